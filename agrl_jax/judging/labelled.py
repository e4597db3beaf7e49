"""Scores judgements on a file of labelled pairs: those of a judge that is loaded, or those that the file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from agrl_jax.data.format import PairsFormat
from agrl_jax.data.judged import JudgedReader, judge_columns
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
    unjudged = [f"row {pairs[i].row}: {error}" for i, error in errors]
    return Scored(kept, judged, unjudged, () if judge.steps else _OF_STEPS)


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
    missing += () if (steps != UNKNOWN).any() else _OF_STEPS  # none is stated by a judge of the tier alone
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


def _without(scores: Scores, names: Sequence[str]) -> Scores:
    """The scores without values for the metrics of these names, in the cuts too."""
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    return {
        name: {part: _without(cut, names) for part, cut in value.items()}
        if name.startswith("by_") else nothing if name.split("/")[0] in names else value
        for name, value in scores.items()
    }  # fmt: skip
