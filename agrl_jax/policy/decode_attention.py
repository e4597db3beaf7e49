"""Attention of one new token over instructions, its group's prompt and its own response, as one GPU kernel (Pallas).

Without this kernel, a layer of decoding launches a dozen small kernels of products and sums, which read the keys and
values at a fraction of the memory's rate. Here a program handles some answers of one group and the query heads of one
key head: it reads the keys and values of instructions and prompt once for all of these, then those of each answer, and
keeps a running softmax (arXiv 2205.14135), so that no score goes through memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from agrl_jax.types import Array

_ROWS = 16  # queries of a program at least: the least that a product in Triton takes
_BLOCK = 64  # keys read at once; 32 or 128 are slower on an H100, as are more rows or warps
_MASKED = -1e30

Carry = tuple[Array, Array, Array]  # peak [rows], sum of exponentials [rows], mixed values [rows, F]


def supports(dtype: Any, head_dim: int) -> bool:
    """Whether the kernel can be used: for arithmetic in bfloat16, and heads of a power of two."""
    return jnp.dtype(dtype) == jnp.bfloat16 and head_dim >= 16 and head_dim & (head_dim - 1) == 0


def decode_attention(
    q: Array, k: Array, v: Array, offset: Array, prefix_k: Array, prefix_v: Array, length: Array,
    shared_k: Array | None = None, shared_v: Array | None = None, interpret: bool = False,
) -> Array:
    """Attends from scaled queries q [B, G, K, Q, F] to the prompt's keys [B, K, S, F] before `length` [B], the
    answers' own k [B, G, K, T, F] up to `offset` [], and the instructions' [K, I, F] where there are any. Returns
    [B, G, K, Q, F] in the dtype of `v`.

    Q query heads share each of the K key heads; F is the size of a head. `interpret` runs it anywhere, slowly.
    """
    b, g, kv_heads, heads, f = q.shape
    padded = pl.next_power_of_2(heads)
    answers = max(1, _ROWS // padded)  # of a program
    rows, blocks = answers * padded, pl.cdiv(g, answers)
    q = jnp.pad(q, [(0, 0), (0, blocks * answers - g), (0, 0), (0, padded - heads), (0, 0)])
    q = q.swapaxes(1, 2).reshape(b, kv_heads, blocks * rows, f)
    queries = pl.BlockSpec((None, None, rows, f), lambda i, j, n: (i, j, n, 0))
    prompt = pl.BlockSpec((None, None, prefix_k.shape[2], f), lambda i, j, n: (i, j, 0, 0))
    own = pl.BlockSpec((None, g, None, k.shape[3], f), lambda i, j, n: (i, 0, j, 0, 0))
    shared = () if shared_k is None else (shared_k, shared_v)
    instructions = [pl.BlockSpec((None, x.shape[1], f), lambda i, j, n: (j, 0, 0)) for x in shared]
    mixed = pl.pallas_call(
        partial(_attend, answers=answers, group=g),
        grid=(b, kv_heads, blocks),
        in_specs=[pl.BlockSpec((1,), lambda i, j, n: (i,)), pl.BlockSpec((1,), lambda i, j, n: (0,)),
                  queries, prompt, prompt, own, own, *instructions],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, v.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(length, jnp.reshape(offset, 1), q, prefix_k, prefix_v, k, v, *shared)  # fmt: skip
    mixed = mixed.reshape(b, kv_heads, blocks * answers, padded, f).swapaxes(1, 2)
    return mixed[:, :g, :, :heads]


def _attend(
    length: Any, offset: Any, q: Any, prefix_k: Any, prefix_v: Any, k: Any, v: Any, *more: Any, answers: int,
    group: int,
) -> None:
    """One program: the rows of q [rows, F] are `answers` answers of the group, each with as many query heads."""
    *shared, out = more
    queries = q[...]
    rows, f = queries.shape
    row_answer = jnp.arange(rows) // (rows // answers)
    seen = offset[0] + 1

    def attend(carry: Carry, keys: Array, values: Array, visible: Array) -> Carry:
        peak, total, mixed = carry
        scores = jnp.where(visible, _product(queries, keys, 1), _MASKED)
        higher = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights = jnp.where(visible, jnp.exp(scores - higher[:, None]), 0.0)
        kept = jnp.exp(peak - higher)
        added = _product(weights.astype(values.dtype), values, 0)
        return higher, kept * total + jnp.sum(weights, axis=1), kept[:, None] * mixed + added

    def in_common(i: Array, carry: Carry, keys: Any, values: Any, number: Array | int) -> Carry:
        at = i * _BLOCK + jnp.arange(_BLOCK)
        index = jnp.minimum(at, keys.shape[0] - 1)
        visible = jnp.broadcast_to((at < number)[None], (rows, _BLOCK))
        return attend(carry, keys[index, :], values[index, :], visible)

    carry = jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros((rows, f))
    common = [(*shared, shared[0].shape[0])] if shared else []
    for keys, values, number in (*common, (prefix_k, prefix_v, length[0])):
        step = partial(in_common, keys=keys, values=values, number=number)
        carry = jax.lax.fori_loop(0, pl.cdiv(number, _BLOCK), step, carry)
    for number in range(answers):
        answer = jnp.minimum(pl.program_id(2) * answers + number, group - 1)  # rows past the group are dropped

        def in_answer(i: Array, carry: Carry, number: int = number, answer: Array = answer) -> Carry:
            at = i * _BLOCK + jnp.arange(_BLOCK)
            index = jnp.minimum(at, k.shape[1] - 1)
            visible = (at < seen)[None] & (row_answer == number)[:, None]
            return attend(carry, k[answer, index, :], v[answer, index, :], visible)

        carry = jax.lax.fori_loop(0, pl.cdiv(seen, _BLOCK), in_answer, carry)
    _, total, mixed = carry
    out[...] = (mixed / total[:, None]).astype(out.dtype)


def _product(x: Array, y: Array, over: int) -> Array:
    """x [rows, n] times y over its axis `over`, in float32."""
    return jax.lax.dot_general(x, y, (((1,), (over,)), ((), ())), preferred_element_type=jnp.float32)
