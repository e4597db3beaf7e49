"""Pairs with unknown steps: the policy fills them in itself, and is not taught what it filled in.

Parts are taken in the order of the response. A part that is known gets its canonical text; for one that is not, the
policy's own likeliest value is taken, among those that the table still allows with the tier and the steps known.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from agrl_jax.data.pipeline import PartTexts
from agrl_jax.policy.scoring import score_parts
from agrl_jax.types import UNKNOWN, Array, Batch, Params, Policy, Prefix, RuleTables


def filled_responses(
    policy: Policy, params: Params, tables: RuleTables, texts: PartTexts, prefix: Prefix, batch: Batch
) -> tuple[Array, Array]:
    """Whole canonical responses [B, T] int32, and which of their tokens [B, T] bool state what is known.

    The end token counts as known. T must have room for the longest canonical response.
    """
    possible = _possible(tables, batch.steps, batch.tier)

    def choose(place: int, logp: Array) -> Array:
        nonlocal possible
        part = tables.order[place]
        if part == tables.num_steps:
            return batch.tier
        others = tuple(axis + 1 for axis in range(tables.num_steps) if axis != part)
        allowed = jnp.any(possible, axis=others)  # [B, values]
        truth = batch.steps[:, part]
        value = jnp.where(truth == UNKNOWN, jnp.argmax(jnp.where(allowed, logp, -jnp.inf), axis=1), truth)
        possible &= _one_value(value, part, tables)
        return value

    values = [value for _, value in score_parts(policy, params, prefix, texts.tokens, texts.length, choose)]
    return _written(tables, texts, batch, values)


def _written(tables: RuleTables, texts: PartTexts, batch: Batch, values: Sequence[Array]) -> tuple[Array, Array]:
    """The response [B, T] that states `values` [B] part by part, and which of its tokens state what is known."""
    sizes, all_texts = jnp.asarray(texts.length), jnp.asarray(texts.tokens)
    place_of = jnp.arange(batch.gold.shape[1])
    tokens = jnp.full(batch.gold.shape, tables.end_token, jnp.int32)
    known = jnp.zeros(batch.gold.shape, bool)
    at = jnp.zeros_like(batch.tier)  # tokens so far
    for place, (part, value) in enumerate(zip(tables.order, values, strict=True)):
        truth = batch.steps[:, part] if part < tables.num_steps else batch.tier
        inside = place_of - at[:, None]  # [B, T] place within the text of this part
        size = sizes[place, value]
        here = (inside >= 0) & (inside < size[:, None])
        text = jnp.take_along_axis(all_texts[place, value], jnp.clip(inside, 0, all_texts.shape[2] - 1), axis=1)
        tokens = jnp.where(here, text, tokens)
        known |= here & (truth != UNKNOWN)[:, None]
        at += size
    return tokens, known | (place_of == at[:, None])


def tokens_scored(tables: RuleTables, texts: PartTexts, batch: Batch) -> Array:
    """How many tokens [] are scored to fill in the unknown steps: the texts of all values of each."""
    sizes = jnp.asarray(texts.length.sum(axis=1))[jnp.argsort(jnp.asarray(tables.order))]  # of each part
    return jnp.sum((batch.steps == UNKNOWN) * sizes[: tables.num_steps])


def _possible(tables: RuleTables, steps: Array, tier: Array) -> Array:
    """[B, values of step 0, ..., values of step R - 1] bool: combinations that agree with what is known."""
    possible = jnp.asarray(tables.tier_of).reshape(tables.num_values) == jnp.expand_dims(
        tier, tuple(range(1, tables.num_steps + 1))
    )
    for part in range(tables.num_steps):
        possible &= _one_value(steps[:, part], part, tables)
    return possible


def _one_value(value: Array, part: int, tables: RuleTables) -> Array:
    """Of `value` [B] of a step: all combinations with it, or all where it is UNKNOWN; ready to broadcast."""
    size = tables.num_values[part]
    mask = (jnp.arange(size) == value[:, None]) | (value == UNKNOWN)[:, None]
    return mask.reshape(-1, *(size if axis == part else 1 for axis in range(tables.num_steps)))
