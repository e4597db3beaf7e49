"""Tiers by cumulative probability: cut points, their fit on labelled pairs, and the file that keeps them.

With the tiers best first, the tier chosen is the first at which the cumulative probability reaches the cut
point of that tier; the last tier takes the rest. (CumPT of TaoSR1, arXiv 2508.12365, as far as its public
description goes; the search below is ours.) Cut points of one half choose the median tier. A lower one makes
its tier easier to reach, so a policy that chooses a tier too rarely or too often can be corrected without
training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from agrl_jax.runtime.files import write_json

PLACES = np.arange(1, 100) / 100  # where a cut point may be
_STARTS = 8  # besides one half for all


class CutsError(ValueError):
    """Cut points that cannot be fitted or used; the message names the file."""


class Fit(NamedTuple):
    """Fitted cut points and what they achieve on the pairs that they were fitted on."""

    cuts: tuple[float, ...]  # one for each tier but the last
    macro_f1: float
    macro_f1_before: float  # of the tiers that were chosen without cut points


def choose(probs: np.ndarray, cuts: Sequence[float]) -> np.ndarray:
    """[N] int: the tier of each row of `probs` [N, tiers], best first, by one cut point for each tier but the last."""
    reached = np.cumsum(probs, axis=1)[:, :-1] >= np.asarray(cuts)
    return np.where(reached.any(axis=1), reached.argmax(axis=1), probs.shape[1] - 1)


def macro_f1(truth: np.ndarray, chosen: np.ndarray) -> float:
    """Mean F1 over the tiers that have pairs."""
    return float(np.mean([_f1(truth == tier, chosen == tier) for tier in np.unique(truth)]))


def _f1(truth: np.ndarray, chosen: np.ndarray) -> float:
    return 2 * np.sum(truth & chosen) / (np.sum(truth) + np.sum(chosen))


def fit(probs: np.ndarray, truth: np.ndarray, before: np.ndarray) -> Fit:
    """The cut points, to two decimals, with the highest macro-F1 found, by coordinate ascent.

    One cut point at a time moves to its best place, the others held, until no move helps; among equal places it takes
    the one nearest to one half. The best of nine starts counts: one half for all, and eight drawn with a fixed seed.

    Args:
      probs: [N, tiers] probabilities, tiers best first.
      truth: [N] int, the true tiers.
      before: [N] int, the tiers chosen without cut points.
    """
    count = probs.shape[1] - 1
    drawn = np.random.default_rng(0).choice(PLACES, (_STARTS, count)).tolist()
    found = [_ascend(probs, truth, start) for start in [[0.5] * count, *drawn]]
    score, cuts = max(found, key=lambda pair: pair[0])
    return Fit(tuple(cuts), score, macro_f1(truth, before))


def _ascend(probs: np.ndarray, truth: np.ndarray, start: Sequence[float]) -> tuple[float, list[float]]:
    """The macro-F1 and the cut points at which no move of a single cut point helps."""
    cuts, best = list(start), -1.0
    nearest_half_first = PLACES[np.argsort(np.abs(PLACES - 0.5), kind="stable")].tolist()
    while True:
        score = best
        for k in range(len(cuts)):
            tried = [cuts[:k] + [place] + cuts[k + 1 :] for place in nearest_half_first]
            scores = [macro_f1(truth, choose(probs, candidate)) for candidate in tried]
            cuts, score = tried[int(np.argmax(scores))], max(scores)
        if score <= best:
            return best, cuts
        best = score


# --------------------------------------------------------------------------------------------- the file


def save(path: epath.PathLike, tiers: Sequence[str], fitted: Fit, made_for: Mapping[str, str]) -> None:
    """Writes cut points by their tiers' names, with the macro-F1 that they reach and what they were `made_for`."""
    cuts = dict(zip(tiers[:-1], fitted.cuts, strict=True))
    content = fitted._asdict() | {"cuts": cuts, "made_for": dict(made_for)}
    write_json(path, content)


def load(path: epath.PathLike, tiers: Sequence[str], made_for: Mapping[str, str]) -> tuple[float, ...]:
    """The cut points of a file, one for each tier but the last.

    Raises:
      CutsError: there is no such file, it has other tiers, or it was not made for `made_for`.
    """
    path = epath.Path(path)
    again = "; fit cut points with --fit_cuts=LABELLED_FILE"
    try:
        content = json.loads(path.read_text())
        cuts = tuple(float(content["cuts"][tier]) for tier in tiers[:-1])
        before = dict(content["made_for"])
    except OSError as error:
        raise CutsError(f"{path}: cannot be read{again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CutsError(f"{path}: does not hold a cut point for each of {', '.join(tiers[:-1])}{again}") from error
    for name, value in made_for.items():
        if before.get(name) != value:
            raise CutsError(f"{path}: was fitted for another {name}{again}")
    return cuts
