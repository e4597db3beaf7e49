"""The tables and plot of docs/benchmarks.md, from the results files.

    python -m benchmarks.table [--results=benchmarks/results] [--plot=docs/benchmarks.png]

It prints the figures of each results file in Markdown, with its machine, and draws the steps of ours and of the peers,
in parts. Figures are compared only with others of the same run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from absl import app, flags

from agrl_jax.runtime.config import parse_flags
from agrl_jax.runtime.markdown import table
from benchmarks import results
from benchmarks.machine import ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen before pyplot is first imported)

_RESULTS = flags.DEFINE_string("results", str(results.RESULTS), "folder of results files")
_PLOT = flags.DEFINE_string("plot", str(ROOT / "docs" / "benchmarks.png"), "the plot; empty: none")

PARTS = ("rollout", "reference", "gradient", "update", "other")
MEASURES = {"seconds": "time of a step", "temporary": "temporary memory", "peak": "peak memory"}  # that grow
PAIRS_PER_MINUTE = 100_000  # the target of tokenising and batching, on two cores


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results by the stem of their file's name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def of(found: dict[str, Any]) -> str:
    """The table of one benchmark's results, in Markdown."""
    return _TABLES[found["benchmark"]](found)


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """A heading and a table for each results file."""
    return "\n\n".join(f"{_heading(name, result)}\n\n{of(result)}" for name, result in found.items())


def _heading(name: str, result: dict[str, Any]) -> str:
    machine = result["machine"]
    what = ", ".join(str(result[key]) for key in ("model", "weights", "dtype") if key in result)
    return (
        f"**{name}**: {what + '; ' if what else ''}{machine['device']}, {machine['cores']} cores, commit "
        f"{machine['commit']}, load average {machine['load_average']:.1f}"
    )


def draw(found: dict[str, dict[str, Any]], path: Path) -> bool:
    """Draws a bar for each contender's step, divided by ours, in its parts. False if there is nothing to draw."""
    comparisons = {name: result for name, result in found.items() if result["benchmark"] == "peers"}
    if not comparisons:
        return False
    figure, panels = plt.subplots(
        1, len(comparisons), figsize=(5 * len(comparisons), 3), layout="constrained", squeeze=False
    )
    for panel, (name, result) in zip(panels[0], comparisons.items(), strict=True):
        table = summary(result)
        unit = table["ours"]["seconds"] if "ours" in table else 1.0
        for contender, row in table.items():
            left = 0.0
            for index, part in enumerate(PARTS):
                width = _part(row["parts"], part) / unit
                panel.barh(contender, width, left=left, color=f"C{index}", label=part if contender == "ours" else None)
                left += width
        panel.set_title(f"{name}: a step, over ours", fontsize=10)
        panel.invert_yaxis()
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _part(parts: dict[str, float], name: str) -> float:
    """Seconds of one of PARTS. Ours splits the rollout in two; Tunix joins gradient and update."""
    names = {
        "rollout": ("rollout", "prefill", "decode"),
        "gradient": ("gradient", "gradient and update"),
        "other": ("other", "read and score"),
    }
    return sum(parts.get(key, 0.0) for key in names.get(name, (name,)))


# One table for each benchmark


def summary(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By contender: seconds of a step (median over rounds), their spread, its parts, warm-up and peak memory."""
    table: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["contender"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["contender"] == name and not run.get("error")]
        if not runs:
            continue
        steps = [step for run in runs for step in run["steps"] if step["warm"]]
        seconds = statistics.median(step["seconds"] for step in steps)
        first = statistics.median(run["steps"][0]["seconds"] for run in runs)
        parts = next((run["parts"] for run in runs if run["parts"]), None) or {
            part: statistics.median(step["parts"].get(part, 0.0) for step in steps) for part in steps[0]["parts"]
        }
        table[name] = {
            "seconds": seconds,
            "cpu_seconds": statistics.median(step["cpu_seconds"] for step in steps),
            "spread": max(step["seconds"] for step in steps) - min(step["seconds"] for step in steps),
            "parts": parts,
            "warm_up": first - seconds,
            "peak_rss": max(run["peak_rss"] for run in runs),
            "peak_device": max((run["peak_device"] for run in runs if run["peak_device"]), default=None),
        }
    return table


def _peers(found: dict[str, Any]) -> str:
    """The summary in Markdown, with the time of each peer divided by ours."""
    table = summary(found)
    columns = ["", "s a step", "over ours", "CPU time over ours", *PARTS[:4], "warm-up s", "peak GB"]
    rows = []
    for name, row in table.items():
        over = [row[key] / table["ours"][key] if "ours" in table else None for key in ("seconds", "cpu_seconds")]
        parts = [_part(row["parts"], part) or None for part in PARTS[:4]]
        rows.append(
            [name, row["seconds"], *over, *parts, row["warm_up"], _gigabytes(row["peak_device"] or row["peak_rss"])]
        )
    return f"{_markdown(columns, rows)}\n\n{_around(found)}"


def _around(found: dict[str, Any]) -> str:
    """The rates that the machine reached before and after the contenders' runs, and its load."""
    measured = [each for run in found["runs"] for each in run["ceilings"]]

    def span(key: str, unit: float) -> str:
        values = [each[key] / unit for each in measured]
        return f"{min(values):.3g} to {max(values):.3g}"

    return (
        f"Around these runs a large matrix product reached {span('flops', 1e9)} GFLOP/s, a large copy "
        f"{span('bytes', 1e9)} GB/s, and the load average was {span('load', 1)}."
    )


def _limits(found: dict[str, Any]) -> str:
    """The phases in Markdown."""
    whole = sum(row["seconds"] for name, row in found["phases"].items() if "," not in name)
    columns = ["phase", "share of the step", "of matrix product", "of copy", "of roofline", "temporary GB"]
    rows = [
        [
            name, row["seconds"] / whole if "," not in name else None, row["of_matrix_product"] or None,
            row["of_copy"] or None, row["roofline"] or None, _gigabytes(row["memory"]),
        ]
        for name, row in found["phases"].items()
    ]  # fmt: skip
    floor = found["launch_floor_share_of_decode"]
    return _markdown(columns, rows) + f"\n\nLaunching its kernels takes {floor:.1%} of the time of decoding."


def _guidance(found: dict[str, Any]) -> str:
    """The ratios in Markdown."""
    columns = ["policy", "capacity", "groups guided", "over the unguided step", "compilations"]
    rows = [
        [
            f"{each['model']}, {each['work']}", f"{step['capacity']:.0%}", f"{step['guided']:.0%}",
            step["over_unguided"], max(each["compilations"]),
        ]
        for each in found["policies"]
        for step in each["steps"]
    ]  # fmt: skip
    return _markdown(columns, rows)


def _growth(found: dict[str, Any]) -> str:
    """The exponents in Markdown."""
    rows = [[axis, *(slopes[name] for name in MEASURES)] for axis, slopes in found["fits"].items()]
    return _markdown(["grows with", *MEASURES.values()], rows)


def _startup(found: dict[str, Any]) -> str:
    """Three tables in Markdown."""
    steps = _markdown(
        ["compilation cache", "to the first step, s", "first RL step, s", "over a later one"],
        [
            [row["cache"], row["to_first_step"], row["first_rl_step"], row["first_rl_step"] / row["later_rl_step"]]
            for row in found["first_steps"]
        ],
    )
    loop = found["loop"]
    host = f"A step of the training loop takes {loop['loop_step']:.3g} s; the host adds {loop['host_share']:.1%} of it."
    rates = _markdown(
        ["tokenizer", "prompts", "pairs a minute", f"over {PAIRS_PER_MINUTE:,}"],
        [
            [row["tokenizer"], row["style"], row["pairs_per_minute"], row["pairs_per_minute"] / PAIRS_PER_MINUTE]
            for row in found["tokenising"]
        ],
    )
    return "\n\n".join((steps, host, rates))


def _instructions(found: dict[str, Any]) -> str:
    """The time of each layout, divided by that of instructions that run once."""
    columns = ["", "layout", "seconds", "over once", "processor time, over once"]
    return _markdown(columns, [
        [name, layout, figure["seconds"][layout], figure["seconds_over_once"][layout],
         figure["processor_seconds_over_once"][layout]]
        for name, figure in found["figures"].items() for layout in figure["seconds"]
    ])  # fmt: skip


def _judges(found: dict[str, Any]) -> str:
    """Rows a second of each judge, and its time divided by ours."""
    rows = judges_summary(found)
    columns = ["", "rows a second", "time over ours", "CPU time over ours", "answers the same as ours", "peak GB"]
    peak = {one["contender"]: one.get("peak_rss") for one in found["runs"]}
    cells = [
        [name, found["rows"] / row["seconds"],
         *(row[key] / rows["ours"][key] if "ours" in rows else None for key in ("seconds", "cpu_seconds")),
         row["same"], _gigabytes(peak[name])]
        for name, row in rows.items()
    ]  # fmt: skip
    return _markdown(columns, cells)


def judges_summary(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By contender: median seconds of a round, in clock and processor time, and the share of answers equal to ours."""
    runs = {one["contender"]: one for one in found["runs"] if "error" not in one}
    rows = {}
    for name, one in runs.items():
        same = [answer.strip() == ours.strip() for answer, ours in
                zip(one["answers"], runs.get("ours", {}).get("answers", []), strict=False)]  # fmt: skip
        rows[name] = {
            key: statistics.median(round_[key] for round_ in one["rounds"]) for key in ("seconds", "cpu_seconds")
        } | {"same": statistics.mean(same) if same else None}
    return rows


_TABLES = {
    "peers": _peers, "limits": _limits, "guidance": _guidance, "growth": _growth, "startup": _startup,
    "instructions": _instructions, "judges": _judges,
}  # fmt: skip


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; numbers with three digits, None as a dash."""
    return table(columns, [[_short(cell) for cell in row] for row in rows])


def _short(cell: Any) -> str:
    """A cell of a table."""
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return "-" if cell is None else str(cell)


def _gigabytes(size: float | None) -> float | None:
    """Bytes in GB."""
    return None if size is None else size / 1e9


def main(argv: Sequence[str]) -> None:
    found = read(Path(_RESULTS.value))
    print(markdown(found))
    if _PLOT.value:
        draw(found, Path(_PLOT.value))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
