"""Judges scored on files of labelled pairs: our judge, and any other whose judgements are in the file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import commands
import numpy as np
import pytest
from workdirs import make_workdir

from agrl_jax import evaluate
from agrl_jax.data.format import PairsFormat
from agrl_jax.data.rows import PairsError
from agrl_jax.judging import labelled
from agrl_jax.judging.engine import Judge
from agrl_jax.judging.files import judge_file
from agrl_jax.judging.trained import Settings
from agrl_jax.rulebook.book import load

BOOK = load("four_tier")


def write(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_anyones_judgements_are_scored_under_their_own_names(tmp_path: Path) -> None:
    """Right, one grade off, three grades off, and no answer, which counts as wrong by as many grades as possible."""
    said = [("4", "4-excellent"), ("3", "2"), ("1", "4"), ("2", "")]
    rows = [
        {"search": f"q{i}", "title": "a shoe", "human": human, "gpt": gpt} for i, (human, gpt) in enumerate(said)
    ]
    columns = {"query": "search", "label": "human", "judge_tier": "gpt"}
    scored = labelled.read_judged(write(tmp_path / "them.csv", rows), BOOK, PairsFormat(columns=columns))
    scores = scored.scores(BOOK, bootstrap=0)
    assert scores["accuracy"]["value"] == pytest.approx(1 / 4) and scores["mae"]["value"] == pytest.approx(6 / 4)
    assert scores["format"]["value"] == pytest.approx(3 / 4)
    for name in ("auc", "nll", "ece", "step_accuracy", "step_accuracy/brand", "adherence", "truncated"):
        assert scores[name]["value"] is None, name
    assert scores["by_family"]["all"]["adherence"]["value"] is None
    errors = labelled.worst_first(scored, BOOK)
    assert [(one["row"], one["grades_off"]) for one in errors] == [(3, 3), (4, 2), (2, 1)]
    assert (errors[0]["label"], errors[0]["judge_tier"], errors[1]["judge_tier"]) == ("1-Irrelevant", "4-Excellent", "")
    labelled.write_errors(tmp_path / "errors.csv", errors)
    with (tmp_path / "errors.csv").open(newline="") as file:
        assert [row["query"] for row in csv.DictReader(file)] == ["q2", "q3", "q1"]


def test_a_file_judged_without_steps_has_no_figures_of_steps(tmp_path: Path) -> None:
    steps = {f"{name}_{step.name}": "" for step in BOOK.steps for name in ("judge_step", "step")}
    row = {"query": "q", "title": "a shoe", "label": "4", "judge_tier": "4"} | steps | {"step_category": "same"}
    scores = labelled.read_judged(write(tmp_path / "alone.csv", [row]), BOOK).scores(BOOK, bootstrap=0)
    assert scores["accuracy"]["value"] == 1
    assert [scores[name]["value"] for name in ("adherence", "step_accuracy", "all_right")] == [None] * 3
    (said,) = write(tmp_path / "said.csv", [row | {"judge_step_brand": "match"}]),
    assert labelled.read_judged(said, BOOK).scores(BOOK, bootstrap=0)["step_accuracy"]["value"] == 0


def test_equally_wrong_answers_are_listed_by_the_probability_of_the_truth(tmp_path: Path) -> None:
    names = [f"judge_prob_{tier.name}" for tier in BOOK.tiers]
    stated = [(0.7, 0.3, 0, 0), (0.9, 0.1, 0, 0), (0.6, 0.4, 0, 0)]
    rows = [
        {"query": f"q{i}", "title": "a shoe", "label": "3", "judge_tier": "4"} | dict(zip(names, probs, strict=True))
        for i, probs in enumerate(stated)
    ]
    scored = labelled.read_judged(write(tmp_path / "them.csv", rows), BOOK)
    assert [one["row"] for one in labelled.worst_first(scored, BOOK)] == [2, 1, 3]
    expected = -np.mean(np.log([0.3, 0.1, 0.4]))
    assert scored.scores(BOOK, bootstrap=0)["nll"]["value"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"judge_tier": "Good"}, "row 1: judge_tier 'Good' should be one of: 4-Excellent"),
        ({"judge_prob_4-Excellent": "0.9"}, "row 1: its probabilities should be at least 0, and sum to 1, not 1.9"),
        ({"judge_prob_4-Excellent": "x"}, "row 1: has a tier, but not a number as the probability of each"),
    ],
)
def test_judgements_that_cannot_be_read_are_refused_by_row(tmp_path: Path, change: dict, said: str) -> None:
    row = {"query": "q", "title": "a shoe", "label": "3", "judge_tier": "3-Related"}
    row |= dict(zip((f"judge_prob_{tier.name}" for tier in BOOK.tiers), (0, 1, 0, 0), strict=True))
    with pytest.raises(PairsError, match="1 of 2 rows cannot be used") as error:
        labelled.read_judged(write(tmp_path / "them.csv", [row | change, row]), BOOK)
    assert said in str(error.value)


def test_a_file_without_judgements_is_refused(tmp_path: Path) -> None:
    rows = [{"query": "q", "title": "a shoe", "label": "3", "judge_tiers": "3"}]
    with pytest.raises(PairsError, match="lacks the column 'judge_tier'; .*did you mean 'judge_tiers'"):
        labelled.read_judged(write(tmp_path / "them.csv", rows), BOOK)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    workdir = make_workdir(tmp_path_factory.mktemp("run"))
    return Judge.from_checkpoint(str(workdir), batch_size=4, settings=Settings(prompt_len=32))


def test_a_judge_is_scored_alike_by_its_file_and_by_itself(judge: Judge, tmp_path: Path) -> None:
    rows = [
        {"query": f"shoes {i // 2}", "title": "red " * (i % 5 + 1), "label": str(4 - i % 4),
         "step_category": "same" if i % 4 == 0 else ""}
        for i in range(16)
    ]  # fmt: skip
    source = write(tmp_path / "human.csv", rows)
    itself = labelled.judge_pairs(judge, source)
    judge_file(judge, str(source), str(tmp_path / "judged.csv"))
    by_file = labelled.read_judged(tmp_path / "judged.csv", judge.book)
    assert itself.unjudged == [] and len(itself.pairs) == 16
    ours, theirs = (scored.scores(judge.book, bootstrap=0) for scored in (itself, by_file))
    for name in ("accuracy", "macro_f1", "kappa", "mae", "step_accuracy", "adherence"):
        assert ours[name]["value"] == theirs[name]["value"], name
    # The file has six decimals, so NLL, which depends on the smallest probabilities, differs.
    assert ours["brier"]["value"] == pytest.approx(theirs["brier"]["value"], abs=1e-5)
    assert labelled.worst_first(itself, judge.book) == labelled.worst_first(by_file, judge.book)


def test_pairs_that_a_judge_cannot_judge_are_told(judge: Judge, tmp_path: Path) -> None:
    rows = [{"query": query, "title": "a shoe", "label": "3"} for query in ("shoes", "red " * 200, "boots")]
    scored = labelled.judge_pairs(judge, write(tmp_path / "human.csv", rows))
    assert [pair.row for pair in scored.pairs] == [1, 3] and len(scored.judged) == 2
    assert len(scored.unjudged) == 1 and scored.unjudged[0].startswith("row 2: ") and "32" in scored.unjudged[0]


# The command


def test_the_command_scores_a_judged_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"query": f"q{i}", "title": "a shoe", "human": str(4 - i % 4), "gpt": str(4 - i // 2 % 4)} for i in range(8)
    ]
    file = write(tmp_path / "them.csv", rows)
    assert commands.exit_code(evaluate.main, f"--judged={file}", "--columns={label: human, judge_tier: gpt}") == 0
    card = json.loads((tmp_path / "them.scorecard.json").read_text())["judged"]["them"]
    # Labels 0 1 2 3 0 1 2 3 and judgements 0 0 1 1 2 2 3 3: the first and the last are right.
    assert card["accuracy"]["value"] == pytest.approx(2 / 8) and card["nll"]["value"] is None
    assert "judged wrongly: 6 of 8 pairs, the worst:" in capfd.readouterr().out
    with (tmp_path / "them.errors.csv").open(newline="") as errors:
        assert [int(row["grades_off"]) for row in csv.DictReader(errors)] == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--judged=a.csv", "--workdir=runs"), "one of --workdir, --checkpoint and --judged is needed"),
        (("--workdir=runs", "--pairs=human.csv"), "a file goes with --checkpoint"),
        (("--judged=a.csv", "--columns=label"), "columns=label: should be written like"),
        (("--judged=no_such.csv",), "no_such.csv"),
    ],
)
def test_the_command_refuses_in_one_message(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.exit_code(evaluate.main, *arguments) == 2
    assert said in capsys.readouterr().err
