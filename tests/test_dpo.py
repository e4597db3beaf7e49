"""Preference optimisation: what is mined, and the loss by hand."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import END, RESPONSE_LEN, lenient

from agrl_jax.rl import reader
from agrl_jax.supervised import dpo
from agrl_jax.supervised.dpo import Answers, Preferences
from agrl_jax.supervised.step import make_step
from agrl_jax.types import Policy, Thought, TrainState

KEY = np.asarray(jax.random.key_data(jax.random.key(1)))
B, N = 6, 8


@pytest.fixture(scope="module")
def batch(small):
    return small.batch([(0, 0), (1, 0), (2, 1)] * 2)


@pytest.fixture(scope="module")
def sample(small):
    return jax.jit(
        partial(dpo.sample_answers, small.policy, small.tables, number=N, length=RESPONSE_LEN, temperature=0.7)
    )


@pytest.fixture(scope="module")
def answers(small, sample, batch) -> Answers:
    return jax.device_get(sample(small.params, KEY, batch))


# ------------------------------------------------------------------------------------------------- mining


@pytest.mark.parametrize("tables_of", [lambda tables: tables, lenient], ids=["as it is", "lenient"])
def test_right_is_well_formed_and_of_the_true_tier_and_wrong_is_of_another_or_none(small, batch, tables_of):
    tables = tables_of(small.tables)
    mine = partial(dpo.sample_answers, small.policy, tables, number=N, length=RESPONSE_LEN, temperature=0.7)
    answers = jax.device_get(jax.jit(mine)(small.params, KEY, batch))
    reading = reader.read(tables, answers.tokens, answers.valid)
    tier, formed = np.asarray(reading.value[..., -1]), np.asarray(reading.well_formed)
    for b in range(B):
        for n in range(N):
            assert answers.right[b, n] == (formed[b, n] and tier[b, n] == batch.tier[b])
            assert answers.wrong[b, n] == (tier[b, n] != batch.tier[b])
    assert answers.wrong.any() and np.any(tier == batch.tier[:, None])
    assert answers.right.any() == (tables_of is lenient)  # an untrained policy's answers are not well-formed


def test_tokens_that_close_a_thought_by_force_are_no_part_of_an_answer(small, batch):
    tables = dataclasses.replace(small.tables, thought=Thought(None, (8, 9), 4))
    mine = partial(dpo.sample_answers, small.policy, tables, number=N, length=RESPONSE_LEN, temperature=0.7)
    answers = jax.device_get(jax.jit(mine)(small.params, KEY, batch))
    first = answers.tokens[..., :4]
    late = ~np.any((first == 8) | (first == tables.end_token), axis=-1)
    assert late.any() and np.all(answers.tokens[late][:, 4:6] == (8, 9))
    assert not answers.valid[late][:, 4:6].any() and answers.valid[late][:, :4].all()


def test_mining_again_or_in_another_order_finds_the_same(small, sample, batch, answers):
    order = np.array([3, 0, 5, 1, 2, 4])
    other = jax.device_get(sample(small.params, KEY, jax.tree.map(lambda x: x[order], batch)))
    np.testing.assert_array_equal(other.tokens, answers.tokens[order])
    np.testing.assert_allclose(other.logp, answers.logp[order], rtol=1e-5)


def test_the_kth_right_answer_goes_with_the_kth_wrong_one(batch):
    right = np.zeros((B, N), bool)
    wrong = np.zeros((B, N), bool)
    right[0, [1, 4, 6]], wrong[0, [0, 2, 7]] = True, True  # three pairs, of which two are taken
    right[1, 3] = True  # no wrong answer
    wrong[2, 5] = True  # no right answer
    right[5, 7], wrong[5, [2, 3]] = True, True
    tokens = np.arange(B * N * RESPONSE_LEN).reshape(B, N, RESPONSE_LEN)
    logp = -np.arange(B * N, dtype=np.float32).reshape(B, N)
    found = dpo.preferences(batch, Answers(tokens, tokens % 2 == 0, logp, right, wrong), most=2)
    assert len(found) == 3
    np.testing.assert_array_equal(found.prompt, batch.prompt[[0, 0, 5]])
    np.testing.assert_array_equal(found.prompt_len, batch.prompt_len[[0, 0, 5]])
    places = ([[0, 0], [0, 0], [5, 5]], [[1, 0], [4, 2], [7, 2]])
    np.testing.assert_array_equal(found.tokens, tokens[places])
    np.testing.assert_array_equal(found.valid, tokens[places] % 2 == 0)
    np.testing.assert_array_equal(found.reference, logp[places])
    none = dpo.preferences(batch, Answers(tokens, tokens > 0, logp, right & False, wrong), most=2)
    assert len(none) == 0 and none.tokens.shape == (0, 2, RESPONSE_LEN)


# ------------------------------------------------------------------------------------------------- the loss


def constant_policy(probability):
    """A policy that gives a token the same probability at every place."""

    def apply_groups(params, prompt, prompt_len, tokens):
        return jnp.zeros((*prompt.shape, 1)), jnp.zeros((*tokens.shape, 1))

    return Policy(None, lambda params, hidden: jnp.log(jnp.asarray(probability)) + 0 * hidden, None, apply_groups)


def test_the_loss_by_hand():
    """Tokens of probability 1/2, 1/4 and 1/8; references differ a little; invalid tokens do not count."""
    probability = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    pairs = Preferences(
        prompt=np.zeros((2, 3), np.int32),
        prompt_len=np.array([3, 2], np.int32),
        tokens=np.array([[[0, 1, 2], [2, 2, 0]], [[1, 1, 1], [0, 0, 3]]], np.int32),
        valid=np.array([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 1]]], bool),
        reference=np.log(2) * np.array([[-4, -6], [-1, -7]], np.float32),
    )
    loss, metrics = dpo.preference_loss(constant_policy(probability), {}, pairs, beta=0.5)
    # In bits. First: chosen -3 + 4 = 1, rejected -7 + 6 = -1; second: -2 + 1 = -1, and -5 + 7 = 2.
    margins = 0.5 * np.log(2) * np.array([2, -3])
    np.testing.assert_allclose(loss, np.mean(np.log1p(np.exp(-margins))), rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/loss"], loss)
    np.testing.assert_allclose(metrics["dpo/margin"], margins.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["dpo/chosen"], 0, atol=1e-7)
    np.testing.assert_allclose(metrics["dpo/rejected"], 0.5 * np.log(2) / 2, rtol=1e-5)
    assert metrics["dpo/accuracy"] == 0.5
    np.testing.assert_allclose(metrics["policy/entropy"], np.log(2) * 1.75, rtol=1e-5)
    assert metrics["tokens/trained"] == 5 + 9 and metrics["budget/tokens"] == 3 * 14


def test_a_step_starts_at_the_reference_and_is_that_of_whole_sequences(small, batch, answers, close):
    """At first the policy is the reference, so margins are 0 and the loss is log 2. The gradient is that of the usual
    layout."""
    first, last = np.argsort(answers.logp, axis=1)[:, [0, -1]].T
    places = np.arange(B)[:, None], np.stack([first, last], axis=1)
    pairs = Preferences(
        batch.prompt, batch.prompt_len, answers.tokens[places], answers.valid[places], answers.logp[places]
    )

    def descend(grads, params, opt_state, skipped):
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), grads, skipped, {}

    preference = partial(dpo.preference_loss, beta=0.3, temperature=0.7, chunk=5)
    step = jax.jit(make_step(preference, small.policy, descend))
    state = TrainState(small.params, small.params, jnp.int32(7), KEY, None, jnp.int32(0))
    after, metrics = step(state, pairs)
    np.testing.assert_allclose(metrics["policy/loss"], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(metrics["dpo/margin"], 0, atol=1e-5)

    lengths = pairs.valid.sum(axis=-1)
    whole = np.full((B, 2, 5 + RESPONSE_LEN), END, np.int32)
    target = np.zeros(whole.shape, bool)
    for b, n in np.ndindex(B, 2):
        begin, size = batch.prompt_len[b], lengths[b, n]
        whole[b, n, : begin + size] = [*batch.prompt[b, :begin], *pairs.tokens[b, n, :size]]
        target[b, n, begin : begin + size] = True

    @jax.jit
    @jax.value_and_grad
    def naive(params):
        flat = whole.reshape(2 * B, 1, -1)
        hidden, _ = small.policy.apply(params, flat[..., :-1])
        logp = jax.nn.log_softmax(small.policy.unembed(params, hidden) / 0.7)
        logp = jnp.take_along_axis(logp, flat[..., 1:, None], axis=-1)[..., 0].reshape(B, 2, -1)
        sums = jnp.sum(logp * target[..., 1:], axis=-1) - pairs.reference
        return -jnp.mean(jnp.log(jax.nn.sigmoid(0.3 * (sums[:, 0] - sums[:, 1]))))

    loss, gradient = naive(small.params)
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-5)
    close(after.opt_state, gradient, 1e-4)
    assert after.step == 8
    later = step(after.replace(opt_state=small.params), pairs)
    assert later[1]["policy/loss"] < metrics["policy/loss"]

    in_pieces = jax.jit(make_step(preference, small.policy, descend, micro_batches=3))
    again = in_pieces(after.replace(opt_state=small.params), pairs)
    close((again[0].opt_state, again[1]), (later[0].opt_state, later[1]))
