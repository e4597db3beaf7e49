"""Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / rank) A B, where only A and B are trained.

The adapters are a tree of their own, with `a` and `b` in place of each adapted matrix of the layers; the base
policy's parameters stay as they are. `attach` joins both into a tree of parameters that the policy's functions take
like any other. B starts at zero: fresh adapters change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from agrl_jax.types import Array, Params, Policy

MODULES = ("q", "k", "v", "out", "gate", "up", "down")  # matrices of a layer, by their names in `transformer`


@struct.dataclass
class Adapted:
    """A matrix of a layer, stacked or not, and the product that is added to it."""

    weight: Array  # [in..., out...]
    a: Array  # [in..., rank]
    b: Array  # [rank, out...], alpha / rank included


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how. Raises ValueError for a module that is not one of MODULES, or for none at all."""

    rank: int
    alpha: float
    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        wrong = [name for name in self.modules if name not in MODULES]
        if wrong or not self.modules:
            raise ValueError(f"lora.modules: {wrong[0] if wrong else ''!r} is not one of {', '.join(MODULES)}")


def init(key: Array, shapes: Params, axes: Params, cfg: LoraConfig) -> Params:
    """Fresh adapters, float32: A drawn with variance 1 / inputs, B zero.

    `shapes` and `axes` are the trees of the base's shapes and logical axes.
    """
    adapted, flat, out = _adapted(axes, cfg), flatten_dict(shapes), {}
    for path, each in zip(sorted(adapted), jax.random.split(key, len(adapted)), strict=True):
        stacked, into, onto = _sides(flat[path].shape, adapted[path])
        out[*path, "a"] = jax.random.normal(each, (*stacked, *into, cfg.rank)) / math.sqrt(math.prod(into))
        out[*path, "b"] = jnp.zeros((*stacked, cfg.rank, *onto))
    return unflatten_dict(out)


def adapter_axes(axes: Params, cfg: LoraConfig) -> Params:
    """The logical axes of the adapters, from those of the base."""
    out = {}
    for path, names in _adapted(axes, cfg).items():
        stacked, into, onto = _sides(names, names)
        out[*path, "a"], out[*path, "b"] = (*stacked, *into, "rank"), (*stacked, "rank", *onto)
    return unflatten_dict(out)


def attach(base: Params, adapters: Params, cfg: LoraConfig) -> Params:
    """The base with each adapted matrix as an `Adapted`; the base itself where there are no adapters."""
    flat = dict(flatten_dict(base))
    for path, (a, b) in _pairs(adapters).items():
        flat[path] = Adapted(flat[path], a, b * (cfg.alpha / cfg.rank))
    return unflatten_dict(flat)


def merge(base: Params, adapters: Params, cfg: LoraConfig, dtype: str) -> Params:
    """The base with the adapters' products added to its matrices, in `dtype`: in bfloat16 small products are lost."""

    def added(leaf: Array | Adapted) -> Array:
        if not isinstance(leaf, Adapted):
            return leaf.astype(dtype)
        product = partial(jnp.tensordot, axes=1, precision="highest")  # TPUs would round to bfloat16, GPUs to TF32
        for _ in range(leaf.a.ndim + leaf.b.ndim - 2 - leaf.weight.ndim):  # stacked axes: the layer, and the expert
            product = jax.vmap(product)
        return (leaf.weight.astype(jnp.float32) + product(leaf.a, leaf.b)).astype(dtype)

    adapters = jax.tree.map(lambda x: x.astype(jnp.float32), adapters)  # they may be kept in bfloat16
    return jax.tree.map(added, attach(base, adapters, cfg), is_leaf=lambda leaf: isinstance(leaf, Adapted))


def over(base: Params, policy: Policy, cfg: LoraConfig) -> Policy:
    """`policy` as a function of the adapters alone, over a fixed base."""

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda adapters, *args, **kwargs: function(attach(base, adapters, cfg), *args, **kwargs)

    return Policy(*map(whole, policy))


# ------------------------------------------------------------------------------------------- helpers


def _adapted(axes: Params, cfg: LoraConfig) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The paths of the matrices to adapt, with their logical axes."""
    return {path: names for path, names in flatten_dict(axes).items() if path[-1] in cfg.modules}


def _pairs(adapters: Params) -> dict[tuple[str, ...], tuple[Array, Array]]:
    flat = flatten_dict(adapters)
    return {path[:-1]: (a, flat[*path[:-1], "b"]) for path, a in flat.items() if path[-1] == "a"}


def _sides(of: Sequence[Any], names: Sequence[str]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Splits sizes or names of a stacked matrix with these axes into layer (and expert), inputs and outputs.

    `embed` stands alone as inputs or as outputs.
    """
    stacked = sum(name in ("layers", "experts") for name in names)
    inputs = stacked + 1 if names[stacked] == "embed" else len(names) - 1
    return tuple(of[:stacked]), tuple(of[stacked:inputs]), tuple(of[inputs:])
