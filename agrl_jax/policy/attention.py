"""Grouped-query attention with rotary positions, over instructions, a prompt and the tokens of its answers."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agrl_jax.policy import blockwise_attention, decode_attention
from agrl_jax.policy.layers import KEYS, PolicyConfig, cast, linear, norm_weight, param, rms_norm
from agrl_jax.policy.products import einsum
from agrl_jax.types import Array, Instructions, Placement

_MASKED = -1e30  # finite: a query that sees no key then yields a mean of the values, never a NaN


def rope_frequencies(cfg: PolicyConfig) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, [head_dim / 2] float32, and the factor on queries and keys.

    The operations come in the same order as in `transformers`. In another order, the last bit of a frequency can
    differ, and at position 10,000 this turns the pair by another 6e-4 radians.
    """
    exponent = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    frequency = np.float32(1) / (np.float64(cfg.rope_theta) ** exponent.astype(np.float64)).astype(np.float32)
    scaling = cfg.rope_scaling
    if scaling is None:
        return frequency, 1.0
    divided = frequency / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return divided, 1.0
    if scaling.kind == "llama3":
        turns = scaling.original / (2 * np.pi / frequency)
        keep = np.clip((turns - scaling.low_freq) / (scaling.high_freq - scaling.low_freq), 0, 1)
    else:
        ends = [
            cfg.head_dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        ]
        if scaling.truncate:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], cfg.head_dim - 1)
        keep = 1 - np.clip((np.arange(cfg.head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return (divided * (1 - keep) + frequency * keep).astype(np.float32), scaling.attention


def rotate(x: Array, positions: Array, frequency: np.ndarray | Array, scale: float = 1.0) -> Array:
    """Rotary position embedding (arXiv 2104.09864). As in Llama, entry i of a head is paired with i + head_dim / 2.

    `x` is [B, G, n, heads, head_dim], `positions` [B, 1 or G, n], `frequency` [head_dim / 2].
    """
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = scale * jnp.cos(angle), scale * jnp.sin(angle)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def scaled(q: Array, dim: int) -> Array:
    """Queries divided by the root of `dim`, in float32: the factor in bfloat16 would be off by 1e-3."""
    return (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)


class Attention(nnx.Module):
    """Grouped-query attention over the shared instructions, the shared prompt and the answer's own tokens."""

    def __init__(self, cfg: PolicyConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        d, h, k, f, dtype = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.param_dtype
        out_scale = (h * f) ** -0.5 * (2 * cfg.layers) ** -0.5  # the residual's variance does not grow with depth
        self.q = param(rngs, (d, h, f), ("embed", "heads", "head_dim"), d**-0.5, dtype)
        self.k = param(rngs, (d, k, f), ("embed", "kv_heads", "head_dim"), d**-0.5, dtype)
        self.v = param(rngs, (d, k, f), ("embed", "kv_heads", "head_dim"), d**-0.5, dtype)
        self.out = param(rngs, (h, f, d), ("heads", "head_dim", "embed"), out_scale, dtype)
        if cfg.bias:
            self.q_bias = nnx.Param(jnp.zeros((h, f), dtype), axes=("heads", "head_dim"))
            self.k_bias = nnx.Param(jnp.zeros((k, f), dtype), axes=("kv_heads", "head_dim"))
            self.v_bias = nnx.Param(jnp.zeros((k, f), dtype), axes=("kv_heads", "head_dim"))
        if cfg.qk_norm:
            self.q_norm = norm_weight(cfg, (f,), ("head_dim",))
            self.k_norm = norm_weight(cfg, (f,), ("head_dim",))
        elif cfg.qk_norm_whole:
            self.q_norm = norm_weight(cfg, (h, f), ("heads", "head_dim"))
            self.k_norm = norm_weight(cfg, (k, f), ("kv_heads", "head_dim"))

    def project(self, x: Array, positions: Array, is_global: Array | bool) -> tuple[Array, Array, Array]:
        """Queries [B, G, n, H, head_dim], keys and values [B, G, K, n, head_dim], from x [B, G, n, D].

        Queries and keys are rotated with the frequencies of a global layer or of a local one. Keys and values have
        the order of axes in which attention reads them, so that no step of decoding transposes the cache.
        """
        cfg, dtype = self.cfg, x.dtype
        q, k, v = (linear(x, cast(weight, dtype)) for weight in (self.q, self.k, self.v))
        if cfg.bias:
            q, k, v = (
                y + b[...].astype(dtype)
                for y, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            )
        if cfg.qk_norm or cfg.qk_norm_whole:
            q, k = rms_norm(cfg, q, self.q_norm[...]), rms_norm(cfg, k, self.k_norm[...])
        rope = rope_frequencies(cfg)
        if cfg.window:  # PolicyConfig refuses a scaling of queries and keys here, so the factor is 1 in both kinds
            local = dataclasses.replace(cfg, rope_theta=cfg.local_rope_theta, rope_scaling=None)
            rope = jnp.where(is_global, rope[0], rope_frequencies(local)[0]), 1.0
        return rotate(q, positions, *rope), rotate(k, positions, *rope).swapaxes(2, 3), v.swapaxes(2, 3)

    def attend(
        self, q: Array, k: Array, v: Array, offset: Array | None, prefix: LayerPrefix | None,
        instructions: Instructions | None, placement: Placement, reach: Array | None = None,
    ) -> Array:
        """Mixed values [B, G, n, H, head_dim] of n queries.

        Query i, at slot offset + i, sees the keys k [B, G, K, t, head_dim] at slots j <= offset + i, every valid key
        of the prompt and every key of the instructions (all of this layer). With `reach`, it sees only those among
        them that are less than `reach` tokens before it. `offset` is None where k holds the keys of the n tokens
        alone, and no cache.
        """
        cfg = self.cfg
        b, g, n, _, f = q.shape
        q = scaled(q, cfg.query_dim or f).reshape(b, g, n, cfg.kv_heads, cfg.heads // cfg.kv_heads, f)
        q = q.transpose(0, 1, 3, 4, 2, 5)
        by_kernel = reach is None and decode_attention.supports(v.dtype, f)
        if n == 1 and offset is not None and prefix is not None and by_kernel:
            mixed = _attend_once(q[:, :, :, :, 0], k, v, offset, prefix, instructions, placement)[:, :, :, :, None]
        elif n > 1 and self._blockwise(k, prefix, instructions):
            kernel = self.cfg.attention == "kernel"
            mixed = _attend_blockwise(q, k, v, offset, prefix, instructions, reach, placement, kernel)
        else:
            mixed = _attend(q, k, v, 0 if offset is None else offset, prefix, instructions, reach)
        return jnp.moveaxis(mixed, 4, 2).astype(v.dtype).reshape(b, g, n, cfg.heads, f)

    def _blockwise(self, k: Array, prefix: LayerPrefix | None, instructions: Instructions | None) -> bool:
        """Whether scores over these keys are never held."""
        sources = (k, *(x.k for x in (prefix, instructions) if x is not None))
        many = sum(keys.shape[-2] for keys in sources) >= blockwise_attention.LONG
        return self.cfg.attention in ("blockwise", "kernel") or (self.cfg.attention == "auto" and many)

    def attend_groups(
        self, q: Array, k: Array, v: Array, prompt_len: Array, size: tuple[int, int],
        instructions: Instructions | None, placement: Placement, reach: Array | None = None,
    ) -> Array:
        """`attend` for prompts and their answers at once. `size` is (S, G).

        q is [B, 1, S + G * n, H, head_dim]: the S tokens of the prompt, then the n tokens of each answer. k and v are
        [B, 1, K, S + G * n, head_dim]. Returns values in the shape of q.
        """
        length, group = size
        b, _, rows, heads, f = q.shape

        def of_answers(x: Array) -> Array:  # [B, 1, K, rows, f] to [B, G, K, n, f]
            return x[:, 0, :, length:].reshape(b, x.shape[2], group, -1, f).swapaxes(1, 2)

        (prompt_k, own_k), (prompt_v, own_v) = ((x[:, :, :, :length], of_answers(x)) for x in (k, v))
        prefix = LayerPrefix(prompt_k[:, 0], prompt_v[:, 0], prompt_len)
        own_q = q[:, 0, length:].reshape(b, group, -1, heads, f)
        prompt = self.attend(q[:, :, :length], prompt_k, prompt_v, None, None, instructions, placement, reach)
        answers = self.attend(own_q, own_k, own_v, None, prefix, instructions, placement, reach)
        return jnp.concatenate([prompt, answers.reshape(b, 1, rows - length, heads, f)], axis=2)

    def output(self, mixed: Array) -> Array:
        """[B, G, n, D] from the mixed values [B, G, n, H, head_dim] of `attend`."""
        return linear(mixed, cast(self.out, mixed.dtype), inputs=2)


_QUERY = "bgkqn"  # axes of queries in an einsum, before head_dim


class _Segment(NamedTuple):
    """Keys and values of one layer. Queries with the same indices along `axes` share them."""

    axes: str  # "bgk": of one answer; "bk": of one group; "k": the same for all
    k: Array  # [*axes, t, head_dim]
    v: Array  # [*axes, t, head_dim]
    visible: Array | None  # bool that broadcasts to scores [*order, t]; None: all keys are visible

    @property
    def order(self) -> str:
        """The axes of scores and of their products: `axes` first, so that the products are batched matrix products."""
        return self.axes + "".join(axis for axis in _QUERY if axis not in self.axes)


def _turned(x: Array, source: str, target: str) -> Array:
    """x with its first axes, `source`, brought into the order `target`."""
    return x.transpose(*(source.index(axis) for axis in target), *range(len(target), x.ndim))


def _attend(
    q: Array, k: Array, v: Array, offset: Array | int, prefix: LayerPrefix | None,
    instructions: Instructions | None = None, reach: Array | None = None,
) -> Array:
    """`Attention.attend` for scaled queries [B, G, K, Q, n, head_dim]. Returns that shape in float32.

    The softmax goes over all segments without concatenating their scores. Each segment's exponentials are taken
    relative to the peak of all segments, and the mixed values are divided by the total at the end. On a CPU, the
    work outside the matrix products takes a fifth less time than with concatenated scores.
    Scores stay in the order that the next product takes. Only queries and results, which are small, are transposed.
    """
    slot = offset + jnp.arange(q.shape[4])[:, None]  # [n, 1]
    own = jnp.arange(k.shape[3])
    before = own <= slot
    segments = [_Segment("bgk", k, v, before if reach is None else before & (slot - own < reach))]
    start = jnp.zeros(1, jnp.int32) if prefix is None else prefix.length
    place = start[:, None, None] + slot  # [B or 1, n, 1] positions of the queries, counted after the instructions
    if prefix is not None:
        theirs = jnp.arange(prefix.k.shape[2])
        valid = theirs < prefix.length[:, None, None]
        valid = valid if reach is None else valid & (place - theirs < reach)
        segments.append(_Segment("bk", prefix.k, prefix.v, valid[:, None, None, None]))
    if instructions is not None:
        number = instructions.k.shape[1]
        near = None if reach is None else (number + place - jnp.arange(number) < reach)[None, :, None, None]
        segments.append(_Segment("k", instructions.k, instructions.v, near))

    scores = []
    for s in segments:
        score = einsum(f"{s.order}f,{s.axes}tf->{s.order}t", _turned(q, _QUERY, s.order), s.k)
        scores.append(score if s.visible is None else jnp.where(s.visible, score, _MASKED))
    peaks = [_turned(jnp.max(score, axis=-1), s.order, _QUERY) for s, score in zip(segments, scores, strict=True)]
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
    total, mixed = jnp.float32(0), jnp.float32(0)
    for s, score in zip(segments, scores, strict=True):
        share = jnp.exp(score - _turned(peak, _QUERY, s.order)[..., None])
        total += _turned(jnp.sum(share, axis=-1), s.order, _QUERY)
        part = einsum(f"{s.order}t,{s.axes}tf->{s.order}f", share.astype(v.dtype), s.v)
        mixed += _turned(part, s.order, _QUERY)
    return mixed / total[..., None]


def _attend_blockwise(
    q: Array, k: Array, v: Array, offset: Array | int | None, prefix: LayerPrefix | None,
    instructions: Instructions | None, reach: Array | None, placement: Placement, kernel: bool = False,
) -> Array:
    """`_attend` whose scores are never held, in the dtype of `v`; `kernel` as in `blockwise_attention.attend`.

    Each device goes through its own examples and heads; the gradient of the instructions is summed over devices once,
    at the end.
    """
    prompt = ("batch", *KEYS[2:])
    named = {"q": (q, (*KEYS, None)), "k": (k, KEYS), "v": (v, KEYS)}
    if offset is not None:
        named["offset"] = jnp.asarray(offset), ()
    if prefix is not None:
        named |= {"prompt_k": (prefix.k, prompt), "prompt_v": (prefix.v, prompt), "length": (prefix.length, prompt[:1])}
    if instructions is not None:
        named |= {"shared_k": (instructions.k, KEYS[2:]), "shared_v": (instructions.v, KEYS[2:])}
    if reach is not None:
        named["reach"] = reach, ()

    def attend(q: Array, *others: Array) -> Array:
        given = dict(zip(list(named)[1:], others, strict=True))
        segments = blockwise_attention.segments(q.shape[4], **given)
        return blockwise_attention.attend(q, segments, blockwise_attention.BLOCK, kernel)

    arrays, axes = zip(*named.values(), strict=True)
    return placement.split(attend, axes, (*KEYS, None))(*arrays)


def _attend_once(
    q: Array, k: Array, v: Array, offset: Array, prefix: LayerPrefix, instructions: Instructions | None,
    placement: Placement,
) -> Array:
    """`_attend` for one query of each answer [B, G, K, Q, head_dim], by a kernel on an NVIDIA GPU. Returns the shape
    of q in the dtype of `v`."""

    def plain(
        q: Array, k: Array, v: Array, offset: Array, prefix_k: Array, prefix_v: Array, length: Array, *shared: Array
    ) -> Array:
        instructions = Instructions(*shared) if shared else None
        mixed = _attend(q[:, :, :, :, None], k, v, offset, LayerPrefix(prefix_k, prefix_v, length), instructions)
        return mixed[:, :, :, :, 0].astype(v.dtype)

    def attend(*args: Array) -> Array:
        return jax.lax.platform_dependent(*args, cuda=decode_attention.decode_attention, default=plain)

    prompt, shared = ("batch", *KEYS[2:]), () if instructions is None else (instructions.k, instructions.v)
    axes = (KEYS, KEYS, KEYS, (), prompt, prompt, ("batch",), *(KEYS[2:] for _ in shared))
    args = (q, k, v, jnp.asarray(offset), prefix.k, prefix.v, prefix.length, *shared)
    return placement.split(attend, axes, KEYS)(*args)


@jax.tree_util.register_dataclass
@dataclass
class LayerPrefix:
    """One layer of a `Prefix`: k, v [B, K, S, head_dim], length [B]."""

    k: Array
    v: Array
    length: Array
