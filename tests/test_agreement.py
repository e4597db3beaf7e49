"""Agreement of raters: against published values and scikit-learn, and files of ratings."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from agrl_jax.data.format import PairsFormat
from agrl_jax.data.rows import PairsError
from agrl_jax.evaluation import agreement
from agrl_jax.evaluation.html import render
from agrl_jax.judging import raters
from agrl_jax.rulebook.book import load

BOOK = load("four_tier")
GRADES = [tier.grade for tier in BOOK.tiers]
_ = -1
# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, twelve units.
PUBLISHED = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]).T  # fmt: skip


@pytest.mark.parametrize(("distance", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_that_of_the_published_example(distance, value):
    labels = np.where(PUBLISHED == _, _, PUBLISHED - 1)
    together = agreement.coincidences(labels, 5).sum(axis=0)
    assert together.sum() == 40  # pairable values
    assert agreement.alpha(together, [1, 2, 3, 4, 5], distance) == pytest.approx(value, abs=5e-4)
    # The values may be listed in any order.
    turned = agreement.coincidences(np.where(labels == _, _, 4 - labels), 5).sum(axis=0)
    assert agreement.alpha(turned, [5, 4, 3, 2, 1], distance) == pytest.approx(value, abs=5e-4)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_kappa_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 4, (2, 30))
    found = agreement.compare(one, other, [str(i) for i in range(30)], GRADES, bootstrap=0)
    assert found["n"] == 30 and found["agreement"]["value"] == pytest.approx(np.mean(one == other))
    assert found["kappa"]["value"] == pytest.approx(cohen_kappa_score(one, other))
    assert found["weighted_kappa"]["value"] == pytest.approx(cohen_kappa_score(one, other, weights="quadratic"))


def test_unequal_grades_weigh_as_they_differ():
    """Grades 10, 1, 0: confusing the last two, as happens once here, hardly counts."""
    one, other = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])
    found = agreement.compare(one, other, list("abcd"), [10, 1, 0], bootstrap=0)["weighted_kappa"]["value"]
    # Raters give the grades 1, 1, 2 and 1, 2, 1 times. By chance the squares are (162 + 100 + 81 + 1 + 200 + 4) / 4.
    assert found == pytest.approx(1 - 1 / (548 / 4))


def test_what_only_one_has_rated_does_not_count():
    one, other = np.array([0, 1, _, 3]), np.array([0, 2, 2, _])
    found = agreement.compare(one, other, list("abcd"), GRADES, bootstrap=50)
    assert found["n"] == 2 and found["agreement"]["value"] == 0.5
    nobody = agreement.compare(np.array([_]), np.array([_]), ["a"], GRADES, bootstrap=10)
    assert nobody["n"] == 0 and nobody["kappa"] == {"value": None, "low": None, "high": None}


def test_the_majority_is_no_tie():
    labels = np.array([[0, 0, 1], [0, 1, _], [2, _, _], [_, _, _], [3, 1, 1]])
    assert agreement.majority(labels, 4).tolist() == [0, _, 2, _, 1]


def test_intervals_hold_the_value_and_shrink_with_queries():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 4, 400)
    same = np.repeat(rng.random(10) < 0.7, 40)  # the pairs of a query are alike
    other = np.where(same, one, (one + 1) % 4)
    by_pair = agreement.compare(one, other, [str(i) for i in range(400)], GRADES, 300)["agreement"]
    by_query = agreement.compare(one, other, [str(i // 40) for i in range(400)], GRADES, 300)["agreement"]
    assert by_pair["low"] < by_pair["value"] < by_pair["high"] and by_pair["value"] == by_query["value"]
    assert 0.05 < by_pair["high"] - by_pair["low"] < 0.15
    assert by_query["high"] - by_query["low"] > 3 * (by_pair["high"] - by_pair["low"])
    assert agreement.compare(one, other, ["a"] * 400, GRADES, 300)["kappa"]["low"] is None


def test_what_is_won_by_abstaining():
    confidence, right = np.array([0.9, 0.5, 0.8, 0.5]), np.array([True, False, False, True])
    curve = agreement.risk_coverage(confidence, right)
    assert [(p["confidence"], p["coverage"], p["agreement"]) for p in curve] == [
        (0.9, 0.25, 1.0), (0.8, 0.5, 0.5), (0.5, 1.0, 0.5)
    ]  # fmt: skip
    assert agreement.threshold(curve, 0.9)["coverage"] == 0.25
    assert agreement.threshold(curve, 0.5)["coverage"] == 1.0
    assert agreement.threshold(curve[1:], 0.9) is None


# Files

WIDE = [
    {"query": "a", "title": "x", "judge_tier": "4-Excellent", "ann": "4", "ben": "4-excellent", "cleo": ""},
    {"query": "b", "title": "y", "judge_tier": "3-Related", "ann": "3", "ben": "2", "cleo": "3"},
    {"query": "b", "title": "z", "judge_tier": "", "ann": "1", "ben": "2", "cleo": ""},
]


def write(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_one_row_a_pair_and_one_row_a_rating_read_alike(tmp_path):
    wide = raters.read_ratings(write(tmp_path / "wide.csv", WIDE), BOOK, raters=("ann", "ben", "cleo"))
    long = [
        {"query": row["query"], "title": row["title"], "judge_tier": row["judge_tier"], "who": who, "label": row[who]}
        for who in ("cleo", "ben", "ann") for row in WIDE
    ]  # fmt: skip
    tall = raters.read_ratings(write(tmp_path / "long.csv", long), BOOK, rater="who")
    assert wide.raters == tall.raters == ("ann", "ben", "cleo")
    assert wide.labels.tolist() == tall.labels.tolist() == [[0, 0, _], [1, 2, 1], [3, 2, _]]
    assert wide.judged.tolist() == tall.judged.tolist() == [0, 1, _] and wide.confidence is None


def test_a_judgement_stands_in_any_row_of_its_pair_and_is_the_same_in_all(tmp_path):
    rows = [{"query": "a", "title": "x", "judge_tier": "", "who": "ann", "label": "4"},
            {"query": "a", "title": "x", "judge_tier": "4", "who": "ben", "label": "3"}]  # fmt: skip
    assert raters.read_ratings(write(tmp_path / "a.csv", rows), BOOK, rater="who").judged.tolist() == [0]
    rows.append({"query": "a", "title": "x", "judge_tier": "1", "who": "cleo", "label": "4"})  # of another brand, say
    with pytest.raises(PairsError, match="row 3: the judge gives this pair '1', and '4' in row 2"):
        raters.read_ratings(write(tmp_path / "a.csv", rows), BOOK, rater="who")


def test_people_may_have_labels_of_their_own_beside_a_judge_that_writes_tiers(tmp_path):
    letters = {"4": "E", "4-excellent": "E", "3": "S", "2": "C", "1": "I", "": ""}
    rows = [row | {who: letters[row[who]] for who in ("ann", "ben")} for row in WIDE]
    form = PairsFormat.parse("", "{E: 4, S: 3, C: 2, I: 1}", "")
    ratings = raters.read_ratings(write(tmp_path / "wide.csv", rows), BOOK, ("ann", "ben"), form=form)
    assert ratings.judged.tolist() == [0, 1, _] and ratings.labels.tolist() == [[0, 0], [1, 2], [3, 2]]
    rows[0]["ann"] = "4-Excellent"  # which is no label of these people
    with pytest.raises(PairsError, match="row 1: ann '4-Excellent' should be one of: E, S, C, I"):
        raters.read_ratings(write(tmp_path / "wide.csv", rows), BOOK, ("ann", "ben"), form=form)


def test_a_report_by_hand(tmp_path):
    probs = [dict(zip((f"judge_prob_{t.name}" for t in BOOK.tiers), p, strict=True))
             for p in ((0.9, 0.1, 0, 0), (0.2, 0.6, 0.2, 0), ("",) * 4)]  # fmt: skip
    rows = [row | of for row, of in zip(WIDE, probs, strict=True)]
    ratings = raters.read_ratings(write(tmp_path / "wide.csv", rows), BOOK, raters=("ann", "ben", "cleo"))
    found = raters.report(ratings, BOOK, wanted=0.9, bootstrap=0)
    assert (found["no_majority"], found["unjudged"]) == (1, 1)  # z: two tiers once each, and no judgement
    figures = {(pair["one"], pair["other"]): (pair["n"], pair["agreement"]["value"]) for pair in found["pairs"]}
    assert figures["judge", "majority"] == (2, 1.0) and figures["judge", "ben"] == (2, 0.5)
    assert figures["ann", "ben"] == (3, pytest.approx(1 / 3)) and figures["ann", "cleo"] == (1, 1.0)
    assert figures["ann", "majority of the others"] == (2, 0.5)  # the others are tied on b and y; only ben is left on z
    by_tier = found["by_tier"]["3-Related"]
    assert by_tier["n"] == 1 and by_tier["agreement"]["value"] == 1 and found["by_family"]["all"]["n"] == 2
    assert not {"kappa", "weighted_kappa"} & by_tier.keys()  # the majority is one tier: they would be 0
    assert found["abstain"]["coverage"] == 1.0 and found["alpha"]["people"]["n"] == 3
    rows[0]["judge_prob_4-Excellent"] = ""  # of a pair that is judged
    assert raters.read_ratings(write(tmp_path / "wide.csv", rows), BOOK, raters=("ann", "ben")).confidence is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ann": "good"}, "row 2: ann 'good' should be one of: 4-Excellent"),
        ({"judge_tier": "9"}, "row 2: judge_tier '9' should be one of"),
    ],
)
def test_what_cannot_be_read_is_refused_by_row(tmp_path, change, said):
    file = write(tmp_path / "wide.csv", [WIDE[0], WIDE[1] | change])
    with pytest.raises(PairsError, match="1 rows cannot be used") as error:
        raters.read_ratings(file, BOOK, raters=("ann", "ben"))
    assert said in str(error.value)


def test_a_rater_who_contradicts_himself_is_refused(tmp_path):
    row = {"query": "a", "title": "x", "judge_tier": "4", "who": "ann", "label": "4"}
    file = write(tmp_path / "long.csv", [row, row, row | {"label": "3"}])
    with pytest.raises(PairsError, match="row 3: 'ann' has rated this pair already, and otherwise"):
        raters.read_ratings(file, BOOK, rater="who")


def test_a_column_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PairsError, match="lacks the column 'anne'.*did you mean 'ann'"):
        raters.read_ratings(write(tmp_path / "wide.csv", WIDE), BOOK, raters=("anne",))


# The command


def test_the_command_writes_a_page_and_its_figures(tmp_path):
    file, out = write(tmp_path / "wide.csv", [*WIDE, WIDE[1] | {"query": "<c>", "title": "<b>"}]), tmp_path / "a.html"
    done = subprocess.run(
        [sys.executable, "-m", "agrl_jax.agree", f"--judged={file}", "--raters=ann,ben,cleo", f"--out={out}",
         "--bootstrap=20"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "judge and majority: weighted kappa 1.000 on 3 pairs" in done.stdout
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["pairs_rated"] == 4 and found["raters"] == ["ann", "ben", "cleo"]
    page = out.read_text()
    assert "judge, majority" in page and "ann, majority of the others" in page and "What is won" not in page


def test_the_page_shows_what_is_won_by_abstaining(tmp_path):
    probs = dict(zip((f"judge_prob_{tier.name}" for tier in BOOK.tiers), (0.7, 0.1, 0.1, 0.1), strict=True))
    ratings = raters.read_ratings(write(tmp_path / "wide.csv", [row | probs for row in WIDE]), BOOK, ["ann", "ben"])
    page = render("agreement", {}, title="<x>", found=raters.report(ratings, BOOK, 0.9, bootstrap=10))
    assert "What is won by abstaining" in page and "0.7000" in page and "<x>" not in page
