"""The step of supervised training, preference optimisation and distillation, which differ in their loss alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from agrl_jax.policy.scoring import instructed, shared_tokens
from agrl_jax.rl.step import UpdateFn, split
from agrl_jax.types import Array, Params, Policy, TrainState

# (policy, params, piece, of=batch) -> loss and figures of a piece, as means over the whole batch, so that they add up
LossFn = Callable[..., tuple[Array, dict[str, Array]]]


def make_step(
    loss: LossFn, policy: Policy, update: UpdateFn, instructions: Array | None = None, micro_batches: int = 1
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Returns the pure function `step(state, batch) -> (state, metrics)`; metrics are float32 scalars.

    `instructions` [I] are the tokens before all prompts; they are run once a step. The gradient is a sum over
    `micro_batches` pieces of the batch.
    """
    after, instruct = instructed(policy, instructions)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        params, pull = jax.vjp(instruct, state.params)

        def one(piece: Any) -> tuple[Params, dict[str, Array]]:
            (_, figures), grads = jax.value_and_grad(partial(loss, after), has_aux=True)(params, piece, of=batch)
            return grads, figures

        grads, metrics = _summed(one, split(batch, micro_batches), micro_batches)
        (grads,) = pull(grads)
        metrics["tokens/trained"] += shared_tokens(params)
        metrics["budget/tokens"] += 3 * shared_tokens(params)
        params, opt_state, skipped, figures = update(grads, state.params, state.opt_state, state.skipped)
        state = state.replace(params=params, opt_state=opt_state, skipped=skipped, step=state.step + 1)
        return state, {name: jnp.asarray(value, jnp.float32) for name, value in (metrics | figures).items()}

    return step


def _summed(one: Callable[[Any], Any], pieces: Any, number: int) -> Any:
    """The sum of `one(piece)` over pieces [number, ...]."""
    first = jax.tree.map(lambda x: x[0], pieces)
    if number == 1:
        return one(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    return jax.lax.scan(lambda total, piece: (jax.tree.map(jnp.add, total, one(piece)), None), zeros, pieces)[0]
