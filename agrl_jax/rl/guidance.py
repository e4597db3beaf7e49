"""Adaptive guided replay: which groups are re-rolled, how much is revealed to them, and what is remembered.

A group whose answers mostly fail teaches little: its rewards are almost equal. Such groups are rolled again
with the first parts of a right response forced as a prefix. Level k asks for the first k parts. It never asks
for the last part, so something is always left to the policy:

    level = clip(round(global + offset[row]), 0, P - 1)
    revealed = min(level, parts that can be shown)

`global` moves by eta * (1/2 - guided pass rate): guidance steers to a pass rate of one half, where
groups teach most. `offset` corrects single rows as they are met again. Neither goes beyond what can be
shown. The paper's own trigger and schedule are not public. This is our reading; `level="fixed"` and
`cap` are there to compare.

The gold response is shown, as far as it is known. With `source="own"`, if the level asks for more than that, the
policy's own latest right answer to the same pair is shown (`reward.is_model_answer`). Such answers are remembered
by training row, since a group that fails now may have none.

Selection works within each data shard, so that no rollout crosses devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from agrl_jax.types import UNKNOWN, Array, Batch, GuidanceState, OwnAnswers, Reading, Rollout

TARGET_PASS_RATE = 0.5


@dataclass(frozen=True)
class GuidanceConfig:
    """How groups are found, guided and remembered."""

    threshold: float  # a group fails where its share of passing answers is at most this
    capacity: float  # groups guided at most, as a share of the batch
    replace: int  # answers of a guided group that are rolled again; the others stay for contrast
    source: str  # gold: the ground truth; own: where that is unknown, the policy's own right answer
    level: str  # adaptive, fixed
    initial_level: float
    eta: float  # step of the adaptive level
    per_family: bool  # one global level for each query family
    cap: str  # none, or linear or cosine: an upper bound that falls to 0 at the end of training


@struct.dataclass
class Selection:
    """The guided groups. Each data shard has the same number of slots; X slots in all, in the order of the shards."""

    index: Array  # [shards, X / shards] int32 position of the group within its shard
    chosen: Array  # [shards, X / shards] bool the slot is in use
    unguidable: Array | None = None  # [B] bool the group fails, and there is nothing to reveal to it


@struct.dataclass
class Revelation:
    """What is shown to each of B groups."""

    tokens: Array  # [B, T] int32
    length: Array  # [B] int32 how many of them are forced
    asked: Array  # [B] int32 the level: parts to reveal
    most: Array  # [B] int32 parts that can be shown; a group with 0 cannot be guided
    shown: Array  # [B] int32 parts that are shown
    gives_tier: Array  # [B] bool the tier is among them


def initial_state(
    num_rows: int, num_families: int, cfg: GuidanceConfig, length: int = 0, parts: int = 0
) -> GuidanceState:
    """No row met yet, every family at the initial level. Own answers have up to `length` tokens and `parts` parts."""
    return GuidanceState(
        level=jnp.full((num_families if cfg.per_family else 1,), cfg.initial_level, jnp.float32),
        offset=jnp.zeros((num_rows,), jnp.int8),
        memory=jnp.full((num_rows,), UNKNOWN, jnp.int8),
        own=None if cfg.source == "gold" else OwnAnswers(
            tokens=jnp.zeros((num_rows, length), jnp.int32), part_end=jnp.zeros((num_rows, parts), jnp.int32)
        ),
    )


def select(pass_rate: Array, guidable: Array, cfg: GuidanceConfig, shards: int) -> Selection:
    """The failing groups that can be guided, hardest first, up to the capacity of each shard.

    `pass_rate` [B] share of passing answers; `guidable` [B] bool: there is something to reveal.
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
    level = state.level[batch.family if cfg.per_family else jnp.zeros_like(batch.family)]
    if cfg.level == "adaptive":
        level = level + state.offset[batch.row]
    if cfg.cap != "none":
        level = jnp.minimum(level, most * (1 - progress if cfg.cap == "linear" else jnp.cos(progress * jnp.pi / 2)))
    return jnp.clip(jnp.round(level), 0, most).astype(jnp.int32)


def remember(
    own: OwnAnswers, batch: Batch, rolled: Rollout, reading: Reading, right: Array, order: tuple[int, ...]
) -> OwnAnswers:
    """`own` with the first answer of each group that is `right` [B, G], in place of the row's older one.

    `order` has the part indices in the order of the response.
    """
    first = jnp.argmax(right, axis=1)
    tokens = jnp.take_along_axis(rolled.tokens, first[:, None, None], axis=1)[:, 0]
    position = jnp.take_along_axis(reading.position, first[:, None, None], axis=1)[:, 0]
    row = jnp.where(jnp.any(right, axis=1), batch.row, own.tokens.shape[0])  # out of range: dropped
    return OwnAnswers(
        tokens=own.tokens.at[row].set(tokens, mode="drop"),
        part_end=own.part_end.at[row].set(position[:, jnp.array(order)] + 1, mode="drop"),
    )


def reveal(batch: Batch, asked: Array, own: OwnAnswers | None, order: tuple[int, ...]) -> Revelation:
    """What to force on each group whose level asks for `asked` [B] parts: gold, or else the row's own answer.

    `order` has the part indices in the order of the response.
    """
    last = batch.part_end.shape[1] - 1
    tokens, part_end, most = batch.gold, batch.part_end, jnp.minimum(batch.known_parts, last)
    if own is not None:
        found = own.part_end[batch.row]
        there = found[:, 0] > 0
        use = (there & (most < asked))[:, None]
        tokens, part_end = jnp.where(use, own.tokens[batch.row], tokens), jnp.where(use, found, part_end)
        most = jnp.where(there, last, most)
    shown = jnp.minimum(asked, most)
    return Revelation(tokens, _length_at(part_end, shown), asked, most, shown, shown > order.index(last))


def _length_at(ends: Array, level: Array) -> Array:
    """Tokens of the first `level` [B] parts, from the running ends [B, P]."""
    padded = jnp.pad(ends, ((0, 0), (1, 0)))
    return jnp.take_along_axis(padded, level[:, None], axis=1)[:, 0]


def update(
    state: GuidanceState, batch: Batch, plain_pass: Array, guided: Array, guided_pass: Array, seen: Revelation,
    cfg: GuidanceConfig,
) -> GuidanceState:
    """The state after a step, apart from own answers.

    `plain_pass` [B] is the pass rate of each group's unguided answers, `guided` [B] bool, `guided_pass` [B] the pass
    rate under guidance (used where guided), `seen` what was revealed.

    A row's offset falls by one where it passes unguided. It rises by one where it failed even under guidance and more
    can be shown. A row that was shown less than the level asked for does not raise the level. The level stays within
    the most that could be shown to any guided row.
    """
    family = batch.family if cfg.per_family else jnp.zeros_like(batch.family)
    families = state.level.shape[0]
    last = batch.part_end.shape[1] - 1
    level = state.level
    if cfg.level == "adaptive":
        shift = TARGET_PASS_RATE - guided_pass
        shift = jnp.where(seen.shown < seen.asked, jnp.minimum(shift, 0.0), shift)
        number = jax.ops.segment_sum(guided.astype(jnp.float32), family, families)
        total = jax.ops.segment_sum(jnp.where(guided, shift, 0.0), family, families)
        reach = jnp.where(guided, seen.most, 0)
        reach = jnp.where(number > 0, jax.ops.segment_max(reach, family, families), last)
        level = jnp.clip(level + cfg.eta * total / jnp.maximum(number, 1), 0, jnp.clip(reach, 0, last))
    harder = guided & (guided_pass <= cfg.threshold) & (seen.shown < seen.most)
    change = harder.astype(jnp.int8) - (plain_pass > cfg.threshold).astype(jnp.int8)
    offset = jnp.clip(state.offset[batch.row] + change, -last, last)
    # Where the tier was given, passing means that the steps are right, which no unguided pass rate compares with.
    memory = jnp.where(guided & ~seen.gives_tier, jnp.round(100 * guided_pass), UNKNOWN).astype(jnp.int8)
    return state.replace(
        level=level,
        offset=state.offset.at[batch.row].set(offset),
        memory=state.memory.at[batch.row].set(memory),
    )


def transfer_gap(state: GuidanceState, batch: Batch, plain_pass: Array) -> tuple[Array, Array]:
    """Guided pass rate then minus unguided pass rate now, mean over the rows that were guided when they were last met
    (NaN without such rows); and the number of these rows."""
    before = state.memory[batch.row]
    met = before != UNKNOWN
    return jnp.mean(before / 100 - plain_pass, where=met), jnp.sum(met)


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

    Failing answers are replaced first, so that a rare right one stays.
    """
    number = replayed.finished.shape[1]
    order = jnp.argsort(gather(passed, selection), axis=1, stable=True)[:, :number]  # [X, replace] answers to replace

    def merge(old: Array, new: Array) -> Array:
        replaced = jax.vmap(lambda rows, at, fresh: rows.at[at].set(fresh))(gather(old, selection), order, new)
        return scatter(old, replaced, selection)

    return jax.tree.map(merge, rolled, replayed)
