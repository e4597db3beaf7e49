"""What the decision table says of steps and tiers, on the device."""

from __future__ import annotations

import jax.numpy as jnp

from agrl_jax.types import UNKNOWN, Array, Batch, RuleTables


def is_consistent(steps: Array, tier: Array, tables: RuleTables, book: Array | None = None) -> Array:
    """[...] bool: all steps [..., R] and the tier [...] are stated, and the table gives this tier for these steps.

    With `book` [B] the arrays begin with [B, G], and each example has the table of its own rule book.
    """
    code = jnp.zeros(tier.shape, jnp.int32)
    for index, size in enumerate(tables.num_values):
        code = code * size + jnp.maximum(steps[..., index], 0)
    tier_of = jnp.asarray(tables.tier_of)
    implied = tier_of[0][code] if book is None else tier_of[book[:, None], code]
    return (tier != UNKNOWN) & jnp.all(steps != UNKNOWN, axis=-1) & (implied == tier)


def reachable(steps: Array, batch: Batch, tables: RuleTables) -> Array:
    """[B, G, R] bool: the steps up to this one, of `steps` [B, G, R], are all stated, and with some values of the later
    steps they agree with all that is known of the pair: its tier and its known steps."""
    possible = possible_steps(tables, batch)
    code, stated, found = jnp.zeros(steps.shape[:-1], jnp.int32), jnp.ones(steps.shape[:-1], bool), []
    for r, size in enumerate(tables.num_values):
        code = code * size + jnp.maximum(steps[..., r], 0)
        stated &= steps[..., r] != UNKNOWN
        open_ways = jnp.any(possible, axis=tuple(range(r + 2, possible.ndim))).reshape(len(possible), -1)
        found.append(stated & jnp.take_along_axis(open_ways, code, axis=1))
    return jnp.stack(found, axis=-1)


def possible_steps(tables: RuleTables, batch: Batch) -> Array:
    """[B, values of step 0, ..., values of step R - 1] bool: combinations that agree with what is known."""
    table = jnp.asarray(tables.tier_of)[0 if batch.book is None else batch.book]  # one for all, or [B, ...]
    possible = table.reshape(*table.shape[:-1], *tables.num_values) == jnp.expand_dims(
        batch.tier, tuple(range(1, tables.num_steps + 1))
    )
    for part in range(tables.num_steps):
        possible &= one_value(batch.steps[:, part], part, tables)
    return possible


def one_value(value: Array, part: int, tables: RuleTables) -> Array:
    """bool, ready to broadcast to `possible_steps`: combinations in which step `part` has `value` [B]; all where
    `value` is UNKNOWN."""
    size = tables.num_values[part]
    mask = (jnp.arange(size) == value[:, None]) | (value == UNKNOWN)[:, None]
    return mask.reshape(-1, *(size if axis == part else 1 for axis in range(tables.num_steps)))
