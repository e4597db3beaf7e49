"""Attention over one segment on a TPU, by the splash kernel that comes with JAX: its output, and its log-sum-exp.

It takes the place of the forward loop of `blockwise_attention`, which merges segments and goes back through them. The
kernel keeps the scores of a block on the chip, and leaves out blocks of keys that no query of the block sees.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from agrl_jax.types import Array

_LANES = 128  # blocks and heads are of multiples of it


def supports(dtype: Any, head_dim: int) -> bool:
    """Whether the kernel can be used: for arithmetic in bfloat16, and heads that fill the lanes of a register."""
    return jnp.dtype(dtype) == jnp.bfloat16 and head_dim % _LANES == 0


def forward(
    q: Array, k: Array, v: Array, size: Array | None, block: int, interpret: bool = False
) -> tuple[Array, Array]:
    """Attends from scaled queries q [Z, heads, N, F] to keys k [Z, t, F] and values v of all these heads.

    A query sees the keys before `size` [Z]; or, where that is None, those up to its own number. Returns the output
    [Z, heads, N, F] in the dtype of q, and the log-sum-exp [Z, heads, N] float32. `block` bounds the queries and keys
    of a block. `interpret` runs it anywhere, slowly.
    """
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[1]
    blocks = [min(block, -(-number // _LANES) * _LANES) for number in (rows, keys)]
    q, (k, v) = padded(q, blocks[0], 2), (padded(x, blocks[1], 1) for x in (k, v))
    shape = q.shape[2], k.shape[1]
    mask = splash.CausalMask(shape) if size is None else splash.FullMask(shape)
    run = splash.make_splash_mqa(
        splash.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, save_residuals=True, interpret=interpret,
        block_sizes=splash.BlockSizes(block_q=blocks[0], block_kv=blocks[1], block_kv_compute=blocks[1]),
    )  # fmt: skip
    if size is None:
        mixed, (lse,) = jax.vmap(run)(q, k, v)
    else:
        there = (jnp.arange(shape[1]) < size[:, None]).astype(jnp.int32)
        mixed, (lse,) = jax.vmap(partial(_among, run))(q, k, v, there)
    return mixed[:, :, :rows], lse[:, :, :rows]


def _among(run: Any, q: Array, k: Array, v: Array, there: Array) -> Any:
    """The kernel over the keys that are there [t]."""
    return run(q, k, v, splash.SegmentIds(q=jnp.ones(q.shape[1], jnp.int32), kv=there))


def padded(x: Array, block: int, axis: int) -> Array:
    """x with zeros along an axis, up to whole blocks."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, pad)
