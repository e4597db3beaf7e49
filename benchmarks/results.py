"""Results files: what was measured, raw, with the machine that it was measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def path_of(out: str, name: str) -> Path:
    """Where results go: the file that was asked for, or `name` among the results."""
    path = Path(out) if out else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a results file at one stroke, so that one that is broken off keeps what it had."""
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(path)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; numbers with three digits, None as a dash."""
    lines = [columns, ["---"] * len(columns), *([short(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short(cell: Any) -> str:
    """A cell of a table."""
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return "-" if cell is None else str(cell)


def gigabytes(size: float | None) -> float | None:
    """Bytes in GB."""
    return None if size is None else size / 1e9
