"""Supervised fine-tuning: the loss falls on the gold response, as far as it is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrl_jax.supervised import sft
from agrl_jax.types import UNKNOWN, Cache, Policy, TrainState


@pytest.fixture(scope="module")
def batch(small):
    """Known throughout: F:yes ,B:ok ,T:good end; up to the first step: F:part; not at all."""
    return small.batch([(0, 0), (1, UNKNOWN), (UNKNOWN, UNKNOWN)], tiers=[0, 1, 1])


def constant_policy(probability):
    """A policy that gives every token the same probability wherever it stands."""

    def apply(params, tokens, **_):
        b, g, n = tokens.shape
        empty = jnp.zeros((1, b, g, n, 1, 1))
        return jnp.zeros((b, g, n, 1)), Cache(empty, empty)

    def unembed(params, hidden):
        return jnp.log(jnp.asarray(probability)) + 0 * hidden

    return Policy(apply, unembed, None)


def test_the_loss_by_hand(batch):
    probability = np.full(12, 5 / 64 / 7)  # what the others leave
    probability[[0, 3, 5, 11, 1]] = 1 / 2, 1 / 4, 1 / 8, 1 / 32, 1 / 64  # the gold tokens, the end, and F:part
    loss, metrics = sft.gold_loss(constant_policy(probability), {}, batch)
    # Four tokens of the first, one of the second, none of the third, which says nothing.
    np.testing.assert_allclose(loss, np.log(2) * (1 + 2 + 3 + 5 + 6) / 5, rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/loss"], loss)
    np.testing.assert_allclose(metrics["policy/gold_probability"], (2.0**-11 + 2.0**-6 + 1) / 3, rtol=1e-5)
    entropy = -np.sum(probability * np.log(probability))
    np.testing.assert_allclose(metrics["policy/entropy"], entropy, rtol=1e-5)
    assert metrics["tokens/trained"] == batch.prompt_len.sum() + 5


@pytest.fixture(scope="module")
def value_and_grad(small):
    return jax.jit(jax.value_and_grad(lambda p, b: sft.gold_loss(small.policy, p, b, chunk=5)[0]))


def test_the_loss_is_that_of_whole_sequences(small, batch, value_and_grad, close):
    """Prompt and response as one sequence, the usual layout; without chunks."""
    width = batch.prompt.shape[1] + batch.gold.shape[1]
    whole, target = np.zeros((3, width), np.int32), np.zeros((3, width), bool)
    for i, (n, m) in enumerate(zip(batch.prompt_len, batch.gold_len, strict=True)):
        whole[i, : n + m] = [*batch.prompt[i, :n], *batch.gold[i, :m]]
        target[i, n : n + m] = True

    @jax.jit
    @jax.value_and_grad
    def naive(params):
        hidden, _ = small.policy.apply(params, whole[:, None, :-1])
        logp = jax.nn.log_softmax(small.policy.unembed(params, hidden[:, 0]))
        logp = jnp.take_along_axis(logp, whole[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(logp * target[:, 1:]) / np.sum(target)

    loss, gradient = value_and_grad(small.params, batch)
    by_hand, expected = naive(small.params)
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
    close(gradient, expected)


def test_nothing_after_the_known_parts_matters(batch, value_and_grad, small):
    rubbish = np.where(np.arange(batch.gold.shape[1]) < batch.gold_len[:, None], batch.gold, 9)
    expected = value_and_grad(small.params, batch)
    jax.tree.map(np.testing.assert_array_equal, value_and_grad(small.params, batch.replace(gold=rubbish)), expected)


def test_a_batch_of_which_nothing_is_known_gives_no_gradient(batch, value_and_grad, small):
    loss, gradient = value_and_grad(small.params, batch.replace(gold_len=np.zeros(3, np.int32)))
    assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_step_updates_by_the_gradient_and_counts(small, batch, value_and_grad, close):
    def update(grads, params, opt_state, skipped):
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), opt_state + 1, skipped, {"optim/rate": 0.5}

    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(small.params, jnp.int32(3), jnp.int32(7), key, None, jnp.int32(0))
    after, metrics = jax.jit(sft.make_step(small.policy, update, chunk=5))(state, batch)
    assert after.step == 8 and after.opt_state == 4 and after.skipped == 0 and after.guidance is None
    np.testing.assert_array_equal(after.key, key)
    assert metrics["optim/rate"] == 0.5 and all(value.dtype == jnp.float32 for value in metrics.values())
    loss, gradient = value_and_grad(small.params, batch)
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-6)
    close(after.params, jax.tree.map(lambda p, g: p - 0.5 * g, small.params, gradient), 1e-6)
