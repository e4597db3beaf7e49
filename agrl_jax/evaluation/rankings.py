"""Measures ranked lists by judged pairs with `ir_measures`, and compares two."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

_MOST = 20  # highest gain whose exponential `ir_measures` takes: its memory grows with the largest
Gains = Mapping[str, Mapping[str, int]]  # by query and item
Lists = Mapping[str, Sequence[str]]  # the items of each query, best first


class RankingError(ValueError):
    """Lists that cannot be measured."""


def check_installed() -> None:
    """Raises RankingError where `ir_measures`, an optional dependency, is missing."""
    if importlib.util.find_spec("ir_measures") is None:
        raise RankingError("measuring rankings needs the library `ir_measures`: pip install 'agrl_jax[rank]'")


def measure(gains: Gains, lists: Lists, k: int, good: int, exponential: bool = False) -> dict[str, dict[str, float]]:
    """`{query: {ndcg, precision, judged}}` of the first k items of each list, for all queries with gains.

    nDCG is the sum of gain / log2(1 + rank), divided by that sum for the best order of the judged items (Järvelin and
    Kekäläinen, 2002); 0 where no gain is above 0. Precision is the share of the k places that hold an item of
    gain >= `good`. An item without a gain counts as 0; `judged` is the share of the listed items that have one. A query
    without a list has 0 for all.

    Args:
      gains: of judged items, whole numbers from 0.
      lists: each item once for a query.
      k: how many items count.
      good: the least gain of a relevant item.
      exponential: nDCG takes 2^gain - 1 in place of the gain (Burges et al., 2005).

    Raises:
      RankingError: the library is missing, or a gain is too large to be exponential.
    """
    check_installed()
    highest = max((gain for of in gains.values() for gain in of.values()), default=0)
    if exponential and highest > _MOST:
        raise RankingError(f"exponential gains need tiers within {_MOST} grades, not {highest}; take linear ones")
    import ir_measures
    from ir_measures import Judged, P, nDCG

    run = [
        ir_measures.ScoredDoc(query, item, float(-place))
        for query, items in lists.items() if query in gains for place, item in enumerate(items)
    ]  # fmt: skip
    found = {query: {"ndcg": 0.0, "precision": 0.0, "judged": 0.0} for query in gains}
    for names, transform in (
        ({P(rel=good) @ k: "precision", Judged @ k: "judged"}, int),
        ({nDCG @ k: "ndcg"}, (lambda gain: 2**gain - 1) if exponential else int),
    ):
        qrels = [
            ir_measures.Qrel(query, item, transform(gain)) for query, of in gains.items() for item, gain in of.items()
        ]
        for one in ir_measures.iter_calc(list(names), qrels, run):
            found[one.query_id][names[one.measure]] = float(one.value)
    return found


def compare(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Whether b is better than a, by values [N] of the same queries: means, their difference with its 95% interval and
    the p of the paired t-test, and on how many queries b is better, worse and equal.

    Interval and p are None for fewer than two queries, or where all differences are equal. On per-query measures of
    rankings the paired t-test and the randomisation test give all but the same p (Smucker et al., 2007).
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    difference = second - first
    found = {
        "queries": len(first), "a": float(first.mean()), "b": float(second.mean()),
        "difference": float(difference.mean()), "low": None, "high": None, "p": None,
        "better": int((difference > 0).sum()), "worse": int((difference < 0).sum()),
        "equal": int((difference == 0).sum()),
    }  # fmt: skip
    if len(first) > 1 and not np.allclose(difference, difference[0]):
        test = stats.ttest_rel(second, first)
        interval = test.confidence_interval(0.95)
        found |= {"low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue)}
    return found
