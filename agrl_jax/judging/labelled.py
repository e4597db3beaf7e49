"""Scores judgements on a file of labelled pairs: those of a judge that is loaded, or those that the file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from agrl_jax.data.cells import clean
from agrl_jax.data.format import PairsFormat, label_reader
from agrl_jax.data.pairs import AS_DESCRIBED, Pair, read_labelled
from agrl_jax.data.rows import MAX_LISTED, PairsError, check_columns, listed, open_rows
from agrl_jax.evaluation import intervals
from agrl_jax.evaluation.metrics import Judgements, Scores
from agrl_jax.judging import PREFIX
from agrl_jax.judging.engine import Judge
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.runtime.files import write_csv
from agrl_jax.types import UNKNOWN

_OF_PROBABILITIES = ("auc", "ece", "brier", "nll", "likeliest_accuracy", "likeliest_macro_f1", "disagreement")
_OF_STEPS = ("step_accuracy", "all_right", "adherence")


class Scored(NamedTuple):
    """Judgements of the pairs of a file."""

    pairs: list[Pair]  # those that were judged
    judged: Judgements  # of these pairs
    unjudged: list[str]  # the row of each other pair, and why it could not be judged
    left_out: tuple[str, ...] = ()  # metrics for which the judgements hold too little

    def scores(self, book: RuleBook, bootstrap: int = 1000, seed: int = 0) -> Scores:
        """The scorecard; the metrics `left_out` have no value."""
        return _without(intervals.score(self.judged, book, bootstrap, seed), self.left_out)


def judge_pairs(judge: Judge, path: epath.PathLike, form: PairsFormat = AS_DESCRIBED) -> Scored:
    """Judges the pairs of a file.

    Raises:
      PairsError: the file cannot be used, or none of its pairs can be judged.
    """
    pairs = read_labelled(path, judge.book, form).pairs
    judged, errors = judge.judgements(pairs)
    if not len(judged):
        raise PairsError(f"{path}: none of its pairs can be judged: {errors[0][1]}")
    failed = dict(errors)
    kept = [pair for i, pair in enumerate(pairs) if i not in failed]
    return Scored(kept, judged, [f"row {pairs[i].row}: {error}" for i, error in errors])


def read_judged(path: epath.PathLike, book: RuleBook, form: PairsFormat = AS_DESCRIBED) -> Scored:
    """Reads labelled pairs with judgements in further columns, named as `agrl_jax.judge` names them: `judge_tier`, and
    optionally `judge_prob_TIER` for all tiers and `judge_step_STEP`. An empty `judge_tier` is no judgement, and wrong.

    Args:
      path: the file.
      book: gives the tiers and steps.
      form: of the file; its columns may name those of judgements too, and its labels hold for `judge_tier` as well.

    Raises:
      PairsError: the file cannot be read, lacks a column, or has rows that cannot be used: all are counted.
    """
    columns = dict(form.columns)
    theirs = {name: columns.pop(name, name) for name in judge_columns(book)}
    pairs = read_labelled(path, book, dataclasses.replace(form, columns=columns)).pairs
    file = open_rows(path)
    check_columns(file, [theirs[f"{PREFIX}tier"]])
    reader = JudgedReader(book, form, {name: column for name, column in theirs.items() if column in file.names})
    records = [row.record for row in file.rows()]
    cells = [reader.read(pair.row, records[pair.row - 1]) for pair in pairs]
    if reader.bad:
        raise PairsError(listed(f"{path}: {len(reader.bad)} of {len(pairs)} rows cannot be used:", reader.bad))
    tier = np.array([one.tier for one in cells])
    steps = np.array([one.steps for one in cells]).reshape(len(pairs), len(book.steps))
    stated = tier != UNKNOWN
    follows = [UNKNOWN not in row and book.tier_for(row) == one for row, one in zip(steps.tolist(), tier, strict=True)]
    judged = Judgements(
        query=[pair.query for pair in pairs],
        family=[pair.family for pair in pairs],
        seen=np.array([pair.seen for pair in pairs]),
        tier=np.array([pair.tier for pair in pairs]),
        predicted=tier,
        steps=np.array([pair.steps or (UNKNOWN,) * len(book.steps) for pair in pairs]).reshape(steps.shape),
        predicted_steps=steps,
        probs=np.where(stated[:, None], [one.probs for one in cells], 1 / len(book.tiers)),
        well_formed=stated,
        truncated=np.zeros(len(pairs), bool),
        consistent=np.array(follows),
        response_tokens=np.zeros(len(pairs), int),
    )
    missing = ("truncated", "response_tokens")
    missing += () if reader.has_probs else _OF_PROBABILITIES
    missing += () if reader.has_steps else _OF_STEPS
    return Scored(pairs, judged, [], missing)


def worst_first(scored: Scored, book: RuleBook) -> list[dict[str, Any]]:
    """The pairs that were judged wrongly: the most grades off first, then the least probability of the truth."""
    judged, grades = scored.judged, np.array([tier.grade for tier in book.tiers])
    furthest = np.abs(grades[:, None] - grades).max(axis=1)  # by true tier: how many grades off no answer is
    stated = judged.predicted != UNKNOWN
    off = np.where(stated, np.abs(grades[judged.predicted] - grades[judged.tier]), furthest[judged.tier])
    of_truth = judged.probs[np.arange(len(judged)), judged.tier]
    wrong = np.flatnonzero(judged.predicted != judged.tier)
    order = wrong[np.lexsort((of_truth[wrong], -off[wrong]))]
    return [
        {
            "row": scored.pairs[i].row, "id": scored.pairs[i].id, "query": scored.pairs[i].query,
            "title": scored.pairs[i].title, "label": book.tiers[judged.tier[i]].name,
            f"{PREFIX}tier": book.tiers[judged.predicted[i]].name if stated[i] else "", "grades_off": int(off[i]),
            "prob_of_label": "" if "nll" in scored.left_out else round(float(of_truth[i]), 6),
            **{
                f"{PREFIX}step_{step.name}": step.values[value] if value != UNKNOWN else ""
                for step, value in zip(book.steps, judged.predicted_steps[i], strict=True)
            },
        }
        for i in order.tolist()
    ]  # fmt: skip


def summary(scored: Scored, errors: Sequence[Mapping[str, Any]]) -> str:
    """How many pairs were judged wrongly, the worst of them, and which could not be judged."""
    lines = [f"judged wrongly: {len(errors):,} of {len(scored.pairs):,} pairs" + (", the worst:" if errors else "")]
    lines += [
        f"  row {one['row']}: {one[f'{PREFIX}tier'] or 'no tier'}, labelled {one['label']}: "
        f"{one['query'][:40]!r} -> {one['title'][:60]!r}"
        for one in errors[:MAX_LISTED]
    ]  # fmt: skip
    if scored.unjudged:
        lines.append(f"pairs that could not be judged, and are in no score: {len(scored.unjudged):,}")
        lines += [f"  {line}" for line in scored.unjudged[:MAX_LISTED]]
    return "\n".join(lines)


def write_errors(path: epath.PathLike, errors: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of `worst_first` as CSV; with no errors, a header alone."""
    write_csv(path, list(errors[0]) if errors else ["row"], errors)


def judge_columns(book: RuleBook) -> Iterator[str]:
    """The columns of judging that scoring reads: tier, probabilities, steps."""
    yield f"{PREFIX}tier"
    yield from (f"{PREFIX}prob_{tier.name}" for tier in book.tiers)
    yield from (f"{PREFIX}step_{step.name}" for step in book.steps)


class Cells(NamedTuple):
    """What a row says of a judgement, as indices of the rule book; UNKNOWN where it says nothing."""

    tier: int
    probs: list[float]
    steps: list[int]


class JudgedReader:
    """Reads judgements out of rows, and notes what is wrong with them in `bad`.

    `columns` maps our names of columns to the file's. The labels of the form hold for tiers too.
    """

    def __init__(self, book: RuleBook, form: PairsFormat, columns: Mapping[str, str]) -> None:
        self.bad: list[str] = []
        self._book, self._columns = book, columns
        self._tier_of, self._wanted = label_reader(book, form)
        self.has_probs = all(f"{PREFIX}prob_{tier.name}" in columns for tier in book.tiers)
        self.has_steps = all(f"{PREFIX}step_{step.name}" in columns for step in book.steps)

    def read(self, number: int, record: Mapping[str, Any]) -> Cells:
        """The judgement of a row."""
        cells = {name: clean(record.get(column)) for name, column in self._columns.items()}
        tier = self._choice(number, cells, f"{PREFIX}tier", self._tier_of, self._wanted)
        steps = [UNKNOWN] * len(self._book.steps)
        if self.has_steps:
            for i, step in enumerate(self._book.steps):
                values = {value.casefold(): place for place, value in enumerate(step.values)}
                steps[i] = self._choice(
                    number, cells, f"{PREFIX}step_{step.name}",
                    lambda text, values=values: values.get(text.casefold(), UNKNOWN),
                    f"one of: {', '.join(step.values)}",
                )  # fmt: skip
        return Cells(tier, self._probs(number, cells, tier), steps)

    def _choice(
        self, number: int, cells: Mapping[str, str], name: str, value_of: Callable[[str], int], wanted: str
    ) -> int:
        value = value_of(cells[name]) if cells[name] else UNKNOWN
        if cells[name] and value == UNKNOWN:
            self.bad.append(f"row {number}: {self._columns[name]} {cells[name]!r} should be {wanted}")
        return value

    def _probs(self, number: int, cells: Mapping[str, str], tier: int) -> list[float]:
        """The probabilities that are stated; if none are, 1 for the tier."""
        tiers = self._book.tiers
        if not self.has_probs or tier == UNKNOWN:
            return [float(i == tier) for i in range(len(tiers))]
        try:
            probs = [float(cells[f"{PREFIX}prob_{one.name}"]) for one in tiers]
        except ValueError:
            self.bad.append(f"row {number}: has a tier, but not a number as the probability of each")
            return [0.0] * len(tiers)
        if not (min(probs) >= 0 and abs(sum(probs) - 1) < 1e-3):
            self.bad.append(f"row {number}: its probabilities should be at least 0, and sum to 1, not {sum(probs):.6g}")
        return probs


def _without(scores: Scores, names: Sequence[str]) -> Scores:
    """The scores without values for the metrics of these names, in the cuts too."""
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    return {
        name: {part: _without(cut, names) for part, cut in value.items()}
        if name.startswith("by_") else nothing if name.split("/")[0] in names else value
        for name, value in scores.items()
    }  # fmt: skip
