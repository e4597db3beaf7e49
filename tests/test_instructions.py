"""Instructions that run once give the same as at the head of every prompt: values, gradients, sampled tokens."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
from conftest import lenient
from test_probabilities import TEXTS
from test_transformer import BASE, PROMPT_LEN, drawn, tokens, variants

from agrl_jax.data.pipeline import PartTexts
from agrl_jax.evaluation.evaluator import judge_batch
from agrl_jax.policy import lora
from agrl_jax.policy.decoding import for_decoding
from agrl_jax.policy.lora import LoraConfig
from agrl_jax.policy.scoring import instructed, predicting_hidden, prefill, run_groups
from agrl_jax.policy.transformer import build
from agrl_jax.rl.step import make_step
from agrl_jax.supervised import distill, dpo, sft
from agrl_jax.supervised.fill import Blanks
from agrl_jax.supervised.step import make_step as make_supervised
from agrl_jax.types import UNKNOWN, TrainState

pytestmark = pytest.mark.usefixtures("scanned")

SHARED = tokens((6,), seed=3) % 10  # words of the small vocabulary too
PROMPT, RESPONSE = tokens((2, 4)), tokens((2, 3, 5), seed=1)


def in_front(prompt, prompt_len):
    """The usual layout: the instructions at the head of every prompt."""
    front = np.broadcast_to(SHARED, (len(prompt), len(SHARED)))
    return np.concatenate([front, prompt], axis=1), prompt_len + len(SHARED)


# ------------------------------------------------------------------------------------------- the policy


@variants
def test_values_and_gradients_are_those_of_whole_prompts(variant, close):
    _, params, _ = drawn(dataclasses.replace(BASE, **variant))
    into = np.random.default_rng(0).normal(size=(*RESPONSE.shape, BASE.width))

    def apart(policy, params, prompt, prompt_len):
        return predicting_hidden(policy, params, prefill(policy, params, prompt, prompt_len), RESPONSE)

    def together(policy, params, prompt, prompt_len):
        return run_groups(policy, params, prompt, prompt_len, RESPONSE)[1]

    def loss(params, policy, instruct, states, prompt, prompt_len):
        params = instruct(params)
        hidden = states(policy, params, prompt, prompt_len)
        return jnp.sum(hidden * into) + jnp.sum(policy.unembed(params, hidden) ** 2), hidden

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2, 3))
    plain, remat = (build(dataclasses.replace(BASE, **variant, remat=remat))[0] for remat in (False, True))
    whole = run(params, *instructed(plain, None), apart, *in_front(PROMPT, PROMPT_LEN))
    close(run(params, *instructed(remat, SHARED), together, PROMPT, PROMPT_LEN), whole)


@pytest.mark.slow
@variants
def test_decoding_goes_on_from_them(variant):
    policy, params, _ = drawn(dataclasses.replace(BASE, **variant))

    @partial(jax.jit, static_argnums=(1, 2))
    def run(params, policy, instruct, prompt, prompt_len):
        params = instruct(params)
        prefix = prefill(policy, params, prompt, prompt_len)
        empty = policy.init_cache(params, 2, 3, 5)
        first, cache = policy.apply(params, RESPONSE[..., :4], prefix=prefix, cache=empty)
        last, cache = policy.apply(params, RESPONSE[..., 4:], offset=4, prefix=prefix, cache=cache)
        return jnp.concatenate([first, last], axis=2), cache

    expected, stacked = run(params, *instructed(policy, None), *in_front(PROMPT, PROMPT_LEN))
    for platform in ("cpu", "gpu"):
        hidden, cache = run(for_decoding(params, platform), *instructed(policy, SHARED), PROMPT, PROMPT_LEN)
        np.testing.assert_allclose(hidden, expected, atol=1e-5, err_msg=platform)
        np.testing.assert_allclose(jnp.stack(cache.k), stacked.k, atol=1e-5, err_msg=platform)


def test_without_them_policy_and_parameters_are_the_same():
    policy, params, _ = drawn(BASE)
    for none in (None, np.zeros(0, np.int32)):
        same, instruct = instructed(policy, none)
        assert same is policy and instruct(params) is params


# ------------------------------------------------------------------------------- what is computed with it


def long(batch):
    """A batch whose prompts begin with the instructions."""
    prompt, prompt_len = in_front(batch.prompt, batch.prompt_len)
    return batch.replace(prompt=prompt, prompt_len=prompt_len)


def without_tokens(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(("tokens/", "budget/"))}


def adapted(small):
    """The policy as a function of adapters that add something."""
    cfg = LoraConfig(rank=3, alpha=6.0, modules=lora.MODULES)
    adapters = lora.init(jax.random.key(1), small.params, build(small.config)[2], cfg)
    return lora.over(small.params, small.policy, cfg), jax.tree.map(lambda x: x + 0.1, adapters)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all known", "filled in", "adapters"])
def test_a_supervised_step_is_that_of_whole_prompts(small, close, case):
    policy, params = adapted(small) if case == "adapters" else (small.policy, small.params)
    unknown = case == "filled in"
    batch = small.batch([(0, 0), (1, UNKNOWN if unknown else 0), (UNKNOWN if unknown else 2, 1)], tiers=[0, 1, 2])
    texts = PartTexts(np.array([[[0], [1], [2]], [[3], [4], [0]], [[5], [6], [7]]]),
                      np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]]))  # fmt: skip
    loss = partial(sft.gold_loss, blanks=Blanks(small.tables, texts) if unknown else None)
    make = partial(make_supervised, loss, policy, test_step.descend)
    state = TrainState(params, params, jnp.int32(0), test_step.KEY, None, jnp.int32(0))
    after, metrics = jax.jit(make(instructions=SHARED))(state, batch)
    expected, figures = jax.jit(make())(state, long(batch))
    close((after.params, after.opt_state), (expected.params, expected.opt_state))
    close(without_tokens(metrics), without_tokens(figures))
    assert metrics["tokens/trained"] == figures["tokens/trained"] - 2 * len(SHARED)  # once, not three times


def test_a_step_on_preferences_is_that_of_whole_prompts(small, close):
    batch, rng = small.batch([(0, 0), (1, 0), (2, 1)]), np.random.default_rng(0)
    answers = rng.integers(0, 10, (3, 2, 6)).astype(np.int32), rng.random((3, 2, 6)) < 0.8, rng.normal(-9, 1, (3, 2))
    pairs = dpo.Preferences(batch.prompt, batch.prompt_len, *answers)
    make = partial(make_supervised, partial(dpo.preference_loss, beta=0.3), small.policy, test_step.descend)
    state = TrainState(small.params, small.params, jnp.int32(0), test_step.KEY, None, jnp.int32(0))
    after, metrics = jax.jit(make(instructions=SHARED))(state, pairs)
    expected, figures = jax.jit(make())(state, long(pairs))
    close((after.opt_state, without_tokens(metrics)), (expected.opt_state, without_tokens(figures)))
    assert metrics["tokens/trained"] == figures["tokens/trained"] - 2 * len(SHARED)


def test_a_step_of_distillation_is_that_of_whole_prompts(small, close):
    batch, rng = small.batch([(0, 0), (1, 0), (2, 1)]), np.random.default_rng(0)
    tiers = np.array([[5, 0], [5, 1], [6, 2]], np.int32)
    stated = np.concatenate([tiers, rng.integers(0, 5, (3, 4))], axis=1).astype(np.int32)
    taught = distill.Lessons(
        batch.prompt, batch.prompt_len, rng.dirichlet(np.ones(3), 3).astype(np.float32), stated,
        np.full(3, 2, np.int32), np.full(3, 5, np.int32),
    )  # fmt: skip
    tier_first = PartTexts(np.stack([tiers, 0 * tiers]), np.array([[2, 2, 2], [1, 1, 0]], np.int32))
    loss = partial(distill.distill_loss, texts=tier_first, step_weight=0.3)
    make = partial(make_supervised, loss, small.policy, test_step.descend)
    state = TrainState(small.params, small.params, jnp.int32(0), test_step.KEY, None, jnp.int32(0))
    after, metrics = jax.jit(make(instructions=SHARED))(state, taught)
    expected, figures = jax.jit(make())(state, long(taught))
    close((after.opt_state, without_tokens(metrics)), (expected.opt_state, without_tokens(figures)))
    assert metrics["tokens/trained"] == figures["tokens/trained"] - 2 * len(SHARED)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [test_step.CONFIG, test_step.UPDATES], ids=["one piece", "pieces"])
def test_a_step_of_rl_is_that_of_whole_prompts(small, close, cfg):
    """Rollout, replay, reference and loss give the same tokens, log-probabilities and gradient."""
    batch = small.batch([(0, 0), (1, 0), (2, 1), (2, 0)] * 2, rows=range(8))
    reference = None if cfg.objective.kl == "none" else jax.tree.map(lambda x: 0.9 * x, small.params)
    make = partial(make_step, small.policy, lenient(small.tables), ("fit", "brand"), test_step.descend, cfg)
    state = test_step.fresh_state(small.params, cfg)
    after, metrics, seen = jax.jit(make(instructions=SHARED))(state, batch, reference)
    expected, figures, naive = jax.jit(make())(state, long(batch), reference)
    assert metrics["guide/share"] > 0
    np.testing.assert_array_equal(seen.rolled.tokens, naive.rolled.tokens)
    close(seen.rolled.logp, naive.rolled.logp)
    close((after.params, after.opt_state), (expected.params, expected.opt_state))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), without_tokens(metrics), without_tokens(figures)
    )
    once, updates, passes = len(SHARED), cfg.epochs * cfg.minibatches, reference is not None
    trained = figures["tokens/trained"] - (8 * cfg.epochs - updates) * once
    assert metrics["tokens/trained"] == trained
    saved = once * (7 + 7 * passes + 3 * (8 * cfg.epochs - updates))
    assert metrics["budget/tokens"] == figures["budget/tokens"] - saved


def test_judgements_are_those_of_whole_prompts(small, close):
    batch = small.batch([(0, 0), (1, 0), (2, 1), (2, 0)])

    @partial(jax.jit, static_argnums=(0, 1))
    def judge(policy, instruct, batch):
        return judge_batch(policy, small.tables, TEXTS, 6, instruct(small.params), batch)

    found = judge(*instructed(small.policy, SHARED), batch)
    expected = judge(*instructed(small.policy, None), long(batch))
    close(*(np.exp(judged.pop("part_logprobs")) for judged in (found, expected)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
