"""The whole step: its gradients, compared with the usual layout, its replays, and that it compiles once."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import END, RESPONSE_LEN, lenient

from agrl_jax.policy.decoding import for_decoding
from agrl_jax.policy.scoring import predicting_hidden, prefill, token_logprobs
from agrl_jax.rl import guidance, objective, reader
from agrl_jax.rl.guidance import GuidanceConfig
from agrl_jax.rl.objective import ObjectiveConfig
from agrl_jax.rl.reward import RewardConfig, component_names
from agrl_jax.rl.rollout import PURPOSE_REPLAY, PURPOSE_ROLLOUT, rollout, row_keys
from agrl_jax.rl.step import (
    StepConfig,
    _accumulate,
    _Example,
    _learnt_first,
    _Parts,
    _roll,
    _rollout_metrics,
    make_step,
)
from agrl_jax.runtime import optim
from agrl_jax.types import UNKNOWN, Batch, OwnAnswers, Rollout, TrainState

B, G, N = 8, 4, 40
RATE = 0.5  # of plain gradient descent
KEY = np.asarray(jax.random.key_data(jax.random.key(3)))  # on the host, since each mesh needs a copy of its own
CONFIG = StepConfig(
    group_size=G, response_len=RESPONSE_LEN, temperature=0.8, epochs=1, minibatches=1, micro_batches=1,
    logprob_chunk=50, total_steps=100, shards=1, inspect=B,
    reward=RewardConfig(
        composition="gated", tier_kind="exact", tier_weight=1.0, step_weight=0.5, consistent_weight=0.25,
        format_weight=0.25, overlong_weight=0.1, overlong_from=4,
    ),
    objective=ObjectiveConfig(
        loss="grpo", credit="sequence", clip_low=0.2, clip_high=0.28, kl="k3", kl_weight=0.1, entropy_weight=0.01,
        mask_truncated=False, treatment="shaped", gamma=0.1, imitate_weight=0.5, baseline="pooled", step_weight=0.3,
    ),
    guidance=GuidanceConfig(
        threshold=0.0, capacity=1.0, replace=2, source="gold", level="adaptive", initial_level=1.0, eta=0.4,
        per_family=False, cap="none",
    ),
)
# Four updates from one rollout, so that ratios are not 1, each in two pieces; unusual settings where there is a choice.
UPDATES = dataclasses.replace(
    CONFIG, epochs=2, minibatches=2, micro_batches=2, shards=2,
    objective=dataclasses.replace(
        CONFIG.objective, loss="dapo", credit="step", kl="none", mask_truncated=True, treatment="imitate",
        baseline="unguided_only", entropy_weight=0.0,
    ),
    guidance=dataclasses.replace(CONFIG.guidance, capacity=0.5, initial_level=2.0, level="fixed"),
)

# [T, V] tokens of a whole answer: fit, brand, tier, end. Places after the end may have any token.
FORM = np.ones((RESPONSE_LEN, END + 1), bool)
FORM[:4] = [np.isin(np.arange(END + 1), tokens) for tokens in ([0, 1, 2], [3, 4], [5, 6, 7], [END])]


def descend(grads, params, opt_state, skipped):
    """Plain gradient descent. It returns the last gradient in place of an optimiser's state."""
    return jax.tree.map(lambda p, g: p - RATE * g, params, grads), grads, skipped, {}


def fresh_state(params, cfg, opt_state=None, skipped=0) -> TrainState:
    opt_state = jax.tree.map(jnp.zeros_like, params) if opt_state is None else opt_state
    memory = None if cfg.guidance is None else guidance.initial_state(N, 2, cfg.guidance, RESPONSE_LEN, 3)
    return TrainState(params, opt_state, jnp.int32(0), KEY, memory, jnp.int32(skipped))


def jitted(small, cfg, update=descend):
    return jax.jit(make_step(small.policy, lenient(small.tables), ("fit", "brand"), update, cfg))


@pytest.fixture(scope="module")
def reference(small):
    """A policy that differs a little from the trained one."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + (0.1 * rng.normal(size=x.shape)).astype(np.float32), small.params)


class Truths(NamedTuple):
    """Batches of the same rows: with labels that some answers of each group state (easy), or none (hard)."""

    plain: Rollout  # the first step's answers before any replay
    easy: Batch
    hard: Batch


@pytest.fixture(scope="module")
def truths(small) -> Truths:
    rows = range(N)

    @jax.jit
    def roll(batch):
        prefix = prefill(small.policy, small.params, batch.prompt, batch.prompt_len)
        rolled = rollout(
            small.policy, small.params, prefix, row_keys(KEY, PURPOSE_ROLLOUT, 0, batch.row, G), length=RESPONSE_LEN,
            temperature=CONFIG.temperature, end_token=small.tables.end_token,
        )
        return rolled, reader.read(small.tables, rolled.tokens, rolled.valid).value[..., -1]

    rolled, tier = roll(small.batch([(0, 0)] * N, rows=rows))
    stated = [set(group.tolist()) & {0, 1, 2} for group in np.asarray(tier)]
    fit = [row for row in rows if 0 < len(stated[row]) < 3][:B]
    assert len(fit) == B
    steps = [(0, 0), (1, 0), (2, 1)]  # for each tier
    easy = [steps[min(stated[row])] for row in fit]
    hard = [steps[min({0, 1, 2} - stated[row])] for row in fit]
    plain = jax.tree.map(lambda x: np.asarray(x)[np.array(fit)], rolled)
    return Truths(plain, small.batch(easy, rows=fit), small.batch(hard, rows=fit))


@pytest.fixture(scope="module")
def step(small, reference):
    """The step of CONFIG; `step.compiled` is the jitted function."""
    compiled = jitted(small, CONFIG)
    state = jax.device_put(fresh_state(small.params, CONFIG))  # a host array would have another signature
    run = partial(lambda batch, state: compiled(state, batch, reference), state=state)
    run.compiled = compiled
    return run


@pytest.fixture(scope="module")
def mixed(truths) -> Batch:
    """Half of the groups fail."""
    return jax.tree.map(lambda a, b: np.concatenate([a[: B // 2], b[B // 2 :]]), truths.easy, truths.hard)


# --------------------------------------------------------------------------------------- the usual layout


def naive_loss(params, small, cfg, batch, rolled, advantage, weights, reference):
    """The loss and its figures in the usual layout: each sample is one sequence, and all logits are held at once."""
    s = batch.prompt.shape[1]
    place = np.arange(s + RESPONSE_LEN) - batch.prompt_len[:, None]  # [B, S + T] place in the response
    index = np.broadcast_to(np.clip(place, 0, RESPONSE_LEN - 1)[:, None], (B, G, s + RESPONSE_LEN))
    prompt = np.pad(batch.prompt, ((0, 0), (0, RESPONSE_LEN)))
    whole = jnp.where((place < 0)[:, None], prompt[:, None], jnp.take_along_axis(rolled.tokens, index, axis=2))
    at = batch.prompt_len[:, None] - 1 + np.arange(RESPONSE_LEN)  # [B, T] places that predict each token

    def logprobs(params):
        hidden, _ = small.policy.apply(params, whole.reshape(B * G, 1, -1))
        hidden = jnp.take_along_axis(hidden.reshape(B, G, s + RESPONSE_LEN, -1), at[:, None, :, None], axis=2)
        logits = small.policy.unembed(params, hidden) / cfg.temperature
        if cfg.constrained:
            logits = jnp.where(FORM, logits, -1e30)
        logp = jax.nn.log_softmax(logits)
        taken = jnp.take_along_axis(logp, rolled.tokens[..., None], axis=-1)[..., 0]
        return taken, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    logp, entropy = logprobs(params)
    reference_logp = None if cfg.objective.kl == "none" else logprobs(reference)[0]
    return objective.loss_terms(
        logp, entropy, rolled.logp, reference_logp, advantage, rolled.sampled, weights, cfg.objective
    )


def weights_of(rolled, advantage, cfg) -> objective.TokenWeights:
    """The weights of all tokens of the groups that are learnt from, also for entropy and KL."""
    weights = objective.token_weights(rolled, cfg.objective)
    learnt = objective.learnt_from(advantage, weights, cfg.objective)[:, None, None]
    return jax.tree.map(lambda w: w * learnt, weights)


def naive(small, cfg, batch, reference=None):
    """`(params, rolled, advantage, weights) -> (loss, figures), gradient`, jitted."""

    def loss(params, rolled, advantage, weights):
        return naive_loss(params, small, cfg, batch, rolled, advantage, weights, reference)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_shared_prompts_give_loss_and_gradients_of_the_usual_layout(small, step, mixed, reference, close):
    after, metrics, seen = step(mixed)
    assert np.any(seen.rolled.forced) and 0 < metrics["guide/share"] < 1
    advantage = np.broadcast_to(np.asarray(seen.advantage)[..., None], seen.rolled.tokens.shape)
    weights = weights_of(seen.rolled, advantage, CONFIG)
    (loss, figures), gradient = naive(small, CONFIG, mixed, reference)(small.params, seen.rolled, advantage, weights)
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/kl"], figures["kl"] / figures["learnt"], rtol=1e-4)
    close(after.opt_state, gradient, 1e-5)
    close(after.params, jax.tree.map(lambda p, g: p - RATE * g, small.params, gradient), 1e-6)
    assert metrics["policy/kl"] > 0.001 and metrics["policy/sampler_gap"] <= 1e-5


@pytest.mark.slow
def test_epochs_minibatches_and_micro_batches_are_updates_one_after_the_other(small, truths, close):
    """Four updates, computed in the usual layout without pieces. Minibatch i has examples i, i + 2, i + 4, ..."""
    start = fresh_state(small.params, UPDATES)
    after, metrics, seen = jitted(small, UPDATES)(start, truths.hard, None)
    forced = np.any(seen.rolled.forced, axis=-1)
    # The capacity is two groups of each shard of four, with two answers in each.
    np.testing.assert_array_equal(forced.reshape(2, 4 * G).sum(axis=1), [4, 4])
    assert metrics["guide/share"] == 0.5
    advantage = objective.advantages(seen.score, seen.reading, forced, RESPONSE_LEN, UPDATES.objective)
    gradient_of = naive(small, UPDATES, truths.hard)
    params, expected = small.params, []
    for _ in range(2):
        for first in range(2):
            minibatch = (np.arange(B) % 2 == first)[:, None, None]
            rolled = seen.rolled.replace(sampled=seen.rolled.sampled & minibatch, valid=seen.rolled.valid & minibatch)
            weights = weights_of(rolled, advantage, UPDATES)
            (loss, figures), gradient = gradient_of(params, seen.rolled, advantage, weights)
            params = jax.tree.map(lambda p, g: p - RATE * g, params, gradient)
            expected.append((loss, *(figures[name] / figures["learnt"] for name in ("clipped", "ratio_change"))))
    close(after.opt_state, gradient, 3e-5)  # the fourth gradient; parameters differ by rounding
    close(after.params, params, 1e-5)
    found = [metrics[f"policy/{name}"] for name in ("loss", "clipped", "ratio_change")]
    np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-4)
    assert found[1] > 0 and found[2] > 0.01  # later updates have ratios that are not 1
    assert metrics["policy/sampler_gap"] <= 1e-5  # of the policy that sampled


@pytest.mark.slow
def test_answers_sampled_under_the_grammar_are_whole_and_learnt_from_by_the_same_choices(
    small, truths, reference, close
):
    """Loss, divergence, entropy and gradients of a guided step in micro-batches equal those of log-probabilities that
    are renormalised by hand, in the usual layout without pieces."""
    guide = dataclasses.replace(CONFIG.guidance, threshold=0.25)  # a group with one right answer of four fails too
    cfg = dataclasses.replace(CONFIG, constrained=True, micro_batches=2, logprob_chunk=20, guidance=guide)
    compiled = jax.jit(make_step(small.policy, small.tables, ("fit", "brand"), descend, cfg))
    after, metrics, seen = compiled(fresh_state(small.params, cfg), truths.hard, reference)
    rolled = jax.tree.map(np.asarray, seen.rolled)
    assert np.all(seen.reading.well_formed) and rolled.finished.all()
    assert np.all(rolled.valid == (np.arange(RESPONSE_LEN) < 4))
    assert np.any(rolled.forced)
    assert np.all(rolled.logp[..., 3] == 0) and np.all(rolled.sampled[..., 3])  # the end token is the only choice there
    assert metrics["policy/sampler_gap"] <= 1e-5
    advantage = np.broadcast_to(np.asarray(seen.advantage)[..., None], rolled.tokens.shape)
    weights = weights_of(rolled, advantage, cfg)
    (loss, figures), gradient = naive(small, cfg, truths.hard, reference)(small.params, rolled, advantage, weights)
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/kl"], figures["kl"] / figures["learnt"], rtol=1e-4)
    # It is the distribution that was sampled from.
    assert metrics["policy/clipped"] == 0 and metrics["policy/ratio_change"] < 1e-5
    close(after.opt_state, gradient, 1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # layers apart, and stacked
def test_a_batch_sampled_in_pieces_has_the_same_answers(small, truths, platform):
    cfg, policy = dataclasses.replace(CONFIG, sample_batches=4), small.policy
    parts = _Parts(policy, lenient(small.tables), ("fit", "brand"), descend, cfg, None, None, None)
    state, decoding = fresh_state(small.params, cfg), (policy, for_decoding(small.params, platform))
    _, rolled = jax.jit(lambda batch: _roll(parts, decoding, state, batch))(truths.easy)
    np.testing.assert_array_equal(rolled.tokens, truths.plain.tokens)
    np.testing.assert_array_equal(rolled.valid, truths.plain.valid)
    np.testing.assert_allclose(rolled.logp, truths.plain.logp, atol=1e-5)


def test_groups_to_learn_from_fill_the_first_micro_batches_of_their_shard():
    learnt = np.array([0, 1, 0, 0, 1, 0, 1, 1], bool)
    examples = _Example(np.arange(8)[:, None], np.arange(8), None, None, None, learnt=learnt)
    learnt_first = jax.jit(_learnt_first, static_argnums=1)
    pieces, number = learnt_first(examples, dataclasses.replace(CONFIG, shards=2, micro_batches=4))
    np.testing.assert_array_equal(pieces.prompt_len, [[1, 4], [0, 6], [2, 7], [3, 5]])
    assert number == 3  # the second shard has three of them
    pieces, number = learnt_first(examples, dataclasses.replace(CONFIG, shards=1, micro_batches=2))
    np.testing.assert_array_equal(pieces.prompt_len, [[1, 4, 6, 7], [0, 2, 3, 5]])
    assert number == 1
    nothing = examples.replace(learnt=np.zeros(8, bool))
    assert learnt_first(nothing, dataclasses.replace(CONFIG, shards=2, micro_batches=4))[1] == 0


@pytest.mark.parametrize("number", [0, 2, 4])
def test_no_more_micro_batches_are_computed_than_are_asked_for(number):
    def value_and_grad(piece):
        total = jnp.sum(piece.prompt_len)
        return (total, {"tokens": total, "sampler_gap": jnp.max(piece.prompt_len)}), {"w": 2 * total}

    pieces = _Example(np.arange(8).reshape(4, 2, 1), np.arange(8).reshape(4, 2), None, None, None)
    grads, sums = jax.jit(partial(_accumulate, value_and_grad))(pieces, number)
    total = sum(range(2 * number))
    assert grads["w"] == 2 * total and sums["tokens"] == sums["loss"] == total
    assert sums["sampler_gap"] == max(2 * number - 1, 0)


# ------------------------------------------------------------------------------------------ guided replay


def test_guided_and_unguided_steps_alternate_with_one_compilation(step, truths, mixed):
    shares = []
    state = step.keywords["state"]
    for batch in (truths.easy, truths.hard, mixed, truths.easy):
        after, metrics, _ = step(batch)
        shares.append(float(metrics["guide/share"]))
        state, _, _ = step(batch, state=state)  # also with the state that the step itself returns
    assert shares == [0, 1, 0.5, 0]
    assert int(state.step) == 4
    assert step.compiled._cache_size() == 1


def test_groups_that_pass_are_left_alone(step, truths):
    after, metrics, seen = step(truths.easy)
    np.testing.assert_array_equal(seen.rolled.tokens, truths.plain.tokens)
    assert not np.any(seen.rolled.forced)
    for name in ("level", "pass_before", "pass_after", "pass_steps", "forced_probability", "transfer_gap"):
        assert np.isnan(metrics[f"guide/{name}"])  # a mean over no group or row is not 0
    assert metrics["guide/failing"] == 0 and metrics["reward/tier_accuracy"] >= 1 / G
    # The figures are those of these answers: means over all, and spreads within groups.
    total, raw, plain = np.asarray(seen.score.total), np.asarray(seen.score.raw), truths.plain
    by_hand = {
        "reward/total": total.mean(), "reward/learnt_from": total.mean(),
        "reward/total_spread": total.std(axis=1).mean(), "policy/entropy": -plain.logp[plain.sampled].mean(),
        "guide/global_level": after.guidance.level.mean(),
    }  # fmt: skip
    for i, name in enumerate(component_names(("fit", "brand"))):
        by_hand |= {f"reward/{name}": raw[..., i].mean(), f"reward/{name}_spread": raw[..., i].std(axis=1).mean()}
    for name, value in by_hand.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(after.guidance.memory, -1)
    assert np.all(np.asarray(after.guidance.offset)[truths.easy.row] == -1)  # passed unguided: reveal less
    assert np.sum(np.asarray(after.guidance.offset) != 0) == B


def test_a_replay_has_random_numbers_of_its_own(small, step, truths):
    batch = truths.hard
    shown = np.ones(B, np.int32)

    @jax.jit
    def replay():
        prefix = prefill(small.policy, small.params, batch.prompt, batch.prompt_len)
        return rollout(
            small.policy, small.params, prefix, row_keys(KEY, PURPOSE_REPLAY, 0, batch.row, 2), length=RESPONSE_LEN,
            temperature=CONFIG.temperature, end_token=small.tables.end_token, forced=batch.gold, forced_len=shown,
        )

    np.testing.assert_array_equal(step(batch)[2].rolled.tokens[:, :2], replay().tokens)


def test_a_cap_on_the_level_falls_as_training_goes_on(small, truths, reference):
    cfg = dataclasses.replace(CONFIG, guidance=dataclasses.replace(CONFIG.guidance, cap="linear", initial_level=2.0))
    begun, compiled = fresh_state(small.params, cfg), jitted(small, cfg)
    levels = [compiled(begun.replace(step=jnp.int32(at)), truths.hard, reference)[1]["guide/level"] for at in (0, 60)]
    most = 3  # parts: two steps and the tier
    assert levels == [2, round(most * (1 - 60 / CONFIG.total_steps))]


def test_failing_groups_are_replayed_behind_their_gold_prefix(step, truths):
    after, metrics, seen = step(truths.hard)
    rolled = jax.tree.map(np.asarray, seen.rolled)
    guided = rolled.forced.any(axis=-1)
    # No answer passes, so the first two are replaced. One part is revealed, which is one token.
    np.testing.assert_array_equal(guided, np.tile(np.arange(G) < 2, (B, 1)))
    np.testing.assert_array_equal(rolled.tokens[:, 2:], truths.plain.tokens[:, 2:])
    np.testing.assert_array_equal(rolled.forced[:, :2], np.broadcast_to(np.arange(RESPONSE_LEN) < 1, (B, 2, 6)))
    np.testing.assert_array_equal(rolled.tokens[:, :2, 0], np.tile(truths.hard.gold[:, :1], (1, 2)))
    assert np.all(rolled.logp[rolled.forced] == 0)
    assert np.any(rolled.tokens[:, :2, 1:] != truths.plain.tokens[:, :2, 1:])
    # Forced parts do not count.
    counted, earned = np.asarray(seen.score.counted), np.asarray(seen.score.earned)
    assert not counted[:, :2, 1].any() and counted[:, 2:, 1].all() and counted[..., [0, 2, 3, 4, 5]].all()
    mean = np.sum(earned * counted, axis=1, keepdims=True) / np.maximum(counted.sum(axis=1, keepdims=True), 1)
    total = np.where(counted, earned - mean, 0).sum(axis=-1)
    spread = total.std(axis=1, keepdims=True)
    by_hand = np.where(spread < 1e-4, 0, total / np.maximum(spread, 1e-4))
    np.testing.assert_allclose(seen.advantage, by_hand, atol=1e-4)
    assert np.abs(by_hand).max() > 0.5
    # Metrics and memory.
    passed = np.asarray(seen.score.passed)[:, :2].mean(axis=1)
    np.testing.assert_allclose(metrics["guide/pass_after"], passed.mean(), rtol=1e-5)
    assert metrics["guide/pass_before"] == metrics["reward/tier_accuracy"] == 0
    assert metrics["guide/level"] == 1 and metrics["guide/failing"] == 1 and metrics["guide/met_again"] == 0
    assert 0 < metrics["guide/forced_probability"] < 1
    np.testing.assert_allclose(after.guidance.level, 1 + 0.4 * (0.5 - passed.mean()), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(after.guidance.memory)[truths.hard.row], np.round(100 * passed))
    np.testing.assert_array_equal(np.asarray(after.guidance.offset)[truths.hard.row], passed == 0)
    # Met again: their pass rate under guidance minus their pass rate now.
    again, metrics, _ = step(truths.hard, state=after)
    assert metrics["guide/met_again"] == B
    gap = passed.mean() - metrics["reward/tier_accuracy"]
    assert not np.isnan(metrics["guide/transfer_gap"])
    np.testing.assert_allclose(metrics["guide/transfer_gap"], gap, atol=0.006)  # memory is in whole percent


@pytest.mark.slow
def test_own_answers_are_shown_again_and_k1_is_taken_from_the_reward(small, truths, reference):
    """Every group fails, and only the tiers are known. Rows with even numbers were answered rightly before."""
    cfg = dataclasses.replace(
        CONFIG, guidance=dataclasses.replace(CONFIG.guidance, source="own"),
        objective=dataclasses.replace(CONFIG.objective, kl="k1", kl_weight=0.5),
    )
    hard, even = truths.hard, truths.hard.row % 2 == 0
    batch = small.batch([(UNKNOWN, UNKNOWN)] * B, tiers=hard.tier, rows=hard.row)
    there = (np.arange(N) % 2 == 0)[:, None]
    own = OwnAnswers(np.where(there, [8, 2, 4, 7, 11, 11], 0).astype(np.int32), np.where(there, [2, 3, 4], 0))
    state = fresh_state(small.params, cfg)
    state = state.replace(guidance=state.guidance.replace(own=jax.tree.map(jnp.int32, own)))
    after, metrics, seen = jitted(small, cfg)(state, batch, reference)

    forced, tokens = np.asarray(seen.rolled.forced), np.asarray(seen.rolled.tokens)
    replayed = even[:, None] & (np.arange(G) < 2)
    np.testing.assert_array_equal(forced, replayed[..., None] & (np.arange(RESPONSE_LEN) < 2))
    assert np.all(tokens[replayed][:, :2] == [8, 2]) and 0 < even.sum() < B
    assert metrics["guide/unguidable"] == 1 - even.mean() and metrics["guide/level"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.guidance.own, own)  # no answer was right

    prefix = prefill(small.policy, reference, batch.prompt, batch.prompt_len)
    hidden = predicting_hidden(small.policy, reference, prefix, seen.rolled.tokens)
    unembed = partial(small.policy.unembed, reference)
    reference_logp, _ = token_logprobs(unembed, hidden, seen.rolled.tokens, cfg.temperature, 0)
    k1 = np.where(seen.rolled.sampled, seen.rolled.logp - reference_logp, 0)
    np.testing.assert_allclose(metrics["policy/kl"], k1.sum() / seen.rolled.sampled.sum(), rtol=1e-4)
    total = np.asarray(seen.score.total) - 0.5 * k1.sum(axis=-1)
    plain = ~even  # without forced parts: the textbook's advantage, of reward minus KL
    by_hand = (total - total.mean(axis=1, keepdims=True)) / total.std(axis=1, keepdims=True)
    np.testing.assert_allclose(seen.advantage[plain], by_hand[plain], atol=1e-3)


def test_the_order_of_a_batch_does_not_matter(step, mixed):
    after, metrics, seen = step(mixed)
    order = np.array([5, 2, 7, 0, 3, 6, 1, 4])
    other, other_metrics, other_seen = step(jax.tree.map(lambda x: x[order], mixed))
    np.testing.assert_array_equal(other_seen.rolled.tokens, np.asarray(seen.rolled.tokens)[order])
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), other.params, after.params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), other.guidance, after.guidance)


# ----------------------------------------------------------------------------------------------- the rest


def test_what_a_step_leaves_behind(step, truths):
    start = step.keywords["state"]
    after, metrics, seen = step(truths.easy)
    assert after.step == 1 and after.skipped == 0
    np.testing.assert_array_equal(after.key, start.key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), start)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())
    np.testing.assert_array_equal(seen.row, truths.easy.row)
    np.testing.assert_array_equal(metrics["tokens/prompt"], truths.easy.prompt_len.sum())
    valid = truths.plain.valid.sum()
    assert metrics["tokens/rolled"] == valid and metrics["tokens/trained"] == valid + metrics["tokens/prompt"]
    np.testing.assert_allclose(metrics["policy/length"], valid / (B * G))
    np.testing.assert_allclose(metrics["policy/truncated"], 1 - truths.plain.finished.mean(), rtol=1e-6)


def test_the_budget_counts_what_is_sampled_replayed_scored_and_trained(step, truths):
    prompt = truths.easy.prompt_len.sum()
    _, plain, seen = step(truths.easy)
    once = prompt + seen.rolled.valid.sum()
    assert plain["budget/tokens"] == once + once + 3 * once  # sampled, scored by the reference, trained on
    assert plain["tokens/replayed"] == 0
    _, guided, seen = step(truths.hard)  # the first two answers of each group are sampled twice, their prompts once
    again = seen.rolled.valid[:, :2].sum()
    assert guided["tokens/replayed"] == again and guided["tokens/rolled"] == truths.plain.valid.sum()
    once = prompt + seen.rolled.valid.sum()
    assert guided["budget/tokens"] == prompt + truths.plain.valid.sum() + again + once + 3 * once


def test_without_guidance_there_is_nothing_to_remember(small, truths):
    cfg = dataclasses.replace(
        CONFIG, guidance=None, inspect=2, objective=dataclasses.replace(CONFIG.objective, kl="none")
    )
    step = make_step(small.policy, small.tables, ("fit", "brand"), descend, cfg)
    after, metrics, seen = jax.eval_shape(step, fresh_state(small.params, cfg), truths.easy, None)
    assert after.guidance is None and seen.rolled.tokens.shape == (2, G, RESPONSE_LEN)
    assert {name for name in metrics if name.startswith("guide/")} == {"guide/forced_probability"}
    assert "policy/kl" not in metrics and "reward/fit" in metrics and "reward/brand_spread" in metrics


def test_equal_rewards_leave_the_policy_where_it_is_and_broken_ones_are_skipped(small, truths):
    """Without any weight, all rewards are 0. Then a parameter is not a number, and both updates are skipped."""
    nothing = dataclasses.replace(
        CONFIG.reward, tier_weight=0.0, step_weight=0.0, consistent_weight=0.0, format_weight=0.0, overlong_weight=0.0
    )
    plain = dataclasses.replace(CONFIG.objective, kl="none", entropy_weight=0.0)
    cfg = dataclasses.replace(CONFIG, reward=nothing, objective=plain, guidance=None, epochs=2)
    tx = optax.sgd(RATE)

    def update(grads, params, opt_state, skipped):
        params, opt_state, skipped, stats = optim.guarded_update(tx, grads, params, opt_state, skipped)
        return params, opt_state, skipped, {f"optim/{name}": value for name, value in stats.items()}

    step = jitted(small, cfg, update)
    after, metrics, _ = step(fresh_state(small.params, cfg, tx.init(small.params), skipped=3), truths.easy, None)
    jax.tree.map(np.testing.assert_array_equal, after.params, small.params)
    assert metrics["optim/grad_norm"] == 0 and metrics["optim/finite"] == 1 and after.skipped == 0
    assert metrics["reward/equal_groups"] == metrics["reward/equal_groups_after"] == 1

    broken = {**small.params, "final_norm": jnp.asarray(small.params["final_norm"]).at[0].set(jnp.nan)}
    after, metrics, _ = step(fresh_state(broken, cfg, tx.init(broken), skipped=3), truths.easy, None)
    jax.tree.map(np.testing.assert_array_equal, after.params, broken)
    assert metrics["optim/finite"] == 0 and after.skipped == 5 and after.step == 1
    assert step._cache_size() == 1


def test_gate_firings_are_answers_of_which_a_right_step_earned_nothing(step, mixed):
    _, _, seen = step(mixed)
    raw, earned, counted = (np.zeros(seen.score.raw.shape, kind) for kind in (np.float32, np.float32, bool))
    raw[..., 1], counted[..., 1] = 1, True  # the first step: right in every answer, counted in all
    earned[0, :, 1] = 0.5  # the gate is open for the first pair
    earned[1, 0, 1] = 0.5
    counted[1, 1, 1] = False  # forced, so there is nothing to gate
    score = seen.score.replace(raw=jnp.array(raw), earned=jnp.array(earned), counted=jnp.array(counted))
    names = tuple(f"step{i}" for i in range(raw.shape[-1] - 4))
    pairs, group = raw.shape[:2]
    run = jax.jit(_rollout_metrics, static_argnums=4)
    metrics = run(mixed, seen.rolled, score, np.arange(pairs) < 2, names)
    assert metrics["reward/equal_groups"] == pytest.approx(1 - 2 / pairs)
    assert metrics["reward/gated"] == pytest.approx(1 - (group + 2) / (pairs * group))
