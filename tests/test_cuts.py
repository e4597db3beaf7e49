"""Cut points: the tiers that they choose, their fit, which finds the best ones, and the file that keeps them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from agrl_jax.judging import cuts
from agrl_jax.judging.cuts import CutsError, Fit

TIERS = ["good", "fair", "bad"]


def test_the_first_tier_whose_cumulative_probability_reaches_its_cut_point() -> None:
    probs = np.array([[0.5, 0.3, 0.2], [0.49, 0.3, 0.21], [0.1, 0.2, 0.7], [0.0, 0.5, 0.5]])
    assert cuts.choose(probs, (0.5, 0.7)).tolist() == [0, 1, 2, 2]
    assert cuts.choose(probs, (0.1, 0.5)).tolist() == [0, 0, 0, 1]
    assert cuts.choose(probs, (0.9, 0.05)).tolist() == [1, 1, 1, 1]


def test_macro_f1_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, chosen = rng.integers(0, 3, (2, 200))
    assert cuts.macro_f1(truth, chosen) == pytest.approx(f1_score(truth, chosen, average="macro"))


def test_a_tier_the_policy_is_shy_of_is_set_right() -> None:
    """Good pairs get 0.35 or more for good, other pairs less. A cut at 0.5 misses all good pairs, a lower one none."""
    probs = np.array([[0.35, 0.05, 0.6], [0.4, 0.1, 0.5], [0.25, 0.5, 0.25], [0.2, 0.55, 0.25], [0.1, 0.1, 0.8]])
    truth = np.array([0, 0, 1, 1, 2])
    fitted = cuts.fit(probs, truth, before=probs.argmax(axis=1))
    assert fitted.macro_f1 == 1
    assert 0.25 < fitted.cuts[0] <= 0.35
    # Without cuts: good 0 of 2, fair 2 of 2, bad once right and twice wrongly claimed: F1 0, 1 and 2/4.
    assert fitted.macro_f1_before == pytest.approx(0.5)


def test_the_fit_comes_near_the_best_of_all_cut_points() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 120)
    probs = rng.dirichlet(np.ones(3), 120) + 0.8 * np.eye(3)[truth] * rng.random((120, 1))
    probs /= probs.sum(axis=1, keepdims=True)
    fitted = cuts.fit(probs, truth, truth)
    best = max(cuts.macro_f1(truth, cuts.choose(probs, pair)) for pair in itertools.product(cuts.PLACES, repeat=2))
    assert fitted.macro_f1 == pytest.approx(cuts.macro_f1(truth, cuts.choose(probs, fitted.cuts)))
    assert best - 0.01 <= fitted.macro_f1 <= best
    assert cuts.fit(probs, truth, truth) == fitted


def test_what_is_saved_is_loaded_for_the_same_judge_alone(tmp_path) -> None:
    path = tmp_path / "cuts.json"
    cuts.save(path, TIERS, Fit((0.25, 0.75), 0.9, 0.8), {"checkpoint": "a"})
    assert cuts.load(path, TIERS, {"checkpoint": "a"}) == (0.25, 0.75)
    with pytest.raises(CutsError, match="fitted for another checkpoint"):
        cuts.load(path, TIERS, {"checkpoint": "b"})
    with pytest.raises(CutsError, match="for each of good, poor"):
        cuts.load(path, ["good", "poor", "bad"], {"checkpoint": "a"})


@pytest.mark.parametrize("content", [None, "{", "[]", json.dumps({"cuts": {"good": "x", "fair": 1}, "made_for": {}})])
def test_a_file_without_cut_points_is_refused_by_name(tmp_path, content) -> None:
    path = tmp_path / "cuts.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CutsError, match=r"cuts\.json.*--fit_cuts"):
        cuts.load(path, TIERS, {})
