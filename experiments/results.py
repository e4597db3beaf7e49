"""Keeps the result of a run: a small JSON file with scores and figures of training, and its judgements beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from agrl_jax.evaluation import judgements, metrics, tables
from agrl_jax.evaluation.metrics import Judgements
from agrl_jax.rulebook import book
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.runtime.config import last_branch
from agrl_jax.runtime.files import write_text
from agrl_jax.runtime.logs import read_jsonl
from experiments import study
from experiments.study import Sweep

# Metrics of the steps that show how steady training was.
WATCHED = ("reward/equal_groups", "policy/entropy", "policy/kl", "optim/grad_norm", "guide/share", "guide/level")


def write(sweep: Sweep, run: str, seed: int, workdir: Path, diverged: bool, settings: Mapping[str, Any]) -> None:
    """Writes the result of the run in `workdir`, which was made with `settings`."""
    config = json.loads((workdir / "config.json").read_text())
    method = sweep.method(run)
    rows = read_jsonl(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []
    after = [row for row in rows if row["stage"] != "sft"]  # after the warm start, which runs share
    cards = tables.read(workdir / "scorecard.json")
    stage = method if method in cards else "sft"
    result = {
        "method": method,
        "run": run,
        "seed": seed,
        "diverged": diverged,
        "labels": sweep.labels(run),
        "fields": sweep.fields(run),
        "stage": stage,
        "scores": {} if diverged else {split: _values(card) for split, card in cards[stage].items()},
        "start": {split: _values(card) for split, card in cards["sft"].items()},
        "validation": [
            {"step": row["step"], "tokens": row.get("budget/spent"), **_named(row, "validation/")}
            for row in after
            if "validation/macro_f1" in row
        ],
        "watched": {name: _thin([row[name] for row in after if row.get(name) is not None]) for name in WATCHED},
        "excursions": {name: _excursion(after, name) for name in ("optim/grad_norm", "policy/kl")},
        "skipped": int(sum(row.get("optim/finite", 1) == 0 for row in after)),
        "cost": _cost(after) | {"pairs": _pairs_met(config, after)},
        "jax": jax.__version__,
        "device": _device(),
        "rulebook": config["rulebook"],
        "settings": settings,
    }
    path = sweep.result(run, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not diverged:
        _keep_judgements(workdir, stage, path.with_suffix(".parquet"))
    write_text(path, json.dumps(result, separators=(",", ":")) + "\n")


def _device() -> str:
    """The kind of device. Its memory is not allocated for this: the runs need it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return jax.devices()[0].device_kind


def is_there(sweep: Sweep, run: str, seed: int, settings: Mapping[str, Any]) -> bool:
    """Whether there is a result of a run with these settings. If one of them has changed, the run is made again."""
    path = sweep.result(run, seed)
    return path.exists() and study.same(json.loads(path.read_text()).get("settings", {}), settings)


def read(sweep: Sweep) -> dict[str, dict[int, dict[str, Any]]]:
    """The results so far, by run and seed, in the order of the sweep; `judged` has the judgements by split."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in sweep.runs:
        for seed in sweep.seeds:
            path = sweep.result(run, seed)
            if path.exists():
                result = json.loads(path.read_text())
                result["judged"] = {} if result["diverged"] else judged(path.with_suffix(".parquet"), rules(result))
                found.setdefault(run, {})[seed] = result
    return found


def judged(path: Path, rules: RuleBook) -> dict[str, Judgements]:
    """The judgements in a file of one stage, by split."""
    parts = judgements.read(path).partition_by("split", as_dict=True, maintain_order=True)
    return {split: judgements.of_frame(frame, rules) for (split,), frame in parts.items()}


def rules(result: Mapping[str, Any]) -> RuleBook:
    """The rule book of a run."""
    return book.load(result["rulebook"]["path"], result["rulebook"]["order"])


def _keep_judgements(workdir: Path, stage: str, path: Path) -> None:
    """Keeps the judgements of a stage, with numbers in place of queries, so that the file is small enough to commit."""
    frame = judgements.read(workdir / judgements.FILE).filter(pl.col("stage") == stage)
    number = pl.col("query").rank("dense").over("split").cast(pl.String)
    frame.with_columns(number).write_parquet(path, compression="zstd")


def _values(card: metrics.Scores) -> dict[str, Any]:
    """The values of a scorecard, without its intervals."""
    cuts = ("by_family", "by_seen")
    values = {name: measure["value"] for name, measure in card.items() if name not in (*cuts, "settings")}
    for cut in cuts:
        values[cut] = {
            part: {name: measure["value"] for name, measure in measures.items()} for part, measures in card[cut].items()
        }
    return values


def _named(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _thin(values: list[float], points: int = 40) -> list[float]:
    """Means over up to `points` pieces of a curve, to three digits."""
    pieces = np.array_split(np.asarray(values, float), min(points, len(values))) if values else []
    return [float(f"{np.mean(piece):.3g}") for piece in pieces]


def _pairs_met(config: Mapping[str, Any], rows: list[dict[str, Any]]) -> int:
    """Labelled training pairs that the stage after the warm start met; a pair met twice counts twice."""
    branch = last_branch(config["method"])
    if branch == "dpo":
        return config["dpo"]["mined"] if rows else 0
    return round(config[branch]["batch_size"] * sum(row.get("refill/rounds", 1) for row in rows))


def _excursion(rows: list[dict[str, Any]], name: str) -> float | None:
    """The greatest value divided by the median."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(np.max(values) / max(np.median(values), 1e-12)) if values else None


def _cost(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens and seconds after the shared warm start. Seconds are the median step's times the number of steps, since
    other jobs may slow some steps."""
    def total(name: str) -> float:
        return float(sum(row.get(name) or 0 for row in rows))

    seconds = [row["time/step_s"] for row in rows]
    return {
        "steps": rows[-1]["step"] if rows else 0,
        "tokens_trained": total("tokens/trained"),
        "forward_equivalents": rows[-1]["budget/spent"] if rows else 0,
        "seconds": float(np.median(seconds) * len(seconds)) if rows else 0.0,
    }

