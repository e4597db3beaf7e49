"""Measures the time to the first step (with a cold and a warm compilation cache), the host's share, and tokenising.

    python -m benchmarks.startup [--config=configs/quickstart.py] [--loop_steps=40] [--out=FILE.json]

The training command is started twice, with one compilation cache that is empty at first. It is timed to the first row
of its log. Then the training loop runs in this process, and each of its steps is compared with the compiled step in it:
the difference is time in which the host works and the device waits. Last, pairs are tokenised and batched; the target
is 100,000 a minute on two cores.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from agrl_jax.data import pipeline
from agrl_jax.data.bundled import benchmark, catalog
from agrl_jax.data.pairs import Pair
from agrl_jax.policy import loading
from agrl_jax.policy.smollm2 import NotInstalledError, find_smollm2
from agrl_jax.policy.tokenizer import Tokenizer, train_bpe
from agrl_jax.rulebook import book, wording
from agrl_jax.runtime.config import parse_flags
from agrl_jax.runtime.logs import MetricsWriter, read_jsonl
from agrl_jax.runtime.memory import with_huge_pages
from agrl_jax.training import run
from agrl_jax.training.programs import Program
from benchmarks import machine, results, table
from benchmarks.machine import ROOT
from benchmarks.options import OUT

_CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "the run that is started")
_STEPS = flags.DEFINE_integer("loop_steps", 40, "RL steps of the loop that is timed", lower_bound=2)
_PAIRS = flags.DEFINE_integer("pairs", 20_000, "pairs that are tokenised", lower_bound=32)

SHORT = {  # a run with the same compiled steps, and as little else as possible
    "sft.steps": 2, "sft.warmup": 1, "eval.every": 0, "eval.pairs": 8, "eval.validation_pairs": 8, "eval.pass_pairs": 1,
    "eval.bootstrap": 2, "checkpoint.every": 1_000_000, "log.samples_every": 0, "log.every": 1,
}  # fmt: skip


def first_steps(config: str, overrides: Sequence[str], folder: str) -> list[dict[str, Any]]:
    """Seconds to the first step of the warm start, and of the first step of RL, with a cold cache and then a warm one.

    The benchmark's pairs are in `folder` already; building them is not timed.
    """
    found = []
    for name in ("cold", "warm"):
        workdir = Path(folder, name)
        command = [
            sys.executable, "-m", "agrl_jax.main", f"--config={config}", f"--workdir={workdir}",
            f"--config.data.dir={folder}/data",
            *(f"--config.{key}={value}" for key, value in (SHORT | {"rl.steps": 5}).items()), *overrides,
        ]  # fmt: skip
        cached = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
        found.append({"cache": name} | _timed_run(command, os.environ | cached, workdir / "metrics.jsonl"))
    return found


def _timed_run(command: Sequence[str], environment: dict[str, str], log: Path) -> dict[str, float]:
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while not (log.exists() and log.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
        time.sleep(0.01)
    first = time.monotonic() - began
    if process.wait():
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
    rows = [row["time/step_s"] for row in read_jsonl(log) if row["stage"] == "rl"]
    return {"to_first_step": first, "first_rl_step": rows[0], "later_rl_step": statistics.median(rows[1:])}


def host_share(config: ConfigDict, steps: int, folder: str) -> dict[str, float]:
    """Seconds of a step of the training loop and of the compiled step in it; and the difference as a share of the step:
    time in which the host works and the device is idle."""
    written: list[float] = []
    compiled: list[Future[float]] = []
    run_stage, write = run._run_stage, MetricsWriter.write

    def noting(writer: MetricsWriter, stage: str, *args: Any) -> None:
        write(writer, stage, *args)
        if stage == "rl":
            written.append(time.perf_counter())

    def timing(run: Any, stage: str, program: Program, *args: Any) -> Any:
        def timed(*given: Any) -> Any:
            began = time.perf_counter()
            state, metrics, *rest = program.step(*given)
            if stage == "rl":
                compiled.append(watcher.submit(lambda: _now(metrics) - began))
            return state, metrics, *rest

        timed._cache_size = program.step._cache_size
        return run_stage(run, stage, program._replace(step=timed), *args)

    with (
        ThreadPoolExecutor(1) as watcher,
        mock.patch.object(MetricsWriter, "write", noting),
        mock.patch.object(run, "_run_stage", timing),
    ):
        with config.unlocked():
            config.update_from_flattened_dict(SHORT | {"rl.steps": steps, "data.dir": f"{folder}/data"})
        run.train(config, f"{folder}/loop", say=lambda *_: None)
    loop = [after - before for before, after in itertools.pairwise(written)]
    device = [future.result() for future in compiled[1:]]
    shares = [1 - busy / whole for busy, whole in zip(device, loop, strict=True)]
    return {
        "loop_step": statistics.median(loop),
        "compiled_step": statistics.median(device),
        "host_share": max(0.0, statistics.median(shares)),
    }


def _now(arrays: Any) -> float:
    """Waits until the arrays are computed, and returns the time."""
    jax.block_until_ready(arrays)
    return time.perf_counter()


def tokenising(number: int) -> list[dict[str, Any]]:
    """Pairs a minute through `pipeline.encode` and `pipeline.batches`, by tokenizer and style of prompt."""
    pairs = catalog.splits(0, dict.fromkeys(catalog.SIZES, number))["train"][:number]
    rules = book.load()
    texts = (wording.prompt(rules, pair.query, pair.title, "terse") for pair in pairs[:2000])
    cases: list[tuple[str, str, Tokenizer, int]] = [("own BPE", "terse", train_bpe(texts, 2000), 128)]
    try:
        cases.append(("SmolLM2's", "chat", loading.read_tokenizer(find_smollm2()), 768))
    except NotInstalledError:
        print("SmolLM2 is not installed: its tokenizer is left out")
    return [
        {"tokenizer": name, "style": style, "pairs_per_minute": _pairs_per_minute(pairs, tokenizer, length, style)}
        for name, style, tokenizer, length in cases
    ]


def _pairs_per_minute(pairs: list[Pair], tokenizer: Tokenizer, length: int, style: str) -> float:
    began = time.perf_counter()
    split = pipeline.encode(pairs, book.load(), tokenizer, length, 128, style)
    for _ in zip(range(len(pairs) // 32), pipeline.batches(split, 32, seed=0), strict=False):
        pass
    return 60 * len(pairs) / (time.perf_counter() - began)


def main(argv: Sequence[str]) -> None:
    path = results.path_of(OUT.value, "startup")
    found: dict[str, Any] = {"benchmark": "startup", "machine": machine.describe()}
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    overrides = [word for word in sys.argv[1:] if word.startswith("--config.")]
    with tempfile.TemporaryDirectory() as folder:
        benchmark.load_benchmark(f"{folder}/data", _CONFIG.value.data.seed)
        found["first_steps"] = first_steps(name, overrides, folder)
        found["loop"] = host_share(_CONFIG.value, _STEPS.value, folder)
    found["tokenising"] = tokenising(_PAIRS.value)
    results.write(path, found)
    print(table.of(found))


if __name__ == "__main__":
    with_huge_pages()
    app.run(main, flags_parser=parse_flags)
