"""One page about a run: curves, scorecards, confusion matrices, alarms, and its rollouts to browse.

    python -m agrl_jax.report --workdir=runs/quickstart --compare=runs/grpo --out=report.html

The command reads only files of the workdirs. The page is one file that loads nothing: mail it, or open it years later.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from absl import flags
from etils import epath

from agrl_jax.evaluation.html import render
from agrl_jax.runtime.config import exit_with, parse_flags
from agrl_jax.runtime.console import say
from agrl_jax.runtime.files import check_writable, write_text

RISE, FALL = 0.02, 0.02  # an alarm: how far a part rises and validation accuracy falls over three validations in a row

_ALARM_RULE = (
    f"From one validation to the second one after it, validation accuracy falls by at least {FALL} and the smoothed "
    f"mean of a part of the reward, before its weight, rises by at least {RISE} (a part's scale is 1 wide)."
)
_CURVES = {
    "reward/total": "reward", "validation/macro_f1": "validation macro-F1",
    "validation/accuracy": "validation accuracy",
    "guide/share": "share guided", "guide/level": "guidance level", "guide/pass_before": "pass rate before guidance",
    "guide/pass_after": "pass rate after guidance", "guide/transfer_gap": "transfer gap",
    "difficulty/inside": "rows in the band of pass rates", "difficulty/above": "rows above it",
    "difficulty/below": "rows below it",
    "reward/equal_groups": "groups with equal rewards", "reward/gated": "a right step earned nothing (gate)",
    "policy/entropy": "entropy [nats]", "policy/kl": "KL to the reference [nats]", "policy/loss": "loss",
}  # fmt: skip


def page(workdirs: Sequence[epath.PathLike]) -> str:
    """The page about workdirs, the first of which is compared with the others.

    Raises:
      ValueError: a workdir is not that of a training run, or a file in it is damaged.
    """
    runs = [_run(epath.Path(workdir)) for workdir in workdirs]
    parts = list(dict.fromkeys(part for run in runs for part in run["parts"]))
    titles = _CURVES | {f"reward/{part}": f"part: {part}" for part in parts}
    shown = {name: title for name, title in titles.items() if any(name in run["curves"] for run in runs)}
    data = {
        "curves": shown,
        "runs": [{name: run[name] for name in ("name", "stage", "curves", "samples")} for run in runs],
    }
    return render("report", data, runs=runs, alarm_rule=_ALARM_RULE)


def _run(workdir: epath.Path) -> dict[str, Any]:
    """All that the page shows of a workdir; `missing` says what it cannot show."""
    from agrl_jax.evaluation import judgements, tables  # here: JAX, which they need, takes seconds to start
    from agrl_jax.runtime.logs import read_jsonl

    if not (workdir / "metrics.jsonl").exists():
        raise ValueError(f"{workdir / 'metrics.jsonl'}: not found; is {workdir} the workdir of a training run?")
    rows = read_jsonl(workdir / "metrics.jsonl")
    stage = rows[-1]["stage"] if rows else None
    curves = _curves([row for row in rows if row["stage"] == stage])
    parts = [n.removeprefix("reward/") for n in curves if n != "reward/total" and f"{n}_spread" in curves]
    missing = []
    if stage != "rl":
        missing.append("There are no steps of RL: " + (f"the curves are those of the stage {stage}." if stage else ""))
    elif "reward/gated" not in curves:
        missing.append("Gate firings were not logged by this run.")
    samples = _file(workdir / "samples.jsonl", read_jsonl, [], "no rollouts to browse", missing)
    cards = _file(workdir / "scorecard.json", tables.read, {}, "no scorecard yet", missing)
    frame = _file(workdir / judgements.FILE, judgements.read, None, "no confusion matrices", missing)
    return {
        "name": str(workdir), "stage": stage, "curves": curves, "parts": parts, "samples": samples, "missing": missing,
        "sheets": list(tables.sheets(cards)), "confusions": [] if frame is None else confusions(frame),
        "alarms": alarms(curves, parts), "reliabilities": [] if frame is None else reliabilities(frame),
    }  # fmt: skip


def _file(path: epath.Path, reader: Any, otherwise: Any, without: str, missing: list[str]) -> Any:
    """What a file holds; where there is none, `otherwise`, and a sentence in `missing`."""
    if path.exists():
        return reader(path)
    missing.append(f"{path.name} is not there: {without}.")
    return otherwise


# ---------------------------------------------------------------------------------------------- curves


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """By metric the points [step, value, mean of the last twentieth of all values], in order of steps."""
    values: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("reward/", "guide/", "policy/", "validation/", "difficulty/")) and _finite(value):
                values.setdefault(name, []).append((row["step"], value))
    return {name: _smoothed(points) for name, points in values.items()}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _smoothed(points: Sequence[tuple[int, float]]) -> list[list[float]]:
    window = max(len(points) // 20, 1)
    sums = np.cumsum([0.0, *(value for _, value in points)])
    ends = np.arange(1, len(points) + 1)
    starts = np.maximum(ends - window, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [[step, float(f"{v:.5g}"), float(f"{mean:.5g}")] for (step, v), mean in zip(points, means, strict=True)]


def alarms(curves: Mapping[str, Sequence[Sequence[float]]], parts: Sequence[str]) -> list[dict[str, Any]]:
    """Where a part of the reward rises while validation accuracy falls: see `_ALARM_RULE`."""
    accuracy = [(step, value) for step, value, _ in curves.get("validation/accuracy", ())]
    found = []
    for part, ((start, before), (end, after)) in itertools.product(parts, zip(accuracy, accuracy[2:], strict=False)):
        mean = {step: smooth for step, _, smooth in curves[f"reward/{part}"]}
        if start not in mean or end not in mean:  # validated before the first step
            continue
        rise, fall = mean[end] - mean[start], before - after
        if rise >= RISE and fall >= FALL:
            found.append({"part": part, "start": start, "end": end, "rise": rise, "fall": fall})
    return found


# --------------------------------------------------------------------------------------------- confusion


def confusions(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """For each stage and split the matrices of the tier and of each step: counts of true by stated values."""
    steps = [name.removeprefix("step_") for name in frame.columns if name.startswith("step_")]
    tiers = [name.removeprefix("prob_") for name in frame.columns if name.startswith("prob_")]
    found = []
    for (stage, split), judged in frame.group_by("stage", "split", maintain_order=True):
        matrices = [_matrix("tier", judged["tier"], judged["judged_tier"], tiers)]
        for step in steps:
            truth, stated = judged[f"step_{step}"], judged[f"judged_step_{step}"]
            matrices.append(_matrix(step, truth, stated, sorted({*truth, *stated} - {None})))
        found.append({"stage": stage, "split": split, "matrices": [matrix for matrix in matrices if matrix["n"]]})
    return found


def _matrix(part: str, truth: pl.Series, stated: pl.Series, names: Sequence[str]) -> dict[str, Any]:
    """Counts of the pairs whose truth is known; the last column counts answers that state nothing."""
    columns = [*names, None]
    counts = np.zeros((len(names), len(columns)), int)
    for true, said in zip(truth, stated, strict=True):
        if true is not None:
            counts[names.index(true), columns.index(said)] += 1
    rows = [
        {"name": name, "cells": [{"n": int(n), "share": n / max(row.sum(), 1)} for n in row]}
        for name, row in zip(names, counts, strict=True)
    ]
    return {"part": part, "columns": [*names, "none stated"], "rows": rows, "n": int(counts.sum())}


# ------------------------------------------------------------------------------------------- reliability


def reliabilities(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """For each stage and split, and each bin of the calibration error that holds pairs: the mean probability of the
    likeliest tier, how often that tier is right (a malformed answer never is), and the number of pairs."""
    from agrl_jax.evaluation.metrics import confidence_bin

    tiers = [name for name in frame.columns if name.startswith("prob_")]
    found = []
    for (stage, split), judged in frame.group_by("stage", "split", maintain_order=True):
        probs = judged.select(tiers).to_numpy().astype(np.float64)
        likeliest, confidence = probs.argmax(axis=1), probs.max(axis=1)
        truth = np.array([tiers.index(f"prob_{name}") for name in judged["tier"]])
        right, of = (likeliest == truth) & judged["well_formed"].to_numpy(), confidence_bin(confidence)
        bins = [
            {"confidence": confidence[of == i].mean(), "right": right[of == i].mean(), "n": int((of == i).sum())}
            for i in np.unique(of)
        ]
        error = sum(abs(one["confidence"] - one["right"]) * one["n"] for one in bins) / len(judged)
        found.append({"stage": stage, "split": split, "bins": bins, "n": len(judged), "error": error})
    return found


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_multi_string("compare", [], "Another workdir to lay beside it; may be repeated.")
    flags.DEFINE_string("out", "report.html", "Where to write the page.")


def main(argv: list[str]) -> None:
    """Exit code 2 for a workdir that is not there."""
    _define_flags()
    parse_flags(argv)
    values = flags.FLAGS
    try:
        check_writable(values.out, "--out")
        written = page([values.workdir, *values.compare])
    except ValueError as error:
        exit_with(error)
    write_text(values.out, written)
    say(f"written to {values.out}")


if __name__ == "__main__":
    main(sys.argv)
