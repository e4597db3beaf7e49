"""A mixture of experts in place of the feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from agrl_jax.policy.layers import HIDDEN, PolicyConfig, cast, param
from agrl_jax.policy.lora import Adapted
from agrl_jax.types import Array, Placement


class MixtureOfExperts(nnx.Module):
    """SwiGLU experts: each token goes through the experts that the router rates highest (arXiv 2101.03961).

    No token is dropped: tokens are sorted by expert, and ragged matrix products run over groups of any size.
    """

    def __init__(self, cfg: PolicyConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        e, d, m, dtype = cfg.experts, cfg.width, cfg.mlp, cfg.param_dtype
        into, out = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
        self.router = param(rngs, (d, e), ("embed", "experts"), d**-0.5, dtype)
        self.gate = param(rngs, (e, d, m), into, d**-0.5, dtype)
        self.up = param(rngs, (e, d, m), into, d**-0.5, dtype)
        self.down = param(rngs, (e, m, d), out, m**-0.5 * (2 * cfg.layers) ** -0.5, dtype)

    def route(self, x: Array, router: Array) -> tuple[Array, Array, Array]:
        """For x [..., D]: the router's probabilities [..., experts], and weights and indices [..., k] of the chosen.

        In float32, so that rounding does not change the choice.
        """
        logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision="highest")
        probability = jax.nn.softmax(logits)
        weight, chosen = jax.lax.top_k(probability, self.cfg.experts_per_token)
        if self.cfg.renormalise_experts:
            weight /= weight.sum(axis=-1, keepdims=True)
        return probability, weight, chosen

    def __call__(self, x: Array, placement: Placement) -> Array:
        """Runs each device's tokens through its own experts; answers to a token are added up."""
        experts, whole = jnp.arange(self.cfg.experts), ("experts", None, None)
        weights, structure = jax.tree.flatten([cast(weight, x.dtype) for weight in (self.gate, self.up, self.down)])

        def answered(x: Array, router: Array, experts: Array, *weights: Array) -> Array:
            return self._answer(x, router, experts, *jax.tree.unflatten(structure, weights))

        inputs = (HIDDEN, (None, None), ("experts",), *(whole for _ in weights))
        answer = placement.split(answered, inputs, ("experts", *HIDDEN))
        return answer(x, self.router[...], experts, *weights).sum(axis=0)

    def _answer(
        self, x: Array, router: Array, experts: Array, gate: Array | Adapted, up: Array | Adapted, down: Array | Adapted
    ) -> Array:
        """[1, B, G, n, D]: the weighted answers of these consecutive `experts`; 0 for a token that chose others."""
        rows, k = x.reshape(-1, x.shape[-1]), self.cfg.experts_per_token
        _, weight, chosen = self.route(rows, router)
        chosen = jnp.where((chosen >= experts[0]) & (chosen <= experts[-1]), chosen - experts[0], len(experts))
        order = jnp.argsort(chosen.reshape(-1))  # stable: the copy of row i for its j-th expert stands at i * k + j
        sizes = jnp.bincount(chosen.reshape(-1), length=len(experts)).astype(jnp.int32)
        ours = (jnp.arange(len(order)) < sizes.sum())[:, None]  # others come last; their products are undefined

        def product(rows: Array, weights: Array | Adapted) -> Array:
            if isinstance(weights, Adapted):
                return product(rows, weights.weight) + product(product(rows, weights.a), weights.b)
            return jnp.where(ours, jax.lax.ragged_dot(jnp.where(ours, rows, 0), weights, sizes), 0)

        ordered = rows[order // k]
        hidden = jax.nn.silu(product(ordered, gate)) * product(ordered, up)
        answers = product(hidden, down)[jnp.argsort(order)].reshape(-1, k, x.shape[-1])
        return jnp.einsum("nkd,nk->nd", answers, weight.astype(x.dtype)).reshape(1, *x.shape)
