"""What to label next, and which labels to check: by hand, from judged files and from a judge."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workdirs import make_workdir

from agrl_jax import suggest as suggest_command
from agrl_jax.data.pairs import read_labelled
from agrl_jax.data.rows import PairsError, open_rows
from agrl_jax.judging import labelled, suggest
from agrl_jax.judging.engine import Judge
from agrl_jax.judging.trained import Settings
from agrl_jax.rulebook.book import load
from agrl_jax.runtime.files import OutputError

BOOK = load("four_tier")
TIERS = [tier.name for tier in BOOK.tiers]
ROOT = Path(__file__).parent.parent
STEPS = {4: "same,match,met,kept", 3: "substitute,match,met,kept", 2: "complement,match,met,kept",
         1: "different,match,met,kept"}  # fmt: skip
SURE = (1.0, 0.0, 0.0, 0.0)


def judged(path: Path, *rows: dict) -> Path:
    """A judged file. A row has its `probs`; unless given, its tier is the likeliest, and its steps imply this tier."""
    with path.open("w", newline="") as file:
        writer = None
        for i, row in enumerate(rows, 1):
            probs = row.pop("probs", SURE)
            grade = row.pop("grade", 4 - int(np.argmax(probs)))
            steps = row.pop("steps", STEPS[grade]).split(",")
            cells = {"query": f"q{i}", "title": f"t{i}", "judge_tier": str(grade)}
            cells |= {f"judge_prob_{name}": prob for name, prob in zip(TIERS, probs, strict=True)}
            cells |= {f"judge_step_{step.name}": value for step, value in zip(BOOK.steps, steps, strict=True)}
            writer = writer or csv.DictWriter(file, cells | row)
            if i == 1:
                writer.writeheader()
            writer.writerow(cells | row)
    return path


def chosen(path: Path, *others: Path, number: int = 99, **options) -> list[suggest.Suggestion]:
    pool = suggest.open_pool(path, {})
    opinions = [suggest.read_opinions(one, pool, BOOK) for one in (path, *others)]
    return suggest.choose(opinions, pool, BOOK, number, **options)


def test_the_less_sure_come_first(tmp_path):
    rows = [{"probs": probs} for probs in (SURE, (0.5, 0.5, 0, 0), (0.25,) * 4, (0.9, 0.1, 0, 0))]
    file = judged(tmp_path / "a.csv", *rows)
    found = chosen(file, by=["unsure"])
    tenth = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(4)
    assert [(one.row, pytest.approx(one.score)) for one in found] == [(3, 1.0), (2, 0.5), (4, tenth), (1, 0.0)]
    assert found[1].because == "unsure: 4-Excellent 0.50, 3-Related 0.50"
    assert found[3].because == "nothing speaks for it"
    assert [one.row for one in chosen(file, by=["unsure"], number=2)] == [3, 2]


def test_judges_who_are_sure_of_different_tiers_disagree(tmp_path):
    """Two judges that are unsure alike do not disagree: their doubt comes from the pair, not from the model."""
    even = (0.5, 0.5, 0, 0)
    one = judged(tmp_path / "a.csv", {"probs": SURE}, {"probs": SURE}, {"probs": even}, {"probs": SURE})
    two = judged(tmp_path / "b.csv", {"probs": SURE}, {"probs": (0, 0, 1, 0)}, {"probs": even}, {"probs": even})
    found = chosen(one, two, by=["disagreement"])
    # For the last row, the mixture is (3/4, 1/4). One judge has no entropy, the other has log 2.
    last = (-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2) / math.log(2)
    assert [(one.row, pytest.approx(one.score)) for one in found] == [(2, 1.0), (4, last), (1, 0.0), (3, 0.0)]
    assert found[0].because == "judges disagree: 4-Excellent 1.00 and 2-Mismatch 1.00"


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_reasons_lie_between_0_and_1(seed, judges):
    rng = np.random.default_rng(seed)
    steps = np.stack([rng.integers(0, count, 8) for count in BOOK.num_values], axis=1)
    opinions = [
        suggest.Opinions(rng.integers(0, 4, 8), rng.dirichlet([0.1] * 4, 8), steps) for _ in range(judges)
    ]
    for name, values in suggest._reasons(opinions, BOOK).items():
        assert ((values >= 0) & (values <= 1 + 1e-9)).all(), name
    alike = suggest._reasons([opinions[0]] * judges, BOOK)
    assert np.allclose(alike["disagreement"], 0)


def test_steps_that_contradict_the_tier(tmp_path):
    file = judged(tmp_path / "a.csv", {}, {"grade": 4, "steps": STEPS[1]}, {"grade": 4, "steps": "different,,,"})
    found = chosen(file, by=["contradiction"])
    assert [(one.row, one.score) for one in found] == [(2, 1.0), (1, 0.0), (3, 0.0)]
    assert found[0].because == "contradiction: 4-Excellent, by its steps 1-Irrelevant"


def test_rules_that_no_label_has_met(tmp_path):
    """By their steps, four pairs belong to the last row of the table and one to the first, which a label has met."""
    rows = [{"probs": (1 - p, p, 0, 0)} for p in (0.1, 0.2, 0.3, 0)]
    file = judged(tmp_path / "a.csv", *rows, {"probs": (0, 0, 0, 1)})
    labels = tmp_path / "labels.csv"
    labels.write_text("query,title,label,step_category\nq,t,1,different\n")
    met = suggest.met_rows([labels], BOOK)
    assert met.tolist() == [True] + [False] * 8
    found = chosen(file, by=["unsure", "new rule"], met=met, per_rule=2)
    assert [one.row for one in found] == [3, 2, 1, 4, 5]
    assert found[0].because.startswith("new rule: no label has met otherwise -> 4-Excellent; unsure: ")
    assert "new rule" not in found[2].because and found[2].score < 1 < found[1].score
    assert [one.row for one in chosen(file, by=["new rule"], per_rule=1)] == [1, 5, 2, 3, 4]


def test_a_pair_is_taken_once_and_a_query_as_often_as_is_wanted(tmp_path):
    pairs, probs = ("ax", "Ax", "ay", "bx", "az"), (0.5, 0.5, 0, 0)
    rows = [{"probs": probs, "query": query, "title": title} for query, title in pairs]
    file = judged(tmp_path / "a.csv", *rows)
    assert [one.row for one in chosen(file, by=["unsure"])] == [1, 3, 4, 5]
    assert [one.row for one in chosen(file, by=["unsure"], per_query=2)] == [1, 3, 4]


def test_what_is_labelled_or_not_judged_is_left_out(tmp_path):
    rows = [{"label": "4"}, {"label": ""}, {"label": "", "judge_tier": ""}, {"label": "", "title": ""}, {"label": ""}]
    file = judged(tmp_path / "a.csv", *rows)
    labels = tmp_path / "labels.csv"
    labels.write_text("query,title,label\nQ5,t5,1\n")
    assert [one.row for one in chosen(file, by=["unsure"])] == [2, 5]
    pool = suggest.open_pool(file, {}, read_labelled(labels, BOOK).pairs)
    assert pool.open.tolist() == [False, True, True, False, False]
    with pytest.raises(PairsError, match="has no pair that could be labelled and is not"):
        suggest.open_pool(labels, {})


def test_a_judged_file_of_other_pairs_is_refused(tmp_path):
    pool = suggest.open_pool(judged(tmp_path / "a.csv", {}, {}), {})
    with pytest.raises(PairsError, match=r"b.csv: has 1 rows, and .*a.csv has 2"):
        suggest.read_opinions(judged(tmp_path / "b.csv", {}), pool, BOOK)
    with pytest.raises(PairsError, match=r"c.csv: row 2 is not the pair of row 2 of .*a.csv"):
        suggest.read_opinions(judged(tmp_path / "c.csv", {}, {"title": "other"}), pool, BOOK)
    with pytest.raises(PairsError, match=r"d.csv: 1 rows cannot be used:\n  row 1: judge_tier '7' should be one of"):
        suggest.read_opinions(judged(tmp_path / "d.csv", {"judge_tier": "7"}, {}), pool, BOOK)


# Labels to check


def test_labels_that_judges_doubt(tmp_path):
    """Right and sure; wrong and sure; wrong and unsure; contradicted by its own steps; a pair with two labels."""
    rows = [
        {"label": "4"}, {"label": "1"}, {"label": "3", "probs": (0.6, 0.4, 0, 0)},
        {"label": "4", "step_category": "different"}, {"label": "4", "query": "x", "title": "y"},
        {"label": "3", "query": "X", "title": "y"},
    ]  # fmt: skip
    one = judged(tmp_path / "a.csv", *({"step_category": "", **row} for row in rows))
    scored, contradicting = labelled.read_judged(one, BOOK), read_labelled(one, BOOK).contradicting
    found = suggest.doubts([scored], contradicting, BOOK, 99)
    assert [(one.row, pytest.approx(one.score)) for one in found] == [(6, 2.0), (2, 1.0), (4, 1.0), (5, 1.0), (3, 0.2)]
    assert found[0].because == "labelled 3-Related 0.00, judged 4-Excellent 1.00; the same pair is 4-Excellent in row 5"
    assert found[2].because == "its steps contradict the label"
    # A second judge that agrees with the label halves the doubt.
    rows = [{"probs": (0, 0, 0, 1), "step_category": "", **row} for row in rows]
    both = suggest.doubts([scored, labelled.read_judged(judged(tmp_path / "b.csv", *rows), BOOK)], (), BOOK, 99)
    assert [(one.row, pytest.approx(one.score)) for one in both] == [(6, 1.5), (5, 1.0), (3, 0.2)]


# Files


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_what_is_written_can_be_labelled_and_trained_on(tmp_path, kind):
    rows = [{"color": color, "judge_note": "x"} for color in ("red", 'blue, "navy"')]
    file = judged(tmp_path / "a.csv", *rows)
    out = tmp_path / f"out.{kind}"
    picks = [suggest.Suggestion(2, 0.75, "unsure"), suggest.Suggestion(1, 0.5, "b")]
    suggest.write(out, open_rows(file), picks, BOOK)
    rows = [row.record for row in open_rows(out).rows()]
    assert list(rows[0]) == [
        "query", "title", "color", "label", *(f"step_{step.name}" for step in BOOK.steps), "suggest_row",
        "suggest_score", "suggest_because",
    ]  # fmt: skip
    assert [row["query"] for row in rows] == ["q2", "q1"] and rows[0]["suggest_because"] == "unsure"
    with pytest.raises(PairsError, match="2 of 2 rows cannot be used"):
        read_labelled(out, BOOK)
    done = pl.DataFrame(rows).with_columns(label=pl.lit("4"), step_brand=pl.lit("match"))
    pairs = read_labelled(done, BOOK).pairs
    assert [(pair.query, pair.color, pair.tier, pair.steps[1]) for pair in pairs] == [
        ("q2", 'blue, "navy"', 0, 0), ("q1", "red", 0, 0)
    ]  # fmt: skip
    with pytest.raises(OutputError, match="out.xlsx: unknown kind of file"):
        suggest.check_kind(tmp_path / "out.xlsx")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_what_was_labelled_is_not_suggested_again(tmp_path, kind):
    """Prices are numbers in the pool, and text in a file to label."""
    rows = [{"query": "q", "title": f"t{i}", "price": price, "label": ""} for i, price in enumerate((129.0, 9.5, 9.99))]
    pl.DataFrame(rows).write_parquet(tmp_path / "pool.parquet")
    picks = [suggest.Suggestion(row, 0.5, "unsure") for row in (1, 2)]
    out = tmp_path / f"out.{kind}"
    suggest.write(out, open_rows(tmp_path / "pool.parquet"), picks, BOOK)
    done = pl.DataFrame([row.record for row in open_rows(out).rows()]).with_columns(label=pl.lit("4"))
    labelled_before = read_labelled(done, BOOK).pairs
    assert suggest.open_pool(tmp_path / "pool.parquet", {}, labelled_before).open.tolist() == [False, False, True]


def test_a_copy_of_a_labelled_pair_is_not_suggested(tmp_path):
    pool = judged(tmp_path / "a.csv", {"label": ""}, {"label": "4"}, {"label": "", "query": "Q2"}, {"label": ""})
    assert suggest.open_pool(pool, {}).open.tolist() == [True, False, True, True]
    rows = [{"query": query, "title": "t", "label": label} for query, label in (("a", ""), ("A", "4"), ("b", ""))]
    pl.DataFrame(rows).write_csv(tmp_path / "b.csv")
    assert suggest.open_pool(tmp_path / "b.csv", {}).open.tolist() == [False, False, True]


def test_judgements_of_other_rows_are_refused_where_labels_are_checked(tmp_path):
    one = judged(tmp_path / "a.csv", {"label": "4"}, {"label": "1"})
    other = judged(tmp_path / "b.csv", {"label": "4", "title": "z"}, {"label": "1", "title": "t2"})
    pairs, scored = read_labelled(one, BOOK).pairs, labelled.read_judged(other, BOOK)
    suggest.check_rows(labelled.read_judged(one, BOOK), one, pairs, one)
    with pytest.raises(PairsError, match=r"b.csv: row 1 is not the labelled pair of row 1 of .*a.csv"):
        suggest.check_rows(scored, other, pairs, one)


def test_a_judge_is_asked_what_its_file_would_say(tmp_path):
    (tmp_path / "run").mkdir()
    judge = Judge.from_checkpoint(str(make_workdir(tmp_path / "run")), batch_size=4, settings=Settings(prompt_len=32))
    rows = [{"q": f"shoes {i}", "title": "red " * (i % 5 + 1), "label": ""} for i in range(9)]
    rows[3]["label"], rows[5]["q"] = "4", "red " * 200
    pl.DataFrame(rows).write_csv(tmp_path / "pool.csv")
    pool = suggest.open_pool(tmp_path / "pool.csv", {"query": "q"})
    found = suggest.ask(judge, pool)
    assert (found.tier == -1).tolist() == [i in (3, 5) for i in range(9)]
    one, = judge.judge([{"query": "shoes 8", "title": rows[8]["title"]}])
    assert TIERS[found.tier[8]] == one.tier
    assert found.probs[8].tolist() == pytest.approx(list(one.probs.values()), abs=1e-5)
    assert [step.values[v] for step, v in zip(BOOK.steps, found.steps[8], strict=True)] == list(one.steps.values())


# The command


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "agrl_jax.suggest", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_suggests_and_doubts(tmp_path):
    judged(tmp_path / "a.csv", {"label": "4"}, {"label": "", "probs": (0.5, 0.5, 0, 0)}, {"label": ""})
    done = command(tmp_path, "--judged=a.csv", "--number=5")
    assert done.returncode == 0, done.stderr
    # Row 1 of the file is labelled without steps. Any row of the table that gives its tier may be met: only the last.
    assert "row 2: 0.50: unsure: 4-Excellent 0.50, 3-Related 0.50" in done.stdout
    assert "2 rows written to to_label.csv" in done.stdout
    assert [row.record["query"] for row in open_rows(tmp_path / "to_label.csv").rows()] == ["q2", "q3"]
    judged(tmp_path / "b.csv", {"label": "1", "step_brand": "match"}, {"label": "4", "step_brand": ""})
    done = command(tmp_path, "--doubt", "--judged=b.csv", "--out=check.csv")
    assert done.returncode == 0, done.stderr
    (row,) = open_rows(tmp_path / "check.csv").rows()
    assert row.record["label"] == "1" and row.record["step_brand"] == "match" and row.record["suggest_row"] == "1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "a judge is needed: --checkpoint or --judged"),
        (("--checkpoint=run",), "--checkpoint judges a pool: --input=pool.csv"),
        (("--judged=no_such.csv",), "no_such.csv: there is no such file"),
        (("--judged=a.csv", "--out=a.xlsx"), "a.xlsx: unknown kind of file"),
    ],
)
def test_the_command_refuses_in_one_message(tmp_path, monkeypatch, capfd, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert commands.exit_code(suggest_command.main, *arguments) == 2
    assert said in capfd.readouterr().err
