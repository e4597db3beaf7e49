"""The file of judgements, and figures over several runs that judged the same pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_scorecard import BOOK, judgements, random_judgements, values

from agrl_jax.evaluation import judgements as kept
from agrl_jax.evaluation.intervals import over_seeds, score
from agrl_jax.evaluation.metrics import ScorecardError


def test_the_file_gives_back_what_was_judged_by_stage_and_split(tmp_path: Path) -> None:
    file = tmp_path / kept.FILE
    first, second = random_judgements(1), random_judgements(2)
    kept.write(file, "sft", {"b_eval": second}, BOOK)
    kept.write(file, "agrl", {"b_eval": second, "w_eval": first}, BOOK)
    kept.write(file, "sft", {"b_eval": first}, BOOK)  # written twice, as by a run that was stopped and continued
    frame = kept.read(file)
    assert frame.group_by("stage", "split").len().height == 3 and frame.height == 600
    judged = kept.of_frame(frame.filter(stage="sft"), BOOK)
    bare = dataclasses.replace(first, sample_index=None, sample_tier=None)  # samples are not kept
    for name, value in dataclasses.asdict(dataclasses.replace(bare, probs=bare.probs.astype(np.float32))).items():
        np.testing.assert_array_equal(value, getattr(judged, name))
    assert values(judged) == pytest.approx(values(bare), nan_ok=True)


def test_the_file_speaks_in_names(tmp_path: Path) -> None:
    steps = np.array([[0, 2, -1, 1]])
    judged = judgements([0], [-1], steps=steps, predicted_steps=np.full((1, 4), -1))
    kept.write(tmp_path / kept.FILE, "sft", {"b_eval": judged}, BOOK)
    (row,) = pl.read_parquet(tmp_path / kept.FILE).to_dicts()
    assert (row["tier"], row["judged_tier"], row["prob_4-Excellent"]) == ("4-Excellent", None, 0.25)
    assert (row["step_category"], row["step_attributes"], row["judged_step_category"]) == ("same", None, None)


def test_the_mean_over_runs_and_its_interval() -> None:
    runs = [random_judgements(seed, accuracy=accuracy) for seed, accuracy in enumerate((0.5, 0.6, 0.7))]
    found = over_seeds(runs, BOOK, bootstrap=400)
    alone = [score(judged, BOOK, bootstrap=0)["macro_f1"]["value"] for judged in runs]
    assert found["macro_f1"][0] == pytest.approx(np.mean(alone)) and found["macro_f1"].shape == (401,)
    # With three runs that differ, the interval is wider than by the queries of one run.
    one = over_seeds(runs[1:2], BOOK, bootstrap=400)
    assert np.std(found["accuracy"][1:]) > 1.2 * np.std(one["accuracy"][1:])
    # With one run, it is the bootstrap by query.
    interval = score(runs[1], BOOK, bootstrap=400)["accuracy"]
    assert np.percentile(one["accuracy"][1:], [2.5, 97.5]) == pytest.approx([interval["low"], interval["high"]])


def test_a_difference_leaves_out_what_both_share() -> None:
    same = over_seeds([random_judgements(1)], BOOK, bootstrap=100)["accuracy"]
    assert not (same - over_seeds([random_judgements(1)], BOOK, bootstrap=100)["accuracy"]).any()
    # 40 of 400 pairs turn from wrong to right, none back. The variance of a change is 0.1·0.9, whatever the level.
    before, after = np.repeat([0, 1], [200, 200]), np.repeat([0, 1], [240, 160])
    start, end = (
        over_seeds([judgements(np.zeros(400, int), one)], BOOK, bootstrap=3000)["accuracy"] for one in (before, after)
    )
    low, high = np.percentile((end - start)[1:], [2.5, 97.5])
    assert (end - start)[0] == pytest.approx(0.1)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.1 * 0.9 / 400), rel=0.1)


def test_runs_of_other_pairs_are_refused() -> None:
    judged = random_judgements(1)
    with pytest.raises(ScorecardError, match="the same pairs in the same order"):
        over_seeds([judged, judged.take(np.arange(199, -1, -1))], BOOK)
