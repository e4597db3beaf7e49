"""The shape of a policy, and the layers that its parts share: norms, products, the feed-forward."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from agrl_jax.policy.decoding import FEW, OutputsFirst
from agrl_jax.policy.lora import Adapted
from agrl_jax.policy.products import matmul, matmul_transposed
from agrl_jax.types import Array, Placement

# Logical axes of activations.
HIDDEN = ("batch", None, None, None)  # [B, G, n, D]
QUERIES = ("batch", None, None, "heads", None)  # [B, G, n, H, head_dim]
KEYS = ("batch", None, "kv_heads", None, None)  # [B, G, K, n, head_dim], and values


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies were stretched to reach beyond the positions a model was first trained on.

    `linear` divides all frequencies by `factor`. `llama3` divides those with wavelengths above original / low_freq,
    keeps those with wavelengths below original / high_freq, and blends both in between. `yarn` (arXiv 2309.00071)
    keeps frequencies that turn at least `beta_fast` times within `original` positions, divides those that turn at
    most `beta_slow` times, and blends in between. It also scales queries and keys by `attention`.
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

    With `experts`, the feed-forward of each layer is a mixture of that many experts of width `mlp`. Each token goes
    through `experts_per_token` of them.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    tied: bool = True
    norms: str = "before"  # each sub-layer; or after it, on what it adds to the residual; or both
    norm_offset: float = 0.0  # added to the weights of norms
    qk_norm: bool = False  # norms of queries and keys, each head by itself
    qk_norm_whole: bool = False  # or all heads together
    bias: bool = False
    activation: str = "silu"  # of the feed-forward's gate; or gelu_tanh
    scaled_embedding: bool = False  # tokens enter the first layer times the root of `width`
    query_dim: int = 0  # scores are divided by its root; 0: head_dim
    window: int = 0  # so many tokens, itself included, a token of a local layer sees; 0: no layer is local
    global_every: int = 0  # with a window: layers whose number (from 1) this divides see all tokens; 0: none does
    local_rope_theta: float = 10_000.0  # of local layers, whose frequencies are not scaled
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: bool = False
    attention: str = "dense"  # holds all scores; blockwise, kernel: never; auto: blockwise for many keys
    max_positions: int = 4096  # written into exports; nothing here depends on it
    rope_scaling: RopeScaling | None = None
    unrotated_every: int = 0  # layers whose number (from 1) this divides have no rotary positions; 0: all have them
    experts: int = 0
    experts_per_token: int = 0
    renormalise_experts: bool = True  # the chosen experts' weights add up to one

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"policy.kv_heads={self.kv_heads} must divide policy.heads={self.heads}")
        if self.norms not in ("before", "after", "both"):
            raise ValueError(f"policy.norms={self.norms!r} is not one of before, after, both")
        if self.attention not in ("auto", "dense", "blockwise", "kernel"):
            raise ValueError(f"policy.attention={self.attention!r} is not one of auto, dense, blockwise, kernel")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"policy.activation={self.activation!r} is not one of silu, gelu_tanh")
        if self.window and self.rope_scaling is not None and self.rope_scaling.attention != 1:
            raise ValueError("policy.window goes with no rope_scaling that scales queries and keys")
        if self.head_dim % 2:
            raise ValueError(f"policy.head_dim={self.head_dim} must be even: rotary positions turn pairs")
        if self.unrotated_every and self.rope_scaling is not None and self.rope_scaling.attention != 1:
            raise ValueError("policy.unrotated_every goes with no rope_scaling that scales queries and keys")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"policy.experts_per_token={self.experts_per_token} must be 1 to {self.experts} (experts)")

    def on(self, platform: str) -> PolicyConfig:
        """The policy as it runs on "cpu", "gpu" or "tpu": on a CPU, `auto` attention is dense at any length."""
        dense = self.attention == "auto" and platform == "cpu"
        return dataclasses.replace(self, attention="dense") if dense else self


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], scale: float, dtype: str) -> nnx.Param:
    """A weight drawn from a normal of standard deviation `scale`, with its logical axes beside it."""
    return nnx.Param((scale * jax.random.normal(rngs.params(), shape)).astype(dtype), axes=axes)


def norm_weight(cfg: PolicyConfig, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """The weight of a norm, which at first multiplies by one."""
    return nnx.Param(jnp.full(shape, 1 - cfg.norm_offset, cfg.param_dtype), axes=axes)


def rms_norm(cfg: PolicyConfig, x: Array, weight: Array) -> Array:
    """x / rms(x) * (norm_offset + weight), over the last axes, which are those of `weight`.

    It is computed in float32 and returned in the dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    axes = tuple(range(-weight.ndim, 0))
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + cfg.norm_eps)
    return (x32 * (cfg.norm_offset + weight.astype(jnp.float32))).astype(x.dtype)


def linear(x: Array, weight: Array | OutputsFirst | Adapted, inputs: int = 1) -> Array:
    """x [..., in...] times weight [in..., out...], where the first `inputs` axes of weight are its inputs.

    This is one product of two matrices: on a CPU, XLA's gradient of the same product with x in four dimensions takes
    twice as long. x is multiplied by low-rank adapters one after the other; they are never merged into the weight.
    """
    if isinstance(weight, Adapted):
        return linear(x, weight.weight, inputs) + linear(linear(x, weight.a, inputs), weight.b)
    if isinstance(weight, OutputsFirst):
        *outputs, size = *weight.matrix.shape[:-inputs], math.prod(weight.matrix.shape[-inputs:])
        rows, matrix = x.reshape(-1, size), weight.matrix.reshape(-1, size)
        if len(rows) > FEW:
            flat = matmul_transposed(rows, matrix)
        else:  # without the barrier, XLA turns the product around again
            flat = jax.lax.optimization_barrier(matmul_transposed(matrix, rows)).T
        return flat.reshape(*x.shape[: x.ndim - inputs], *outputs)
    size = math.prod(weight.shape[:inputs])
    flat = matmul(x.reshape(-1, size), weight.reshape(size, -1))
    return flat.reshape(*x.shape[: x.ndim - inputs], *weight.shape[inputs:])


def cast(param: nnx.Param, dtype: Any) -> Any:
    """A weight, with its adapters if it has any, in the dtype to compute in."""
    return jax.tree.map(lambda x: x.astype(dtype), param.get_value())


class FeedForward(nnx.Module):
    """SwiGLU, (silu(x W_gate) * x W_up) W_down, or the same with GELU in place of silu (arXiv 2002.05202)."""

    def __init__(self, cfg: PolicyConfig, rngs: nnx.Rngs):
        self.activation = cfg.activation
        d, m, dtype = cfg.width, cfg.mlp, cfg.param_dtype
        self.gate = param(rngs, (d, m), ("embed", "mlp"), d**-0.5, dtype)
        self.up = param(rngs, (d, m), ("embed", "mlp"), d**-0.5, dtype)
        self.down = param(rngs, (m, d), ("mlp", "embed"), m**-0.5 * (2 * cfg.layers) ** -0.5, dtype)

    def __call__(self, x: Array, placement: Placement) -> Array:
        gate, up, down = (cast(weight, x.dtype) for weight in (self.gate, self.up, self.down))
        act = jax.nn.silu if self.activation == "silu" else partial(jax.nn.gelu, approximate=True)
        return linear(act(linear(x, gate)) * linear(x, up), down)
