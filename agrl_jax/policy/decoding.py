"""Lays out weights as each platform decodes with them fastest. Tricks for a platform live here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.layout import Layout, with_layout_constraint

from agrl_jax.policy.lora import MODULES, Adapted
from agrl_jax.types import Array, Params

FEW = 32  # rows up to which a CPU is faster with the weight on the left of the product; see `OutputsFirst`


@jax.tree_util.register_dataclass
@dataclass
class OutputsFirst:
    """A matrix of a layer, laid out for decoding on a CPU.

    Before each product, XLA on a CPU copies the right operand into another order. With few rows, copying the weight is
    most of the work, and copying the rows is none. So the weight stands on the left: SmolLM2 decodes 32 answers 1.3
    times as fast.
    """

    matrix: Array  # [out..., in...]


def for_decoding(params: Params, platform: str) -> Params:
    """`params` laid out for decoding on a platform, "cpu", "gpu" or "tpu"; the policy computes the same with them.

    With stacked weights, every decoded token copies each layer's weights. So on a CPU and a GPU the weights of each
    layer are in a dict of their own: a shape of 1B parameters decodes 1.7 times as fast on an H100, SmolLM2 1.2 times
    as fast on two CPU cores. On a CPU the layers' matrices are `OutputsFirst` too.
    """
    if platform == "tpu":
        return params
    leaves, structure = jax.tree.flatten(params["blocks"])
    layers = [jax.tree.unflatten(structure, layer) for layer in zip(*(list(leaf) for leaf in leaves), strict=True)]
    return {**params, "blocks": tuple(_outputs_first(layer) if platform == "cpu" else layer for layer in layers)}


def _outputs_first(layer: Params) -> Params:
    """One layer's weights with its matrices `OutputsFirst`, except a mixture's experts."""

    def turned(weight: Array | Adapted, inputs: int) -> OutputsFirst | Adapted:
        if isinstance(weight, Adapted):
            return weight.replace(weight=turned(weight.weight, inputs))
        matrix = jnp.moveaxis(weight, range(inputs), range(-inputs, 0))
        # Without the constraint, XLA first copies each layer in its old layout, and holds both.
        return OutputsFirst(with_layout_constraint(matrix, Layout(tuple(range(matrix.ndim)))))

    weights = flatten_dict(layer)
    of_experts = ("mlp", "router") in weights
    for path, weight in weights.items():
        if path[-1] in MODULES and not (of_experts and path[0] == "mlp"):
            weights[path] = turned(weight, inputs=2 if path[-1] == "out" else 1)
    return unflatten_dict(weights)
