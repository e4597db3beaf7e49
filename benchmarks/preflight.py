"""Makes the table of docs/tpu.md: what a step takes on TPUs, by compiled programs. It needs no TPU.

    python -m benchmarks.preflight [--only=qwen3_8b@v6e:8x8]

It compiles the rows that are named (`--only=all` names all of them, an hour on two cores), keeps their figures in
docs/preflight.json, and prints the table of all rows there. It needs `pip install -e '.[preflight]'`.
"""

from __future__ import annotations

import importlib
import json
from typing import Any, NamedTuple

from absl import app, flags

from agrl_jax import preflight
from agrl_jax.bounds import compile
from agrl_jax.runtime.config import parse_flags
from agrl_jax.runtime.files import write_text
from agrl_jax.runtime.markdown import table
from benchmarks.machine import ROOT

_ONLY = flags.DEFINE_list("only", [], "rows to compile, CONFIG@TOPOLOGY; or all")
_FILE = ROOT / "docs" / "preflight.json"
_SHAPES = ROOT / "configs" / "shapes"


class Row(NamedTuple):
    """A config, the chips that it is compiled for, and the fields to set for them."""

    config: str
    topology: str
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the row in `--only`."""
        return f"{self.config}@{self.topology}"


ROWS = (
    Row("quickstart", "v5e:4x4", {}),
    Row("smollm2_135m", "v5e:4x4", {"policy.compute_dtype": "bfloat16", "rl.micro_batches": 1}),
    Row("qwen3_0p6b", "v5e:4x4", {"mesh.data": 1, "mesh.fsdp": -1, "rl.micro_batches": 1}),
    Row("qwen3_8b", "v5p:4x4x4", {"mesh.tensor": 4, "rl.batch_size": 64, "rl.micro_batches": 1}),
    Row("qwen3_8b", "v6e:8x8", {"mesh.tensor": 4, "rl.batch_size": 64, "rl.micro_batches": 1}),
    Row("qwen3_30b_a3b", "v5p:4x4x8", {"rl.batch_size": 128, "rl.micro_batches": 1}),
)


def compile_row(row: Row) -> dict[str, Any]:
    """The figures of a row, with guided replay in every step."""
    config = importlib.import_module(f"configs.{row.config}").get_config()
    config.update_from_flattened_dict(row.fields)
    shape = _SHAPES / f"{row.config}.json"
    return preflight.run(config, row.topology, str(shape) if shape.exists() else "", guided_share=1.0, workdir="")


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The table of the rows in `found`."""
    columns = [
        "config", "chips", "set", "fits", "GiB a chip", "a step takes at least", "tokens/s at most", "bound by"
    ]  # fmt: skip
    return table(columns, [_cells(row, found[row.name]) for row in ROWS if row.name in found])


def _cells(row: Row, figures: dict[str, Any]) -> list[str]:
    memory, chip = figures["memory"], figures["chip"]
    cells = [
        row.config,
        f"{figures['devices']} x {chip['name']}",
        ", ".join(f"`{name}={value}`" for name, value in row.fields.items()),
        "yes" if figures["fits"] else "no",
        f"{memory['total'] / compile.GIB:.2g} of {chip['memory'] / compile.GIB:.0f}",
    ]
    if figures["phases"]:
        whole = figures["seconds"]
        slowest = sorted(figures["phases"].items(), key=lambda item: -item[1]["seconds"])[:3]
        bounds = (f"{name} {phase['seconds'] / whole:.0%} ({phase['bound_by']})" for name, phase in slowest)
        rate = float(f"{figures['tokens_per_s']:.2g}")  # two digits
        cells += [f"{whole:.2g} s", f"{rate:,.0f}", ", ".join(bounds)]
    else:
        cells += ["-", "-", "-"]
    return cells


def main(_: list[str]) -> None:
    compile.only_compile()
    for row in ROWS:
        if row.name in _ONLY.value or "all" in _ONLY.value:
            figures = compile_row(row)
            write_text(_FILE, json.dumps(_kept() | {row.name: figures}, indent=1, sort_keys=True) + "\n")
    print(markdown(_kept()))


def _kept() -> dict[str, dict[str, Any]]:
    return json.loads(_FILE.read_text()) if _FILE.exists() else {}


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
