"""Results files: what was measured, raw, with the machine that it was measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agrl_jax.runtime.files import write_text
from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def path_of(out: str, name: str) -> Path:
    """Where results go: the file that was asked for, or `name` among the results."""
    path = Path(out) if out else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a results file in one piece, so that an interrupted benchmark keeps its earlier results."""
    write_text(path, json.dumps(content, indent=1) + "\n")
