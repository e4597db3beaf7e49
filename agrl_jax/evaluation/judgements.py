"""`judgements.parquet`: what the policy said of every pair that a scorecard rests on, one row a pair, by names.

Columns: `stage`, `split`, `query`, `family`, `seen`, `tier` (the truth) and `judged_tier`, `prob_TIER`, `step_STEP`
(the truth) and `judged_step_STEP`, `well_formed`, `truncated`, `consistent`, `response_tokens`. Null means not known,
or not stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from etils import epath

from agrl_jax.evaluation.metrics import Judgements
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.runtime.files import in_one_piece
from agrl_jax.types import UNKNOWN

FILE = "judgements.parquet"
_PLAIN = ("seen", "well_formed", "truncated", "consistent", "response_tokens")


def write(path: epath.PathLike, stage: str, judged: Mapping[str, Judgements], book: RuleBook) -> None:
    """Writes the judgements of a stage, by split; the file keeps those of other stages."""
    path = epath.Path(path)
    frames = [_frame(stage, split, judgements, book) for split, judgements in judged.items()]
    if path.exists():
        frames.insert(0, read(path).filter(pl.col("stage") != stage))
    with in_one_piece(path) as half, half.open("wb") as file:
        pl.concat(frames, how="vertical_relaxed").write_parquet(file)


def read(path: epath.PathLike) -> pl.DataFrame:
    """The file as a frame."""
    with epath.Path(path).open("rb") as file:
        return pl.read_parquet(file)


def of_frame(frame: pl.DataFrame, book: RuleBook) -> Judgements:
    """The judgements of one stage and split; samples are not kept in the file."""
    tiers, steps = [tier.name for tier in book.tiers], book.steps
    return Judgements(
        query=frame["query"].to_list(),
        family=frame["family"].to_list(),
        tier=_indices(frame["tier"], tiers),
        predicted=_indices(frame["judged_tier"], tiers),
        probs=frame.select(f"prob_{name}" for name in tiers).to_numpy().astype(np.float64),
        steps=_stacked([_indices(frame[f"step_{step.name}"], step.values) for step in steps], len(frame)),
        predicted_steps=_stacked(
            [_indices(frame[f"judged_step_{step.name}"], step.values) for step in steps], len(frame)
        ),
        **{name: frame[name].to_numpy() for name in _PLAIN},
    )


def _frame(stage: str, split: str, judged: Judgements, book: RuleBook) -> pl.DataFrame:
    tiers = [tier.name for tier in book.tiers]
    columns = {
        "stage": [stage] * len(judged),
        "split": [split] * len(judged),
        "query": list(judged.query),
        "family": list(judged.family),
        "tier": _names(judged.tier, tiers),
        "judged_tier": _names(judged.predicted, tiers),
        **{f"prob_{name}": judged.probs[:, i].astype(np.float32) for i, name in enumerate(tiers)},
    }
    for i, step in enumerate(book.steps):
        columns[f"step_{step.name}"] = _names(judged.steps[:, i], step.values)
        columns[f"judged_step_{step.name}"] = _names(judged.predicted_steps[:, i], step.values)
    columns |= {name: np.asarray(getattr(judged, name)) for name in _PLAIN}
    return pl.DataFrame(columns)


def _names(indices: np.ndarray, names: Sequence[str]) -> pl.Series:
    return pl.Series([None if i == UNKNOWN else names[i] for i in indices], dtype=pl.String)


def _indices(column: pl.Series, names: Sequence[str]) -> np.ndarray:
    position = {name: i for i, name in enumerate(names)} | {None: UNKNOWN}
    return np.array([position[name] for name in column], np.int32)


def _stacked(columns: list[np.ndarray], rows: int) -> np.ndarray:
    return np.stack(columns, axis=1) if columns else np.zeros((rows, 0), np.int32)
