"""Sampling by difficulty: examples that the policy answers rightly at times, but not always, are rolled before others.

A step is given `pool` times B examples and rolls B of them. First come those that it may learn from: rows not met
yet, rows whose pass rate lies in the band [low, high], and rows outside it that were last rolled `again` or more steps
ago, since the policy has changed. If these are too few, rows outside the band fill the batch; those that have waited
longest come first. So a batch is always full, and no row is lost: the pool goes through all rows, epoch by epoch.

The pass rate of a row is that of its unguided answers. Each group counts as much as all groups before it:
rate = (rate + pass rate of the group) / 2. The rates are kept in the training state, not in the input pipeline. So the
pipeline's batches depend only on seed and batch number, and a resumed run chooses the same rows.

Rows are chosen within each data shard, so that no example crosses devices. Among equals the first in the pool comes
first; the pool's order is random.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from agrl_jax.rl.guidance import Selection, gather
from agrl_jax.types import UNKNOWN, Array, Batch, DifficultyState


@dataclass(frozen=True)
class DifficultyConfig:
    """The band of pass rates, bounds included, and how rows are chosen by it."""

    pool: int  # examples to choose from, as a multiple of the batch
    low: float
    high: float
    again: int  # steps after which a row outside the band comes back


def initial_state(num_rows: int) -> DifficultyState:
    """No row met yet."""
    return DifficultyState(jnp.full((num_rows,), UNKNOWN, jnp.float32), jnp.zeros((num_rows,), jnp.int32))


def choose(state: DifficultyState, pool: Batch, step: Array, cfg: DifficultyConfig, shards: int) -> tuple[Batch, Array]:
    """The B examples of the `pool` [cfg.pool * B] to roll in this step, and [B] bool whether each is outside the band.
    """
    rate, waited = state.rate[pool.row], step - state.met[pool.row]
    outside = (rate != UNKNOWN) & ((rate < cfg.low) | (rate > cfg.high))
    wanted = ~outside | (waited >= cfg.again)
    patience = jnp.where(wanted, jnp.iinfo(jnp.int32).max, waited).reshape(shards, -1)
    places = patience.shape[1] // cfg.pool
    index = jnp.argsort(patience, axis=1, stable=True, descending=True)[:, :places]
    return gather((pool, outside), Selection(index, jnp.ones(index.shape, bool)))


def remember(state: DifficultyState, batch: Batch, pass_rate: Array, step: Array) -> DifficultyState:
    """The state after a step in which the unguided answers of the batch passed at `pass_rate` [B]."""
    before = state.rate[batch.row]
    rate = jnp.where(before == UNKNOWN, pass_rate, (before + pass_rate) / 2)
    return DifficultyState(state.rate.at[batch.row].set(rate), state.met.at[batch.row].set(step))


def count(state: DifficultyState, cfg: DifficultyConfig) -> dict[str, Array]:
    """How many training rows lie in the band, above and below it, and how many were not met yet."""
    met = state.rate != UNKNOWN
    below, above = met & (state.rate < cfg.low), met & (state.rate > cfg.high)
    return {
        "difficulty/inside": jnp.sum(met & ~below & ~above),
        "difficulty/above": jnp.sum(above),
        "difficulty/below": jnp.sum(below),
        "difficulty/unmet": jnp.sum(~met),
    }
