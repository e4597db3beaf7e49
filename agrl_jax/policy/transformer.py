"""The policy: a decoder-only transformer in Flax NNX, used through a pure `apply`.

RMSNorm before each sub-layer, rotary positions, grouped-query attention, SwiGLU; tied or untied
embeddings, attention biases, query/key norms, scaled rotary frequencies and a mixture of experts by
config, so that Llama, Qwen2, Qwen3 and Qwen3-MoE shapes are the same code. Layers are stacked on a
leading axis and scanned, so that compile time does not grow with depth; for decoding they are taken
apart where that is faster (`for_decoding`).

The modules are split once into a graph definition and parameters (`build`); from there on only pure
functions of the parameters are used. Responses attend to two segments: the keys and values of their
group's prompt (`Prefix`, computed once per example and shared) and their own (`Cache`). One softmax
runs over both, so sharing is exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.layout import Layout as MemoryOrder
from jax.experimental.layout import with_layout_constraint

from agrl_jax.policy import decode_attention
from agrl_jax.policy.lora import MODULES, Adapted
from agrl_jax.types import ANYWHERE, Array, Cache, Layout, Params, Policy, Prefix

_FEW = 32  # rows up to which a CPU is faster with the weight on the left of the product; see `OutputsFirst`
_UNROLLED = 8  # stacks up to this deep are unrolled: a quarter off the gradient's time on a CPU, for more to compile
# Logical axes of activations.
_HIDDEN = ("batch", None, None, None)  # [B, G, n, D]
_QUERIES = ("batch", None, None, "heads", None)  # [B, G, n, H, head_dim]
_KEYS = ("batch", None, "kv_heads", None, None)  # [B, G, K, n, head_dim], and values
_MASKED = -1e30  # finite, so that a query which may see nothing yields a mean, never a NaN


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies were stretched to reach beyond the positions a model was first trained on.

    `linear` divides all of them by `factor`. `llama3` divides those whose wavelength exceeds
    original / low_freq, keeps those below original / high_freq, and goes over smoothly between. `yarn`
    (arXiv 2309.00071) ramps from kept to divided between the frequencies that turn `beta_fast` and
    `beta_slow` times within `original` positions, and scales queries and keys by `attention`.
    """

    kind: str
    factor: float
    original: int = 0  # positions before stretching
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float = 1.0
    truncate: bool = True  # round the ends of yarn's ramp outwards

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"rope_scaling.kind={self.kind!r} is not one of linear, llama3, yarn")
        if self.kind != "linear" and self.original < 1:
            raise ValueError(f"rope_scaling.original={self.original} must be positive for {self.kind}")


@dataclass(frozen=True)
class PolicyConfig:
    """The shape of a policy. `kv_heads` divides `heads`; `head_dim` is even.

    With `experts`, each layer's feed-forward is a mixture of that many, each of width `mlp`, of which a
    token goes through `experts_per_token`.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    tied: bool = True
    qk_norm: bool = False
    bias: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: bool = False
    max_positions: int = 4096  # told to those who load an export; nothing here depends on it
    rope_scaling: RopeScaling | None = None
    experts: int = 0
    experts_per_token: int = 0
    renormalise_experts: bool = True  # the chosen experts' weights add up to one

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"policy.kv_heads={self.kv_heads} must divide policy.heads={self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"policy.head_dim={self.head_dim} must be even: rotary positions turn pairs")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"policy.experts_per_token={self.experts_per_token} must be 1 to {self.experts} (experts)")


# ------------------------------------------------------------------------------------------- modules


def _param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], scale: float, dtype: str) -> nnx.Param:
    """A weight drawn from a normal of standard deviation `scale`, with its logical axes beside it."""
    return nnx.Param((scale * jax.random.normal(rngs.params(), shape)).astype(dtype), axes=axes)


def _ones(size: int, axis: str, dtype: str) -> nnx.Param:
    return nnx.Param(jnp.ones((size,), dtype), axes=(axis,))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis, in float32, returned in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * weight.astype(jnp.float32)).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass
class OutputsFirst:
    """A matrix of a layer, laid out for a CPU to decode with.

    XLA's CPU product packs what stands on its right anew each time. With few rows that is most of the work where it is
    the weight, and nothing where it is the rows: SmolLM2 decodes 32 answers 1.3 times as fast.
    """

    matrix: Array  # [out..., in...]


def linear(x: Array, weight: Array | OutputsFirst | Adapted, inputs: int = 1) -> Array:
    """x [..., in...] times weight [in..., out...], where the first `inputs` axes of weight are its inputs.

    As one product of two matrices: on a CPU, XLA's gradient of the same product with x in four dimensions takes
    twice as long. Low-rank adapters are multiplied one after the other, and never into the weight.
    """
    if isinstance(weight, Adapted):
        return linear(x, weight.weight, inputs) + linear(linear(x, weight.a, inputs), weight.b)
    if isinstance(weight, OutputsFirst):
        *outputs, size = *weight.matrix.shape[:-inputs], math.prod(weight.matrix.shape[-inputs:])
        rows, matrix = x.reshape(-1, size), weight.matrix.reshape(-1, size)
        if len(rows) > _FEW:
            flat = rows @ matrix.T
        else:  # behind a barrier, or XLA turns the product around again
            flat = jax.lax.optimization_barrier(matrix @ rows.T).T
        return flat.reshape(*x.shape[: x.ndim - inputs], *outputs)
    size = math.prod(weight.shape[:inputs])
    flat = x.reshape(-1, size) @ weight.reshape(size, -1)
    return flat.reshape(*x.shape[: x.ndim - inputs], *weight.shape[inputs:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(spec: str, x: Array, y: Array) -> Array:
    """The einsum of two arrays of one dtype, added up and returned in float32.

    Each axis is in two or three of the parts of `spec`, which the gradient relies on.
    In the gradient the cotangent is first rounded to that dtype. Left in float32, as JAX would have it, the products
    of the gradient are float32 too. With scores laid out as in `_attend` that was 22% of the gradient's time, of 1B
    parameters in bfloat16 on an H100.
    """
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _einsum_forward(spec: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum(spec, x, y), (x, y)


def _einsum_backward(spec: str, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, y = operands
    cotangent = cotangent.astype(x.dtype)
    left, right, out = re.split(",|->", spec)
    grad_x = jnp.einsum(f"{out},{right}->{left}", cotangent, y)
    # Asked for with its last two axes swapped, the gradient of keys has queries on the left of its product. Otherwise
    # the scores' cotangent stands there, far larger, which XLA's CPU product first copies into another order: 7% of the
    # gradient's time of SmolLM2, with prompts of 600 tokens and 16 answers to each.
    swapped = f"{right[:-2]}{right[-1]}{right[-2]}"
    grad_y = jnp.einsum(f"{left},{out}->{swapped}", x, cotangent).swapaxes(-1, -2)
    return grad_x, grad_y


einsum.defvjp(_einsum_forward, _einsum_backward)


def _cast(param: nnx.Param, dtype: Any) -> Any:
    """A weight, with its adapters where it has them, in the dtype to compute in."""
    return jax.tree.map(lambda x: x.astype(dtype), param.get_value())


def rope_frequencies(cfg: PolicyConfig) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, [head_dim / 2] float32, and the factor on queries and keys.

    In the order of operations of `transformers`: at position 10,000 a frequency that differs in its last
    bit turns the pair by another 6e-4 radians.
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


def rotate(x: Array, positions: Array, frequency: np.ndarray, scale: float = 1.0) -> Array:
    """Rotary position embedding (arXiv 2104.09864), halves paired as in Llama.

    `x` is [B, G, n, heads, head_dim], `positions` [B, 1 or G, n], `frequency` [head_dim / 2].
    """
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = scale * jnp.cos(angle), scale * jnp.sin(angle)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention over the shared prompt and the response's own tokens."""

    def __init__(self, cfg: PolicyConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        d, h, k, f, dtype = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.param_dtype
        out_scale = (h * f) ** -0.5 * (2 * cfg.layers) ** -0.5  # keeps the residual's variance flat in depth
        self.q = _param(rngs, (d, h, f), ("embed", "heads", "head_dim"), d**-0.5, dtype)
        self.k = _param(rngs, (d, k, f), ("embed", "kv_heads", "head_dim"), d**-0.5, dtype)
        self.v = _param(rngs, (d, k, f), ("embed", "kv_heads", "head_dim"), d**-0.5, dtype)
        self.out = _param(rngs, (h, f, d), ("heads", "head_dim", "embed"), out_scale, dtype)
        if cfg.bias:
            self.q_bias = nnx.Param(jnp.zeros((h, f), dtype), axes=("heads", "head_dim"))
            self.k_bias = nnx.Param(jnp.zeros((k, f), dtype), axes=("kv_heads", "head_dim"))
            self.v_bias = nnx.Param(jnp.zeros((k, f), dtype), axes=("kv_heads", "head_dim"))
        if cfg.qk_norm:
            self.q_norm = _ones(f, "head_dim", dtype)
            self.k_norm = _ones(f, "head_dim", dtype)

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries [B, G, n, H, head_dim], keys and values [B, G, K, n, head_dim], rotated.

        Keys and values stand as attention reads them, so that no step of decoding transposes the cache.
        """
        cfg, dtype = self.cfg, x.dtype
        q, k, v = (linear(x, _cast(weight, dtype)) for weight in (self.q, self.k, self.v))
        if cfg.bias:
            q, k, v = (
                y + b[...].astype(dtype)
                for y, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            )
        if cfg.qk_norm:
            q, k = rms_norm(q, self.q_norm[...], cfg.norm_eps), rms_norm(k, self.k_norm[...], cfg.norm_eps)
        rope = rope_frequencies(cfg)
        return rotate(q, positions, *rope), rotate(k, positions, *rope).swapaxes(2, 3), v.swapaxes(2, 3)

    def __call__(
        self, q: Array, k: Array, v: Array, offset: Array | None, prefix: _LayerPrefix | None, layout: Layout
    ) -> Array:
        """Attends from n queries at slots offset + i to keys k [B, G, K, t, head_dim] at slots j <= offset + i,
        and to every valid key of the prompt. Returns [B, G, n, D]. `offset` is None where k are the n tokens' own."""
        cfg = self.cfg
        b, g, n, _, f = q.shape
        q = q.reshape(b, g, n, cfg.kv_heads, cfg.heads // cfg.kv_heads, f) * f**-0.5
        q = q.transpose(0, 1, 3, 4, 2, 5)
        if n == 1 and offset is not None and prefix is not None and decode_attention.supports(v.dtype, f):
            mixed = _attend_once(q[:, :, :, :, 0], k, v, offset, prefix, layout)[:, :, :, :, None]
        else:
            mixed = _attend(q, k, v, 0 if offset is None else offset, prefix)
        mixed = jnp.moveaxis(mixed, 4, 2).astype(v.dtype).reshape(b, g, n, cfg.heads, f)
        return linear(mixed, _cast(self.out, v.dtype), inputs=2)


def _attend(q: Array, k: Array, v: Array, offset: Array | int, prefix: _LayerPrefix | None) -> Array:
    """Attention of scaled queries [B, G, K, Q, n, head_dim], in that shape, in float32; as `Attention` has it.

    One softmax over both segments, never put together: exponentials of each less the peak of both, whose sums
    are divided by at last. A fifth less time outside of the products than with concatenated scores, on a CPU.
    Every product leaves its result as the next one takes it: only queries and answers, which are small, are transposed.
    """
    own = einsum("bgkqnf,bgktf->bgkqnt", q, k)
    visible = jnp.arange(k.shape[3])[None, :] <= offset + jnp.arange(q.shape[4])[:, None]
    own = jnp.where(visible, own, _MASKED)
    peak = jnp.max(own, axis=-1)
    if prefix is not None:
        prompt = einsum("bkgqnf,bksf->bkgqns", q.swapaxes(1, 2), prefix.k)
        valid = jnp.arange(prefix.k.shape[2]) < prefix.length[:, None]
        prompt = jnp.where(valid[:, None, None, None, None, :], prompt, _MASKED)
        peak = jnp.maximum(peak, jnp.max(prompt, axis=-1).swapaxes(1, 2))
    peak = jax.lax.stop_gradient(peak)
    own = jnp.exp(own - peak[..., None])
    total = jnp.sum(own, axis=-1)
    mixed = einsum("bgkqnt,bgktf->bgkqnf", own.astype(v.dtype), v)
    if prefix is not None:
        prompt = jnp.exp(prompt - peak.swapaxes(1, 2)[..., None])
        total += jnp.sum(prompt, axis=-1).swapaxes(1, 2)
        mixed += einsum("bkgqns,bksf->bkgqnf", prompt.astype(v.dtype), prefix.v).swapaxes(1, 2)
    return mixed / total[..., None]


def _attend_once(q: Array, k: Array, v: Array, offset: Array, prefix: _LayerPrefix, layout: Layout) -> Array:
    """`_attend` of one query an answer [B, G, K, Q, head_dim]: on an NVIDIA GPU by a kernel, in the dtype of `v`."""

    def plain(q: Array, k: Array, v: Array, offset: Array, *prefix: Array) -> Array:
        return _attend(q[:, :, :, :, None], k, v, offset, _LayerPrefix(*prefix))[:, :, :, :, 0].astype(v.dtype)

    def attend(*args: Array) -> Array:
        return jax.lax.platform_dependent(*args, cuda=decode_attention.decode_attention, default=plain)

    prompt = ("batch", *_KEYS[2:])
    axes = (_KEYS, _KEYS, _KEYS, (), prompt, prompt, ("batch",))
    return layout.split(attend, axes, _KEYS)(q, k, v, jnp.asarray(offset), prefix.k, prefix.v, prefix.length)


class FeedForward(nnx.Module):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down."""

    def __init__(self, cfg: PolicyConfig, rngs: nnx.Rngs):
        d, m, dtype = cfg.width, cfg.mlp, cfg.param_dtype
        self.gate = _param(rngs, (d, m), ("embed", "mlp"), d**-0.5, dtype)
        self.up = _param(rngs, (d, m), ("embed", "mlp"), d**-0.5, dtype)
        self.down = _param(rngs, (m, d), ("mlp", "embed"), m**-0.5 * (2 * cfg.layers) ** -0.5, dtype)

    def __call__(self, x: Array, layout: Layout) -> Array:
        gate, up, down = (_cast(weight, x.dtype) for weight in (self.gate, self.up, self.down))
        return linear(jax.nn.silu(linear(x, gate)) * linear(x, up), down)


class MixtureOfExperts(nnx.Module):
    """SwiGLU experts, of which each token goes through those that its router rates highest (arXiv 2101.03961).

    No token is dropped: tokens are sorted by expert, and ragged matrix products run over groups of any size.
    """

    def __init__(self, cfg: PolicyConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        e, d, m, dtype = cfg.experts, cfg.width, cfg.mlp, cfg.param_dtype
        into, out = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
        self.router = _param(rngs, (d, e), ("embed", "experts"), d**-0.5, dtype)
        self.gate = _param(rngs, (e, d, m), into, d**-0.5, dtype)
        self.up = _param(rngs, (e, d, m), into, d**-0.5, dtype)
        self.down = _param(rngs, (e, m, d), out, m**-0.5 * (2 * cfg.layers) ** -0.5, dtype)

    def route(self, x: Array, router: Array) -> tuple[Array, Array, Array]:
        """For x [..., D]: the router's probabilities [..., experts], and weights and indices [..., k] of those chosen.

        In float32, so that rounding does not change the choice.
        """
        probability = jax.nn.softmax(x.astype(jnp.float32) @ router.astype(jnp.float32))
        weight, chosen = jax.lax.top_k(probability, self.cfg.experts_per_token)
        if self.cfg.renormalise_experts:
            weight /= weight.sum(axis=-1, keepdims=True)
        return probability, weight, chosen

    def __call__(self, x: Array, layout: Layout) -> Array:
        """Each device has its own experts answer its own tokens; what they say of a token is added up."""
        experts = jnp.arange(self.cfg.experts)
        whole = ("experts", None, None)
        answer = layout.split(self._answer, (_HIDDEN, (None, None), whole, whole, whole, ("experts",)),
                              ("experts", *_HIDDEN))  # fmt: skip
        weights = (weight[...].astype(x.dtype) for weight in (self.gate, self.up, self.down))
        return answer(x, self.router[...], *weights, experts).sum(axis=0)

    def _answer(self, x: Array, router: Array, gate: Array, up: Array, down: Array, experts: Array) -> Array:
        """[1, B, G, n, D]: the weighted answers of these consecutive `experts`; 0 of a token that chose others."""
        rows, k = x.reshape(-1, x.shape[-1]), self.cfg.experts_per_token
        _, weight, chosen = self.route(rows, router)
        chosen = jnp.where((chosen >= experts[0]) & (chosen <= experts[-1]), chosen - experts[0], len(experts))
        order = jnp.argsort(chosen.reshape(-1))  # stable: the copy of row i for its j-th expert stands at i * k + j
        sizes = jnp.bincount(chosen.reshape(-1), length=len(experts)).astype(jnp.int32)
        ours = (jnp.arange(len(order)) < sizes.sum())[:, None]  # others come last, where a product is not defined

        def product(rows: Array, weights: Array) -> Array:
            return jnp.where(ours, jax.lax.ragged_dot(jnp.where(ours, rows, 0), weights, sizes), 0)

        ordered = rows[order // k]
        hidden = jax.nn.silu(product(ordered, gate)) * product(ordered, up)
        answers = product(hidden, down)[jnp.argsort(order)].reshape(-1, k, x.shape[-1])
        return jnp.einsum("nkd,nk->nd", answers, weight.astype(x.dtype)).reshape(1, *x.shape)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each after a norm and added to the residual."""

    def __init__(self, cfg: PolicyConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.attention_norm = _ones(cfg.width, "embed", cfg.param_dtype)
        self.attention = Attention(cfg, rngs)
        self.mlp_norm = _ones(cfg.width, "embed", cfg.param_dtype)
        self.mlp = (MixtureOfExperts if cfg.experts else FeedForward)(cfg, rngs)


class Transformer(nnx.Module):
    """Embedding, stacked blocks (a leading layer axis on every weight), final norm, head."""

    def __init__(self, cfg: PolicyConfig, rngs: nnx.Rngs):
        # Apart from the head, rows of unit scale: Adam's steps on a rare word then move it, and do not rewrite it.
        scale = 0.02 if cfg.tied else 1.0
        self.embedding = _param(rngs, (cfg.vocab_size, cfg.width), ("vocab", "embed"), scale, cfg.param_dtype)
        make_block = nnx.vmap(lambda key: Block(cfg, nnx.Rngs(params=key)), in_axes=0, out_axes=0)
        self.blocks = make_block(jax.random.split(rngs.params(), cfg.layers))
        self.final_norm = _ones(cfg.width, "embed", cfg.param_dtype)
        if not cfg.tied:
            shape, scale = (cfg.width, cfg.vocab_size), cfg.width**-0.5
            self.head = _param(rngs, shape, ("embed", "vocab"), scale, cfg.param_dtype)


# ------------------------------------------------------------------------------------ pure functions


@jax.tree_util.register_dataclass
@dataclass
class _LayerPrefix:
    """One layer of a `Prefix`: k, v [B, K, S, head_dim], length [B]."""

    k: Array
    v: Array
    length: Array


Observe = Callable[[Any, Array], Any]


def _run_block(
    block: Block, x: Array, positions: Array, offset: Array | None, prefix: _LayerPrefix | None,
    remember: Callable[[Array, Array], tuple[Array, Array]], layout: Layout, observe: Observe,
) -> tuple[Array, Any]:
    """One layer; `remember` stores the new keys and values and returns those to attend to.

    Also returns what `observe` makes of the feed-forward and its input.
    """
    eps = block.cfg.norm_eps
    q, k, v = block.attention.project(rms_norm(x, block.attention_norm[...], eps), positions)
    q, k, v = layout.place(q, _QUERIES), layout.place(k, _KEYS), layout.place(v, _KEYS)
    x = layout.place(x + block.attention(q, *remember(k, v), offset, prefix, layout), _HIDDEN)
    y = rms_norm(x, block.mlp_norm[...], eps)
    return layout.place(x + block.mlp(y, layout), _HIDDEN), observe(block.mlp, y)


def _forward(
    cfg: PolicyConfig, merge: Callable[[Params], Transformer], params: Params, tokens: Array, offset: Array | int,
    prefix: Prefix | None, cache: Cache | None, layout: Layout, observe: Observe = lambda mlp, x: None,
) -> tuple[Array, Cache, Any]:
    """See `build` for the contract. Also returns what `observe` saw, by layer."""
    model = merge(params)
    table = layout.place(model.embedding[...], ("vocab", None))  # split along D, every device would look up all rows
    x = layout.place(table[tokens].astype(jnp.dtype(cfg.compute_dtype)), _HIDDEN)
    start = 0 if prefix is None else prefix.length[:, None, None]
    positions = start + offset + jnp.broadcast_to(jnp.arange(tokens.shape[2]), (tokens.shape[0], 1, tokens.shape[2]))
    run = partial(_run_block, positions=positions, offset=None if cache is None else offset, layout=layout,
                  observe=observe)  # fmt: skip
    if isinstance(params["blocks"], tuple):
        blocks = [merge({**params, "blocks": weights}).blocks for weights in params["blocks"]]
        x, cache, seen = _loop(blocks, x, offset, prefix, cache, run)
    else:
        x, cache, seen = _scan(cfg, model.blocks, x, offset, prefix, cache, run)
    return rms_norm(x, model.final_norm[...], cfg.norm_eps), cache, seen


def _scan(
    cfg: PolicyConfig, blocks: Block, x: Array, offset: Array | int, prefix: Prefix | None, cache: Cache | None,
    run: Callable[..., tuple[Array, Any]],
) -> tuple[Array, Cache, Any]:
    """The layers as one scan over their stacked weights."""
    graph, weights = nnx.split(blocks)

    def layer(carry: tuple[Array, Any], xs: tuple[Any, Any, Array]) -> tuple[tuple[Array, Any], Any]:
        x, (cache_k, cache_v) = carry
        block_weights, prefix_kv, index = xs
        fresh: list[Array] = []

        def remember(k: Array, v: Array) -> tuple[Array, Array]:
            if cache_k is None:
                fresh.extend((k, v))
                return k, v
            at = (index, 0, 0, 0, offset, 0)  # in place: the whole cache is carried, never copied layer by layer
            full_k = jax.lax.dynamic_update_slice(cache_k, k[None], at)
            full_v = jax.lax.dynamic_update_slice(cache_v, v[None], at)
            fresh.extend((full_k, full_v))
            return full_k[index], full_v[index]

        layer_prefix = None if prefix_kv is None else _LayerPrefix(*prefix_kv, prefix.length)
        x, seen = run(nnx.merge(graph, block_weights), x, prefix=layer_prefix, remember=remember)
        return ((x, (None, None)), (tuple(fresh), seen)) if cache_k is None else ((x, tuple(fresh)), (None, seen))

    prefix_kv = None if prefix is None else (prefix.k, prefix.v)
    kept = (None, None) if cache is None else (cache.k, cache.v)
    unroll = cfg.layers if cfg.layers <= _UNROLLED else 1
    body = layer
    if cfg.remat:
        body = jax.checkpoint(layer, prevent_cse=False)
    elif unroll == 1:  # keeps the products: SmolLM2's gradient as fast on a CPU, with 2.2 GB of residuals for 6.0
        body = jax.checkpoint(layer, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    xs = (weights, prefix_kv, jnp.arange(cfg.layers))
    (x, kept), (fresh, seen) = jax.lax.scan(body, (x, kept), xs, unroll=unroll)
    return x, Cache(*(fresh if cache is None else kept)), seen


def _loop(
    blocks: list[Block], x: Array, offset: Array | int, prefix: Prefix | None, cache: Cache | None,
    run: Callable[..., tuple[Array, Any]],
) -> tuple[Array, Cache, Any]:
    """The layers one after the other, their weights, prefix and cache apart."""
    kept: list[tuple[Array, Array]] = []
    seen = []
    for index, block in enumerate(blocks):

        def remember(k: Array, v: Array, index: int = index) -> tuple[Array, Array]:
            if cache is not None:
                k, v = (
                    jax.lax.dynamic_update_slice(whole[index], new, (0, 0, 0, offset, 0))
                    for whole, new in ((cache.k, k), (cache.v, v))
                )
            kept.append((k, v))
            return k, v

        layer_prefix = None if prefix is None else _LayerPrefix(prefix.k[index], prefix.v[index], prefix.length)
        x, saw = run(block, x, prefix=layer_prefix, remember=remember)
        seen.append(saw)
    return x, Cache(*zip(*kept, strict=True)), seen


def _structure(cfg: PolicyConfig) -> tuple[nnx.State, Callable[[Params], Transformer]]:
    """The parameters as abstract variables, and the function that puts arrays into the modules."""
    graph, template = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(params=0))))

    def merge(params: Params) -> Transformer:
        if isinstance(params["blocks"], tuple):  # of layers: the first stands for them
            params = {**params, "blocks": params["blocks"][0]}
        state = jax.tree.map(lambda x: x, template)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    return template, merge


def build(cfg: PolicyConfig, layout: Layout = ANYWHERE) -> tuple[Policy, Callable[[Array], Params], Params]:
    """The pure functions of a policy of this shape; `layout` lays their activations over the devices.

    Returns `(policy, init, axes)`: `init(key)` draws parameters, a nested dict of arrays; `axes` is a
    dict of the same structure with the logical axis names of each (a leading "layers" where stacked).

    `policy.apply(params, tokens, offset=0, prefix=None, cache=None)` runs tokens [B, G, n], which stand
    at slots offset .. offset + n - 1 of their response (of their prompt, where `prefix` is None), and
    returns the final hidden states [B, G, n, D] and the keys and values. Without a cache the n tokens
    see the prefix and each other, causally, and the returned cache holds their n entries. With one,
    their entries are written at `offset`, and they see the prefix and all slots up to their own. Of
    parameters whose layers are apart (`for_decoding`), so are the prefix and the cache.
    """
    template, merge = _structure(cfg)
    axes = jax.tree.map(
        lambda variable: (("layers",) if variable.ndim > len(variable.axes) else ()) + tuple(variable.axes),
        nnx.to_pure_dict(template, extract_fn=lambda variable: variable),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Transformer(cfg, nnx.Rngs(params=key))))

    def apply(
        params: Params, tokens: Array, *, offset: Array | int = 0, prefix: Prefix | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache]:
        return _forward(cfg, merge, params, tokens, offset, prefix, cache, layout)[:2]

    def unembed(params: Params, hidden: Array) -> Array:
        """Logits [B, ..., V] in float32 from hidden states [B, ..., D]."""
        model = merge(params)
        head = model.embedding[...].T if cfg.tied else model.head[...]
        # One product of two matrices, as in `linear`: a gradient 1.4 times as fast on a CPU.
        flat, head = hidden.reshape(-1, cfg.width), head.astype(hidden.dtype)
        logits = einsum("nd,dv->nv", flat, head).reshape(*hidden.shape[:-1], -1)
        return layout.place(logits, ("batch", *[None] * (logits.ndim - 2), "vocab"))

    def init_cache(params: Params, batch: int, group: int, length: int) -> Cache:
        shape = (batch, group, cfg.kv_heads, length, cfg.head_dim)
        if isinstance(params["blocks"], tuple):
            empty = tuple(layout.place(jnp.zeros(shape, cfg.compute_dtype), _KEYS) for _ in params["blocks"])
        else:
            empty = layout.place(jnp.zeros((cfg.layers, *shape), cfg.compute_dtype), ("layers", *_KEYS))
        return Cache(k=empty, v=empty)

    return Policy(apply, unembed, init_cache), init, axes


class ExpertLoad(NamedTuple):
    """How a mixture's router spreads tokens over the experts, each layer by itself."""

    share: Array  # [L, experts] float32 of the tokens' choices, those that fell on each expert; rows add up to 1
    probability: Array  # [L, experts] float32 mean of the router's probabilities

    def metrics(self) -> dict[str, Array]:
        """Scalars: the balance loss of Switch transformers (arXiv 2101.03961; 1 where balanced, at most the number
        of experts), the busiest expert's load over the mean, and the share of experts that no token chose."""
        experts = self.share.shape[-1]
        return {
            "experts/balance_loss": experts * jnp.mean(jnp.sum(self.share * self.probability, axis=-1)),
            "experts/max_load": experts * jnp.mean(jnp.max(self.share, axis=-1)),
            "experts/idle": jnp.mean(self.share == 0),
        }


def build_expert_load(cfg: PolicyConfig, layout: Layout = ANYWHERE) -> Callable[[Params, Array, Array], ExpertLoad]:
    """The pure function `(params, tokens [B, n], valid [B, n] bool) -> ExpertLoad` over the valid tokens.

    `layout` as in `build`.
    Raises ValueError where the policy has no experts.
    """
    if not cfg.experts:
        raise ValueError("policy.experts=0: there is no router whose load could be told")
    merge = _structure(cfg)[1]

    def expert_load(params: Params, tokens: Array, valid: Array) -> ExpertLoad:
        weight = valid.astype(jnp.float32) / jnp.maximum(valid.sum(), 1)

        def observe(mlp: MixtureOfExperts, x: Array) -> ExpertLoad:
            probability, _, chosen = mlp.route(x[:, 0], mlp.router[...])
            counts = jax.nn.one_hot(chosen, cfg.experts).sum(axis=2) / cfg.experts_per_token
            return ExpertLoad(*(jnp.einsum("bne,bn->e", y, weight) for y in (counts, probability)))

        return _forward(cfg, merge, params, tokens[:, None], 0, None, None, layout, observe)[2]

    return expert_load


def cast_weights(cfg: PolicyConfig, params: Params) -> Params:
    """`params` with every array in the dtype in which the policy computes with it; it then computes just the same.

    The weights of norms and routers stay as they are: they are computed with in float32.
    """

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        name = path[-1].key
        return leaf if name == "router" or name.endswith("norm") else leaf.astype(cfg.compute_dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def for_decoding(params: Params, platform: str) -> Params:
    """`params` as they are decoded with on a platform, "cpu", "gpu" or "tpu"; the policy computes the same with them.

    Stacked weights are read through a copy of each layer's, for every token that is decoded. So on a CPU and a GPU the
    weights of each layer are in a dict of their own: a shape of 1B parameters decodes 1.7 times as fast on an H100,
    SmolLM2 1.2 times as fast on two CPU cores. On a CPU the layers' matrices are moreover `OutputsFirst`.
    """
    if platform == "tpu":
        return params
    leaves, structure = jax.tree.flatten(params["blocks"])
    layers = [jax.tree.unflatten(structure, layer) for layer in zip(*(list(leaf) for leaf in leaves), strict=True)]
    return {**params, "blocks": tuple(_outputs_first(layer) if platform == "cpu" else layer for layer in layers)}


def _outputs_first(layer: Params) -> Params:
    """One layer's weights with its matrices `OutputsFirst`, those of a mixture's experts excepted."""

    def turned(weight: Array | Adapted, inputs: int) -> OutputsFirst | Adapted:
        if isinstance(weight, Adapted):
            return weight.replace(weight=turned(weight.weight, inputs))
        matrix = jnp.moveaxis(weight, range(inputs), range(-inputs, 0))
        # Else XLA first copies each layer out as it was, and holds both.
        return OutputsFirst(with_layout_constraint(matrix, MemoryOrder(tuple(range(matrix.ndim)))))

    weights = flatten_dict(layer)
    of_experts = ("mlp", "router") in weights
    for path, weight in weights.items():
        if path[-1] in MODULES and not (of_experts and path[0] == "mlp"):
            weights[path] = turned(weight, inputs=2 if path[-1] == "out" else 1)
    return unflatten_dict(weights)


def count_parameters(params: Params) -> int:
    """The number of scalars in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
