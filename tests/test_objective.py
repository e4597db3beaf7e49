"""Advantages and losses against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrl_jax.policy.scoring import token_logprobs
from agrl_jax.rl.objective import (
    ObjectiveConfig,
    advantages,
    kl_estimate,
    learnt_from,
    loss_terms,
    masked_std,
    part_of_token,
    teaches,
    token_weights,
)
from agrl_jax.rl.reward import Score
from agrl_jax.types import Reading, Rollout

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")
BASE = ObjectiveConfig(
    loss="grpo", credit="sequence", clip_low=0.2, clip_high=0.2, kl="none", kl_weight=0.0, entropy_weight=0.0,
    mask_truncated=False, treatment="mask", gamma=0.1, imitate_weight=0.5, baseline="pooled", step_weight=0.3,
)


def having(**changes) -> ObjectiveConfig:
    return dataclasses.replace(BASE, **changes)


# ---------------------------------------------------------------------------------------- advantages


def advantage(earned, counted=True, guided=False, cfg=BASE, divergence=None) -> np.ndarray:
    """Advantage of each answer of one group. `earned` is [G] of one component, or [G, Q]."""
    earned = np.array(earned, np.float32).reshape(1, len(earned), -1)
    counted = np.broadcast_to(np.array(counted), earned.shape[1:])[None]
    guided = np.broadcast_to(np.array(guided), earned.shape[:2])
    unused = np.zeros(earned.shape[:2], bool)
    score = Score(raw=earned, earned=earned, counted=counted, passed=unused, tier_forced=unused)
    reading = Reading(*[np.zeros((*earned.shape[:2], 3), np.int32)] * 3, well_formed=unused)
    divergence = None if divergence is None else np.array([divergence], np.float32)
    per_token = np.asarray(advantages(score, reading, guided, 4, cfg, divergence))
    assert per_token.shape == (1, earned.shape[1], 4) and np.all(per_token == per_token[..., :1])
    return per_token[0, :, 0]


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        ("grpo", [3**0.5, *[-1 / 3**0.5] * 3]),  # mean 1/4, variance 3/16
        ("dapo", [3**0.5, *[-1 / 3**0.5] * 3]),
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1, -1 / 3, -1 / 3, -1 / 3]),  # minus the mean of the three others
    ],
)
def test_one_right_answer_of_four(loss, by_hand):
    np.testing.assert_allclose(advantage([1, 0, 0, 0], cfg=having(loss=loss)), by_hand, rtol=1e-6)


def test_the_advantage_of_a_token_is_clamped():
    np.testing.assert_allclose(advantage([1, 0, 0, 0], cfg=having(clamp=1.0)), [1, *[-1 / 3**0.5] * 3], rtol=1e-6)
    np.testing.assert_allclose(advantage([1, 0, 0, 0], cfg=having(clamp=0.5)), [0.5, -0.5, -0.5, -0.5])
    np.testing.assert_allclose(advantage([1, 0, 0, 0], cfg=having(clamp=2.0)), advantage([1, 0, 0, 0]))


def test_a_token_is_clamped_in_all_that_it_has():
    """Credit by step, unscaled: the tier gives 0.5 and -0.5 to all tokens, the step the same to the first: 1 and -1."""
    earned = jnp.array([[[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])  # tier, a step, consistent
    unused = jnp.zeros((1, 2), bool)
    score = Score(raw=earned, earned=earned, counted=jnp.ones((1, 2, 3), bool), passed=unused, tier_forced=unused)
    position = jnp.array([[[0, 2], [0, 2]]])
    reading = Reading(value=position, count=position, position=position, well_formed=unused)
    cfg = having(loss="dr_grpo", credit="step", clamp=0.75)
    by_hand = np.array([0.75, 0.5, 0.5])
    np.testing.assert_allclose(advantages(score, reading, unused, 3, cfg), [[by_hand, -by_hand]])


def test_each_component_is_centred_over_the_answers_in_which_it_counts():
    """The second component was forced on answers 2 and 3: they earn nothing by it, and are not compared in it."""
    earned = [[1, 1], [0, 0], [0, 1], [1, 1]]
    counted = [[True, True], [True, True], [True, False], [True, False]]
    centred = np.array([0.5 + 0.5, -0.5 - 0.5, -0.5, 0.5])
    np.testing.assert_allclose(advantage(earned, counted, cfg=having(loss="dr_grpo")), centred)
    np.testing.assert_allclose(advantage(earned, counted), centred / np.sqrt(2.5 / 4), rtol=1e-6)
    left_out = [2 / 3 + 1, -2 / 3 - 1, -2 / 3, 2 / 3]  # three others in the first component, one in the second
    np.testing.assert_allclose(advantage(earned, counted, cfg=having(loss="rloo")), left_out, rtol=1e-6)


def test_answers_of_which_nothing_counts_are_no_part_of_the_spread():
    """A part was forced on two of four answers: the other two are compared only with each other."""
    by_hand = [1, -1, 0, 0]  # with two zeros among them it would be 1.41
    half = [True, True, False, False]
    np.testing.assert_allclose(advantage([1, 0, 1, 0], np.array(half)[:, None]), by_hand, rtol=1e-6)
    # The format counts in all answers, but all have it, so it makes no answer comparable.
    earned = [[1, 0.1], [0, 0.1], [1, 0.1], [0, 0.1]]
    counted = [[known, True] for known in half]
    np.testing.assert_allclose(advantage(earned, counted), by_hand, rtol=1e-6)
    # If the format differs, all are compared: components are centred one by one and added up.
    earned = [[1, 0.1], [0, 0.1], [1, 0.1], [0, 0.3]]
    centred = np.array([0.5 - 0.05, -0.5 - 0.05, -0.05, 0.15])
    np.testing.assert_allclose(advantage(earned, counted), centred / centred.std(), rtol=1e-5)


def test_spreads_are_over_the_answers_that_count():
    values, where = jnp.array([[1.0, 0, 9, 9], [2, 2, 2, 2], [1, 2, 3, 4]]), np.array([[1, 1, 0, 0], [1] * 4, [0] * 4])
    np.testing.assert_allclose(masked_std(values, where.astype(bool)), [0.5, 0, 0])


def test_k1_is_taken_from_the_reward():
    """Rewards 1 and 0, minus 0.1 times log-ratios of 3 and 1: 0.7 against -0.1."""
    cfg = having(loss="dr_grpo", kl="k1", kl_weight=0.1)
    np.testing.assert_allclose(advantage([1, 0], cfg=cfg, divergence=[3, 1]), [0.4, -0.4], rtol=1e-6)
    np.testing.assert_allclose(advantage([0, 0], cfg=having(kl="k1", kl_weight=0.1), divergence=[3, 1]), [-1, 1],
                               rtol=1e-6)  # with equal rewards, the answer nearer the reference wins


@pytest.mark.parametrize(
    ("treatment", "by_hand"),
    [("mask", [0, 1, 0, 0]), ("imitate", [0, 1, 1, 1]), ("shaped", [0, 1, 0, 1]), ("importance", [0, 1, 0, 1])],
)
def test_groups_that_are_learnt_from(treatment, by_hand):
    """Four groups of two answers: no advantage; a sampled token has one; a forced token has none; it has one."""
    sampled, forced = np.ones((4, 2, 3), bool), np.zeros((4, 2, 3), bool)
    forced[2:, 0, 0], sampled[2:, 0, 0] = True, False
    values = np.zeros((4, 2, 3), np.float32)
    values[1, 1, 2], values[3, 0, 0] = -0.5, 0.5
    answers = Rollout(np.zeros((4, 2, 3), np.int32), np.zeros((4, 2, 3)), sampled, sampled | forced, sampled[..., 1])
    cfg = having(treatment=treatment)
    np.testing.assert_array_equal(learnt_from(values, token_weights(answers, cfg), cfg), by_hand)


def test_a_group_teaches_where_a_sampled_token_has_an_advantage():
    values = np.zeros((3, 2, 4), np.float32)
    values[1, 0, 2], values[2, 1, 3] = 0.5, -0.5
    answers = rolled([[1, 1, 1, 0], [0, 1, 1, 0]], forced=[[0] * 4, [1, 0, 0, 0]])
    answers = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), answers)
    np.testing.assert_array_equal(teaches(values, answers), [False, True, False])  # the last: past its end


def test_baselines_of_guided_answers():
    guided = [False, False, True, True]
    np.testing.assert_allclose(advantage([0, 0, 1, 1], guided=guided), [-1, -1, 1, 1], rtol=1e-6)
    unguided = having(baseline="unguided_only")  # mean 0 of the unguided; spread 1/2 of all
    np.testing.assert_allclose(advantage([0, 0, 1, 1], guided=guided, cfg=unguided), [0, 0, 2, 2], rtol=1e-6)
    rloo = having(baseline="unguided_only", loss="rloo")  # leave-one-out only for answers that are in the mean
    np.testing.assert_allclose(
        advantage([0, 0.5, 1, 1], guided=guided, cfg=rloo), [-0.5, 0.5, 0.75, 0.75], rtol=1e-6
    )
    np.testing.assert_allclose(advantage([0, 1], guided=True, cfg=unguided), [-1, 1], rtol=1e-6)  # no unguided one: all


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("baseline", ["pooled", "unguided_only"])
def test_equal_rewards_give_no_advantage(loss, baseline):
    cfg = having(loss=loss, baseline=baseline)
    for rewards in ([0.7] * 4, [0.7, 0.7 + 1e-5, 0.7, 0.7], [0.0] * 4):
        assert np.all(advantage(rewards, guided=[False, True, True, False], cfg=cfg) == 0)
    assert np.all(advantage([0.3, 0.9], counted=False, cfg=cfg) == 0)  # nothing counts
    assert np.abs(advantage([0.7, 0.701, 0.7, 0.7], cfg=cfg)).max() > 0  # a spread of 4e-4 is a spread


# ------------------------------------------------------------------------------------ credit by step


def reading_at(positions) -> Reading:
    position = np.array(positions, np.int32)[None]
    return Reading(value=position, count=position, position=position, well_formed=np.ones(position.shape[:2], bool))


@pytest.mark.parametrize(
    ("positions", "parts"),
    [
        ((1, 2, 4), [0, 0, 1, 2, 2, 3]),  # fit ends with token 1, brand with 2, the tier with 4; then the end
        ((2, 6, 0), [2, 0, 0, 3, 3, 3]),  # the tier comes first, brand never
        ((1, 1, 5), [0, 0, 2, 2, 2, 2]),  # one token completes two parts: it belongs to the first
        ((6, 6, 6), [3] * 6),
    ],
)
def test_tokens_belong_to_the_part_they_help_to_complete(positions, parts):
    np.testing.assert_array_equal(part_of_token(reading_at([positions]), 6)[0, 0], parts)


def test_each_step_is_credited_to_its_own_tokens():
    # Components: tier, fit, brand, consistent, format, overlong.
    earned = np.array([[[1, 0.5, 0.0, 0, 0, 0], [0, 0.0, 0.5, 0, 0, 0]]], np.float32)
    counted = jnp.ones(earned.shape, bool)
    unused = np.zeros((1, 2), bool)
    reading = reading_at([(1, 2, 4), (0, 2, 3)])
    score = Score(raw=earned, earned=earned, counted=counted, passed=unused, tier_forced=unused)
    by_step = advantages(score, reading, unused, 6, having(credit="step"))
    # All tokens have the tier's +-1. Fit adds +-0.3 to its own tokens, brand the opposite to its own.
    by_hand = [[1.3, 1.3, 0.7, 1, 1, 1], [-1.3, -0.7, -0.7, -1, -1, -1]]
    np.testing.assert_allclose(by_step[0], by_hand, rtol=1e-6)
    # If brand was forced on the second answer, no other answer is left to compare with.
    alone = score.replace(counted=counted & ~((np.arange(6) == 2) & (np.arange(2) == 1)[:, None]))
    by_hand = [[1.3, 1.3, 1, 1, 1, 1], [-1.3, -1, -1, -1, -1, -1]]
    np.testing.assert_allclose(advantages(alone, reading, unused, 6, having(credit="step"))[0], by_hand, rtol=1e-6)


@pytest.mark.parametrize(("loss", "tier", "fit"), [("grpo", 1, 0.3), ("dr_grpo", 0.5, 0.25), ("rloo", 1, 0.5)])
def test_a_step_has_its_weight_once(loss, tier, fit):
    """Right steps earn 0.5, the weight of a step. Divided by their spread they would count 1; `step_weight` is 0.3."""
    earned = np.array([[[1, 0.5, 0, 0, 0, 0], [0] * 6]], np.float32)
    unused = np.zeros((1, 2), bool)
    score = Score(earned, earned, counted=jnp.ones(earned.shape, bool), passed=unused, tier_forced=unused)
    found = advantages(score, reading_at([(0, 1, 2), (0, 1, 2)]), unused, 4, having(credit="step", loss=loss))
    np.testing.assert_allclose(found[0], np.outer([1, -1], [tier + fit, tier, tier, tier]), rtol=1e-6)


def test_step_credit_compares_the_answers_in_which_the_step_was_sampled():
    """G = 4. The step fit was forced on two answers; one of the other two is right."""
    earned = np.zeros((1, 4, 6), np.float32)
    earned[0, [0, 2], 1] = 0.5
    counted = np.ones(earned.shape, bool)
    counted[0, 2:, 1] = False
    guided = ~counted[..., 1]
    score = Score(earned, earned, jnp.array(counted), passed=guided, tier_forced=guided)
    found = advantages(score, reading_at([(1, 2, 3)] * 4), guided, 5, having(credit="step"))
    by_hand = np.zeros((4, 5))
    by_hand[:2, :2] = [[0.3, 0.3], [-0.3, -0.3]]
    np.testing.assert_allclose(found[0], by_hand, rtol=1e-6)


# --------------------------------------------------------------------------------- log-probabilities


def test_log_probabilities_and_entropies_by_hand():
    hidden = jnp.log(jnp.array([[[[0.25, 0.25, 0.5], [0.1, 0.9, 0.0]]]]) + 1e-30)
    logp, entropy = token_logprobs(lambda h: h, hidden, jnp.array([[[2, 0]]]), temperature=1.0, chunk=0)
    np.testing.assert_allclose(np.exp(logp[0, 0]), [0.5, 0.1], rtol=1e-5)
    np.testing.assert_allclose(entropy[0, 0], [1.5 * np.log(2), -0.1 * np.log(0.1) - 0.9 * np.log(0.9)], rtol=1e-5)
    logp, _ = token_logprobs(lambda h: h, hidden, jnp.array([[[2, 0]]]), temperature=0.5, chunk=0)
    np.testing.assert_allclose(np.exp(logp[0, 0]), [4 / 6, 1 / 82], rtol=1e-5)  # squares: 1, 1, 4 and 1, 81


@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_log_probabilities_among_the_choices_by_hand(chunk):
    """Odds 1, 2, 3, 4. The choices are all tokens, then the first and third, and the last alone; at temperature 1/2 the
    odds 1 and 3 become their squares, 1 and 9."""
    masks = jnp.array([[True] * 4, [True, False, True, False], [False, False, False, True]])
    tokens, which = jnp.array([[[3, 2, 0, 3]]]), jnp.array([[[0, 1, 1, 2]]])

    def found(odds, temperature):
        how = {"choices": lambda which: masks[which], "of": (which,)}
        return token_logprobs(lambda h: h, jnp.log(odds), tokens, temperature, chunk, **how)

    odds = jnp.broadcast_to(jnp.array([1.0, 2.0, 3.0, 4.0]), (1, 1, 4, 4))
    logp, entropy = found(odds, 1.0)
    np.testing.assert_allclose(np.exp(logp[0, 0]), [0.4, 0.75, 0.25, 1.0], rtol=1e-6)
    of_two = -0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    np.testing.assert_allclose(entropy[0, 0, 1:], [of_two, of_two, 0], rtol=1e-6)
    np.testing.assert_allclose(np.exp(found(odds, 0.5)[0][0, 0]), [16 / 30, 0.9, 0.1, 1.0], rtol=1e-6)

    def slopes(part):  # by the logits at temperature 1/2
        def value(logits):
            return jnp.sum(found(jnp.exp(logits), 0.5)[part])

        return np.asarray(jax.grad(value)(jnp.log(odds)))[0, 0]

    by_hand = [[-1 / 15, -4 / 15, -9 / 15, 14 / 15], [-0.2, 0, 0.2, 0], [1.8, 0, -1.8, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(slopes(0), by_hand, atol=1e-6)
    tilt = 2 * 0.1 * 0.9 * np.log(9)  # gradient of the entropy: -p (log p + H) / temperature
    np.testing.assert_allclose(slopes(1)[1:], [[tilt, 0, -tilt, 0], [tilt, 0, -tilt, 0], [0, 0, 0, 0]], atol=1e-6)
    assert np.all(slopes(0)[3] == 0) and np.all(slopes(1)[3] == 0)  # exactly 0 where there is one choice


def test_values_and_gradients_are_those_of_log_softmax_in_chunks_of_any_size():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=(5, 11)).astype(np.float32)
    tokens = rng.integers(0, 11, (2, 3, 4))
    weight = rng.normal(size=(2, 2, 3, 4))

    def value(hidden, head, chunk):
        if chunk is None:
            logp = jax.nn.log_softmax(hidden @ head / 0.7)
            pair = jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        else:
            pair = token_logprobs(lambda h: h @ head, hidden, tokens, 0.7, chunk)
        return sum(jnp.sum(w * x) for w, x in zip(weight, pair, strict=True)), pair

    run = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), static_argnums=2)
    (_, whole), gradients = run(hidden, head, None)
    for chunk in (0, 1, 7, 24, 100):  # none; one by one; a remainder; exactly all; too many
        (_, chunked), chunked_gradients = run(hidden, head, chunk)
        for a, b in zip((*chunked, *chunked_gradients), (*whole, *gradients), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


# -------------------------------------------------------------------------------------------- losses


def rolled(sampled, forced=None, finished=True) -> Rollout:
    """Masks of one group, [G][T] of 0 and 1."""
    sampled = np.array(sampled, bool)[None]
    forced = np.zeros_like(sampled) if forced is None else np.array(forced, bool)[None]
    return Rollout(
        tokens=np.zeros(sampled.shape, np.int32), logp=np.zeros(sampled.shape, np.float32), sampled=sampled,
        valid=sampled | forced, finished=np.broadcast_to(np.array(finished), sampled.shape[:2]),
    )


# Two answers of 2 and 3 tokens, T = 4, with these ratios; the first is better than the second.
ANSWERS = rolled([[1, 1, 0, 0], [1, 1, 1, 0]])
RATIO = np.array([[1.5, 0.5, 9.0, 9.0], [1.5, 0.5, 0.9, 9.0]], np.float32)
LOGP = np.array([[-1.0, -2.0, -8.0, -8.0], [-0.5, -1.0, -3.0, -8.0]], np.float32)
ADVANTAGE = np.array([[1.0] * 4, [-1.0] * 4], np.float32)


def loss_of(cfg, answers=ANSWERS, logp=LOGP, ratio=RATIO, advantage=ADVANTAGE, entropy=0.0, reference=None):
    """The loss of one group, its gradient by the log-probabilities, and its figures."""

    def loss(logp):
        whole = np.shape(logp)
        return loss_terms(
            logp, jnp.broadcast_to(entropy, whole), jax.lax.stop_gradient(logp) - np.log(ratio)[None],
            None if reference is None else np.array(reference, np.float32)[None],
            np.broadcast_to(advantage, whole), answers.sampled, token_weights(answers, cfg), cfg,
        )

    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logp)[None])
    return float(value), np.asarray(gradient[0]), sums


@pytest.mark.parametrize(
    ("cfg", "by_hand"),
    [
        # The better answer gets min(r, clip r): 1.2, 0.5. The worse one gets max(r, clip r): 1.5, 0.8, 0.9.
        (having(loss="grpo"), -((1.2 + 0.5) / 2 - (1.5 + 0.8 + 0.9) / 3) / 2),
        (having(loss="dr_grpo"), -(1.2 + 0.5 - 1.5 - 0.8 - 0.9) / (4 * 2)),
        (having(loss="dapo", clip_high=0.28), -(1.28 + 0.5 - 1.5 - 0.8 - 0.9) / 5),
        # The geometric means are 0.866 and 0.877, clipped to 0.9. Only the worse answer takes the clipped value.
        (having(loss="gspo", clip_low=0.1), -(0.75**0.5 - 0.9) / 2),
        (having(loss="cispo"), -(1.2 * -1 + 0.8 * -2 - (1.2 * -0.5 + 0.8 * -1 + 0.9 * -3)) / 5),
        (having(loss="rloo"), -(1.5 + 0.5 - 1.5 - 0.5 - 0.9) / 2),
    ],
    ids=LOSSES,
)
def test_losses_by_hand(cfg, by_hand):
    np.testing.assert_allclose(loss_of(cfg)[0], by_hand, rtol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "by_hand"),
    [
        # The gradient is -weight * r * A, or 0 where the clipped term counts.
        (having(loss="grpo"), [[0, -0.5 / 4, 0, 0], [1.5 / 6, 0, 0.9 / 6, 0]]),
        (having(loss="dr_grpo"), [[0, -0.5 / 8, 0, 0], [1.5 / 8, 0, 0.9 / 8, 0]]),
        (having(loss="dapo", clip_high=0.6), [[-1.5 / 5, -0.5 / 5, 0, 0], [1.5 / 5, 0, 0.9 / 5, 0]]),
        # Each token moves its answer's mean by 1 / length, and the mean stands in `length` terms of weight 1 / length.
        (having(loss="gspo", clip_low=0.1), [[-(0.75**0.5) / 4] * 2 + [0, 0], [0, 0, 0, 0]]),
        (having(loss="cispo"), [[-1.2 / 5, -0.8 / 5, 0, 0], [1.2 / 5, 0.8 / 5, 0.9 / 5, 0]]),
        (having(loss="rloo"), [[-1.5 / 2, -0.5 / 2, 0, 0], [1.5 / 2, 0.5 / 2, 0.9 / 2, 0]]),
    ],
    ids=LOSSES,
)
def test_gradients_by_hand(cfg, by_hand):
    np.testing.assert_allclose(loss_of(cfg)[1], by_hand, atol=1e-6)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "gspo"])  # gspo's ratio is of a whole answer
def test_figures_of_the_ratio_do_not_depend_on_the_denominators_of_the_loss(loss):
    _, _, sums = loss_of(having(loss=loss))
    assert sums["learnt"] == 5 and sums["clipped"] == 4  # 1.5 and 0.5, twice, are outside [0.8, 1.2]
    np.testing.assert_allclose(sums["ratio_change"], np.abs(np.log([1.5, 0.5, 1.5, 0.5, 0.9])).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [("k1", [np.log(2), -np.log(4)]), ("k2", [0.5 * np.log(2) ** 2, 0.5 * np.log(4) ** 2]),
     ("k3", [0.5 - 1 + np.log(2), 4 - 1 - np.log(4)])],
)
def test_divergence_by_hand(kind, by_hand):
    logp, reference = np.log([0.5, 0.125]), np.log([0.25, 0.5])  # twice and a quarter as likely as under the reference
    np.testing.assert_allclose(kl_estimate(logp, reference, kind), by_hand, rtol=1e-6)
    cfg = having(kl=kind, kl_weight=0.1, loss="dapo")
    answers = rolled([[1, 1, 0]])
    if kind == "k1":  # in the loss, its gradient would be 0 in expectation
        assert "kl" not in loss_of(cfg, answers, np.log([[0.5, 0.125, 0.3]]), np.ones((1, 3)), np.ones((1, 3)))[2]
        return
    plain, *_ = loss_of(having(loss="dapo"), answers, np.log([[0.5, 0.125, 0.3]]), np.ones((1, 3)), np.ones((1, 3)))
    value, _, sums = loss_of(
        cfg, answers, np.log([[0.5, 0.125, 0.3]]), np.ones((1, 3)), np.ones((1, 3)), reference=[[*reference, -50.0]]
    )
    np.testing.assert_allclose(sums["kl"], np.sum(by_hand), rtol=1e-5)
    np.testing.assert_allclose(value - plain, 0.1 * np.mean(by_hand), rtol=1e-4)


def test_the_entropy_bonus_lowers_the_loss_by_the_weighted_entropy():
    entropy = np.array([[0.2, 0.4, 9.0, 9.0], [0.3, 0.6, 0.9, 9.0]])
    plain, *_ = loss_of(BASE)
    value, *_ = loss_of(having(entropy_weight=0.5), entropy=entropy)
    np.testing.assert_allclose(plain - value, 0.5 * (0.3 + 0.6) / 2, rtol=1e-5)


def test_truncated_answers_can_be_masked():
    cut = ANSWERS.replace(finished=np.array([[True, False]]))
    value, gradient, _ = loss_of(having(mask_truncated=True), cut)
    np.testing.assert_allclose(value, -(1.2 + 0.5) / 2, rtol=1e-6)  # one answer is left
    assert np.all(gradient[1] == 0)
    np.testing.assert_allclose(loss_of(BASE, cut)[0], loss_of(BASE)[0])


# ------------------------------------------------------------------------------------- forced tokens

# An answer of one forced token (probability 0.3) and two sampled ones, and one of four sampled tokens. T = 4, ratios 1.
GUIDED = rolled([[0, 1, 1, 0], [1, 1, 1, 1]], forced=[[1, 0, 0, 0], [0, 0, 0, 0]])
GUIDED_LOGP = np.log(np.array([[0.3, 0.5, 0.5, 0.5], [0.5] * 4], np.float32))
GUIDED_ADVANTAGE = np.array([[2.0] * 4, [-1.0] * 4], np.float32)


def guided_loss(**changes):
    cfg = having(**changes)
    return loss_of(cfg, GUIDED, GUIDED_LOGP, np.ones((2, 4), np.float32), GUIDED_ADVANTAGE)


@pytest.mark.parametrize(
    ("changes", "term", "gradient"),
    [
        ({"treatment": "mask"}, 0, 0),
        # -A p / (p + 0.1) = -1.5, weighed as a sampled token of this answer; its slope is -A p 0.1 / (p + 0.1)^2.
        ({"treatment": "shaped"}, -1.5 / 6, -2 * 0.3 * 0.1 / 0.16 / 6),
        ({"treatment": "importance"}, -0.6 / 6, -0.6 / 6),
        ({"treatment": "imitate"}, -0.5 * np.log(0.3) / 8, -0.5 / 8),  # its weight is divided by T and two answers
        ({"treatment": "imitate", "loss": "dapo"}, -0.5 * np.log(0.3) / 8, -0.5 / 8),
        ({"treatment": "shaped", "loss": "dapo"}, -1.5 / 6, None),  # weighed as one of 6 sampled tokens
        ({"treatment": "shaped", "loss": "dr_grpo"}, -1.5 / 8, None),
        ({"treatment": "shaped", "loss": "rloo"}, -1.5 / 2, None),
        ({"treatment": "importance", "loss": "cispo"}, -0.6 / 6, None),
        ({"treatment": "importance", "loss": "gspo"}, -0.6 / 6, None),
    ],
)
def test_forced_tokens_by_hand(changes, term, gradient):
    value, gradients, _ = guided_loss(**changes)
    masked, masked_gradients, _ = guided_loss(**{**changes, "treatment": "mask"})
    np.testing.assert_allclose(value - masked, term, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradients.reshape(-1)[1:], masked_gradients.reshape(-1)[1:])
    assert masked_gradients[0, 0] == 0
    if gradient is not None:
        np.testing.assert_allclose(gradients[0, 0], gradient, rtol=1e-5)


@pytest.mark.parametrize("treatment", ["shaped", "importance"])
def test_true_tokens_are_not_pushed_down_when_what_follows_is_wrong(treatment):
    worse = np.array([[-2.0] * 4, [1.0] * 4], np.float32)
    _, gradients, _ = loss_of(having(treatment=treatment), GUIDED, GUIDED_LOGP, np.ones((2, 4), np.float32), worse)
    assert gradients[0, 0] == 0 and np.all(gradients[0, 1:3] > 0)


@pytest.mark.parametrize("groups", [1, 5])
def test_a_forced_token_to_imitate_weighs_the_same_however_many_there_are(groups):
    """Ten answers of T = 4, of which `groups` have one forced token."""
    forced = np.zeros((10, 4), int)
    forced[:groups, 0] = 1
    weights = token_weights(rolled(1 - forced, forced), having(treatment="imitate")).forced
    np.testing.assert_allclose(weights[0], 0.5 / 40 * forced, rtol=1e-6)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_a_sampled_token_behind_a_prefix_weighs_no_more_than_elsewhere(loss):
    """In the first answer only the tier was sampled, in the second all of it. Both have four tokens."""
    weights = token_weights(rolled([[0, 0, 0, 1], [1] * 4], [[1, 1, 1, 0], [0] * 4]), having(loss=loss))
    np.testing.assert_allclose(weights.sampled[0], [[0, 0, 0, 1 / 8], [1 / 8] * 4])


def test_sampled_tokens_after_a_prefix_keep_their_weight():
    # Ratios are 1: the first answer has advantage 2 over 2 of its 3 tokens, the second -1 over its 4.
    np.testing.assert_allclose(guided_loss()[0], -(2 * 2 / 3 - 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(guided_loss(loss="dapo")[0], -(2 * 2 - 4) / 6, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_forced_tokens_stay_out_of_ratios_divergence_and_entropy(loss):
    cfg = having(loss=loss, kl="k3", kl_weight=0.1, entropy_weight=0.1)

    def run(first):
        """The loss with arbitrary values as ratio, reference and entropy of the forced token."""
        ratio, reference, entropy = np.full((2, 4), 1.1), np.full((2, 4), -1.0), np.full((2, 4), 0.4)
        ratio[0, 0], reference[0, 0], entropy[0, 0] = first
        return loss_of(cfg, GUIDED, GUIDED_LOGP, ratio, GUIDED_ADVANTAGE, entropy, reference)

    for a, b in zip(jax.tree.leaves(run((1.1, -1.0, 0.4))), jax.tree.leaves(run((5.0, -9.0, 7.0))), strict=True):
        np.testing.assert_array_equal(a, b)


# ----------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("treatment", ["shaped", "imitate", "importance", "mask"])
def test_a_fully_masked_row_changes_nothing(loss, treatment):
    """An answer without sampled tokens, whatever its numbers, changes neither value nor gradients."""
    cfg = having(loss=loss, treatment=treatment, kl="k3", kl_weight=0.1, entropy_weight=0.1)

    def with_blank(rows, fill):
        return np.concatenate([rows, np.broadcast_to(fill, (3, 4))])

    def run(extend):
        answers = rolled(extend(GUIDED.sampled[0], 0), extend(GUIDED.forced[0], 0))
        logp = extend(GUIDED_LOGP, np.array([[-200.0], [0.0], [-np.inf]]))
        return loss_of(
            cfg, answers, logp, extend(RATIO, 5.0), extend(GUIDED_ADVANTAGE, 1e6), extend(np.full((2, 4), 0.3), 7.0),
            extend(np.full((2, 4), -1.5), 0.0),
        )

    value, gradient, _ = run(lambda rows, fill: rows)
    masked, masked_gradient, _ = run(with_blank)
    np.testing.assert_allclose(masked, value, rtol=1e-5)
    np.testing.assert_allclose(masked_gradient[:2], gradient, rtol=1e-5)
    assert np.all(masked_gradient[2:] == 0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("treatment", ["shaped", "importance", "mask"])
def test_no_advantage_gives_no_gradient(loss, treatment):
    cfg = having(loss=loss, treatment=treatment)
    value, gradient, _ = loss_of(cfg, GUIDED, GUIDED_LOGP, np.full((2, 4), 1.5), np.zeros((2, 4)))
    assert value == 0 and np.all(gradient == 0)
