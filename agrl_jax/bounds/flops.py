"""Counts the operations of matrix products in a program's jaxpr. The count is exact and the same for every compiler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from agrl_jax.bounds.hlo import phase_of


def matrix_flops(jaxpr: Any, phases: Sequence[str], branch_share: float = 1.0, shards: int = 1) -> dict[str, float]:
    """Floating-point operations of all devices, by phase and "other": two for each multiply-add.

    Rematerialised products are counted again. Scans count in full; a `while` counts from 0 to the number that its
    counter is compared to. `branch_share` is the share of runs in which the first branch of a `cond` is not taken. A
    choice by platform counts its default. The phase of a product is the first of `phases` in its name stack
    (`jax.named_scope`). A product in a `shard_map` counts once for each device. A ragged product there counts once for
    each of the `shards` different pieces of the rows, since devices with the same rows split its groups.

    Raises ValueError for a `while` whose counter is compared to no number.
    """
    found: Counter[str] = Counter()

    def walk(jaxpr: Any, times: float, phase: str, repeated: float = 1.0) -> None:
        for eqn in jaxpr.eqns:
            own = phase_of(str(eqn.source_info.name_stack), phases) or phase
            name, params = eqn.primitive.name, eqn.params
            if name == "dot_general":
                found[own] += times * _dense(eqn)
            elif name in ("ragged_dot", "ragged_dot_general"):
                found[own] += times * _ragged(eqn) / repeated
            elif name == "shard_map":
                walk(params["jaxpr"], times * params["mesh"].size, own, params["mesh"].size / shards)
            elif name == "cond" and params.get("branches_platforms"):  # a choice by platform; the default is last
                walk(params["branches"][-1].jaxpr, times, own, repeated)
            elif name == "cond":
                first, *others = params["branches"]
                walk(first.jaxpr, times * (1 - branch_share), own, repeated)
                for other in others:
                    walk(other.jaxpr, times * branch_share / len(others), own, repeated)
            else:
                trips = _most_trips(params) if name == "while" else params.get("length", 1) if name == "scan" else 1
                for inner in _inner(params):
                    walk(inner, times * trips, own, repeated)

    walk(jaxpr, 1.0, "other")
    return dict(found)


def _most_trips(params: dict[str, Any]) -> int:
    literals = [x for eqn in params["cond_jaxpr"].eqns for x in eqn.invars if isinstance(x, Literal)]
    numbers = [x.val for x in literals if jnp.issubdtype(x.aval.dtype, jnp.integer)]
    if not numbers:
        raise ValueError("a while loop compares its counter to no number")
    return int(max(numbers))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation holds."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def _dense(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contracted)


def _ragged(eqn: Any) -> float:
    """A row is multiplied by the matrix of its own group alone. So it is in the gradient of the matrices, whose result
    has a matrix for each group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    whole = 2.0 * math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contracted)
    by_group = set(numbers.lhs_ragged_dimensions) <= set(contracted)
    return whole / out.shape[0] if by_group else whole
