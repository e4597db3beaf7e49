"""The optimiser: AdamW, Adafactor, or Muon for the layers' matrices, with warm-up and clipping by norm. An update whose
gradient is not finite is skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from agrl_jax.types import Array, Params


def learning_rate_schedule(
    peak: float, warmup: int, steps: int, schedule: str = "cosine"
) -> Callable[[Array | int], Array]:
    """The learning rate as a function of the number of updates made before this one.

    It rises linearly to `peak` over the first `warmup` updates (the first one uses peak / warmup, so
    none is wasted at zero), then stays ("constant") or falls to zero at `steps` along half a cosine.
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule={schedule!r}, expected cosine or constant")

    def rate(count: Array | int) -> Array:
        count = jnp.asarray(count, jnp.float32)
        done = jnp.clip((count - warmup) / max(steps - warmup, 1), 0, 1)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * done)) if schedule == "cosine" else 1.0
        return peak * jnp.minimum((count + 1) / max(warmup, 1), fall)

    return rate


def make(
    learning_rate: float,
    warmup: int,
    steps: int,
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    kind: str = "adamw",
    moments: str = "float32",
    decay: Any = None,
    matrix_rate: float = 0.0,
    axes: Any = None,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) or Adafactor (arXiv 1804.04235) after clipping by global norm, if `clip_norm` is not 0.

    `steps` counts updates: RL steps times epochs times minibatches. `decay` is a tree of booleans saying
    which parameters decay (`decay_mask`); by default those of two or more dimensions. Parameters kept in
    bfloat16 lose updates below about 1/256 of their size: keep them in float32 for small learning rates.

    Updates are computed in float32. `moments` is the dtype in which the state is kept between updates. Adafactor keeps
    only the mean squares of each matrix's rows and columns, and no momentum; `b1`, `b2` and `eps` are AdamW's.

    With a `matrix_rate`, the matrices of the layers are updated by Muon (Jordan et al., 2024: the
    momentum, orthogonalised) with that peak learning rate, and the other parameters by AdamW with Nesterov's
    momentum. `axes`, the logical axis names of each parameter, then tell which parameters are matrices, and their
    inputs from their outputs.
    """
    rate = learning_rate_schedule(learning_rate, warmup, steps, schedule)
    if matrix_rate:
        rule = optax.contrib.muon(
            learning_rate_schedule(matrix_rate, warmup, steps, schedule),
            weight_decay=weight_decay, eps=eps,
            adam_b1=b1, adam_b2=b2, adam_weight_decay=weight_decay, adam_learning_rate=rate,
            muon_weight_dimension_numbers=matrix_dimensions(axes),
        )
    else:
        adafactor = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        rule = optax.chain(
            adafactor if kind == "adafactor" else optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
            optax.add_decayed_weights(weight_decay, mask=_two_dimensional if decay is None else decay),
            optax.scale_by_learning_rate(rate),
        )
    inner = optax.chain(optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(), rule)

    def init(params: Params) -> Any:
        return _moments(inner.init(_float32(params)), moments)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        params = _float32(params)
        if matrix_rate:  # Muon lets all parameters decay, and reads them for nothing else
            kept = _two_dimensional(params) if decay is None else decay
            params = jax.tree.map(lambda x, decays: x if decays else jnp.zeros_like(x), params, kept)
        updates, state = inner.update(_float32(grads), _moments(state, "float32"), params)
        return updates, _moments(state, moments)

    return optax.GradientTransformation(init, update)


def decay_mask(axes: Any) -> Any:
    """Which parameters decay, from a tree of logical axis names: the matrices.

    A matrix has the axis `embed`, or the `rank` of an adapter, and another besides `layers`. By their number of
    dimensions, stacked norms, [layers, embed], and biases, [layers, heads, head_dim], would be matrices too.
    """

    def is_matrix(names: tuple[str, ...]) -> bool:
        return ("embed" in names or "rank" in names) and len(set(names) - {"layers"}) > 1

    return jax.tree.map(is_matrix, axes, is_leaf=lambda x: isinstance(x, tuple))


def matrix_dimensions(axes: Any) -> Any:
    """Which axes of each matrix of the layers are inputs and outputs, for Muon; None for all other parameters.

    The input axes of a weight come before its output axes, and one of the two sides is `embed`.
    """

    def dimensions(names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
        sides = [i for i, name in enumerate(names) if name not in ("layers", "experts")]
        if "layers" not in names or "embed" not in names or len(sides) < 2:
            return None
        embed = names.index("embed")
        others = tuple(i for i in sides if i != embed)
        into, out = ((embed,), others) if embed < others[0] else (others, (embed,))
        return optax.contrib.MuonDimensionNumbers(into, out)

    return jax.tree.map(dimensions, axes, is_leaf=lambda x: isinstance(x, tuple))


def guarded_update(
    tx: optax.GradientTransformation,
    grads: Params,
    params: Params,
    opt_state: Any,
    skipped: Array,
) -> tuple[Params, Any, Array, dict[str, Array]]:
    """One update, or none if any gradient is not finite. Pure, and safe under jit.

    `skipped` [] int32 counts skipped updates in a row; the count that is returned is 0 after an update that
    was made. A skipped update leaves parameters and optimiser state (its schedule included) as they were.

    Returns `(params, opt_state, skipped, stats)`; `stats`, all [] float32: `grad_norm` before clipping,
    `update_norm` (0 if skipped), `finite` (1 if the update was made).
    """
    grad_norm = optax.tree.norm(_float32(grads))  # not finite as soon as one element is not
    finite = jnp.isfinite(grad_norm)
    updates, new_state = tx.update(grads, opt_state, params)

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old)

    stats = {
        "grad_norm": grad_norm,
        "update_norm": choose(optax.tree.norm(_float32(updates)), jnp.zeros((), jnp.float32)),
        "finite": finite.astype(jnp.float32),
    }
    params = jax.tree.map(choose, optax.apply_updates(params, updates), params)
    opt_state = jax.tree.map(choose, new_state, opt_state)
    return params, opt_state, choose(jnp.zeros_like(skipped), skipped + 1), stats


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _moments(state: Any, dtype: str) -> Any:
    """A state of the optimiser with its moments in `dtype`; counts, and the coefficients of Muon, stay as they are."""

    def cast(path: tuple[Any, ...], x: Array) -> Array:
        is_moment = jnp.issubdtype(x.dtype, jnp.floating) and getattr(path[-1], "name", "") != "ns_coeffs"
        return x.astype(dtype) if is_moment else x

    return jax.tree_util.tree_map_with_path(cast, state)


def _two_dimensional(params: Params) -> Any:
    return jax.tree.map(lambda x: x.ndim >= 2, params)
