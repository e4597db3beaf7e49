"""Supervised fine-tuning: the loss is over the gold response, as far as it is known."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrl_jax.supervised import sft
from agrl_jax.supervised.step import make_step
from agrl_jax.types import UNKNOWN, Policy, TrainState

KEY = jax.random.key_data(jax.random.key(0))


@pytest.fixture(scope="module")
def batch(small):
    """Three pairs: all known (F:yes ,B:ok ,T:good end); known up to the first step (F:part); nothing known."""
    return small.batch([(0, 0), (1, UNKNOWN), (UNKNOWN, UNKNOWN)], tiers=[0, 1, 1])


def constant_policy(probability):
    """A policy that gives a token the same probability at every place."""

    def apply_groups(params, prompt, prompt_len, tokens):
        return jnp.zeros((*prompt.shape, 1)), jnp.zeros((*tokens.shape, 1))

    def unembed(params, hidden):
        return jnp.log(jnp.asarray(probability)) + 0 * hidden

    return Policy(None, unembed, None, apply_groups)


def test_the_loss_by_hand(batch):
    probability = np.full(12, 5 / 64 / 7)  # the rest
    probability[[0, 3, 5, 11, 1]] = 1 / 2, 1 / 4, 1 / 8, 1 / 32, 1 / 64  # the gold tokens, the end, and F:part
    loss, metrics = sft.gold_loss(constant_policy(probability), {}, batch)
    # Four tokens of the first pair, one of the second, none of the third.
    np.testing.assert_allclose(loss, np.log(2) * (1 + 2 + 3 + 5 + 6) / 5, rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/loss"], loss)
    np.testing.assert_allclose(metrics["policy/gold_probability"], (2.0**-11 + 2.0**-6 + 1) / 3, rtol=1e-5)
    entropy = -np.sum(probability * np.log(probability))
    np.testing.assert_allclose(metrics["policy/entropy"], entropy, rtol=1e-5)
    assert metrics["tokens/trained"] == batch.prompt_len.sum() + 5
    assert metrics["budget/tokens"] == 3 * metrics["tokens/trained"]


@pytest.fixture(scope="module")
def step(small):
    """`step(batch)`: the state and the metrics after a step of gradient descent, the gradient in `opt_state`."""

    def descend(grads, params, opt_state, skipped):
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), grads, skipped, {"optim/rate": 0.5}

    compiled = jax.jit(make_step(partial(sft.gold_loss, chunk=5), small.policy, descend))
    return lambda batch: compiled(TrainState(small.params, small.params, jnp.int32(7), KEY, None, jnp.int32(0)), batch)


def test_a_step_is_that_of_whole_sequences(small, batch, step, close):
    """The usual layout has prompt and response as one sequence, and no chunks."""
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

    after, metrics = step(batch)
    loss, gradient = naive(small.params)
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-5)
    close(after.opt_state, gradient)
    close(after.params, jax.tree.map(lambda p, g: p - 0.5 * g, small.params, gradient), 1e-6)
    assert after.step == 8 and after.skipped == 0 and after.guidance is None
    np.testing.assert_array_equal(after.key, KEY)
    assert metrics["optim/rate"] == 0.5 and all(value.dtype == jnp.float32 for value in metrics.values())


def test_a_batch_in_pieces_is_the_same_step(small, batch, close):
    """With a weight for prompts. Each piece has one pair; nothing is known of the last one. Instructions count once."""

    def descend(grads, params, opt_state, skipped):
        return params, grads, skipped, {}

    def run(pieces):
        loss, shared = partial(sft.gold_loss, prompt_weight=0.5), np.array([1, 4])
        state = TrainState(small.params, small.params, jnp.int32(7), KEY, None, jnp.int32(0))
        return jax.jit(make_step(loss, small.policy, descend, shared, pieces))(state, batch)

    (whole, metrics), (summed, figures) = run(1), run(3)
    close(summed.opt_state, whole.opt_state)
    close(figures, metrics)
    assert figures["tokens/trained"] == metrics["tokens/trained"] == 2 + batch.prompt_len.sum() + 5


def test_prompts_can_weigh_in(small, batch):
    """Half of the mean loss of their tokens, except the first of each, is added. The metric does not change."""

    @jax.jit
    def losses(params):
        plain, _ = sft.gold_loss(small.policy, params, batch)
        loss, metrics = sft.gold_loss(small.policy, params, batch, prompt_weight=0.5)
        hidden, _ = small.policy.apply(params, batch.prompt[:, None])
        return plain, loss, metrics["policy/loss"], jax.nn.log_softmax(small.policy.unembed(params, hidden[:, 0]))

    plain, loss, reported, logp = map(np.asarray, losses(small.params))
    own = [
        -logp[i, t - 1, batch.prompt[i, t]] for i, length in enumerate(batch.prompt_len) for t in range(1, length)
    ]
    np.testing.assert_allclose(loss, plain + 0.5 * np.mean(own), rtol=1e-5)
    assert reported == plain


def test_nothing_after_the_known_parts_matters(batch, step):
    rubbish = np.where(np.arange(batch.gold.shape[1]) < batch.gold_len[:, None], batch.gold, 9)
    jax.tree.map(np.testing.assert_array_equal, step(batch.replace(gold=rubbish)), step(batch))


def test_a_batch_of_which_nothing_is_known_gives_no_gradient(batch, step):
    after, metrics = step(batch.replace(gold_len=np.zeros(3, np.int32)))
    assert metrics["policy/loss"] == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(after.opt_state))
