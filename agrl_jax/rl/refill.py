"""Dynamic sampling (DAPO, arXiv 2503.14476): groups with equal rewards are dropped, and others rolled in their place.

A step learns from B groups, but is given more examples. It rolls them in rounds of B until each of the B places holds
a group whose rewards differ, or until there are no more rounds. A group with equal rewards stays only where no better
one is found, and has advantage 0. Exchanges stay within each data shard, so that no rollout crosses devices.
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
    """The groups of the `first` round, with those that teach nothing replaced by groups of later rounds; and figures.

    `rounds` [k, B, ...] begins with the first round. Others are rolled only while some group teaches nothing.
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
    """`groups`, where groups that teach nothing are replaced by those of `fresh` that do, as many as there are of both.
    """
    teaches, better = (x.teaches.reshape(shards, -1) for x in (groups, fresh))
    into, of = jnp.argsort(teaches, axis=1, stable=True), jnp.argsort(~better, axis=1, stable=True)
    worth = ~jnp.take_along_axis(teaches, into, axis=1) & jnp.take_along_axis(better, of, axis=1)
    rows = gather(fresh, Selection(of, worth))
    return jax.tree.map(lambda old, new: scatter(old, new, Selection(into, worth)), groups, rows)
