"""Pairs with unknown steps: the policy fills these in itself, and is not taught what it filled in.

Parts are written in the order of the response. A known part gets its canonical text, after its reason if there is one.
An unknown part gets the value that the policy finds likeliest among those that the decision table still allows, given
the tier and the known steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from agrl_jax.data.pipeline import PartTexts
from agrl_jax.policy.scoring import score_parts
from agrl_jax.supervised.marginal import Forks
from agrl_jax.types import UNKNOWN, Array, Batch, Params, Policy, Prefix, RuleTables


class Blanks(NamedTuple):
    """What the policy needs to fill in unknown steps."""

    tables: RuleTables  # of the rule book
    texts: PartTexts  # of its parts
    forks: Forks | None = None  # where the texts of a part differ; if given, the loss is that of `marginal`


class Filled(NamedTuple):
    """Whole responses, made of canonical texts and the reasons that are known."""

    tokens: Array  # [B, T] int32
    known: Array  # [B, T] bool the tokens that state what is known, reasons and end token included
    starts: Array  # [B, P] int32 tokens before the statement of each part, parts in the order of the response
    reasons: Array  # [B, T] bool the tokens that give reasons


def filled_responses(
    policy: Policy, params: Params, tables: RuleTables, texts: PartTexts, prefix: Prefix, batch: Batch
) -> Filled:
    """The labels as whole responses. T must have room for the longest canonical one."""
    possible = possible_steps(tables, batch)

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

    before = None if batch.reason is None else (batch.reason, batch.reason_len)
    values = [value for _, value in score_parts(policy, params, prefix, texts.tokens, texts.length, choose, before)]
    return _written(tables, texts, batch, values)


def _written(tables: RuleTables, texts: PartTexts, batch: Batch, values: Sequence[Array]) -> Filled:
    """The responses that state `values`, an array [B] for each part in the order of the response."""
    sizes, all_texts = jnp.asarray(texts.length), jnp.asarray(texts.tokens)
    place_of = jnp.arange(batch.gold.shape[1])
    tokens = jnp.full(batch.gold.shape, tables.end_token, jnp.int32)
    known, reasons = jnp.zeros(batch.gold.shape, bool), jnp.zeros(batch.gold.shape, bool)
    at, starts = jnp.zeros_like(batch.tier), []  # tokens so far

    def write(text: Array, size: Array) -> Array:
        """Appends the first `size` [B] tokens of `text` [B, W]. Returns where they are, [B, T] bool."""
        nonlocal tokens, at
        inside = place_of - at[:, None]
        here = (inside >= 0) & (inside < size[:, None])
        tokens = jnp.where(here, jnp.take_along_axis(text, jnp.clip(inside, 0, text.shape[1] - 1), axis=1), tokens)
        at += size
        return here

    for place, (part, value) in enumerate(zip(tables.order, values, strict=True)):
        truth = batch.steps[:, part] if part < tables.num_steps else batch.tier
        if batch.reason is not None:
            reasons |= write(batch.reason[:, place], batch.reason_len[:, place])
        starts.append(at)
        known |= write(all_texts[place, value], sizes[place, value]) & (truth != UNKNOWN)[:, None]
    return Filled(tokens, known | reasons | (place_of == at[:, None]), jnp.stack(starts, axis=1), reasons)


def tokens_scored(tables: RuleTables, texts: PartTexts, batch: Batch) -> Array:
    """How many tokens [] are scored to fill in unknown steps: for each of these, the texts of all its values."""
    sizes = jnp.asarray(texts.length.sum(axis=1))[jnp.argsort(jnp.asarray(tables.order))]  # of each part
    return jnp.sum((batch.steps == UNKNOWN) * sizes[: tables.num_steps])


def tokens_learnt(blanks: Blanks, batch: Batch) -> Array:
    """How many tokens [] of the filled responses are learnt: known parts, reasons and end tokens. With `forks`, the
    steps of a pair with any unknown step are not counted."""
    sizes = jnp.asarray(blanks.texts.length)
    total = 1 if batch.reason is None else 1 + jnp.sum(batch.reason_len, axis=1)
    whole = jnp.all(batch.steps != UNKNOWN, axis=1) | (blanks.forks is None)
    for place, part in enumerate(blanks.tables.order):
        is_step = part < blanks.tables.num_steps
        truth = batch.steps[:, part] if is_step else batch.tier
        learnt = (truth != UNKNOWN) & (whole | (not is_step))
        total += jnp.where(learnt, sizes[place, truth], 0)
    return jnp.sum(total)


def possible_steps(tables: RuleTables, batch: Batch) -> Array:
    """[B, values of step 0, ..., values of step R - 1] bool: combinations that agree with what is known."""
    table = jnp.asarray(tables.tier_of)[0 if batch.book is None else batch.book]  # one for all, or [B, ...]
    possible = table.reshape(*table.shape[:-1], *tables.num_values) == jnp.expand_dims(
        batch.tier, tuple(range(1, tables.num_steps + 1))
    )
    for part in range(tables.num_steps):
        possible &= _one_value(batch.steps[:, part], part, tables)
    return possible


def _one_value(value: Array, part: int, tables: RuleTables) -> Array:
    """bool, ready to broadcast to `possible_steps`: combinations in which step `part` has `value` [B]; all where
    `value` is UNKNOWN."""
    size = tables.num_values[part]
    mask = (jnp.arange(size) == value[:, None]) | (value == UNKNOWN)[:, None]
    return mask.reshape(-1, *(size if axis == part else 1 for axis in range(tables.num_steps)))
