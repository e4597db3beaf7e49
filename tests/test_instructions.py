"""Instructions run once give what they give at the head of every prompt: values, gradients, sampled tokens."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import BASE, PROMPT_LEN, drawn, tokens, variants

from agrl_jax.policy.decoding import for_decoding
from agrl_jax.policy.scoring import instructed, predicting_hidden, prefill
from agrl_jax.policy.transformer import build

pytestmark = pytest.mark.usefixtures("quick_compiles")

SHARED = tokens((6,), seed=3)
PROMPT, RESPONSE = tokens((2, 4)), tokens((2, 3, 5), seed=1)


def in_front(prompt, prompt_len):
    """The usual layout: the instructions at the head of every prompt."""
    front = np.broadcast_to(SHARED, (len(prompt), len(SHARED)))
    return np.concatenate([front, prompt], axis=1), prompt_len + len(SHARED)


# ------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
@variants
def test_values_and_gradients_are_those_of_whole_prompts(variant, remat, close):
    _, params, _ = drawn(dataclasses.replace(BASE, **variant))
    policy, _, _ = build(dataclasses.replace(BASE, **variant, remat=remat))
    after, instruct = instructed(policy, SHARED)
    into = np.random.default_rng(0).normal(size=(*RESPONSE.shape, BASE.width))

    def loss(params, policy, instruct, prompt, prompt_len):
        params = instruct(params)
        hidden = predicting_hidden(policy, params, prefill(policy, params, prompt, prompt_len), RESPONSE)
        return jnp.sum(hidden * into) + jnp.sum(policy.unembed(params, hidden) ** 2), hidden

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))
    whole = run(params, *instructed(policy, None), *in_front(PROMPT, PROMPT_LEN))
    close(run(params, after, instruct, PROMPT, PROMPT_LEN), whole)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@variants
def test_decoding_goes_on_from_them(variant, platform):
    policy, params, _ = drawn(dataclasses.replace(BASE, **variant))

    @partial(jax.jit, static_argnums=(1, 2))
    def run(params, policy, instruct, prompt, prompt_len):
        params = instruct(params)
        prefix = prefill(policy, params, prompt, prompt_len)
        empty = policy.init_cache(params, 2, 3, 5)
        first, cache = policy.apply(params, RESPONSE[..., :4], prefix=prefix, cache=empty)
        last, cache = policy.apply(params, RESPONSE[..., 4:], offset=4, prefix=prefix, cache=cache)
        return jnp.concatenate([first, last], axis=2), cache

    hidden, cache = run(for_decoding(params, platform), *instructed(policy, SHARED), PROMPT, PROMPT_LEN)
    expected, stacked = run(params, *instructed(policy, None), *in_front(PROMPT, PROMPT_LEN))
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    np.testing.assert_allclose(jnp.stack(cache.k), stacked.k, atol=1e-5)


def test_without_them_policy_and_parameters_are_the_same():
    policy, params, _ = drawn(BASE)
    for none in (None, np.zeros(0, np.int32)):
        same, instruct = instructed(policy, none)
        assert same is policy and instruct(params) is params
