"""Measures how far raters agree: a judge with people, and people with each other.

All figures are functions of totals per query, weighted as in `metrics`: weights of one give the value, and a bootstrap
resample of queries is a set of other weights. A pair that a rater has not rated counts in none of that rater's figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agrl_jax.evaluation.intervals import interval, resamples
from agrl_jax.types import UNKNOWN

DISTANCES = ("nominal", "ordinal", "interval")


def coincidences(labels: np.ndarray, values: int) -> np.ndarray:
    """[N, values, values] how often two values meet in the `labels` [N, raters] int of a pair (UNKNOWN: not rated).
    Each ordered pair of the m raters who rated it counts 1 / (m - 1); for m below 2, all are 0."""
    counts = (labels[:, :, None] == np.arange(values)).sum(axis=1).astype(np.float64)  # [N, values]
    together = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(values)
    return together / np.maximum(counts.sum(axis=1) - 1, 1)[:, None, None]


def alpha(coincident: np.ndarray, grades: Sequence[float], distance: str = "ordinal") -> np.ndarray:
    """Krippendorff's alpha [...] of coincidences [..., values, values] summed over pairs.

    1 - observed over expected disagreement (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011). NaN where
    all labels are equal.

    Args:
      coincident: sums of `coincidences`.
      grades: one for each value; their differences are the distance `interval`.
      distance: `nominal` (equal or not), `ordinal` (how many labels lie between) or `interval`.
    """
    grades = np.asarray(grades, np.float64)
    order = np.argsort(grades)
    coincident = coincident[..., order, :][..., order]
    marginal = coincident.sum(axis=-1)  # [..., values]
    total = marginal.sum(axis=-1)
    if distance == "nominal":
        square = 1.0 - np.eye(len(grades))
    elif distance == "interval":
        square = (grades[order, None] - grades[order]) ** 2
    else:
        upto = np.cumsum(marginal, axis=-1)
        middle = upto - marginal / 2  # half of a value's own labels lie on either side
        square = (middle[..., :, None] - middle[..., None, :]) ** 2
    observed = (coincident * square).sum(axis=(-2, -1)) * (total - 1)
    expected = (marginal[..., :, None] * marginal[..., None, :] * square).sum(axis=(-2, -1))
    return 1 - _ratio(observed, expected)


def kappa(confusion: np.ndarray, grades: Sequence[float] | None = None) -> np.ndarray:
    """Cohen's kappa [...] of counts [..., values of one rater, values of the other]; weighted by squared differences of
    `grades` where they are given (Cohen, 1968). NaN where both raters only ever give one and the same value."""
    values = confusion.shape[-1]
    weight = 1.0 - np.eye(values)
    if grades is not None:
        weight = (np.asarray(grades, np.float64)[:, None] - np.asarray(grades, np.float64)) ** 2
    total = confusion.sum(axis=(-2, -1))
    by_chance = confusion.sum(axis=-1)[..., :, None] * confusion.sum(axis=-2)[..., None, :]
    return 1 - _ratio((confusion * weight).sum(axis=(-2, -1)) * total, (by_chance * weight).sum(axis=(-2, -1)))


def majority(labels: np.ndarray, values: int) -> np.ndarray:
    """[N] int: the label that most raters give, of `labels` [N, raters]; UNKNOWN where there is none, or a tie."""
    counts = (labels[:, :, None] == np.arange(values)).sum(axis=1)
    most = counts.max(axis=1)
    alone = (most > 0) & ((counts == most[:, None]).sum(axis=1) == 1)
    return np.where(alone, counts.argmax(axis=1), UNKNOWN)


def compare(
    one: np.ndarray, other: np.ndarray, query: Sequence[str], grades: Sequence[float], bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """`{n, agreement, kappa, weighted_kappa}` of two raters, [N] int each, over the pairs that both have rated; all but
    n are `{value, low, high}` with 95% intervals over resamples of queries, None where undefined."""
    both = (one != UNKNOWN) & (other != UNKNOWN)
    confusion = np.eye(len(grades))[one][:, :, None] * np.eye(len(grades))[other][:, None, :] * both[:, None, None]

    def figures(counts: np.ndarray) -> dict[str, np.ndarray]:
        agree = np.trace(counts, axis1=-2, axis2=-1)
        return {
            "agreement": _ratio(agree, counts.sum(axis=(-2, -1))),
            "kappa": kappa(counts),
            "weighted_kappa": kappa(counts, grades),
        }

    return {"n": int(both.sum())} | _with_intervals(confusion, query, figures, bootstrap, seed)


def alpha_of(
    labels: np.ndarray, query: Sequence[str], grades: Sequence[float], bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """`{n, nominal, ordinal, interval}`: Krippendorff's alpha of raters [N, raters] by each distance, with intervals as
    in `compare`; n counts the pairs that two or more have rated."""

    def figures(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {name: alpha(sums, grades, name) for name in DISTANCES}

    n = int(((labels != UNKNOWN).sum(axis=1) > 1).sum())
    together = coincidences(labels, len(grades))
    return {"n": n} | _with_intervals(together, query, figures, bootstrap, seed)


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """The gain from abstaining: for each confidence [N] that occurs, from the highest, the share of pairs with at least
    that confidence (`coverage`) and the share of these that are `right` [N] (`agreement`)."""
    order = np.argsort(-confidence, kind="stable")
    agreement = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    last = np.append(np.diff(confidence[order]) != 0, True)[: len(order)]  # equal confidences go together
    return [
        {"confidence": float(confidence[order][i]), "coverage": (i + 1) / len(order), "agreement": float(agreement[i])}
        for i in np.flatnonzero(last)
    ]


def threshold(curve: Sequence[dict[str, float]], wanted: float) -> dict[str, float] | None:
    """The point of a `risk_coverage` curve with the widest coverage and the wanted agreement; None if there is none."""
    enough = [point for point in curve if point["agreement"] >= wanted]
    return max(enough, key=lambda point: point["coverage"], default=None)


def _with_intervals(rows: np.ndarray, query: Sequence[str], figures: Any, bootstrap: int, seed: int) -> dict[str, Any]:
    """Figures of the sum of `rows` [N, ...] with their intervals over resamples of queries."""
    position = {name: i for i, name in enumerate(sorted(set(query)))}
    totals = np.zeros((len(position), *rows.shape[1:]))
    np.add.at(totals, [position[name] for name in query], rows)
    values = figures(totals.sum(axis=0))
    drawn = [figures(np.tensordot(some, totals, axes=1)) for some in resamples(len(totals), len(rows), bootstrap, seed)]
    found = {}
    for name, value in values.items():
        low, high = interval(float(value), np.concatenate([[], *(np.atleast_1d(one[name]) for one in drawn)]))
        found[name] = {"value": None if np.isnan(value) else float(value), "low": low, "high": high}
    return found


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)
