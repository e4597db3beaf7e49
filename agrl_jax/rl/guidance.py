"""Adaptive guided replay: which groups are re-rolled, how much is revealed to them, and what is remembered.

A group whose answers mostly fail teaches nothing: its rewards are alike. Such groups are rolled again
with the first parts of the ground truth forced as a prefix. Level k reveals the first k parts of the
gold response and never the last, so something is always left to the policy:

    level = clip(round(global + offset[row]), 0, P - 1)

`global` moves by eta * (1/2 - guided pass rate): guidance steers to a pass rate of one half, where
groups teach most. `offset` corrects single rows as they are met again. The paper's own trigger and
schedule are not public; this is our reading, and `level="fixed"` and `cap` are there to compare.

Selection works within each data shard, so that no rollout crosses devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from agrl_jax.types import UNKNOWN, Array, Batch, GuidanceState, Reading, Rollout

TARGET_PASS_RATE = 0.5


@dataclass(frozen=True)
class GuidanceConfig:
    """How groups are found, guided and remembered."""

    threshold: float  # a group fails where its share of passing answers is at most this
    capacity: float  # groups guided at most, as a share of the batch
    replace: int  # answers re-rolled in a guided group; the others stay for contrast
    source: str  # gold: the ground truth; own: where that is unknown, a right and consistent answer of the group
    level: str  # adaptive, fixed
    initial_level: float
    eta: float  # step of the adaptive level
    per_family: bool  # one global level for each query family
    cap: str  # none, or linear or cosine: an upper bound that falls to 0 at the end of training


@struct.dataclass
class Selection:
    """The guided groups: `capacity` slots of each data shard. X slots in all, those of a shard together."""

    index: Array  # [shards, X / shards] int32 position of the group within its shard
    chosen: Array  # [shards, X / shards] bool the slot is in use
    unguidable: Array | None = None  # [B] bool the group fails, and there is nothing to reveal to it


def initial_state(num_rows: int, num_families: int, cfg: GuidanceConfig) -> GuidanceState:
    """Nothing met yet, every family at the initial level."""
    return GuidanceState(
        level=jnp.full((num_families if cfg.per_family else 1,), cfg.initial_level, jnp.float32),
        offset=jnp.zeros((num_rows,), jnp.int8),
        memory=jnp.full((num_rows,), UNKNOWN, jnp.int8),
    )


def select(pass_rate: Array, guidable: Array, cfg: GuidanceConfig, shards: int) -> Selection:
    """The failing groups, hardest first, as far as the capacity of each shard goes.

    `pass_rate` [B] share of passing answers, `guidable` [B] bool.
    """
    fails = pass_rate <= cfg.threshold
    wanted = (fails & guidable).reshape(shards, -1)
    slots = int(cfg.capacity * wanted.shape[1])
    hardness = jnp.where(wanted, 1.0 - pass_rate.reshape(shards, -1), -1.0)
    strength, index = jax.lax.top_k(hardness, slots)
    return Selection(index=index, chosen=strength >= 0, unguidable=fails & ~guidable)


def levels(state: GuidanceState, batch: Batch, progress: Array, cfg: GuidanceConfig) -> Array:
    """Parts to reveal, [B] int32 in 0 .. P - 1. `progress` [] in [0, 1] is the share of training done."""
    most = batch.part_end.shape[1] - 1
    level = state.level[batch.family if cfg.per_family else 0]
    if cfg.level == "adaptive":
        level = level + state.offset[batch.row]
    if cfg.cap != "none":
        level = jnp.minimum(level, most * (1 - progress if cfg.cap == "linear" else jnp.cos(progress * jnp.pi / 2)))
    return jnp.clip(jnp.round(level), 0, most).astype(jnp.int32)


def reveal(
    batch: Batch, level: Array, rolled: Rollout, reading: Reading, right: Array, order: tuple[int, ...],
    cfg: GuidanceConfig,
) -> tuple[Array, Array, Array]:
    """The prefix to force on each group: tokens [B, T], their number [B], and whether there is one to give [B].

    Gold where known. With `source="own"`, where the gold response is known for fewer parts than the
    level asks, the prefix of the first of the group's own answers that is `right` [B, G]: rule-consistent
    and of the right tier. A group of which nothing is known and that has no such answer cannot be guided.
    """
    shown = jnp.minimum(level, jnp.minimum(batch.known_parts, batch.part_end.shape[1] - 1))
    gold_len = _length_at(batch.part_end, shown)
    tokens, lengths, available = batch.gold, gold_len, batch.known_parts > 0
    if cfg.source == "own":
        first = jnp.argmax(right, axis=1)
        ends = jnp.take_along_axis(reading.position, first[:, None, None], axis=1)[:, 0][:, jnp.array(order)] + 1
        use_own = jnp.any(right, axis=1) & (batch.known_parts < level)
        own = jnp.take_along_axis(rolled.tokens, first[:, None, None], axis=1)[:, 0]
        tokens = jnp.where(use_own[:, None], own, tokens)
        lengths = jnp.where(use_own, _length_at(ends, level), gold_len)
        available |= jnp.any(right, axis=1)
    return tokens, lengths, available


def _length_at(ends: Array, level: Array) -> Array:
    """Tokens of the first `level` [B] parts, from the running ends [B, P]."""
    padded = jnp.pad(ends, ((0, 0), (1, 0)))
    return jnp.take_along_axis(padded, level[:, None], axis=1)[:, 0]


def update(
    state: GuidanceState, batch: Batch, plain_pass: Array, guided: Array, guided_pass: Array, cfg: GuidanceConfig
) -> GuidanceState:
    """What is remembered after a step.

    `plain_pass` [B]: pass rate of the unguided answers of every group; `guided` [B] bool; `guided_pass`
    [B]: pass rate under guidance, read where guided. A row's offset falls by one where it passes
    unguided and rises by one where it failed even guided.
    """
    shift = TARGET_PASS_RATE - guided_pass
    family = batch.family if cfg.per_family else jnp.zeros_like(batch.family)
    number = jax.ops.segment_sum(guided.astype(jnp.float32), family, state.level.shape[0])
    total = jax.ops.segment_sum(jnp.where(guided, shift, 0.0), family, state.level.shape[0])
    most = batch.part_end.shape[1] - 1
    level = state.level
    if cfg.level == "adaptive":
        level = jnp.clip(level + cfg.eta * total / jnp.maximum(number, 1), 0, most)
    harder = guided & (guided_pass <= cfg.threshold)
    change = harder.astype(jnp.int8) - (plain_pass > cfg.threshold).astype(jnp.int8)
    offset = jnp.clip(state.offset[batch.row] + change, -most, most)
    memory = jnp.where(guided, jnp.round(100 * guided_pass), UNKNOWN).astype(jnp.int8)
    return GuidanceState(
        level=level,
        offset=state.offset.at[batch.row].set(offset),
        memory=state.memory.at[batch.row].set(memory),
    )


def transfer_gap(state: GuidanceState, batch: Batch, plain_pass: Array) -> tuple[Array, Array]:
    """Sum and number, over rows met again since they were guided, of guided less unguided pass rate now."""
    before = state.memory[batch.row]
    met = before != UNKNOWN
    return jnp.sum(jnp.where(met, before / 100 - plain_pass, 0.0)), jnp.sum(met)


# ---------------------------------------------------------------------------------- gather and merge


def gather(tree: object, selection: Selection, axis: int = 0) -> object:
    """The selected groups of arrays with B on `axis`: B becomes X, taken shard by shard."""
    shards, slots = selection.index.shape

    def take(x: Array) -> Array:
        x = jnp.moveaxis(x, axis, 0)
        rows = jax.vmap(lambda rows, index: rows[index])(x.reshape(shards, -1, *x.shape[1:]), selection.index)
        return jnp.moveaxis(rows.reshape(shards * slots, *x.shape[1:]), 0, axis)

    return jax.tree.map(take, tree)


def scatter(into: Array, rows: Array, selection: Selection) -> Array:
    """`into` [B, ...] with the groups in use replaced by `rows` [X, ...], shard by shard."""
    shards, slots = selection.index.shape
    size = into.shape[0] // shards
    index = jnp.where(selection.chosen, selection.index, size)  # out of range where unused: dropped

    def one_shard(into: Array, rows: Array, index: Array) -> Array:
        return into.at[index].set(rows, mode="drop")

    merged = jax.vmap(one_shard)(
        into.reshape(shards, size, *into.shape[1:]), rows.reshape(shards, slots, *rows.shape[1:]), index
    )
    return merged.reshape(into.shape)


def replace_answers(rolled: Rollout, replayed: Rollout, passed: Array, selection: Selection) -> Rollout:
    """`rolled` [B, G, ...] with answers of the guided groups replaced by those of `replayed` [X, replace, ...].

    Failing answers go first, so that a rare right one stays.
    """
    number = replayed.finished.shape[1]
    order = jnp.argsort(gather(passed, selection), axis=1, stable=True)[:, :number]  # [X, replace] answers to replace

    def merge(old: Array, new: Array) -> Array:
        replaced = jax.vmap(lambda rows, at, fresh: rows.at[at].set(fresh))(gather(old, selection), order, new)
        return scatter(old, replaced, selection)

    return jax.tree.map(merge, rolled, replayed)
