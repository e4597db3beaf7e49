"""The machine of a benchmark: its description, and the rates that a large matrix product and a large copy reach now.

    python -m benchmarks.machine [--dtype=auto|float32|bfloat16]

The other benchmarks compare their figures with these two rates, or with another figure of the same run.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app

from agrl_jax.runtime.config import parse_flags
from agrl_jax.runtime.memory import with_huge_pages
from benchmarks.options import DTYPE

ROOT = Path(__file__).parent.parent


def describe() -> dict[str, Any]:
    """Device, software, commit and load, for the head of a results file."""
    device = jax.devices()[0]
    return {
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": load_average(),
    }


def dtype_of(name: str) -> str:
    """The dtype of the arithmetic; `auto` is float32 on a CPU, which is slow in bfloat16, and bfloat16 elsewhere."""
    return name if name != "auto" else "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def ceilings(dtype: str = "float32") -> dict[str, float]:
    """`flops` per second of a large matrix product, `bytes` per second (read and written) of a large copy; `load`.

    Both are the best of a second's repeats: what the device can do when nothing else uses it.
    """
    cpu = jax.devices()[0].platform == "cpu"
    size, length = (2048, 1 << 26) if cpu else (8192, 1 << 28)
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)  # a GPU multiplies equal numbers faster
    vector = jnp.zeros((length,), jnp.float32)
    product = best_time(lambda: matrix @ matrix)
    copy = best_time(lambda: _plus_one(vector))
    return {"flops": 2 * size**3 / product, "bytes": 2 * vector.nbytes / copy, "load": load_average()}


_plus_one = jax.jit(lambda x: x + 1)


def best_time(call: Callable[[], Any], seconds: float = 1.0) -> float:
    """The shortest time that `call` took, repeated for some `seconds` and three times at least, after a warm-up."""
    return min(_times(call, seconds, 3))


def median_time(call: Callable[[], Any], repeats: int) -> float:
    """The median time of `repeats` calls, after a warm-up."""
    return statistics.median(_times(call, 0.0, repeats))


def _times(call: Callable[[], Any], seconds: float, repeats: int) -> list[float]:
    jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < repeats or sum(times) < seconds:
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return times


def load_average() -> float:
    """Processes that ran or waited to run, over the last minute."""
    return os.getloadavg()[0]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the code, with a mark if the code has changed since; empty if there is no repository."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main(argv: Sequence[str]) -> None:
    dtype = dtype_of(DTYPE.value)
    print(json.dumps(describe() | {"dtype": dtype, "ceilings": ceilings(dtype)}))


if __name__ == "__main__":
    with_huge_pages()
    app.run(main, flags_parser=parse_flags)
