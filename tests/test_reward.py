"""The reward, by hand, for answers with a given reading."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import CONFIG

from agrl_jax.data.pairs import Pair
from agrl_jax.evaluation.samples import score_answers
from agrl_jax.policy.tokenizer import train_bpe
from agrl_jax.rl import reader, reward
from agrl_jax.rl.objective import advantages
from agrl_jax.rl.reward import RewardConfig, component_names, is_consistent, is_model_answer
from agrl_jax.rulebook.automaton import compile_tables
from agrl_jax.types import UNKNOWN, Batch, Reading, Rollout

# The rule book of conftest: fit yes 0, part 1, no 2; brand ok 0, off 1; tiers good 0, fair 1, bad 2.
# The table: (yes, ok) good; (no, any) bad; all else fair.
SUM = RewardConfig(
    composition="sum", tier_kind="exact", tier_weight=1.0, step_weight=0.5, consistent_weight=0.25,
    format_weight=0.125, overlong_weight=2.0, overlong_from=4,
)
T = 8
TIER, FIT, BRAND, CONSISTENT, FORMAT, OVERLONG = range(6)
score = jax.jit(reward.score, static_argnames="cfg")


def scored(small, stated, cfg=SUM, truth=(0, 0), tier=0, position=None, forced_len=0, length=4, well_formed=True,
           whole=False):
    """The score of one group. `stated` has (fit, brand, tier) of each answer; other arguments have one value for all or
    one each. `whole` returns the reading and the batch too."""
    stated = np.array(stated, np.int32)[None]
    g = stated.shape[1]
    default = np.where(stated == UNKNOWN, T, np.arange(3))  # fit by token 0, brand by 1, tier by 2
    t = np.arange(T)
    valid = np.broadcast_to(t < np.reshape(length, (-1, 1)), (1, g, T))
    forced = t < np.reshape(forced_len, (-1, 1))
    rolled = Rollout(
        tokens=np.zeros((1, g, T), np.int32), logp=np.zeros((1, g, T), np.float32), sampled=valid & ~forced,
        valid=valid, finished=np.ones((1, g), bool),
    )
    reading = Reading(
        value=stated, count=(stated != UNKNOWN).astype(np.int32),
        position=default if position is None else np.broadcast_to(np.array(position), default.shape),
        well_formed=np.broadcast_to(np.array(well_formed), (1, g)),
    )
    empty = np.zeros((1, 1), np.int32)
    batch = Batch(
        prompt=empty, prompt_len=empty[0], gold=empty, gold_len=empty[0], part_end=empty, known_parts=empty[0],
        steps=np.array([truth], np.int32), tier=np.array([tier], np.int32), row=empty[0], family=empty[0],
    )
    s = score(reading, rolled, batch, small.tables, cfg=cfg)
    return (s, reading, batch) if whole else s


def test_names_go_with_components():
    assert component_names(("fit", "brand")) == ("tier", "fit", "brand", "consistent", "format", "overlong")
    media = component_names(("format", "total"))  # steps of a shop for books
    assert media == ("tier", "step format", "step total", "consistent", "format", "overlong")


def test_every_component_and_their_sum(small):
    s = scored(
        small,
        [(0, 0, 0), (0, 1, 0), (2, 1, 2), (UNKNOWN, 0, 0), (0, 0, UNKNOWN)],
        length=[4, 6, 8, 4, 5],
        well_formed=[True, True, True, False, False],
    )
    np.testing.assert_array_equal(s.raw[0], [
        # tier, fit, brand, consistent, format, overlong (from 4 tokens on, a quarter a token)
        [1, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1, -0.5],  # (yes, off) is fair, not good
        [0, 0, 0, 1, 1, -1],  # all wrong, but consistent
        [0, 0, 1, 0, 0, 0],  # malformed, so its tier is not right; a step is not stated, so it is not consistent
        [0, 1, 1, 0, 0, -0.25],  # not consistent either: no tier is stated
    ])
    assert np.all(s.counted)
    total = [1 + 0.5 + 0.5 + 0.25 + 0.125, 1 + 0.5 + 0.125 - 1, 0.25 + 0.125 - 2, 0.5, 0.5 + 0.5 - 0.5]
    np.testing.assert_allclose(s.total[0], total)
    np.testing.assert_array_equal(s.passed[0], [True, True, False, False, False])
    assert not s.tier_forced.any()


@pytest.mark.parametrize("composition", ["terminal", "sum", "gated", "gated_tier"])
@pytest.mark.parametrize("tier_kind", ["exact", "ordinal", "brier", "rps"])
def test_a_malformed_answer_has_not_passed_and_its_tier_earns_nothing(small, composition, tier_kind):
    cfg = dataclasses.replace(SUM, composition=composition, tier_kind=tier_kind)
    s = scored(small, [(0, 0, 0), (0, 0, 0)], cfg, well_formed=[True, False])  # two answers are not compared
    np.testing.assert_array_equal(s.passed[0], [True, False])
    np.testing.assert_array_equal(s.earned[0, :, TIER], [1, 0])
    steps = {"terminal": 0, "gated_tier": 0}.get(composition, 0.5)  # for right steps of a consistent answer
    np.testing.assert_array_equal(s.earned[0, 1, [FIT, BRAND]], [steps] * 2)
    forced = scored(small, [(0, 0, 0)] * 2, cfg, position=(1, 2, 0), forced_len=1, well_formed=[True, False])
    np.testing.assert_array_equal(forced.passed[0], [True, False])  # where the tier was given, malformed is not passed


def test_model_answers_are_right_in_every_respect_that_is_known(small):
    def model(stated, truth=(UNKNOWN, UNKNOWN), tier=1, **more):
        s, reading, batch = scored(small, stated, truth=truth, tier=tier, whole=True, **more)
        return is_model_answer(s, reading, batch, small.tables)[0].tolist()

    # (yes, off) and (part, ok) are fair, (yes, ok) is not; the last answer has another tier.
    answers = [(0, 1, 1), (1, 0, 1), (0, 0, 1), (2, 1, 2)]
    assert model(answers) == [True, True, False, False]
    assert model(answers, truth=(0, UNKNOWN)) == [True, False, False, False]
    assert model(answers, well_formed=[False, True, True, True]) == [False, True, False, False]
    assert model(answers, truth=(0, 1), position=(1, 2, 0), forced_len=[0, 0, 0, 1]) == [True, False, False, False]
    assert model(answers[:1], truth=(0, 1), position=(1, 2, 0), forced_len=1) == [False]  # passes, its tier was given


@pytest.mark.parametrize(
    ("composition", "totals"),
    [
        ("terminal", [1, 1, 0, 0]),
        ("sum", [1 + 1 + 0.375, 1 + 0.5 + 0.125, 0.5 + 0.375, 1 + 0.125]),
        ("gated", [1 + 1 + 0.375, 1 + 0.125, 0.5 + 0.375, 0.125]),  # steps count where consistent
        ("gated_tier", [1 + 1 + 0.375, 1 + 0.5 + 0.125, 0.375, 0.125]),  # steps count where the tier is right
    ],
)
def test_compositions_and_gates(small, composition, totals):
    answers = [
        (0, 0, 0),  # right and consistent
        (0, 1, 0),  # right tier, one step right, inconsistent
        (0, 1, 1),  # wrong tier, one step right, consistent
        (0, 0, 1),  # wrong tier, both steps right, inconsistent
    ]
    s = scored(small, answers, dataclasses.replace(SUM, composition=composition))
    np.testing.assert_allclose(s.total[0], totals)
    np.testing.assert_array_equal(s.raw[0, :, CONSISTENT], [1, 0, 1, 0])  # the logged value is not gated
    np.testing.assert_array_equal(s.raw[0, :, FIT], [1, 1, 1, 1])


def test_the_ordinal_tier_gives_less_for_each_tier_off(small):
    ordinal = dataclasses.replace(SUM, tier_kind="ordinal")
    answers = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, UNKNOWN)]
    s = scored(small, answers, ordinal)
    np.testing.assert_allclose(s.raw[0, :, TIER], [1, 0.5, 0, 0])  # 1 - distance / (3 tiers - 1)
    np.testing.assert_array_equal(s.passed[0], [True, False, False, False])  # only the right tier passes
    s = scored(small, answers, ordinal, tier=1)
    np.testing.assert_allclose(s.raw[0, :, TIER], [0.5, 1, 0.5, 0])


def tiers_earn(small, kind, tiers, tier=0, **more):
    """The earnings of the tiers of one group, times 1 + c."""
    s = scored(small, [(0, 0, t) for t in tiers], dataclasses.replace(SUM, tier_kind=kind), tier=tier, **more)
    group = len(tiers)
    return s.raw[0, :, TIER] * (1 + (group - 1) / (group - 2))


def test_a_brier_tier_earns_more_where_others_differ(small):
    """Four answers, c = 3/2: a right tier earns 1, and each of the three others that differs adds 1/2."""
    np.testing.assert_allclose(tiers_earn(small, "brier", [0, 0, 1, 2]), [1 + 1, 1 + 1, 1.5, 1.5])
    np.testing.assert_allclose(tiers_earn(small, "brier", [0, 1, 1, 1]), [1 + 1.5, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(tiers_earn(small, "brier", [0, 0, 0, 0]), [1] * 4)
    np.testing.assert_allclose(tiers_earn(small, "brier", [2, 2, 2, 2]), [0] * 4)


def test_a_ranked_tier_counts_how_far_tiers_are_apart(small):
    """With three tiers, neighbours have distance 1/2. A tier earns 1 minus its distance to the truth, plus 1/2 of its
    distance to each other answer."""
    answers = [0, 0, 1, 2]
    np.testing.assert_allclose(tiers_earn(small, "rps", answers), [1.75, 1.75, 0.5 + 0.75, 0 + 1.25])
    np.testing.assert_allclose(tiers_earn(small, "rps", answers, tier=1), [0.5 + 0.75] * 2 + [1 + 0.75, 0.5 + 1.25])


@pytest.mark.parametrize("kind", ["brier", "rps"])
def test_answers_without_form_differ_from_all_and_guided_ones_are_compared_with_guided(small, kind):
    formed = [True, True, False, True]  # without form, the third is not right
    np.testing.assert_allclose(tiers_earn(small, kind, [0, 0, 0, 0], well_formed=formed), [1.5, 1.5, 0, 1.5])
    # The prefix of the last two holds fit. Each has one other answer to compare with, whose distance counts c = 3/2.
    found = tiers_earn(small, kind, [0, 2, 0, 0], forced_len=[0, 0, 1, 1])
    np.testing.assert_allclose(found, [1 + 1.5, 1.5, 1, 1])


@pytest.mark.parametrize(("loss", "factor"), [("dr_grpo", 0.15), ("rloo", 0.2)])
@pytest.mark.parametrize("kind", ["brier", "rps"])
def test_the_expected_policy_gradient_is_that_of_the_score(small, kind, loss, factor):
    """Over all 81 groups of four answers from three tiers; 0.15 is (1 - 1/4) / 2 / (1 + 3/2), and 0.2 is 4/3 of it."""
    logits, truth = jnp.array([0.3, -0.5, 0.9]), 1

    def proper(logits):
        p, hit = jax.nn.softmax(logits), jnp.arange(3) == truth
        if kind == "brier":
            return jnp.sum((p - hit) ** 2)
        return jnp.sum((jnp.cumsum(p) - jnp.cumsum(hit)) ** 2) * 2 / (3 - 1)

    groups = np.array(list(itertools.product(range(3), repeat=4)))
    stated = np.stack([np.zeros_like(groups), np.zeros_like(groups), groups], axis=-1)
    yes = np.ones((81, 4, T), bool)
    rolled = Rollout(tokens=0 * yes, logp=0.0 * yes, sampled=yes, valid=yes, finished=yes[..., 0])
    reading = Reading(stated, np.ones_like(stated), np.ones_like(stated), well_formed=yes[..., 0])
    batch = small.batch([(0, 0)] * 81, tiers=[truth] * 81)
    cfg = dataclasses.replace(SUM, composition="terminal", tier_kind=kind)
    s = score(reading, rolled, batch, small.tables, cfg=cfg)
    config = dataclasses.replace(CONFIG.objective, loss=loss, credit="sequence", kl="none")
    advantage = jax.jit(advantages, static_argnums=(3, 4))(s, reading, ~yes[..., 0], T, config)[..., 0]

    def surrogate(logits):  # the advantages are constants, as in the loss
        logp = jax.nn.log_softmax(logits)[groups]
        chance = jax.lax.stop_gradient(jnp.exp(jnp.sum(logp, axis=1)))
        return jnp.sum(chance * jnp.mean(advantage * logp, axis=1))

    np.testing.assert_allclose(jax.grad(surrogate)(logits), -factor * jax.grad(proper)(logits), atol=1e-6)


def test_a_step_of_unknown_truth_is_not_counted(small):
    s = scored(small, [(0, 0, 1), (2, 1, 2)], truth=(UNKNOWN, 1), tier=1)
    np.testing.assert_array_equal(s.counted[0, :, FIT], [False, False])
    np.testing.assert_array_equal(s.counted[0, :, BRAND], [True, True])
    np.testing.assert_allclose(s.total[0], [1 + 0.125, 0.5 + 0.25 + 0.125])  # the second answer is consistent
    s = scored(small, [(UNKNOWN, 0, 0)], truth=(UNKNOWN, 0))
    assert s.raw[0, 0, FIT] == 0  # "not stated" does not match "not known"


def test_a_forced_part_earns_nothing_and_is_counted_nowhere(small):
    # The prefix holds 1 token (fit), 2 (fit and brand), none.
    s = scored(small, [(0, 0, 0)] * 3, forced_len=[1, 2, 0])
    np.testing.assert_array_equal(s.counted[0, :, :CONSISTENT], [[1, 0, 1], [1, 0, 0], [1, 1, 1]])
    assert s.counted[0, :, CONSISTENT:].all()  # the tier was sampled, so consistency counts
    np.testing.assert_allclose(s.total[0], [1.875, 1.375, 2.375])
    assert s.passed.all() and not s.tier_forced.any()


def test_a_part_completed_after_the_prefix_is_sampled(small):
    """A part that the prefix begins and the policy completes counts as sampled."""
    s = scored(small, [(0, 0, 0)], position=(1, 2, 3), forced_len=1)
    assert s.counted.all()
    s = scored(small, [(0, 0, 0)], position=(1, 2, 3), forced_len=2)
    np.testing.assert_array_equal(s.counted[0, 0], [1, 0, 1, 1, 1, 1])


def test_a_whole_answer_that_was_forced_is_not_called_consistent(small):
    s = scored(small, [(0, 0, 0)], forced_len=3)
    np.testing.assert_array_equal(s.counted[0, 0], [0, 0, 0, 0, 1, 1])
    assert s.total[0, 0] == 0.125
    assert s.tier_forced[0, 0] and not s.passed[0, 0]  # no step was sampled


def test_where_the_tier_was_forced_sampled_steps_of_known_truth_decide(small):
    """respond_then_think: the tier comes first, so the prefix may hold it."""
    places = (1, 2, 0)
    s = scored(small, [(0, 0, 0), (0, 1, 0), (0, 0, 0), (1, 0, 0)], position=places, forced_len=[1, 1, 2, 2])
    assert s.tier_forced.all() and not s.counted[0, :, TIER].any()
    # Both right; one wrong; fit given and brand right; fit given, so that it may be wrong, and brand right.
    np.testing.assert_array_equal(s.passed[0], [True, False, True, True])
    s = scored(small, [(0, 0, 0), (0, 1, 0)], truth=(UNKNOWN, 0), position=places, forced_len=1)
    np.testing.assert_array_equal(s.passed[0], [True, False])  # fit is unknown, so brand decides
    s = scored(small, [(0, 0, 0)], truth=(UNKNOWN, UNKNOWN), position=places, forced_len=1)
    assert not s.passed[0, 0]  # no sampled step is known


def test_the_overlong_penalty_rises_to_its_whole_weight_at_the_last_token(small):
    s = scored(small, [(0, 0, 0)] * 5, length=[3, 4, 5, 7, 8])
    np.testing.assert_allclose(s.earned[0, :, OVERLONG], [0, 0, -0.5, -1.5, -2])
    late = dataclasses.replace(SUM, overlong_from=T)  # no penalty
    np.testing.assert_allclose(scored(small, [(0, 0, 0)], late, length=8).earned[0, 0, OVERLONG], 0)


def test_consistency_is_that_of_the_table(small):
    combinations = np.array([(fit, brand) for fit in range(3) for brand in range(2)])
    by_hand = [0, 1, 1, 1, 2, 2]
    for tier in range(3):
        found = is_consistent(combinations, np.full(6, tier), small.tables)
        np.testing.assert_array_equal(found, np.array(by_hand) == tier)
    unstated = is_consistent(np.array([[0, UNKNOWN], [0, 0]]), np.array([0, UNKNOWN]), small.tables)
    assert not np.any(unstated)


def test_score_of_answers_as_the_reader_reads_them(small):
    """From tokens: a right answer, one that states two different tiers, and the right one with all tokens forced."""
    end = small.tables.end_token
    tokens = np.array([[[0, 3, 5, end, end, end], [0, 3, 5, 6, end, end], [0, 3, 5, end, end, end]]], np.int32)
    valid = np.cumsum(tokens == end, axis=-1) - (tokens == end) == 0
    sampled = valid & ~((np.arange(6) < 3) & (np.arange(3) == 2)[None, :, None])
    rolled = Rollout(tokens, np.zeros(tokens.shape, np.float32), sampled, valid, np.ones((1, 3), bool))
    reading = reader.read(small.tables, tokens, valid)
    s = score(reading, rolled, small.batch([(0, 0)]), small.tables, cfg=dataclasses.replace(SUM, overlong_from=6))
    np.testing.assert_allclose(s.total[0], [2.375, 1.0, 0.125])
    np.testing.assert_array_equal(s.passed[0], [True, False, False])


@pytest.mark.slow
def test_answers_that_somebody_wrote_earn_what_they_would_in_training(small):
    """The reader reads them, with the vocabulary of a trained tokenizer. An answer that is too long is cut."""
    tokenizer = train_bpe([phrase.text for phrase in small.book.phrases], 300)
    tables = compile_tables(small.book, tokenizer.token_bytes(), tokenizer.end_token)
    pair = Pair(id="p", query="red shoes", title="red boots", tier=0, steps=(0, 0))
    cfg = dataclasses.replace(SUM, composition="gated", overlong_weight=0.0)
    right = "F:yes,B:ok,T:good"
    longest = len(tokenizer.encode(right)) + 1  # and its end token
    answers = [right, "F:yes,B:off,T:good", "F:part,B:ok,T:fair", "T:good", f"well, {right}", ""]
    rows = score_answers(answers, pair, small.book, tokenizer, tables, cfg, longest + 9)
    stated = {"fit": "yes", "brand": "ok", "tier": "good"}
    assert rows[0]["statements"] == rows[4]["statements"] == ["F:yes", "B:ok", "T:good"]
    assert rows[0]["stated"] == stated and rows[0]["text"] == right and rows[0]["truth"] == stated
    parts = {"tier": 1, "fit": 0.5, "brand": 0.5, "consistent": 0.25, "format": 0.125, "overlong": 0}
    assert rows[0]["parts"] == parts and "advantage" not in rows[0]
    gated = 1 + 0.125  # the steps do not imply the tier
    # The last three are malformed, so their tier is not right.
    assert [row["reward"] for row in rows] == [2.375, gated, 0.5 + 0.25 + 0.125, 0, 1.25, 0]
    assert [row["passed"] for row in rows] == [True, True, False, False, False, False]
    (cut,) = score_answers([right + " " * 9], pair, small.book, tokenizer, tables, cfg, longest)
    assert not cut["finished"] and cut["parts"]["format"] == 0
