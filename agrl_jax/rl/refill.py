"""Dynamic sampling (DAPO, arXiv 2503.14476): groups with equal rewards are dropped, and others rolled in their place.

A step is given more examples than the B that it learns from, and rolls them in rounds of B: until each of B places
holds a group whose rewards differ, or there are no more rounds. A group with equal rewards keeps its place only where
nothing better comes, and has advantage 0. Exchanges stay within each data shard, so that no rollout crosses devices.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from agrl_jax.rl.guidance import Selection, gather, scatter
from agrl_jax.types import Array, Batch, Rollout


@struct.dataclass
class Groups:
    """Examples with their answers."""

    batch: Batch  # [B, ...]
    rolled: Rollout  # [B, G, T]
    teaches: Array  # [B] bool: the rewards of the group differ


def refill(
    first: Groups, rounds: Batch, roll: Callable[[Batch], Groups], shards: int
) -> tuple[Groups, dict[str, Array]]:
    """The groups of the `first` round, those that teach nothing exchanged for better ones of the others, and figures.

    `rounds` [k, B, ...] has the first round in front; the others are rolled only while there is a place for them.
    """

    def more(carry: tuple[Array, Groups, Array]) -> Array:
        done, groups, _ = carry
        return (done < rounds.row.shape[0] - 1) & ~jnp.all(groups.teaches)

    def one_round(carry: tuple[Array, Groups, Array]) -> tuple[Array, Groups, Array]:
        done, groups, tokens = carry
        fresh = roll(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, done + 1, keepdims=False), rounds))
        tokens += jnp.sum(fresh.batch.prompt_len) + jnp.sum(fresh.rolled.valid)
        return done + 1, exchange(groups, fresh, shards), tokens

    done, groups, tokens = jax.lax.while_loop(more, one_round, (jnp.int32(0), first, jnp.int32(0)))
    return groups, {"refill/rounds": done + 1, "tokens/refilled": tokens}


def exchange(groups: Groups, fresh: Groups, shards: int) -> Groups:
    """`groups` where those that teach nothing are replaced by those of `fresh` that do, as far as either go."""
    teaches, better = (x.teaches.reshape(shards, -1) for x in (groups, fresh))
    into, of = jnp.argsort(teaches, axis=1, stable=True), jnp.argsort(~better, axis=1, stable=True)
    worth = ~jnp.take_along_axis(teaches, into, axis=1) & jnp.take_along_axis(better, of, axis=1)
    rows = gather(fresh, Selection(of, worth))
    return jax.tree.map(lambda old, new: scatter(old, new, Selection(into, worth)), groups, rows)
