"""Attention over instructions, prompt and own tokens whose scores are never held: a softmax that runs over blocks.

The algorithm is FlashAttention's (arXiv 2205.14135, 2307.08691), in plain JAX. Forward, each block of queries goes
through the blocks of keys, and keeps the peak of its scores so far, the sum of their exponentials and the mixture of
values. Of each segment this leaves an output and the logarithm of that sum (log-sum-exp), by which segments are merged.
For the gradient nothing is kept but the merged output and log-sum-exp of each query: they give back the share of every
key, block by block. So memory grows with the number of tokens, not with its square.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from agrl_jax.policy import tpu_attention
from agrl_jax.types import Array

LONG = 1024  # keys of a query from which `auto` goes through them in blocks
BLOCK = 512  # queries and keys of a block at most
_MASKED = -1e30  # finite, as in `attention`
_SMALLEST = 128  # a matrix unit's width
_SCORES = 2**26  # of all heads and examples in a block at most, where blocks are not the smallest: 256 MiB
_QUERY = "bgkqn"  # axes of queries: example, answer, key head, query head of it, token


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segment:
    """Keys and values that all queries share which agree in `axes`, and which of them each query sees."""

    k: Array  # [*axes, t, F]
    v: Array  # [*axes, t, F]
    last: Array  # [B or 1, n] the last key that a query sees; -1: none
    first: Array | None  # [B or 1, n] the first; None: it is the first of all
    axes: str = dataclasses.field(metadata={"static": True})  # "bgk": each answer's own; "bk": a group's; "k": all's
    causal: bool = dataclasses.field(default=False, metadata={"static": True})  # no query sees a key later than itself

    @property
    def simple(self) -> bool:
        """Whether queries see the keys up to themselves, or else all those that there are for their example."""
        return self.first is None and (self.causal or "g" not in self.axes)


def segments(
    tokens: int, k: Array, v: Array, offset: Array | None = None, prompt_k: Array | None = None,
    prompt_v: Array | None = None, length: Array | None = None, shared_k: Array | None = None,
    shared_v: Array | None = None, reach: Array | None = None,
) -> tuple[Segment, ...]:
    """What `tokens` queries at slots offset + i (by default the slots of the keys) see: of k, v [B, G, K, t, F] the
    slots up to their own, of the prompt's [B, K, S, F] those before `length` [B], and all of the instructions'
    [K, I, F]; of all these, only what stands less than `reach` tokens before them."""
    slot = (jnp.arange(tokens) + (0 if offset is None else offset))[None]
    length = jnp.zeros(1, jnp.int32) if length is None else length
    place = length[:, None] + slot  # after the instructions

    def segment(axes: str, k: Array, v: Array, last: Array, at: Array, causal: bool = False) -> Segment:
        """`at` is the queries' place, counted from the first key."""
        return Segment(k, v, jnp.broadcast_to(last, at.shape), None if reach is None else at - reach + 1, axes, causal)

    found = [segment("bgk", k, v, slot, slot, causal=offset is None)]
    if prompt_k is not None:
        found.append(segment("bk", prompt_k, prompt_v, length[:, None] - 1, place))
    if shared_k is not None:
        number = shared_k.shape[1]
        found.append(segment("k", shared_k, shared_v, jnp.full((1, 1), number - 1), place + number))
    return tuple(segment for segment in found if segment.k.shape[-2])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend(q: Array, segments: tuple[Segment, ...], block: int, kernel: bool = False) -> Array:
    """Attention of scaled queries [B, G, K, Q, n, F], in that shape and in the dtype of the values.

    Q query heads share each of the K key heads; F is the size of a head. Each query must see a key of some segment.
    Products are of the operands' dtype, summed in float32, as is all that lies between them. `block` bounds the queries
    and the keys of a block. With `kernel`, TPUs go through the segments for which it can be used by JAX's own kernel.
    """
    return _attend_forward(q, segments, block, kernel)[0]


def _attend_forward(q: Array, segments: tuple[Segment, ...], block: int, kernel: bool) -> tuple[Array, tuple]:
    # What queries see is known before any layer runs. Behind a barrier with queries it is worked out block by block all
    # the same; rematerialisation would keep it for all pairs of blocks.
    rows, behind = jax.lax.optimization_barrier((q, segments))
    parts = []
    for segment in behind:
        plain, by_kernel = (partial(function, block=block) for function in (_forward, _forward_by_kernel))
        if kernel and segment.simple and tpu_attention.supports(q.dtype, q.shape[-1]):
            parts.append(jax.lax.platform_dependent(rows, segment, tpu=by_kernel, default=plain))
        else:
            parts.append(plain(rows, segment))
    lse = functools.reduce(jnp.logaddexp, (lse for _, lse in parts))
    mixed = sum(jnp.exp(own - lse)[..., None] * part for part, own in parts).astype(segments[0].v.dtype)
    return mixed, (q, segments, mixed, lse)


def _attend_backward(block: int, kernel: bool, kept: tuple, slope: Array) -> tuple[Array, tuple[Segment, ...]]:
    """With the log-sum-exp of all segments, and with the product of output and slope, each segment's part is apart."""
    q, segments, mixed, lse = kept
    dot = jnp.sum(slope.astype(jnp.float32) * mixed, axis=-1)
    parts = [_backward(q, segment, slope, lse, dot, block) for segment in segments]
    of_segments = (
        dataclasses.replace(segment, k=k.astype(segment.k.dtype), v=v.astype(segment.v.dtype), last=None, first=None)
        for segment, (_, k, v) in zip(segments, parts, strict=True)
    )
    return sum(of_q for of_q, _, _ in parts).astype(q.dtype), tuple(of_segments)


attend.defvjp(_attend_forward, _attend_backward)


# ------------------------------------------------ one segment, as Z matrices of keys, with N rows of queries each


class _Blocks:
    """One segment's keys [Z, t, F] and the range [Z, N] that each of its queries sees, padded to whole blocks."""

    def __init__(self, shape: tuple[int, ...], segment: Segment, block: int):
        self.shape, self.axes = shape[:-1], segment.axes
        self.alike = math.prod(shape[_QUERY.index(axis)] for axis in "bgkq" if axis not in segment.axes)  # per token
        z, t = math.prod(segment.k.shape[:-2]), segment.k.shape[-2]
        while block > _SMALLEST and z * block**2 > _SCORES:
            block //= 2
        self.rows, self.keys = min(block, self.alike * shape[4]), min(block, t)
        self.k, self.v = (tpu_attention.padded(x.reshape(z, t, -1), self.keys, 1) for x in (segment.k, segment.v))
        self.last, self.first = (self._seen(x) for x in (segment.last, segment.first))
        self.causal = segment.causal

    def _seen(self, x: Array | None) -> Array | None:
        return None if x is None else self.of_queries(jnp.broadcast_to(x[:, None, None, None], self.shape))

    def of_queries(self, x: Array) -> Array:
        """[B, G, K, Q, n, ...] as [Z, N, ...]: rows of one token stand together."""
        order = [_QUERY.index(axis) for axis in self._order]
        turned = x.transpose(*order, *range(len(order), x.ndim))
        return tpu_attention.padded(turned.reshape(len(self.k), -1, *x.shape[len(order) :]), self.rows, 1)

    def to_queries(self, x: Array) -> Array:
        """The reverse of `of_queries`."""
        sizes = [self.shape[_QUERY.index(axis)] for axis in self._order]
        rows = x[:, : self.alike * self.shape[4]].reshape(*sizes, *x.shape[2:])
        return rows.transpose(*map(self._order.index, _QUERY), *range(len(sizes), rows.ndim))

    @property
    def _order(self) -> str:
        return self.axes + "n" + "".join(axis for axis in "bgkq" if axis not in self.axes)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """The numbers of all blocks of queries and of keys that may see one another."""
        for i in range(self.last.shape[1] // self.rows):
            latest = ((i + 1) * self.rows - 1) // self.alike
            for j in range(self.k.shape[1] // self.keys):
                if not self.causal or j * self.keys <= latest:
                    yield i, j

    def scores(self, q: Array, i: Array, j: Array) -> Array:
        """[Z, rows, keys] float32 of one pair."""
        score = _product("zif,zjf->zij", self.query(q, i), self.key(self.k, j))
        number = j * self.keys + jnp.arange(self.keys)
        visible = number <= self.query(self.last, i)[..., None]
        if self.first is not None:
            visible &= number >= self.query(self.first, i)[..., None]
        return jnp.where(visible, score, _MASKED)

    def query(self, x: Array, i: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, i * self.rows, self.rows, axis=1)

    def key(self, x: Array, j: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, j * self.keys, self.keys, axis=1)


def _product(spec: str, x: Array, y: Array) -> Array:
    """In the dtype of y, summed in float32."""
    return jnp.einsum(spec, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _put(x: Array, block: Array, number: Array) -> Array:
    """x [Z, N, ...] with its block of that number replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, block, number * block.shape[1], axis=1)


Sums = tuple[Array, Array, Array]  # what a loop over blocks carries


def _over_pairs(blocks: _Blocks, step: Callable[[Sums, Array, Array], Sums], carry: Sums) -> Sums:
    """`step(carry, i, j)` for all pairs: one loop, whose length the compiler and preflight know."""
    pairs = np.array(list(blocks.pairs()), np.int32)
    return jax.lax.scan(lambda carry, pair: (step(carry, *pair), None), carry, pairs)[0]


def _forward(q: Array, segment: Segment, block: int) -> tuple[Array, Array]:
    """The output [B, G, K, Q, n, F] over one segment, and the log-sum-exp [B, G, K, Q, n]; both float32."""
    blocks = _Blocks(q.shape, segment, block)
    rows = blocks.of_queries(q)

    def step(carry: Sums, i: Array, j: Array) -> Sums:
        peak, total, mixed = (blocks.query(x, i) for x in carry)
        scores = blocks.scores(rows, i, j)
        higher = jnp.maximum(peak, jnp.max(scores, axis=-1))
        share, kept = jnp.exp(scores - higher[..., None]), jnp.exp(peak - higher)
        total = kept * total + jnp.sum(share, axis=-1)
        mixed = kept[..., None] * mixed + _product("zij,zjf->zif", share, blocks.key(blocks.v, j))
        return tuple(_put(x, new, i) for x, new in zip(carry, (higher, total, mixed), strict=True))

    empty = jnp.full(rows.shape[:2], _MASKED), jnp.zeros(rows.shape[:2]), jnp.zeros(rows.shape)
    peak, total, mixed = _over_pairs(blocks, step, empty)
    return blocks.to_queries(mixed / total[..., None]), blocks.to_queries(peak + jnp.log(total))


def _forward_by_kernel(q: Array, segment: Segment, block: int) -> tuple[Array, Array]:
    """`_forward` on a TPU; the kernel rounds its output to the dtype of q."""
    if segment.causal:
        rows, of_z = q.reshape(-1, *q.shape[3:]), (x.reshape(-1, *x.shape[3:]) for x in (segment.k, segment.v))
        mixed, lse = tpu_attention.forward(rows, *of_z, None, block)
        return mixed.reshape(q.shape).astype(jnp.float32), lse.reshape(q.shape[:-1])
    blocks, examples = _Blocks(q.shape, segment, block), len(segment.last) if "b" in segment.axes else 1
    size = jnp.broadcast_to(segment.last[:examples, :1] + 1, (examples, q.shape[2])).reshape(-1)
    of_z = (x.reshape(len(size), *x.shape[-2:]) for x in (segment.k, segment.v))
    mixed, lse = tpu_attention.forward(blocks.of_queries(q)[:, None], *of_z, size, block)
    return blocks.to_queries(mixed[:, 0]).astype(jnp.float32), blocks.to_queries(lse[:, 0])


def _backward(q: Array, segment: Segment, slope: Array, lse: Array, dot: Array, block: int) -> Sums:
    """The gradients of queries, keys and values through one segment, float32 in their shapes; `lse` is that of all
    segments, `dot` the output's product with its slope."""
    blocks = _Blocks(q.shape, segment, block)
    rows, slope, lse, dot = map(blocks.of_queries, (q, slope, lse, dot))

    def step(carry: Sums, i: Array, j: Array) -> Sums:
        of_q, of_k, of_v = carry
        share = jnp.exp(blocks.scores(rows, i, j) - blocks.query(lse, i)[..., None])
        into = blocks.query(slope, i).astype(blocks.v.dtype)
        of_share = _product("zif,zjf->zij", into, blocks.key(blocks.v, j))
        of_score = share * (of_share - blocks.query(dot, i)[..., None])
        from_q = _product("zij,zjf->zif", of_score, blocks.key(blocks.k, j))
        from_k = _product("zij,zif->zjf", of_score, blocks.query(rows, i))
        from_v = _product("zij,zif->zjf", share, into)
        of_q = _put(of_q, blocks.query(of_q, i) + from_q, i)
        of_k, of_v = (_put(x, blocks.key(x, j) + new, j) for x, new in ((of_k, from_k), (of_v, from_v)))
        return of_q, of_k, of_v

    zeros = tuple(jnp.zeros(x.shape) for x in (rows, blocks.k, blocks.v))
    of_q, of_k, of_v = _over_pairs(blocks, step, zeros)
    of_keys = (x[:, : segment.k.shape[-2]].reshape(segment.k.shape) for x in (of_k, of_v))
    return blocks.to_queries(of_q), *of_keys
