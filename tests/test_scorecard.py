"""The scorecard: each metric by hand and against scikit-learn, intervals against theory, file and tables."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from agrl_jax.evaluation import intervals, metrics, tables
from agrl_jax.evaluation.intervals import score
from agrl_jax.evaluation.metrics import Judgements, ScorecardError
from agrl_jax.rulebook.book import RuleBook, Step, Tier, load
from agrl_jax.types import UNKNOWN

BOOK = load("four_tier")
GOOD = np.array([tier.good for tier in BOOK.tiers])
GRADES = np.array([tier.grade for tier in BOOK.tiers])


def judgements(tier, predicted, **fields) -> Judgements:
    """Judgements of one pair per query. By default they are right, known and well-formed, with steps of value 0."""
    tier, predicted = np.asarray(tier), np.asarray(predicted)
    n, r, tiers = len(tier), len(BOOK.steps), len(BOOK.tiers)
    formed = predicted != UNKNOWN
    defaults = dict(
        query=[f"q{i}" for i in range(n)],
        family=["plain"] * n,
        seen=np.ones(n, bool),
        steps=np.zeros((n, r), int),
        predicted_steps=np.zeros((n, r), int),
        probs=np.where(formed[:, None], np.eye(tiers)[predicted], 1 / tiers),
        well_formed=formed,
        truncated=np.zeros(n, bool),
        consistent=formed,
        response_tokens=np.full(n, 20),
    )
    return Judgements(tier=tier, predicted=predicted, **defaults | fields)


def random_judgements(seed: int, n: int = 200, queries: int = 60, accuracy: float = 0.6) -> Judgements:
    """Judgements that are right about as often as asked, sometimes malformed. The truth is the same for all seeds."""
    truth, rng = np.random.default_rng(123), np.random.default_rng(seed)
    tiers = len(BOOK.tiers)
    tier = truth.integers(tiers, size=n)
    steps = np.stack([truth.integers(UNKNOWN, count, size=n) for count in BOOK.num_values], axis=1)
    predicted = np.where(rng.random(n) < accuracy, tier, rng.integers(UNKNOWN, tiers, size=n))
    formed = predicted != UNKNOWN
    probs = rng.dirichlet(np.ones(tiers), size=n)
    sampled = np.sort(rng.choice(n, size=n // 3, replace=False))
    return judgements(
        tier,
        predicted,
        query=[f"q{i}" for i in truth.integers(queries, size=n)],
        family=[("plain", "brand", "negation")[i] for i in truth.integers(3, size=n)],
        seen=truth.random(n) < 0.8,
        steps=steps,
        predicted_steps=np.where(rng.random(steps.shape) < accuracy, steps, 0),
        probs=np.where(formed[:, None], probs, 1 / tiers),
        truncated=~formed & (rng.random(n) < 0.5),
        consistent=rng.random(n) < accuracy,
        response_tokens=rng.integers(15, 24, size=n),
        sample_index=sampled,
        sample_tier=rng.integers(UNKNOWN, tiers, size=(len(sampled), 5)),
    )


def values(judged: Judgements, book: RuleBook = BOOK) -> dict[str, float | None]:
    scores = score(judged, book, bootstrap=0)
    return {name: measure["value"] for name, measure in scores.items() if "value" in measure}


# ------------------------------------------------------------------------------------ against scikit-learn


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_scikit_learn(seed):
    judged = random_judgements(seed)
    found = values(judged)
    truth, said, labels = judged.tier, judged.predicted, range(4)
    furthest = np.abs(GRADES[:, None] - GRADES).argmax(axis=1)
    worst = np.where(said == UNKNOWN, furthest[truth], said)  # kappa and mae count a malformed answer so
    side = np.where(said == UNKNOWN, ~GOOD[truth], GOOD[said])
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, said))
    f1 = sk.f1_score(truth, said, labels=labels, average=None)
    assert [found[f"f1/{tier.name}"] for tier in BOOK.tiers] == pytest.approx(f1)
    assert found["macro_f1"] == pytest.approx(f1.mean())
    assert found["good_f1"] == pytest.approx(sk.f1_score(GOOD[truth], side))
    assert found["auc"] == pytest.approx(sk.roc_auc_score(GOOD[truth], judged.probs[:, GOOD].sum(axis=1)))
    assert found["kappa"] == pytest.approx(sk.cohen_kappa_score(truth, worst, labels=labels, weights="quadratic"))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(GRADES[truth], GRADES[worst]))
    assert found["nll"] == pytest.approx(sk.log_loss(truth, judged.probs, labels=labels))
    assert found["brier"] == pytest.approx(4 * sk.mean_squared_error(np.eye(4)[truth], judged.probs))


def test_steps_and_shares_equal_plain_means():
    judged = random_judgements(0)
    found = values(judged)
    formed, known = judged.well_formed, judged.steps != UNKNOWN
    right = (judged.steps == judged.predicted_steps) & formed[:, None]
    assert found["step_accuracy"] == pytest.approx(right[known].mean())
    for r, step in enumerate(BOOK.steps):
        assert found[f"step_accuracy/{step.name}"] == pytest.approx(right[known[:, r], r].mean())
    assert (known.any(axis=1) & (judged.tier == judged.predicted)).any()
    whole = (right | ~known).all(axis=1) & (judged.predicted == judged.tier)
    assert found["all_right"] == pytest.approx(whole[known.any(axis=1)].mean())
    assert found["adherence"] == pytest.approx((judged.consistent & formed).mean())
    assert found["format"] == pytest.approx(formed.mean())
    assert found["truncated"] == pytest.approx(judged.truncated.mean())
    assert found["response_tokens"] == pytest.approx(judged.response_tokens.mean())
    hit = judged.sample_tier == judged.tier[judged.sample_index][:, None]
    assert found["pass@5"] == pytest.approx(hit.any(axis=1).mean())


def test_ties_in_the_score_count_half_in_auc():
    probs = np.array([[0.5, 0.0, 0.5, 0.0], [0.25, 0.25, 0.5, 0.0], [0.9, 0.0, 0.0, 0.1], [0.2, 0.2, 0.6, 0.0]])
    judged = judgements([0, 2, 3, 3], [0, 2, 0, 3], probs=probs)  # scores 0.5 (Good); 0.5, 0.9, 0.4 (Bad)
    assert values(judged)["auc"] == pytest.approx((0.5 + 0 + 1) / 3)


# ------------------------------------------------------------------------------------------------ by hand


def test_tier_metrics_by_hand():
    # truth  4 4 3 2 1 1   said  4 3 3 2 1 2
    found = values(judgements([0, 0, 1, 2, 3, 3], [0, 1, 1, 2, 3, 2]))
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert [found[f"f1/{tier.name}"] for tier in BOOK.tiers] == pytest.approx([2 / 3] * 4)
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert found["good_f1"] == 1  # neither mistake crosses from Good to Bad
    assert found["mae"] == pytest.approx(2 / 6)
    # Disagreement 1 + 1. By chance: truth (2,1,1,2) against said (1,2,2,1) by grade 4..1, over 6:
    # 4: 2·(0 + 2·1 + 2·4 + 1·9) = 38; 3: 1·(1 + 0 + 2·1 + 1·4) = 7; 2 and 1 mirror them: 90 / 6 = 15.
    assert found["kappa"] == pytest.approx(1 - 2 / 15)


def test_a_malformed_answer_counts_as_wrong_everywhere():
    # All tiers are right, but the third and fourth answers are malformed.
    formed = np.array([True, True, False, False])
    tier = np.array([0, 3, 0, 3])
    judged = judgements(tier, tier, well_formed=formed, consistent=np.ones(4, bool), probs=np.eye(4)[tier])
    found = values(judged)
    assert found["accuracy"] == found["step_accuracy"] == found["adherence"] == found["format"] == 0.5
    assert found["f1/4-Excellent"] == found["f1/1-Irrelevant"] == pytest.approx(2 / 3)  # 1 hit, 1 miss, no false alarm
    assert found["good_f1"] == 0.5  # 1 hit, 1 miss, 1 false alarm
    assert found["mae"] == 1.5  # two of four are three grades off
    assert found["kappa"] == pytest.approx(0)  # two agree, two are opposite
    assert found["nll"] == pytest.approx(math.log(4) / 2)
    assert found["brier"] == pytest.approx((9 / 16 + 3 / 16) / 2)
    assert found["ece"] == pytest.approx(0.25 / 2)  # they say 0.25 and are wrong; the others say 1 and are right
    assert found["auc"] == pytest.approx((1 + 1 + 1 + 0.5) / 4)  # scores 1 and 0.5 against 0 and 0.5


def test_an_answer_without_a_tier_is_no_better_than_a_malformed_one():
    silent = judgements([0, 3], [0, UNKNOWN], well_formed=np.ones(2, bool))
    malformed = judgements([0, 3], [0, UNKNOWN])
    for metric in ("accuracy", "macro_f1", "good_f1", "kappa", "mae"):
        assert values(silent)[metric] == values(malformed)[metric]


def test_unknown_steps_are_not_counted():
    steps = np.full((3, 4), UNKNOWN)
    steps[0] = [0, 1, 0, UNKNOWN]
    steps[1, 0] = 2
    predicted = np.zeros((3, 4), int)
    scores = score(judgements([0, 1, 2], [0, 1, 2], steps=steps, predicted_steps=predicted), BOOK, bootstrap=0)
    assert (scores["step_accuracy"]["value"], scores["step_accuracy"]["n"]) == (0.5, 4)
    assert (scores["all_right"]["value"], scores["all_right"]["n"]) == (0, 2)
    assert (scores["step_accuracy/category"]["value"], scores["step_accuracy/category"]["n"]) == (0.5, 2)
    assert (scores["step_accuracy/brand"]["value"], scores["step_accuracy/brand"]["n"]) == (0, 1)
    assert scores["step_accuracy/limits"] == {"value": None, "low": None, "high": None, "n": 0}


def test_a_tier_that_is_right_by_luck_is_not_all_right():
    steps = np.zeros((5, 4), int)
    steps[2, 1:] = steps[4] = UNKNOWN
    predicted = np.zeros((5, 4), int)
    predicted[1, 3] = 1  # a wrong step, and yet the right tier
    scores = score(judgements([0] * 5, [0, 0, 0, 1, 0], steps=steps, predicted_steps=predicted), BOOK, bootstrap=0)
    assert (scores["all_right"]["value"], scores["all_right"]["n"]) == (2 / 4, 4)


def test_what_is_undefined_is_none_and_macro_f1_is_over_the_tiers_present():
    scores = score(judgements([0, 0, 1], [0, 2, 0]), BOOK, bootstrap=50)
    assert scores["f1/2-Mismatch"] == {"value": None, "low": None, "high": None, "n": 0}  # said, never true
    assert scores["auc"]["value"] is None and scores["auc"]["n"] == 0  # all are Good
    assert scores["f1/4-Excellent"]["n"] == 2
    assert scores["macro_f1"]["value"] == pytest.approx((0.5 + 0) / 2)
    only_bad = score(judgements([2, 3], [2, 3]), BOOK, bootstrap=0)
    assert only_bad["good_f1"]["value"] is None and only_bad["good_f1"]["n"] == 0
    assert score(judgements([2, 2], [2, 2]), BOOK, bootstrap=0)["kappa"]["value"] is None  # only one tier occurs
    assert "pass@8" not in scores and not any(name.startswith("majority") for name in scores)


def test_pass_and_majority_by_hand():
    samples = np.array([
        [0, 0, 1, 2],  # truth 0: wins
        [1, 1, 0, 0],  # truth 0: one of two tied
        [3, UNKNOWN, UNKNOWN, UNKNOWN],  # truth 3: malformed answers do not vote
        [2, 2, 1, 3],  # truth 1: passes, loses
        [UNKNOWN] * 4,  # truth 2: neither
    ])  # fmt: skip
    tier = [0, 0, 0, 3, 1, 2]  # the first pair was not sampled
    judged = judgements(tier, tier, sample_index=np.arange(1, 6), sample_tier=samples)
    scores = score(judged, BOOK, bootstrap=0)
    assert (scores["pass@4"]["value"], scores["pass@4"]["n"]) == (pytest.approx(4 / 5), 5)
    assert scores["majority@4"]["value"] == pytest.approx((1 + 0.5 + 1) / 5)


def test_calibration_error_by_hand():
    # Confidences 0.9, 0.9 (14th bin; one right) and 0.55 (9th bin; right): (|1.8 - 1| + |0.55 - 1|) / 3
    probs = np.array([[0.9, 0.1, 0, 0], [0.9, 0.1, 0, 0], [0.45, 0.55, 0, 0]])
    assert values(judgements([0, 1, 1], [0, 0, 1], probs=probs))["ece"] == pytest.approx((0.8 + 0.45) / 3)


def test_a_malformed_answer_is_never_calibrated_by_chance():
    assert values(judgements([0], [UNKNOWN]))["ece"] == 0.25  # although the first of four equal tiers is the true one


def test_a_certain_mistake_has_a_finite_nll():
    assert values(judgements([0], [3]))["nll"] == pytest.approx(-math.log(1e-12))


def test_grades_that_are_not_evenly_spaced():
    tiers = (Tier("A", 10, True, ""), Tier("B", 2, False, ""), Tier("C", 0, False, ""))
    step = Step("fit", "Fit", "Does it fit?", ("yes", "no"), ("", ""))
    book = RuleBook("three", tiers, (step,), ())
    steps, equal = np.zeros((3, 1), int), np.full((3, 3), 1 / 3)
    judged = judgements([0, 1, 2], [1, 2, UNKNOWN], steps=steps, predicted_steps=steps, probs=equal)
    found = values(judged, book)
    assert found["mae"] == pytest.approx((8 + 2 + 10) / 3)
    # Said B, C, A: disagreement 64 + 4 + 100. By chance, each truth against each answer over 3: 2·(64 + 4 + 100) / 3.
    assert found["kappa"] == pytest.approx(1 - 168 / 112)
    assert set(found) >= {"f1/A", "f1/B", "f1/C", "step_accuracy/fit"}


# ------------------------------------------------------------------------------------------------- cuts


def test_families_and_unseen_are_scored_on_their_own_pairs():
    judged = random_judgements(0)
    scores = score(judged, BOOK, bootstrap=100)
    assert list(scores["by_family"]) == ["brand", "negation", "plain"] and list(scores["by_seen"]) == ["seen", "unseen"]
    rows = np.flatnonzero(np.array(judged.family) == "negation")
    alone = score(judged.take(rows), BOOK, bootstrap=100)
    assert scores["by_family"]["negation"] == {name: alone[name] for name in metrics.CUT_METRICS}
    assert scores["by_seen"]["unseen"]["accuracy"]["n"] == (~judged.seen).sum()
    everything_seen = score(judgements([0, 1], [0, 1]), BOOK, bootstrap=10)["by_seen"]["unseen"]
    assert everything_seen["accuracy"] == {"value": None, "low": None, "high": None, "n": 0}


def test_scores_do_not_depend_on_the_order_of_the_rows():
    judged = random_judgements(0)
    shuffled = judged.take(np.random.default_rng(0).permutation(len(judged)))
    assert_close(score(judged, BOOK, bootstrap=50), score(shuffled, BOOK, bootstrap=50))


def assert_close(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_close(a[name], b[name])
    else:
        assert a == (b if a is None else pytest.approx(b, abs=1e-9))


# ------------------------------------------------------------------------------------------------ intervals


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.lists(st.integers(0, 3), min_size=12, max_size=12).filter(any))
def test_a_weighted_estimate_equals_that_of_the_materialised_resample(seed, counts):
    judged = random_judgements(seed, n=40, queries=12)
    names = sorted(set(judged.query))
    counts = counts[: len(names)]
    weights = np.zeros((1, len(names)))
    weights[0, : len(counts)] = counts
    taken = dict(zip(names, counts, strict=False))
    rows = np.repeat(np.arange(40), [taken.get(query, 0) for query in judged.query])
    weighted = metrics.Estimator(judged, BOOK)(weights)
    resample = metrics.Estimator(judged.take(rows), BOOK)
    materialised = resample(np.ones((1, resample.queries)))
    assert weighted.keys() == materialised.keys()
    for name, estimate in weighted.items():
        np.testing.assert_allclose(estimate.value, materialised[name].value, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(estimate.n, materialised[name].n, err_msg=name)


def test_the_interval_of_independent_pairs_is_the_normal_one():
    n, right = 400, 280
    judged = judgements(np.zeros(n, int), np.repeat([0, 1], [right, n - right]))
    measure = score(judged, BOOK, bootstrap=4000)["accuracy"]
    half = 1.96 * math.sqrt(0.7 * 0.3 / n)
    assert measure["value"] == 0.7
    assert measure["low"] == pytest.approx(0.7 - half, abs=0.005)
    assert measure["high"] == pytest.approx(0.7 + half, abs=0.005)


def test_the_interval_covers_the_true_accuracy():
    rng, covered, runs = np.random.default_rng(0), 0, 150
    for _ in range(runs):
        judged = judgements(np.zeros(80, int), np.where(rng.random(80) < 0.7, 0, 1))
        measure = score(judged, BOOK, bootstrap=300)["accuracy"]
        covered += measure["low"] <= 0.7 <= measure["high"]
    assert 0.89 <= covered / runs <= 0.99


def test_repeating_every_row_under_its_query_does_not_shrink_the_interval():
    judged = random_judgements(0)
    once, thrice = score(judged, BOOK, 200), score(judged.take(np.repeat(np.arange(len(judged)), 3)), BOOK, 200)
    for metric in ("accuracy", "macro_f1", "auc", "kappa", "step_accuracy", "ece"):
        for end in ("value", "low", "high"):
            assert thrice[metric][end] == pytest.approx(once[metric][end]), metric


def test_rows_under_queries_of_their_own_do_shrink_the_interval():
    tier, predicted = np.zeros(200, int), np.repeat([0, 1], [130, 70])
    wide = score(judgements(tier, predicted), BOOK, 4000)["accuracy"]
    narrow = score(judgements(np.repeat(tier, 4), np.repeat(predicted, 4)), BOOK, 4000)["accuracy"]
    assert (wide["high"] - wide["low"]) / (narrow["high"] - narrow["low"]) == pytest.approx(2, rel=0.1)


def test_every_interval_holds_its_value():
    # Exactly calibrated at 0.5, 0.6, 0.7, 0.8 and 0.9, so the calibration error is 0. That of every resample is larger.
    sure = np.repeat([0.5, 0.6, 0.7, 0.8, 0.9], 20)
    right = np.concatenate([np.arange(20) < count for count in (10, 12, 14, 16, 18)])
    probs = np.stack([sure, 1 - sure, 0 * sure, 0 * sure], axis=1)
    judged = judgements(np.where(right, 0, 2), np.zeros(100, int), probs=probs)
    calibration = score(judged, BOOK, bootstrap=200)["ece"]
    assert calibration["low"] == calibration["value"] == pytest.approx(0) and calibration["high"] > 0.02
    scores = score(random_judgements(0, n=120), BOOK, bootstrap=200)
    assert all(m["low"] <= m["value"] <= m["high"] for name, m in scores.items() if not name.startswith("by_"))


def test_a_tier_of_few_pairs_has_no_interval_of_f1_nor_has_macro_f1():
    tier = np.repeat([0, 1, 3], [20, 40, 19])  # no pair of the third tier
    judged = judgements(tier, np.roll(tier, 5))
    scores = score(judged, BOOK, bootstrap=50)
    names = [t.name for t in BOOK.tiers]
    assert scores["macro_f1"]["tiers"] == {names[0]: 20, names[1]: 40, names[3]: 19}
    has = {name: scores[name]["low"] is not None for name in ("accuracy", "macro_f1", *(f"f1/{n}" for n in names))}
    assert has == {"accuracy": True, "macro_f1": False} | {
        f"f1/{n}": there for n, there in zip(names, (True, True, False, False), strict=True)
    }
    lines = printed({"agrl": {"test": scores}}, 100)
    for start, few in [("macro-F1", True), (f"F1 {names[1]}", False), (f"F1 {names[3]}", True)]:
        assert next(line for line in lines if line.startswith(start)).rstrip().endswith("too few") == few
    said = " ".join("\n".join(lines).split())
    assert f"macro-F1: the mean over the tiers with pairs: {names[0]}, {names[1]}, {names[3]}." in said
    enough = score(judgements(np.repeat([0, 1], 20), np.zeros(40, int)), BOOK, bootstrap=50)
    assert enough["macro_f1"]["low"] is not None and enough["macro_f1"]["tiers"] == dict.fromkeys(names[:2], 20)


def test_without_resamples_or_with_one_query_there_is_no_interval():
    judged = random_judgements(0)
    assert score(judged, BOOK, bootstrap=0)["accuracy"]["low"] is None
    one = dataclasses.replace(judged, query=["same"] * len(judged))
    measure = score(one, BOOK, bootstrap=10)["accuracy"]
    assert measure["value"] is not None and measure["low"] is None and measure["high"] is None


def test_intervals_are_the_same_however_many_resamples_are_held_at_once(monkeypatch):
    judged = random_judgements(0)
    whole = score(judged, BOOK, bootstrap=30)
    monkeypatch.setattr(intervals, "_CELLS", 7 * len(judged))
    assert_close(score(judged, BOOK, bootstrap=30), whole)


def test_a_seed_gives_the_same_intervals_and_another_seed_others():
    judged = random_judgements(0)
    assert score(judged, BOOK, 50, seed=1) == score(judged, BOOK, 50, seed=1)
    assert score(judged, BOOK, 50, seed=1)["nll"]["low"] != score(judged, BOOK, 50, seed=2)["nll"]["low"]


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predicted": np.array([0])}, "predicted has 1 rows, query has 2"),
        ({"tier": np.array([0, UNKNOWN])}, "row 1: tier is -1, should be a tier index below 4"),
        ({"predicted": np.array([0, 4])}, "row 1: predicted is 4"),
        ({"predicted_steps": np.zeros((2, 3), int)}, r"predicted_steps is \(2, 3\), steps is \(2, 4\)"),
        ({"probs": np.array([[1.0, 0, 0, 0], [1.0, 1.0, 0, 0]])}, "row 1: probs is .* sum to 1"),
        ({"probs": np.array([[np.nan] * 4, [1.0, 0, 0, 0]])}, "row 0: probs"),
        ({"sample_index": np.array([0])}, "come together"),
        ({"sample_index": np.array([0, 2]), "sample_tier": np.zeros((2, 3), int)}, "sample_index is 2, should be"),
        ({"sample_index": np.array([1, 1]), "sample_tier": np.zeros((2, 3), int)}, "twice"),
        ({"sample_index": np.array([0]), "sample_tier": np.zeros((2, 3), int)}, "sample_tier has 2 rows"),
    ],
)
def test_judgements_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ScorecardError, match=message):
        dataclasses.replace(judgements([0, 1], [0, 1]), **fields)


def test_judgements_of_another_rule_book_are_refused():
    judged = judgements([0], [0], steps=np.zeros((1, 2), int), predicted_steps=np.zeros((1, 2), int))
    with pytest.raises(ScorecardError, match="4 tiers and 2 steps; the rule book '.*' has 4 and 4"):
        score(judged, BOOK)


# ------------------------------------------------------------------------------------------- file and tables


@pytest.fixture(scope="module")
def cards() -> metrics.Scorecards:
    start = score(random_judgements(1, accuracy=0.5), BOOK, bootstrap=50)
    end = score(random_judgements(2, accuracy=0.8), BOOK, bootstrap=50)
    return {"sft": {"b_eval": start, "w_eval": end}, "agrl": {"b_eval": end, "w_eval": end}}


def test_the_file_keeps_other_stages_and_is_strict_json(tmp_path, cards):
    path = tmp_path / "scorecard.json"
    tables.write(path, {"sft": cards["sft"], "old": {}})
    tables.write(path, {"agrl": cards["agrl"], "old": {"b_eval": cards["sft"]["b_eval"]}})
    found = tables.read(path)
    assert list(found) == ["sft", "old", "agrl"]
    assert found["sft"] == cards["sft"] and found["agrl"] == cards["agrl"]
    assert found["old"] == {"b_eval": cards["sft"]["b_eval"]}
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [p.name for p in tmp_path.iterdir()] == ["scorecard.json"]


@pytest.mark.parametrize("text", ["", "[1]", '{"sft": 3}', "{"])
def test_a_file_that_is_no_scorecard_is_refused_and_left_alone(tmp_path, text, cards):
    path = tmp_path / "scorecard.json"
    path.write_text(text)
    for use in (tables.read, lambda p: tables.write(p, cards)):
        with pytest.raises(ScorecardError, match="scorecard.json"):
            use(path)
    assert path.read_text() == text


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ScorecardError, match="nowhere.json: cannot be read"):
        tables.read(tmp_path / "nowhere.json")


def printed(cards, width: int) -> list[str]:
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(tables.table(cards), markup=False, highlight=False, soft_wrap=True)
    return console.file.getvalue().splitlines()


def test_the_table_shows_values_intervals_supports_and_the_difference(cards):
    lines = printed(cards, 80)
    start, end = cards["sft"]["b_eval"]["accuracy"], cards["agrl"]["b_eval"]["accuracy"]
    row = next(line for line in lines if line.startswith("accuracy"))
    assert row.split() == [
        "accuracy", "200",
        f"{start['value']:.3f}", f"[{start['low']:.3f},{start['high']:.3f}]",
        f"{end['value']:.3f}", f"[{end['low']:.3f},{end['high']:.3f}]",
        f"{end['value'] - start['value']:+.3f}",
    ]  # fmt: skip
    assert [line.strip() for line in lines if line.startswith(("b_eval", "w_eval"))] == [
        "b_eval", "b_eval by family: sft → agrl", "w_eval", "w_eval by family: sft → agrl",
    ]  # fmt: skip
    for tier in BOOK.tiers:
        support = cards["sft"]["b_eval"][f"f1/{tier.name}"]["n"]
        row = next(line for line in lines if line.startswith(f"F1 {tier.name}"))
        assert row.split()[2] == f"{support}" + "*" * (support < 50)
    assert any(cards["sft"]["b_eval"][f"f1/{tier.name}"]["n"] < 50 for tier in BOOK.tiers)
    assert any("fewer than 50" in line for line in lines)
    unseen = [cards[stage]["b_eval"]["by_seen"]["unseen"]["macro_f1"]["value"] for stage in ("sft", "agrl")]
    assert f"{unseen[0]:.2f}→{unseen[1]:.2f}" in next(line for line in lines if line.startswith("unseen"))


@pytest.mark.parametrize(("stages", "width"), [(1, 80), (2, 80), (3, 80), (3, 100)])
def test_the_table_fits_and_cuts_no_number(cards, stages, width):
    shown = dict(zip(("sft", "agrl", "best"), [cards["sft"], cards["agrl"], cards["sft"]], strict=True))
    lines = printed({name: shown[name] for name in list(shown)[:stages]}, width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert (width == 80 and stages == 3) or any(line.startswith("accuracy") and "[" in line for line in lines)


def test_what_a_stage_lacks_shows_as_a_dash(cards):
    bare = score(judgements([0, 1], [0, 0]), BOOK, bootstrap=0)
    lines = printed({"sft": {"b_eval": bare}, "agrl": cards["agrl"]}, 80)
    assert next(line for line in lines if line.startswith("AUC")).split()[-1] == "-"
    assert next(line for line in lines if line.startswith("pass@5")).split()[2] == "-"
    assert next(line for line in lines if line.startswith("accuracy")).split()[1] == "2/200*"
    assert any(line.startswith("w_eval") for line in lines)


def test_markdown_is_the_same_table(cards):
    text = tables.to_markdown(cards)
    blocks = text.split("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[1].splitlines()]
    assert rows[0] == ["", "n", "sft", "agrl", "difference"]
    assert {len(row) for row in rows} == {5}
    accuracy = next(row for row in rows if row[0] == "accuracy")
    plain = next(line for line in printed(cards, 80) if line.startswith("accuracy"))
    assert " ".join(accuracy).split() == plain.split()
    assert tables.to_markdown({}) == ""
