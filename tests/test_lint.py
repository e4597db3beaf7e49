"""The lint of rule books, by hand: the rows of a table that pairs meet, and the changes that an edit makes."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrl_jax import lint
from agrl_jax.data import coverage
from agrl_jax.data.format import PairsFormat
from agrl_jax.data.rows import PairsError
from agrl_jax.rulebook import book as books
from agrl_jax.rulebook import versions

ROOT = Path(__file__).parent.parent
BOOK = """\
tiers:
  - {name: Buy, grade: 3, good: true, meaning: worth it}
  - {name: Look, grade: 2, good: true}
  - {name: Skip, grade: 1, good: false}
steps:
  - {name: size, question: "Does it fit?", values: {yes: it fits, no: it does not}}
  - {name: colour, question: "Is it right?", values: [right, wrong, any]}
table:
  - {when: {size: no}, tier: Skip}
  - {when: {colour: [right, any]}, tier: Buy, because: It is what was asked for.}
  - {when: otherwise, tier: Look}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def edited(tmp_path: Path, *swaps: tuple[str, str], name: str = "new.yaml") -> books.RuleBook:
    text = BOOK
    for old, new in swaps:
        assert old in text
        text = text.replace(old, new)
    return books.load(write(tmp_path / name, text))


@pytest.fixture
def book(tmp_path: Path) -> books.RuleBook:
    return edited(tmp_path, name="old.yaml")


def pairs(path: Path, *rows: tuple[str, str, str]) -> Path:
    lines = [f"q{i},t{i},{','.join(row)}" for i, row in enumerate(rows, 1)]
    return write(path, "\n".join(["query,title,label,step_size,step_colour", *lines]) + "\n")


MINE = [
    ("Buy", "yes", "right"),  # row 2 of the table
    ("Buy", "", ""),  # row 2 whatever the steps are; it implies the size
    ("3", "yes", ""),  # row 2, with right or any
    ("Skip", "", "wrong"),  # row 1
    ("Buy", "yes", "wrong"),  # the table gives Look
    ("Rent", "yes", "right"),  # there is no such tier
    ("Skip", "never", ""),  # there is no such value
]


def test_what_pairs_meet(tmp_path, book):
    groups, unreadable = coverage.read_stated(pairs(tmp_path / "mine.csv", *MINE), [book])
    found = coverage.meet(groups, book)
    assert found["pairs"] == 7 and unreadable == []
    assert [(row["line"], row["pairs"], row["may"]) for row in found["rows"]] == [(9, 2, 0), (10, 3, 0), (11, 0, 0)]
    assert found["tiers"] == {"Buy": 4, "Look": 0, "Skip": 2}
    # Sizes: three stated and one implied by Buy; two implied by Skip. The pair that contradicts the table counts with
    # what its label implies, and no more.
    assert found["values"] == {"size": {"yes": 4, "no": 2}, "colour": {"right": 1, "wrong": 1, "any": 0}}
    assert found["contradicting"] == [{"row": 5, "query": "q5", "title": "t5", "label": "Buy", "table": "Look"}]
    assert {(one["column"], one["value"]): one["pairs"] for one in found["foreign"]} == {
        ("label", "Rent"): 1, ("step_size", "never"): 1
    }  # fmt: skip
    lines = coverage.describe(found)
    assert "rows of the table that no pair is known to meet: 1 of 3" in lines
    assert "  line 11: otherwise -> Look" in lines
    assert "values never labelled: 1 of 5" in lines and "  colour: any" in lines
    assert "tiers never labelled: Look" in lines and "  row 5: labelled Buy, its steps give Look" in lines


def test_a_pair_may_meet_rows_that_its_unknown_steps_leave_open(tmp_path):
    book = edited(tmp_path, ("{size: no}, tier: Skip", "{size: no}, tier: Look"),
                  ("otherwise, tier: Look", "{colour: any}, tier: Look}\n  - {when: otherwise, tier: Skip"),
                  ("[right, any]", "right"))  # fmt: skip
    file = pairs(tmp_path / "mine.csv", ("Look", "", ""), ("Look", "", "right"), ("Skip", "", ""))
    groups, _ = coverage.read_stated(file, [book])
    rows = [(row["pairs"], row["may"]) for row in coverage.meet(groups, book)["rows"]]
    assert rows == [(1, 1), (0, 0), (0, 1), (1, 0)]


def test_all_for_which_a_book_is_refused_is_told(tmp_path):
    text = BOOK.replace("{when: otherwise, tier: Look}", "{when: {size: no, colour: any}, tier: Skip}")
    book, problems = books.check(write(tmp_path / "bad.yaml", text))
    assert len(problems) == 3 and all(str(tmp_path / "bad.yaml") in one for one in problems)
    assert "bad.yaml:11: table[2]: this row can never win: the rows on lines 9 match first" in problems[0]
    assert "no row gives a tier for {size: yes, colour: wrong} (1 combinations in all)" in problems[1]
    assert "no row gives the tier 'Look'" in problems[2]
    with pytest.raises(books.RuleBookError) as error:
        books.load(tmp_path / "bad.yaml")
    assert str(error.value) == problems[0]
    groups, _ = coverage.read_stated(pairs(tmp_path / "mine.csv", ("Look", "yes", "wrong")), [book])
    assert coverage.meet(groups, book)["contradicting"][0]["table"] == ""  # not a tier of its own


# Two versions


def test_every_text_that_differs_is_told(tmp_path, book):
    new = edited(tmp_path, ("it fits", "it will fit"), ("right, any]", "right]"), ("Skip", "Pass"))
    found = [str(change) for change in versions.changes(book, new)]
    assert "steps.size.values.yes: 'it fits' -> 'it will fit'" in found
    assert "tiers: 'Buy, Look, Skip' -> 'Buy, Look, Pass'" in found and "tiers.Skip.grade: '1' is gone" in found
    assert "table: 'colour: right or any -> Buy (It is what was asked for.)' is gone" in found
    assert "table: new: 'colour: right -> Buy (It is what was asked for.)'" in found
    assert versions.changes(book, book) == []


def test_pairs_whose_tier_an_edit_changes(tmp_path, book):
    new = edited(tmp_path, ("colour: [right, any]", "colour: right"))  # now any colour gives Look
    rows = ["Buy yes any", "Buy yes right", "Buy  ", "Skip no any", "Look yes any"]
    file = pairs(tmp_path / "mine.csv", *(tuple(row.split(" ")) for row in rows))
    groups, _ = coverage.read_stated(file, [new, book])
    found = coverage.changed(groups, book, new)
    # The first changes; the third changes if its colour is any. The last contradicts the old table.
    assert [(one["row"], one["old"], one["new"], one["surely"]) for one in found] == [
        (1, "Buy", ["Look"], True), (3, "Buy", ["Buy", "Look"], False)
    ]  # fmt: skip
    lines = coverage.describe_changed(found)
    assert lines[0] == "pairs whose tier changes: 1, and may change by steps not known: 1"
    assert "  Buy -> Look: 1" in lines and "  Buy -> Buy or Look: 1" in lines


def test_a_tier_renamed_is_the_same_by_its_grade(tmp_path, book):
    new = edited(tmp_path, ("Skip", "Pass"))
    groups, _ = coverage.read_stated(pairs(tmp_path / "mine.csv", ("Skip", "no", "any")), [new, book])
    assert versions.same_tiers(book, new).tolist() == [0, 1, 2] and coverage.changed(groups, book, new) == []


def test_a_value_that_is_gone_and_a_step_that_is_new_leave_all_open(tmp_path, book):
    new = edited(tmp_path, ("[right, wrong, any]", "[right, wrong]"), ("colour: [right, any]", "colour: right"),
                 ("table:", "  - {name: price, question: \"Is it fair?\", values: [fair, dear]}\ntable:"),
                 ("- {when: {size: no}", "- {when: {price: dear}, tier: Skip}\n  - {when: {size: no}"))  # fmt: skip
    groups, _ = coverage.read_stated(
        pairs(tmp_path / "mine.csv", ("Buy", "yes", "any"), ("Skip", "no", "right")), [new, book]
    )
    found = coverage.changed(groups, book, new)
    assert [(one["row"], one["new"]) for one in found] == [(1, ["Buy", "Look", "Skip"])]


@given(st.data())
def test_outcomes_are_those_of_every_new_combination(data):
    """By enumeration: a new combination is possible if each step of both books agrees or is unknown."""
    names, values = ("a", "b", "c"), ("x", "y", "z")

    def draw(label: str) -> books.RuleBook:
        steps = data.draw(st.permutations(names), label)[: data.draw(st.integers(1, 3), label)]
        answers = {step: data.draw(st.permutations(values), label)[: data.draw(st.integers(2, 3))] for step in steps}
        row = st.tuples(st.sampled_from(steps), st.integers(0, 1), st.integers(0, 2))
        table = tuple(
            books.Row(tuple((value,) if step == one else () for one in steps), tier, "", 0)
            for step, value, tier in data.draw(st.lists(row, max_size=3))
        )
        tiers = tuple(books.Tier(name, 3 - i, i < 2, "") for i, name in enumerate(("t", "u", "v")))
        otherwise = books.Row(((),) * len(steps), 2, "", 0)
        parts = tuple(books.Step(step, step, "?", tuple(answers[step]), ("",) * len(answers[step])) for step in steps)
        return books.RuleBook("", tiers, parts, (*table, otherwise))

    old, new = draw("old"), draw("new")
    found = versions.outcomes(old, new)
    for before in itertools.product(*(range(count) for count in old.num_values)):
        said = {step.name: step.values[value] for step, value in zip(old.steps, before, strict=True)}
        expected = np.zeros(3, bool)
        for after in itertools.product(*(range(count) for count in new.num_values)):
            fits = all(
                said.get(step.name) in (None, step.values[value]) or said[step.name] not in step.values
                for step, value in zip(new.steps, after, strict=True)
            )
            expected[new.tier_for(after)] |= fits
        assert found[before].tolist() == expected.tolist()


# Files and the command


def test_files_may_have_other_names_and_none_of_the_steps(tmp_path, book):
    file = write(tmp_path / "mine.csv", "q,verdict,step_weight\na,E,light\nb,E\n")
    form = PairsFormat(columns={"label": "verdict", "query": "q"}, labels={"E": "Look"})
    groups, unreadable = coverage.read_stated(file, [book], form)
    assert unreadable == [
        "column 'step_weight': no step of the rule book", "row 2 (line 3): has 2 cells where the header has 3"
    ]  # fmt: skip
    assert coverage.meet(groups, book, form)["tiers"] == {"Buy": 0, "Look": 1, "Skip": 0}
    with pytest.raises(PairsError, match="lacks the column 'label'"):
        coverage.read_stated(file, [book])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agrl_jax.lint", *arguments],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_command(tmp_path, book):
    write(tmp_path / "new.yaml", BOOK.replace("colour: [right, any]", "colour: right"))
    file = pairs(tmp_path / "mine.csv", ("Buy", "yes", "any"), ("Skip", "no", "any"))
    done = command(
        str(tmp_path / "new.yaml"), f"--against={tmp_path / 'old.yaml'}", f"--pairs={file}",
        f"--changed={tmp_path / 'changed.csv'}", f"--out={tmp_path / 'found.json'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "texts that differ from" in done.stdout and "pairs whose tier changes: 1" in done.stdout
    with (tmp_path / "changed.csv").open(newline="") as rows:
        assert list(csv.DictReader(rows)) == [
            {"row": "1", "query": "q1", "title": "t1", "old": "Buy", "new": "Look", "surely": "True"}
        ]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["problems"] == [] and found["pairs"] == 2 and len(found["changed"]) == 1


def test_the_command_says_which_rows_and_columns_it_cannot_use(tmp_path, book, capfd):
    write(tmp_path / "book.yaml", BOOK)
    file = pairs(tmp_path / "mine.csv", ("Buy", "yes", "any"), ("Skip", "no", "any"))
    text = file.read_text().replace("step_size", "step_siez", 1)
    file.write_text(text + 'q9,"t9')  # a quote that never ends
    assert commands.exit_code(lint.main, str(tmp_path / "book.yaml"), f"--pairs={file}") == 0
    said = capfd.readouterr().out
    assert "rows and columns that cannot be used: 2" in said
    assert "column 'step_siez': no step of the rule book" in said and "row 3 (line 4): " in said


def test_the_command_says_what_training_would_refuse(tmp_path, capfd):
    write(tmp_path / "bad.yaml", BOOK.replace("size: no}", "colour: [right, wrong, any]}"))
    assert commands.exit_code(lint.main, str(tmp_path / "bad.yaml")) == 1
    said = capfd.readouterr().out
    assert "table[1]: this row can never win" in said and "table[2]: this row can never win" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "one rule book is needed"),
        (("no_such.yaml",), "no_such.yaml: cannot be read"),
        (("four_tier", "--changed=a.csv"), "--changed needs --against and --pairs"),
        (("four_tier", "--pairs=no_such.csv"), "no_such.csv: there is no such file"),
    ],
)
def test_the_command_refuses_in_one_message(arguments, said, capfd):
    assert commands.exit_code(lint.main, *arguments) == 2
    assert said in capfd.readouterr().err
