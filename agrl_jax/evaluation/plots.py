"""Draws the curves of a run, `curves.png`, from `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath

from agrl_jax.runtime.logs import read_jsonl

matplotlib.use("Agg")  # a file, never a window
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen before pyplot is first imported)

_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Reward of the policy's own answers", {"reward/total": "reward", "reward/tier_accuracy": "tier accuracy"}),
    ("Held-out validation", {
        "validation/macro_f1": "macro-F1", "validation/step_accuracy": "step accuracy",
        "validation/adherence": "rule adherence",
    }),
    ("Guided replay", {
        "guide/share": "share guided", "guide/pass_before": "pass before", "guide/pass_after": "pass after",
    }),
    ("Policy", {"policy/entropy": "entropy [nats]", "reward/equal_groups": "groups with equal rewards"}),
)


def learning_curves(workdir: epath.PathLike) -> epath.Path | None:
    """Draws the RL stage of a workdir, raw values faint, their mean strong. Returns the file; None without steps."""
    workdir = epath.Path(workdir)
    rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["stage"] == "rl"]
    if not rows:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained", sharex=True)
    for panel, (title, names) in zip(axes.flat, _PANELS, strict=True):
        for metric, label in names.items():
            points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
            if points:
                _draw(panel, *zip(*points, strict=True), label=label)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("RL step")
    path = workdir / "curves.png"
    with path.open("wb") as file:
        figure.savefig(file, dpi=120)
    plt.close(figure)
    return path


def _draw(panel: Any, steps: Sequence[int], values: Sequence[float], label: str) -> None:
    """Draws one curve: raw values, and their mean over about a twentieth of the points if there are many."""
    window = max(len(values) // 20, 1)
    if window < 2:
        panel.plot(steps, values, marker="o", markersize=3, label=label)
        return
    kernel = np.ones(window) / window
    smooth = np.convolve(values, kernel, mode="valid")
    line = panel.plot(steps[window - 1 :], smooth, label=label)[0]
    panel.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)
