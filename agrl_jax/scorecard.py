"""How good judgements are: metrics with intervals, the file that keeps them, the tables that show them.

All of it is numpy over arrays already gathered (`judging` gathers them). One function, `_Estimator`,
computes every metric from totals per query, weighted: weights of one give the score, and a bootstrap
resample of queries is nothing but other weights. So score and interval cannot drift apart, and a
thousand resamples are a few matrix products.

Conventions:

- **Malformed counts as wrong, everywhere.** Of a malformed answer, nothing that it states counts: no
  step is right, it does not adhere to the rules, and its tier probabilities are equal. Where a metric
  needs a tier all the same, it is the most wrong one: the tier furthest from the truth for kappa and
  mae (the better one of two equally far), the wrong side for Good-F1. An answer that states no tier is
  treated alike. For the F1 of a tier it is a miss, and a false alarm for none.
- **What is not known is not counted**: a step counts where its true value is known.
- **What is not defined is None** with n = 0: the F1 of a tier that no pair has, AUC of one class.
- **n** is the number of pairs (for steps: of known steps) that a metric rests on; for an F1 the pairs
  that truly are of the class.
- **Intervals** are the 2.5% and 97.5% percentiles over resamples of whole queries, since pairs of one
  query err together; widened to hold the value, where resampling is biased (ECE). Resamples in which a
  metric is undefined are left out. With fewer than two queries, or without resamples, they are None.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text
from etils import epath

from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN

Scores = dict[str, Any]  # {metric: {value, low, high, n}}; by_family and by_seen one level deeper
Scorecards = dict[str, dict[str, Scores]]  # {stage: {split: scores}}

CUT_METRICS = ("accuracy", "macro_f1", "good_f1", "step_accuracy", "adherence")  # of each family; of seen and unseen
SMALL = 50  # a support below this is flagged
_BINS = 15  # of the calibration error
_LEAST_PROB = 1e-12  # so that nll stays finite
_CELLS = 1 << 21  # resamples x pairs held at once


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
        if self.sample_index is not None:
            sample_of = np.full(len(self), -1)
            sample_of[self.sample_index] = np.arange(len(self.sample_index))
            sample = sample_of[rows]
            taken["sample_index"] = np.flatnonzero(sample >= 0)
            taken["sample_tier"] = self.sample_tier[sample[sample >= 0]]
        return Judgements(**taken)


def _per_pair() -> list[str]:
    """Fields of `Judgements` with a row for each pair."""
    return [field.name for field in dataclasses.fields(Judgements) if not field.name.startswith("sample_")]


def _check(name: str, values: np.ndarray, fine: np.ndarray, wanted: str) -> None:
    if not fine.all():
        row = int(np.argmin(fine))
        raise ScorecardError(f"judgements, row {row}: {name} is {values[row].tolist()}, should be {wanted}")


def _strict(judged: Judgements) -> Judgements:
    """The judgements with nothing that a malformed answer states."""
    formed, tiers = judged.well_formed, judged.probs.shape[1]
    return dataclasses.replace(
        judged,
        predicted=np.where(formed, judged.predicted, UNKNOWN),
        predicted_steps=np.where(formed[:, None], judged.predicted_steps, UNKNOWN),
        probs=np.where(formed[:, None], judged.probs.astype(np.float64), 1 / tiers),
        consistent=judged.consistent & formed,
    )


# --------------------------------------------------------------------------------------------- metrics


def score(judged: Judgements, book: RuleBook, bootstrap: int = 1000, seed: int = 0) -> Scores:
    """Every metric, `{metric: {value, low, high, n}}`.

    Metrics, of one greedy answer to each pair unless said otherwise:

      accuracy, f1/TIER, macro_f1    macro_f1 is the mean over the tiers that have pairs
      good_f1, auc                   Good (the tiers that the book flags) against Bad; auc ranks by the
                                     summed probability of the good tiers
      kappa, mae                     quadratic-weighted, and mean absolute error, both in grades
      step_accuracy[/STEP]           over the known steps of all pairs together
      all_right                      the tier and every known step are right, so that the tier is not right by luck;
                                     over the pairs of which a step is known
      adherence                      the stated steps imply the stated tier; over all pairs
      format, truncated              shares; response_tokens is a mean
      pass@K, majority@K             of K samples one is right; the most frequent stated tier is right
                                     (tied tiers share the credit). Absent where nothing was sampled.
      ece, brier, nll                of the tier probabilities: calibration error of the likeliest tier in 15
                                     bins of equal width, squared error summed over tiers, -log p(truth) [nats]

    and `by_family` {family: {metric: ...}} and `by_seen` {"seen", "unseen"}, one level deeper, with CUT_METRICS.

    Args:
      judged: the judgements; those of the same pairs give the same scores in any order.
      book: names, grades and good flags of the tiers, names of the steps.
      bootstrap: resamples of the 95% intervals; 0 for none.
      seed: of the resamples.

    Raises:
      ScorecardError: the judgements have other tiers or steps than the book.
    """
    scores = _measure(judged, book, bootstrap, seed)
    families, seen = np.array(judged.family, dtype=object), judged.seen.astype(bool)
    cuts = {
        "by_family": {name: families == name for name in sorted(set(judged.family))},
        "by_seen": {"seen": seen, "unseen": ~seen},
    }
    for cut, masks in cuts.items():
        scores[cut] = {
            name: _measure(judged.take(np.flatnonzero(mask)), book, bootstrap, seed, CUT_METRICS)
            for name, mask in masks.items()
        }
    return scores


def paired_difference(
    start: Judgements, end: Judgements, metric: str, book: RuleBook, bootstrap: int = 1000, seed: int = 0
) -> dict[str, float | None]:
    """`{value, low, high}` of a metric of `end` less that of `start`, both judging the same pairs.

    Each resample weighs the queries of both alike, so that what makes a pair hard for both cancels.
    `metric` is any of `score`, such as `macro_f1`.

    Raises:
      ScorecardError: the pairs are not the same ones in the same order, or there is no such metric.
    """
    same = len(start) == len(end) and np.array_equal(start.steps, end.steps) and np.array_equal(start.tier, end.tier)
    if not same or list(start.query) != list(end.query):
        raise ScorecardError("a paired difference needs two judgements of the same pairs in the same order")
    estimators = _Estimator(start, book), _Estimator(end, book)

    def difference(weights: np.ndarray) -> np.ndarray:
        before, after = (estimator(weights) for estimator in estimators)
        if metric not in before or metric not in after:
            raise ScorecardError(f"unknown metric {metric!r}; there are {', '.join(before)}")
        return after[metric].value - before[metric].value

    queries = estimators[0].queries
    value = difference(np.ones((1, queries)))[0]
    resampled = [difference(weights) for weights in _resamples(queries, len(start), bootstrap, seed)]
    low, high = _interval(value, np.concatenate([[], *resampled]))
    return {"value": _number(value), "low": low, "high": high}


def over_seeds(
    judged: Sequence[Judgements], book: RuleBook, bootstrap: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Every metric of `score` over several runs: [1 + bootstrap], the mean over the runs and its resamples.

    The bootstrap is hierarchical: runs are drawn with replacement, then queries, the same ones for all of them. With
    the same `seed`, as many runs and the same queries, two calls draw the same, so that the difference of their
    results is a paired one.

    Raises:
      ScorecardError: the runs did not judge the same pairs.
    """
    first = judged[0]
    if any(list(other.query) != list(first.query) or not np.array_equal(other.tier, first.tier) for other in judged):
        raise ScorecardError("runs to be averaged need judgements of the same pairs in the same order")
    estimators = [_Estimator(each, book) for each in judged]
    runs, queries = len(judged), estimators[0].queries
    drawn = np.random.default_rng(seed).integers(runs, size=(bootstrap, runs))
    times = (drawn[:, :, None] == np.arange(runs)).sum(axis=1)  # [bootstrap, runs]
    share = np.concatenate([np.ones((1, runs)), times]) / runs
    weights = [np.ones((1, queries)), *_resamples(queries, len(first), bootstrap, seed)]
    values = [[estimator(some) for some in weights] for estimator in estimators]  # by run, then by piece
    return {
        metric: sum(
            share[: len(whole), run] * whole
            for run, whole in enumerate(np.concatenate([piece[metric].value for piece in of]) for of in values)
        )
        for metric in values[0][0]
    }


class _Estimate(NamedTuple):
    value: np.ndarray  # [W] one for each weighting, NaN where undefined
    n: np.ndarray  # [W] support


class _Estimator:
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
        furthest = np.eye(len(self._grades))[np.argmax(distance, axis=1)]  # [truth, tiers] where silence counts
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
    """What each pair adds to the totals that the metrics are made of, [N, ...] each."""
    n, tiers = judged.probs.shape
    rows, truth = np.arange(n), np.eye(tiers)[judged.tier]  # [N, tiers]
    said = np.eye(tiers + 1)[judged.predicted]  # UNKNOWN, -1, falls into the last column
    likeliest, confidence = judged.probs.argmax(axis=1), judged.probs.max(axis=1)
    # Bins are closed above, as is usual. Below, a malformed answer is wrong even where argmax happens on the truth.
    bins = np.eye(_BINS)[np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)]
    known = judged.steps != UNKNOWN
    right = judged.predicted_steps == judged.steps
    explained = known.any(axis=1)
    return {
        "pairs": np.ones(n),
        "confusion": truth[:, :, None] * said[:, None, :],
        "known": known,
        "right": known & right,
        "explained": explained,
        "all_right": explained & (right | ~known).all(axis=1) & (judged.predicted == judged.tier),
        "adherence": judged.consistent,
        "format": judged.well_formed,
        "truncated": judged.truncated,
        "response_tokens": judged.response_tokens,
        "bin_confidence": bins * confidence[:, None],
        "bin_right": bins * ((likeliest == judged.tier) & judged.well_formed)[:, None],
        "brier": ((judged.probs - truth) ** 2).sum(axis=1),
        "nll": -np.log(np.maximum(judged.probs[rows, judged.tier], _LEAST_PROB)),
        **_sample_tallies(judged),
    }


def _sample_tallies(judged: Judgements) -> dict[str, np.ndarray]:
    """Of each pair: was it sampled, was one sample right, the credit of the majority vote; [N] each."""
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


# ------------------------------------------------------------------------------------------- intervals


def _measure(
    judged: Judgements, book: RuleBook, bootstrap: int, seed: int, metrics: Sequence[str] | None = None
) -> Scores:
    """`{metric: {value, low, high, n}}` of all metrics, or of those named."""
    estimator = _Estimator(judged, book)
    scores = estimator(np.ones((1, estimator.queries)))
    metrics = list(scores) if metrics is None else metrics
    resampled: dict[str, list[np.ndarray]] = {metric: [] for metric in metrics}
    for weights in _resamples(estimator.queries, len(judged), bootstrap, seed):
        estimates = estimator(weights)
        for metric in metrics:
            resampled[metric].append(estimates[metric].value)
    measured = {}
    for metric in metrics:
        value, n = scores[metric].value[0], scores[metric].n[0]
        low, high = _interval(value, np.concatenate([[], *resampled[metric]]))
        measured[metric] = {"value": _number(value), "low": low, "high": high, "n": 0 if np.isnan(value) else round(n)}
    return measured


def _resamples(queries: int, pairs: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """How often each query is drawn in each of `count` resamples, [some, queries] at a time; none below two queries."""
    if queries < 2:
        return
    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS // pairs)
    for start in range(0, count, at_once):
        some = min(at_once, count - start)
        drawn = rng.integers(queries, size=(some, queries)) + queries * np.arange(some)[:, None]
        yield np.bincount(drawn.ravel(), minlength=some * queries).reshape(some, queries).astype(np.float64)


def _interval(value: float, resampled: np.ndarray) -> tuple[float | None, float | None]:
    resampled = resampled[~np.isnan(resampled)]
    if np.isnan(value) or not len(resampled):
        return None, None
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(min(low, value)), float(max(high, value))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# ------------------------------------------------------------------------------------------------ file


def write(path: epath.PathLike, cards: Mapping[str, Mapping[str, Scores]]) -> None:
    """Writes scorecards `{stage: {split: scores}}` as JSON, in one piece; other stages already there stay.

    On a run of several processes, call it on one.

    Raises:
      ScorecardError: what is there is no scorecard.
    """
    path = epath.Path(path)
    merged = {**(read(path) if path.exists() else {}), **cards}
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_text(json.dumps(merged, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    temporary.replace(path)


def read(path: epath.PathLike) -> Scorecards:
    """The scorecards `{stage: {split: scores}}` of a file.

    Raises:
      ScorecardError: the file is missing or is no scorecard.
    """
    path = epath.Path(path)
    try:
        cards = json.loads(path.read_text())
    except OSError as error:
        raise ScorecardError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ScorecardError(f"{path}: not JSON ({error}); move it away, or write to another file") from error
    if not isinstance(cards, dict) or not all(isinstance(card, dict) for card in cards.values()):
        raise ScorecardError(f"{path}: not a scorecard, which is {{stage: {{split: {{metric: ...}}}}}}")
    return cards


# ---------------------------------------------------------------------------------------------- tables

_SECTIONS = (  # of the table; a name that ends in / or @ stands for all that start so
    ("accuracy", "macro_f1", "good_f1", "auc", "kappa", "mae"),
    ("f1/",),
    ("step_accuracy", "step_accuracy/", "all_right", "adherence"),
    ("format", "truncated", "response_tokens", "pass@", "majority@"),
    ("ece", "brier", "nll"),
)
_LABELS = {
    "macro_f1": "macro-F1", "good_f1": "Good-F1", "auc": "AUC Good/Bad", "kappa": "kappa (quadr.)",
    "mae": "MAE [grades]", "step_accuracy": "step accuracy", "all_right": "all right",
    "adherence": "rule adherence", "format": "well-formed", "response_tokens": "answer [tokens]",
    "ece": "ECE", "brier": "Brier", "nll": "NLL [nats]",
}  # fmt: skip


class Sheet(NamedTuple):
    """A table before it is drawn."""

    title: str
    columns: list[str]
    sections: list[list[list[str]]]  # rows of cells
    note: str


def table(cards: Mapping[str, Mapping[str, Scores]]) -> rich.console.Group:
    """Scorecards to print with rich: the stages side by side, split by split, and a short table by family.

    Two stages fit 80 columns, three fit 100. The difference is the last stage less the first.
    """
    drawn = []
    for sheet in sheets(cards):
        grid = rich.table.Table(
            title=rich.text.Text(sheet.title, style="bold not italic"), title_justify="left", show_edge=False,
            caption=rich.text.Text(sheet.note, style="dim") if sheet.note else None, caption_justify="left",
            box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
        )  # fmt: skip
        for i, column in enumerate(sheet.columns):
            cells = [row[i] for rows in sheet.sections for row in rows]
            word = max((len(word) for cell in cells for word in cell.split()), default=0)  # a line breaks between words
            grid.add_column(rich.text.Text(column), justify="right" if i else "left", no_wrap=i == 0, min_width=word)
        for rows in sheet.sections:
            for row in rows:
                grid.add_row(*map(rich.text.Text, row))
            grid.add_section()
        drawn += [grid, ""]
    return rich.console.Group(*drawn[:-1])


def to_markdown(cards: Mapping[str, Mapping[str, Scores]]) -> str:
    """What `table` shows, as Markdown."""
    blocks = []
    for sheet in sheets(cards):
        header, *rows = (
            "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
            for row in [sheet.columns, *(row for rows in sheet.sections for row in rows)]
        )
        lines = [header, "|:--|" + "--:|" * (len(sheet.columns) - 1), *rows]
        blocks += [f"**{sheet.title}**", "\n".join(lines)] + ([sheet.note.replace("*", r"\*")] if sheet.note else [])
    return "\n\n".join(blocks) + "\n" if blocks else ""


def sheets(cards: Mapping[str, Mapping[str, Scores]]) -> Iterator[Sheet]:
    """For each split the metrics of every stage that has it, then the cuts."""
    for split in dict.fromkeys(split for card in cards.values() for split in card):
        stages = {stage: card[split] for stage, card in cards.items() if split in card}
        yield _metrics_sheet(split, stages)
        if any(_cut_names(stages, cut) for cut in ("by_family", "by_seen")):
            yield _cuts_sheet(split, stages)


def _metrics_sheet(split: str, stages: Mapping[str, Scores]) -> Sheet:
    names = list(dict.fromkeys(name for scores in stages.values() for name in scores))
    sections = []
    for members in _SECTIONS:
        chosen = [n for n in names if n in members or any(m[-1] in "/@" and n.startswith(m) for m in members)]
        rows = [[_label(name), *_row([scores.get(name) for scores in stages.values()])] for name in chosen]
        sections += [rows] if rows else []
    differs = ["difference"] if len(stages) > 1 else []
    columns = ["", "n", *stages, *differs]
    note = "In brackets: 95% bootstrap intervals, by query.\nLower is better: MAE, truncated, ECE, Brier, NLL."
    if any(row[1].endswith("*") for rows in sections for row in rows):
        note += f" * fewer than {SMALL}."
    return Sheet(split, columns, sections, note)


def _row(measures: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Support, each stage's value with interval, and the last less the first."""
    cells = [_support(measures)]
    for measure in measures:
        cell = _short(measure and measure["value"])
        if measure and measure["low"] is not None:
            cell += f" [{_short(measure['low'])},{_short(measure['high'])}]"
        cells.append(cell)
    if len(measures) > 1:
        first, last = (measure and measure["value"] for measure in (measures[0], measures[-1]))
        cells.append("-" if first is None or last is None else _short(last - first, sign="+"))
    return cells


def _cuts_sheet(split: str, stages: Mapping[str, Scores]) -> Sheet:
    """Families, and seen and unseen: the first stage's value and the last one's, two decimals."""
    shown = ("accuracy", "macro_f1", "step_accuracy", "adherence")
    ends = [*stages.values()] if len(stages) == 1 else [[*stages.values()][0], [*stages.values()][-1]]
    sections = []
    for cut in ("by_family", "by_seen"):
        rows = []
        for name in _cut_names(stages, cut):
            found = [scores.get(cut, {}).get(name, {}) for scores in ends]
            cells = ["→".join(_two(scores.get(metric)) for scores in found) for metric in shown]
            rows.append([name, _support([scores.get("accuracy") for scores in found]), *cells])
        sections += [rows] if rows else []
    names = list(stages)
    title = f"{split} by family: {names[0]}" + (f" → {names[-1]}" if len(names) > 1 else "")
    note = f"* fewer than {SMALL}." if any(row[1].endswith("*") for rows in sections for row in rows) else ""
    return Sheet(title, ["", "n", "accuracy", "macro-F1", "steps", "adherence"], sections, note)


def _cut_names(stages: Mapping[str, Scores], cut: str) -> list[str]:
    """The parts of a cut that have pairs; none where a single part is all there is."""
    names = [
        name
        for scores in stages.values()
        for name, measures in scores.get(cut, {}).items()
        if measures.get("accuracy", {}).get("n")
    ]
    names = list(dict.fromkeys(names))
    return names if len(names) > 1 else []


def _label(name: str) -> str:
    if name.startswith("f1/"):
        return f"F1 {name[3:]}"
    if name.startswith("step_accuracy/"):
        return f"  {name.split('/', 1)[1]}"
    return _LABELS.get(name, name)


def _support(measures: Sequence[Mapping[str, Any] | None]) -> str:
    """The support, flagged where small; those of several stages where they differ."""
    supports = list(dict.fromkeys(measure["n"] for measure in measures if measure))
    return "/".join(f"{n:,}" for n in supports) + ("*" if any(n < SMALL for n in supports) else "")


def _short(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return format(value, f"{sign}.3f" if abs(value) < 10 else f"{sign}.1f")


def _two(measure: Mapping[str, Any] | None) -> str:
    return "-" if not measure or measure["value"] is None else f"{measure['value']:.2f}"
