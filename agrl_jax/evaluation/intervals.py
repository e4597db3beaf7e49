"""Bootstrap intervals: of one scorecard by query, and over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from agrl_jax.evaluation.metrics import CUT_METRICS, Estimator, Judgements, ScorecardError, Scores
from agrl_jax.rulebook.book import RuleBook

FEW = 20  # pairs of a tier: with fewer, intervals of its F1 and of macro-F1 cover too little to be shown
_CELLS = 1 << 21  # resamples x pairs held at once


def score(judged: Judgements, book: RuleBook, bootstrap: int = 1000, seed: int = 0) -> Scores:
    """Every metric, `{metric: {value, low, high, n}}`.

    Metrics, of one greedy answer to each pair unless said otherwise:

      accuracy, f1/TIER, macro_f1    macro_f1 is the mean over the tiers that have pairs, and counts them by name
                                     in `tiers`; where a tier has fewer than FEW, its F1 and macro_f1 have no interval
      good_f1, auc                   Good (the tiers that the book flags) against Bad; auc ranks by the
                                     summed probability of the good tiers
      kappa, mae                     quadratic-weighted, and mean absolute error, both in grades
      step_accuracy[/STEP]           over the known steps of all pairs together
      all_right                      the tier and every known step are right, so that the tier is not right by luck;
                                     over the pairs with a known step
      adherence                      the stated steps imply the stated tier; over all pairs
      format, truncated              shares; response_tokens is a mean
      pass@K, majority@K             of K samples one is right; the most frequent stated tier is right
                                     (tied tiers share the credit). Absent where nothing was sampled.
      likeliest_accuracy, likeliest_macro_f1, disagreement
                                     of the likeliest tier by the probabilities, in place of the stated one; and the
                                     share of answers that state another tier
      ece, brier, nll                of the tier probabilities: calibration error of the likeliest tier in 15
                                     bins of equal width, squared error summed over tiers, -log p(truth) [nats]

    and `by_family` {family: {metric: ...}} and `by_seen` {"seen", "unseen"}, one level deeper, with CUT_METRICS.

    Args:
      judged: the judgements; their order does not change the scores.
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


def over_seeds(
    judged: Sequence[Judgements], book: RuleBook, bootstrap: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Every metric of `score` over several runs: [1 + bootstrap], the mean over the runs and its resamples.

    The bootstrap is hierarchical: runs are drawn with replacement, then queries, the same ones for all runs. Two calls
    with equal `seed`, number of runs and queries draw the same, so that the difference of their results is paired.

    Raises:
      ScorecardError: the runs did not judge the same pairs.
    """
    first = judged[0]
    if any(list(other.query) != list(first.query) or not np.array_equal(other.tier, first.tier) for other in judged):
        raise ScorecardError("runs to be averaged need judgements of the same pairs in the same order")
    estimators = [Estimator(each, book) for each in judged]
    runs, queries = len(judged), estimators[0].queries
    drawn = np.random.default_rng(seed).integers(runs, size=(bootstrap, runs))
    times = (drawn[:, :, None] == np.arange(runs)).sum(axis=1)  # [bootstrap, runs]
    share = np.concatenate([np.ones((1, runs)), times]) / runs
    weights = [np.ones((1, queries)), *resamples(queries, len(first), bootstrap, seed)]
    values = [[estimator(some) for some in weights] for estimator in estimators]  # by run, then by piece
    return {
        metric: sum(
            share[: len(whole), run] * whole
            for run, whole in enumerate(np.concatenate([piece[metric].value for piece in of]) for of in values)
        )
        for metric in values[0][0]
    }


def _measure(
    judged: Judgements, book: RuleBook, bootstrap: int, seed: int, metrics: Sequence[str] | None = None
) -> Scores:
    """`{metric: {value, low, high, n}}` of all metrics, or of those named; macro_f1 has `tiers` too."""
    estimator = Estimator(judged, book)
    scores = estimator(np.ones((1, estimator.queries)))
    metrics = list(scores) if metrics is None else metrics
    resampled: dict[str, list[np.ndarray]] = {metric: [] for metric in metrics}
    for weights in resamples(estimator.queries, len(judged), bootstrap, seed):
        estimates = estimator(weights)
        for metric in metrics:
            resampled[metric].append(estimates[metric].value)
    tiers = {tier.name: round(scores[f"f1/{tier.name}"].n[0]) for tier in book.tiers}
    present = {name: n for name, n in tiers.items() if n}
    too_few = {f"f1/{name}" for name, n in present.items() if n < FEW}
    too_few |= {"macro_f1", "likeliest_macro_f1"} if too_few else set()
    measured = {}
    for metric in metrics:
        value, n = scores[metric].value[0], scores[metric].n[0]
        low, high = interval(value, np.concatenate([[], *resampled[metric]]))
        if metric in too_few:
            low = high = None
        measured[metric] = {"value": _number(value), "low": low, "high": high, "n": 0 if np.isnan(value) else round(n)}
    if "macro_f1" in measured:
        measured["macro_f1"]["tiers"] = present
    return measured


def resamples(queries: int, pairs: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample draws each query: blocks [some, queries], `count` rows in all; none below two queries."""
    if queries < 2:
        return
    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS // pairs)
    for start in range(0, count, at_once):
        some = min(at_once, count - start)
        drawn = rng.integers(queries, size=(some, queries)) + queries * np.arange(some)[:, None]
        yield np.bincount(drawn.ravel(), minlength=some * queries).reshape(some, queries).astype(np.float64)


def interval(value: float, resampled: np.ndarray) -> tuple[float | None, float | None]:
    resampled = resampled[~np.isnan(resampled)]
    if np.isnan(value) or not len(resampled):
        return None, None
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(min(low, value)), float(max(high, value))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
