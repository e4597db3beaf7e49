"""How good judgements are: every metric, worked out from totals per query.

All of it is numpy over arrays that `evaluator` has gathered. One class, `Estimator`, computes every
metric from weighted totals per query: weights of one give the score, and a bootstrap resample of
queries is a set of other weights. So score and interval cannot drift apart, and a thousand resamples
are a few matrix products.

Conventions:

- **Malformed counts as wrong, everywhere.** Nothing that a malformed answer states counts: no step is
  right, it does not adhere to the rules, and its tier probabilities are equal. Where a metric needs a
  tier all the same, it takes the most wrong one: the tier furthest from the truth for kappa and mae
  (the better one of two equally far), the wrong side for Good-F1. For the F1 of the true tier the
  answer is a miss; it is a false alarm for no tier. An answer that states no tier is treated alike.
- **What is not known is not counted**: a step counts where its true value is known.
- **What is not defined is None** with n = 0: the F1 of a tier that no pair has, AUC of one class.
- **n** is the number of pairs (for steps: of known steps) that a metric rests on; for an F1 the pairs
  that truly are of the class.
- **Intervals** are the 2.5% and 97.5% percentiles over resamples of whole queries, since pairs of one
  query err together; where resampling is biased (ECE), they are widened to hold the value. Resamples in
  which a metric is undefined are left out. With fewer than two queries, or no resamples, they are None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN

Scores = dict[str, Any]  # {metric: {value, low, high, n}}; by_family and by_seen one level deeper
Scorecards = dict[str, dict[str, Scores]]  # {stage: {split: scores}}


CUT_METRICS = ("accuracy", "macro_f1", "good_f1", "step_accuracy", "adherence")  # of each family; of seen and unseen
_BINS = 15  # of the calibration error
LEAST_PROB = 1e-12  # so that nll stays finite


class ScorecardError(ValueError):
    """Judgements or a scorecard file that cannot be used; the message names field and row, or file."""


# ------------------------------------------------------------------------------------------ judgements


@dataclass(frozen=True)
class Judgements:
    """What a policy said of N labelled pairs, beside the truth. R steps; tiers by index, best first."""

    query: Sequence[str]  # N: pairs of one query are resampled together
    family: Sequence[str]  # N
    seen: np.ndarray  # [N] bool
    tier: np.ndarray  # [N] int, the truth
    predicted: np.ndarray  # [N] int, UNKNOWN where malformed or not stated
    steps: np.ndarray  # [N, R] int, the truth, UNKNOWN where not known
    predicted_steps: np.ndarray  # [N, R] int, UNKNOWN where not stated
    probs: np.ndarray  # [N, tiers] float, equal where malformed
    well_formed: np.ndarray  # [N] bool
    truncated: np.ndarray  # [N] bool
    consistent: np.ndarray  # [N] bool: the stated steps imply the stated tier; False where not all are stated
    response_tokens: np.ndarray  # [N] int
    part_logprobs: np.ndarray | None = None  # [N, places, values] of `stated_logprobs`, from which `probs` come
    sample_index: np.ndarray | None = None  # [M] int: which pairs were sampled too, each once
    sample_tier: np.ndarray | None = None  # [M, K] int: the tiers of K samples of each, UNKNOWN where malformed

    def __post_init__(self) -> None:
        """Raises ScorecardError for a wrong shape, a tier out of range or probabilities that do not sum to 1."""
        n = len(self.query)
        for name in _per_pair():
            length = len(getattr(self, name))
            if length != n:
                raise ScorecardError(f"judgements: {name} has {length} rows, query has {n}")
        if np.shape(self.steps) != np.shape(self.predicted_steps):
            raise ScorecardError(
                f"judgements: predicted_steps is {np.shape(self.predicted_steps)}, steps is {np.shape(self.steps)}"
            )
        tiers = self.probs.shape[1]
        _check("tier", self.tier, (self.tier >= 0) & (self.tier < tiers), f"a tier index below {tiers}")
        fine = (self.predicted >= UNKNOWN) & (self.predicted < tiers)
        _check("predicted", self.predicted, fine, f"a tier index below {tiers}, or {UNKNOWN}")
        with np.errstate(invalid="ignore"):
            fine = (self.probs >= 0).all(axis=1) & (np.abs(self.probs.sum(axis=1) - 1) < 1e-3)
        _check("probs", self.probs, fine, "probabilities that sum to 1")
        if (self.sample_index is None) != (self.sample_tier is None):
            raise ScorecardError("judgements: sample_index and sample_tier come together, or neither")
        if self.sample_index is not None:
            self._check_samples(n)

    def _check_samples(self, n: int) -> None:
        if len(self.sample_index) != len(self.sample_tier):
            raise ScorecardError(
                f"judgements: sample_tier has {len(self.sample_tier)} rows, sample_index has {len(self.sample_index)}"
            )
        fine = (self.sample_index >= 0) & (self.sample_index < n)
        _check("sample_index", self.sample_index, fine, f"the row of a pair, below {n}")
        if len(np.unique(self.sample_index)) < len(self.sample_index):
            raise ScorecardError("judgements: sample_index has a row twice")

    def __len__(self) -> int:
        return len(self.query)

    def take(self, rows: np.ndarray) -> Judgements:
        """The judgements at `rows` (int, repeats allowed), their samples with them."""
        taken = {}
        for name in _per_pair():
            value = getattr(self, name)
            taken[name] = value[rows] if isinstance(value, np.ndarray) else [value[i] for i in rows]
        taken["part_logprobs"] = None if self.part_logprobs is None else self.part_logprobs[rows]
        if self.sample_index is not None:
            sample_of = np.full(len(self), -1)
            sample_of[self.sample_index] = np.arange(len(self.sample_index))
            sample = sample_of[rows]
            taken["sample_index"] = np.flatnonzero(sample >= 0)
            taken["sample_tier"] = self.sample_tier[sample[sample >= 0]]
        return Judgements(**taken)


def _per_pair() -> list[str]:
    """Fields of `Judgements` with a row for each pair; `part_logprobs` may be None."""
    return [field.name for field in dataclasses.fields(Judgements) if field.default is dataclasses.MISSING]


def _check(name: str, values: np.ndarray, fine: np.ndarray, wanted: str) -> None:
    if not fine.all():
        row = int(np.argmin(fine))
        raise ScorecardError(f"judgements, row {row}: {name} is {values[row].tolist()}, should be {wanted}")


def _strict(judged: Judgements) -> Judgements:
    """The judgements without anything that a malformed answer states."""
    formed, tiers = judged.well_formed, judged.probs.shape[1]
    return dataclasses.replace(
        judged,
        predicted=np.where(formed, judged.predicted, UNKNOWN),
        predicted_steps=np.where(formed[:, None], judged.predicted_steps, UNKNOWN),
        probs=np.where(formed[:, None], judged.probs.astype(np.float64), 1 / tiers),
        consistent=judged.consistent & formed,
    )


class _Estimate(NamedTuple):
    value: np.ndarray  # [W] one for each weighting, NaN where undefined
    n: np.ndarray  # [W] support


class Estimator:
    """All metrics of some judgements, as a function of the weights of their queries, [W, queries]."""

    def __init__(self, judged: Judgements, book: RuleBook) -> None:
        tiers, steps = judged.probs.shape[1], judged.steps.shape[1]
        if (tiers, steps) != (len(book.tiers), len(book.steps)):
            raise ScorecardError(
                f"judgements of {tiers} tiers and {steps} steps; the rule book {book.name!r} has "
                f"{len(book.tiers)} and {len(book.steps)}"
            )
        judged = _strict(judged)
        position = {query: i for i, query in enumerate(sorted(set(judged.query)))}
        self.queries = len(position)
        self._query = np.array([position[query] for query in judged.query], dtype=int)  # [N]
        self._book = book
        self._good = np.array([tier.good for tier in book.tiers])
        self._grades = np.array([tier.grade for tier in book.tiers], dtype=np.float64)
        self._samples = 0 if judged.sample_tier is None else judged.sample_tier.shape[1]
        self._totals = {name: self._by_query(rows) for name, rows in _tallies(judged).items()}
        self._positive = self._good[judged.tier]  # [N]
        self._score = judged.probs[:, self._good].sum(axis=1)  # [N]

    def _by_query(self, rows: np.ndarray) -> np.ndarray:
        """Sums [N, ...] over the pairs of each query: [queries, ...]."""
        totals = np.zeros((self.queries, *rows.shape[1:]))
        np.add.at(totals, self._query, rows)
        return totals

    def __call__(self, weights: np.ndarray) -> dict[str, _Estimate]:
        totals = {name: np.tensordot(weights, rows, axes=1) for name, rows in self._totals.items()}  # [W, ...]
        pairs = totals["pairs"]
        estimates = {
            **self._tier_metrics(totals["confusion"], self._auc(weights)),
            **self._step_metrics(totals["right"], totals["known"]),
        }
        likeliest = self._tier_metrics(totals["likeliest"], estimates["auc"].value)
        for metric in ("accuracy", "macro_f1"):
            estimates[f"likeliest_{metric}"] = likeliest[metric]
        estimates["disagreement"] = _mean(totals["disagreement"], pairs)
        estimates["all_right"] = _mean(totals["all_right"], totals["explained"])
        for metric in ("adherence", "format", "truncated", "response_tokens"):
            estimates[metric] = _mean(totals[metric], pairs)
        if self._samples:
            for metric in ("pass", "majority"):
                estimates[f"{metric}@{self._samples}"] = _mean(totals[metric], totals["sampled"])
        gaps = np.abs(totals["bin_confidence"] - totals["bin_right"]).sum(axis=1)
        estimates["ece"] = _mean(gaps, pairs)
        for metric in ("brier", "nll"):
            estimates[metric] = _mean(totals[metric], pairs)
        return estimates

    def _tier_metrics(self, confusion: np.ndarray, auc: np.ndarray) -> dict[str, _Estimate]:
        """From counts [W, truth, tiers + 1]; the last column is for answers without a tier."""
        stated, silent = confusion[..., :-1], confusion[..., -1]
        right = np.diagonal(stated, axis1=1, axis2=2)
        support, claimed = confusion.sum(axis=2), stated.sum(axis=1)  # [W, tiers]
        pairs = support.sum(axis=1)
        f1 = np.where(support > 0, _ratio(2 * right, support + claimed), np.nan)
        present = (support > 0).sum(axis=1)

        good, bad = self._good, ~self._good
        hits = stated[:, good][:, :, good].sum(axis=(1, 2))
        good_support = support[:, good].sum(axis=1)
        called_good = stated[:, :, good].sum(axis=(1, 2)) + silent[:, bad].sum(axis=1)
        good_f1 = np.where(good_support > 0, _ratio(2 * hits, good_support + called_good), np.nan)

        distance = np.abs(self._grades[:, None] - self._grades)  # [tiers, tiers]
        furthest = np.eye(len(self._grades))[np.argmax(distance, axis=1)]  # [truth, tiers] what no tier counts as
        full = stated + silent[..., None] * furthest
        expected = support[:, :, None] * full.sum(axis=1)[:, None, :] / np.maximum(pairs, 1)[:, None, None]
        square = distance**2
        kappa = 1 - _ratio((full * square).sum(axis=(1, 2)), (expected * square).sum(axis=(1, 2)))

        estimates = {
            "accuracy": _mean(right.sum(axis=1), pairs),
            "macro_f1": _mean(np.nansum(f1, axis=1), present, pairs),
            "good_f1": _Estimate(good_f1, good_support),
            "auc": _Estimate(auc, pairs),
            "kappa": _Estimate(kappa, pairs),
            "mae": _mean((full * distance).sum(axis=(1, 2)), pairs),
        }
        for i, tier in enumerate(self._book.tiers):
            estimates[f"f1/{tier.name}"] = _Estimate(f1[:, i], support[:, i])
        return estimates

    def _step_metrics(self, right: np.ndarray, known: np.ndarray) -> dict[str, _Estimate]:
        """From counts [W, R]."""
        estimates = {"step_accuracy": _mean(right.sum(axis=1), known.sum(axis=1))}
        for i, step in enumerate(self._book.steps):
            estimates[f"step_accuracy/{step.name}"] = _mean(right[:, i], known[:, i])
        return estimates

    def _auc(self, weights: np.ndarray) -> np.ndarray:
        """[W] the share of (Good, Bad) pairs of pairs that the score puts in order, ties by half."""
        if not len(self._score):
            return np.full(len(weights), np.nan)
        order = np.argsort(self._score, kind="stable")
        score, positive = self._score[order], self._positive[order]
        ties = np.flatnonzero(np.diff(score, prepend=-1) > 1e-12)  # where each run of equal scores starts
        weights = weights[:, self._query[order]]  # [W, N]
        good = np.add.reduceat(weights * positive, ties, axis=1)
        bad = np.add.reduceat(weights * ~positive, ties, axis=1)
        below = np.cumsum(bad, axis=1) - bad
        return _ratio((good * (below + bad / 2)).sum(axis=1), good.sum(axis=1) * bad.sum(axis=1))


def _tallies(judged: Judgements) -> dict[str, np.ndarray]:
    """What each pair adds to the totals from which metrics are computed, [N, ...] each."""
    n, tiers = judged.probs.shape
    rows, truth = np.arange(n), np.eye(tiers)[judged.tier]  # [N, tiers]
    said = np.eye(tiers + 1)[judged.predicted]  # UNKNOWN, -1, falls into the last column
    confidence = judged.probs.max(axis=1)
    likeliest = np.where(judged.well_formed, judged.probs.argmax(axis=1), UNKNOWN)
    bins = np.eye(_BINS)[confidence_bin(confidence)]
    known = judged.steps != UNKNOWN
    right = judged.predicted_steps == judged.steps
    explained = known.any(axis=1)
    return {
        "pairs": np.ones(n),
        "confusion": truth[:, :, None] * said[:, None, :],
        "likeliest": truth[:, :, None] * np.eye(tiers + 1)[likeliest][:, None, :],
        "disagreement": likeliest != judged.predicted,
        "known": known,
        "right": known & right,
        "explained": explained,
        "all_right": explained & (right | ~known).all(axis=1) & (judged.predicted == judged.tier),
        "adherence": judged.consistent,
        "format": judged.well_formed,
        "truncated": judged.truncated,
        "response_tokens": judged.response_tokens,
        "bin_confidence": bins * confidence[:, None],
        "bin_right": bins * (likeliest == judged.tier)[:, None],
        "brier": ((judged.probs - truth) ** 2).sum(axis=1),
        "nll": -np.log(np.maximum(judged.probs[rows, judged.tier], LEAST_PROB)),
        **_sample_tallies(judged),
    }


def confidence_bin(confidence: np.ndarray) -> np.ndarray:
    """[N] int: which of 15 bins of equal width a probability [N] falls into. Bins are closed above, as is usual."""
    return np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)


def _sample_tallies(judged: Judgements) -> dict[str, np.ndarray]:
    """For each pair: whether it was sampled, whether one sample was right, the majority vote's credit; [N] each."""
    if judged.sample_tier is None:
        return {}
    n, tiers = judged.probs.shape
    truth = judged.tier[judged.sample_index]
    votes = (judged.sample_tier[:, :, None] == np.arange(tiers)).sum(axis=1)  # [M, tiers]; the malformed do not vote
    mine, most = votes[np.arange(len(truth)), truth], votes.max(axis=1)
    winners = (votes == most[:, None]).sum(axis=1)
    columns = {"sampled": np.ones(len(truth)), "pass": mine > 0, "majority": (mine > 0) * (mine == most) / winners}
    tallies = {}
    for name, values in columns.items():
        tallies[name] = np.zeros(n)
        tallies[name][judged.sample_index] = values
    return tallies


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is 0."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 0)


def _mean(total: np.ndarray, count: np.ndarray, n: np.ndarray | None = None) -> _Estimate:
    return _Estimate(_ratio(total, count), count if n is None else n)
