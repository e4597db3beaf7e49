"""Measures how a step's time and memory grow with group size, prompt, response, vocabulary and model.

    python -m benchmarks.growth [--base=quickstart] [--base_work=quickstart] [--factors=1,2,4,8] [--out=FILE.json]

One size at a time grows from the base. Each point is measured in a process of its own, so that its peak memory is its
own (RSS, or the device's on a GPU). The compiler gives the memory of the program's temporary arrays. A power of the
size is fitted to each curve: its exponent is the slope of the logarithms. Results are written as they come, with a plot
beside them; the same command continues one that was stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from absl import app, flags

from agrl_jax.policy.layers import PolicyConfig
from agrl_jax.runtime.config import parse_flags
from agrl_jax.runtime.memory import with_huge_pages
from benchmarks import machine, results, table, workload
from benchmarks.contenders.protocol import peak_rss
from benchmarks.machine import ROOT
from benchmarks.options import DTYPE, OUT, REPEATS
from benchmarks.workload import Work

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen before pyplot is first imported)

_BASE = flags.DEFINE_enum("base", "quickstart", list(workload.SHAPES), "the shape that grows")
_WORK = flags.DEFINE_enum("base_work", "quickstart", list(workload.WORKS), "the work that grows")
_FACTORS = flags.DEFINE_list("factors", ["1", "2", "4", "8"], "how much, times the base")
_POINT = flags.DEFINE_string("point", "", "JSON: the one point that this process measures; used by the command itself")

FIGURES = ("seconds", "temporary", "peak", "parameters")  # of a point
AXES = ("group_size", "prompt_len", "response_len", "vocab_size", "parameters")


def grown(shape: PolicyConfig, work: Work, axis: str, factor: int) -> tuple[PolicyConfig, Work]:
    """Shape and work with one size `factor` times as large. A model grows in width, so its parameters grow with the
    square of the factor."""
    if axis == "parameters":
        wider = {name: getattr(shape, name) * factor for name in ("width", "heads", "kv_heads", "mlp")}
        return dataclasses.replace(shape, **wider), work
    if axis == "vocab_size":
        return dataclasses.replace(shape, vocab_size=shape.vocab_size * factor), work
    return shape, dataclasses.replace(work, **{axis: getattr(work, axis) * factor})


def measure(shape: PolicyConfig, work: Work, repeats: int) -> dict[str, Any]:
    """One point: seconds of a step, temporary memory by the compiler, peak memory of this process or device."""
    load = workload.build(workload.draw(shape), work, workload.step_config(work))
    program = jax.jit(load.step).lower(load.state, load.batch, load.reference).compile()
    memory = program.memory_analysis()
    seconds = machine.median_time(lambda: program(load.state, load.batch, load.reference), repeats)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": seconds,
        "temporary": None if memory is None else memory.temp_size_in_bytes,
        "peak": stats.get("peak_bytes_in_use", peak_rss()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(load.state.params)),
    }


def _in_a_process(point: dict[str, Any]) -> dict[str, Any]:
    """`measure` of a point, in a process of its own, since the peak of memory is a process's."""
    command = [
        sys.executable, "-m", "benchmarks.growth", f"--point={json.dumps(point)}",
        f"--repeats={REPEATS.value}", f"--dtype={DTYPE.value}",
    ]  # fmt: skip
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def fit(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The exponent of the power of the size that fits the values best, in logarithms."""
    if len(sizes) < 2 or any(not value for value in values):
        return None
    return float(np.polyfit(np.log(sizes), np.log(np.array(values, float)), 1)[0])


def _measure_all(found: dict[str, Any], factors: Sequence[int], path: Path) -> None:
    """Adds the points that `found` does not have yet, and writes them."""
    shape, work, points = workload.SHAPES[found["model"]], workload.WORKS[found["work"]], found["points"]
    done = {(point["axis"], point["factor"]) for point in points}
    for axis, factor in itertools.product(AXES, factors):
        if (axis, factor) in done:
            continue
        bigger, more = grown(shape, work, axis, factor)
        point = {"shape": dataclasses.asdict(bigger), "work": dataclasses.asdict(more)}
        base = next((one for one in points if one["factor"] == factor == 1), None)  # the same on every axis
        figures = _in_a_process(point) if base is None else {name: base[name] for name in FIGURES}
        size = figures["parameters"] if axis == "parameters" else (point["work"] | point["shape"])[axis]
        points.append({"axis": axis, "factor": factor, "size": size, **figures})
        results.write(path, found)
        print(f"{axis} {size}: {figures['seconds']:.3g} s", flush=True)


def _broken_off(found: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The points in the file, if they are of the same work, device and commit and were never fitted."""

    def identity(found: dict[str, Any]) -> list[Any]:
        return [found.get("model"), found.get("work"), *(found["machine"][key] for key in ("device", "commit"))]

    earlier = json.loads(path.read_text()) if path.exists() else None
    same = earlier is not None and "fits" not in earlier and identity(earlier) == identity(found)
    return earlier["points"] if same else []


def _fits(points: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    fits: dict[str, dict[str, float | None]] = {}
    for axis in AXES:
        rows = [point for point in points if point["axis"] == axis]
        sizes = [row["size"] for row in rows]
        fits[axis] = {name: fit(sizes, [row[name] for row in rows]) for name in table.MEASURES}
    return fits


def draw(found: dict[str, Any], path: Path) -> None:
    """Plots the points, each divided by the base's, with the slopes in the legend."""
    figure, panels = plt.subplots(1, len(table.MEASURES), figsize=(11, 3.6), layout="constrained")
    for panel, (name, title) in zip(panels, table.MEASURES.items(), strict=True):
        for axis in AXES:
            rows = [point for point in found["points"] if point["axis"] == axis and point[name]]
            if rows:
                slope = found["fits"][axis][name]
                label = axis if slope is None else f"{axis}: {slope:.2f}"
                panel.loglog(
                    [row["size"] / rows[0]["size"] for row in rows], [row[name] / rows[0][name] for row in rows],
                    marker="o", markersize=4, label=label,
                )  # fmt: skip
        panel.set_title(f"{title}, over the base", fontsize=10)
        panel.set_xlabel("times the base")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str]) -> None:
    if _POINT.value:
        point = json.loads(_POINT.value)
        shape = dataclasses.replace(PolicyConfig(**point["shape"]), compute_dtype=machine.dtype_of(DTYPE.value))
        print(json.dumps(measure(shape, Work(**point["work"]), REPEATS.value)))
        return
    path = results.path_of(OUT.value, f"growth_{_BASE.value}")
    found: dict[str, Any] = {
        "benchmark": "growth", "model": _BASE.value, "work": _WORK.value, "machine": machine.describe(), "points": [],
    }  # fmt: skip
    found["points"] = _broken_off(found, path)
    _measure_all(found, [int(factor) for factor in _FACTORS.value], path)
    found["fits"] = _fits(found["points"])
    results.write(path, found)
    draw(found, path.with_suffix(".png"))
    print(table.of(found))


if __name__ == "__main__":
    with_huge_pages()
    app.run(main, flags_parser=parse_flags)
