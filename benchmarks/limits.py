"""Measures how near each phase of a step comes to what the device can do.

    python -m benchmarks.limits [--work=A|B|...] [--model=smollm2|llama_1b|...] [--batches=64,256] [--out=FILE.json]

For each phase it gives operations and bytes per second, as shares of what a large matrix product and a large copy reach
on the same device in the same run; `roofline` is the least time that both rates allow, divided by the time taken. The
launch floor of decoding is the time of a policy with as many layers, but as narrow as possible: its arithmetic is
negligible, so its time is that of starting kernels. `--batches` decodes other numbers of answers too. The arithmetic
and traffic are the lower bounds of `benchmarks.phases`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from agrl_jax.policy.layers import PolicyConfig
from agrl_jax.runtime.config import parse_flags
from agrl_jax.runtime.memory import with_huge_pages
from benchmarks import machine, phases, results, table, workload
from benchmarks.options import CHUNK, DTYPE, MODEL, OUT, REPEATS, WORK
from benchmarks.workload import Work, Workload

_MICRO = flags.DEFINE_integer("micro_batches", 1, "pieces of the batch in reference and gradient", lower_bound=1)
_REMAT = flags.DEFINE_bool("remat", False, "recompute layers in the backward pass")
_BATCHES = flags.DEFINE_list("batches", [], "numbers of answers to decode at once, besides those of the work")


def measure(load: Workload, limits: dict[str, float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds of each phase of a step and its shares of the ceilings."""
    for name, phase in phases.of(load):
        seconds = machine.median_time(phase.run, REPEATS.value)
        shares = phases.shares(seconds, phase, limits)
        yield name, {"seconds": seconds * phase.times, **shares, "memory": phase.run.memory}


def decode(shape: PolicyConfig, work: Work, limits: dict[str, float]) -> dict[str, Any]:
    """The figures of `measure` for decoding alone."""
    return next(figures for name, figures in measure(_load(shape, work), limits) if name == "decode")


def launch_floor(shape: PolicyConfig, work: Work, limits: dict[str, float]) -> float:
    """Seconds of decoding with a policy as deep as this one and as narrow as possible."""
    narrow = dataclasses.replace(shape, vocab_size=600, width=8, heads=1, kv_heads=1, head_dim=8, mlp=8)
    return decode(narrow, dataclasses.replace(work, prompts=1, prompt_len=8, group_size=2), limits)["seconds"]


def _load(shape: PolicyConfig, work: Work) -> Workload:
    config = workload.step_config(work, micro_batches=_MICRO.value, logprob_chunk=CHUNK.value)
    return workload.build(workload.draw(shape), work, config)


def main(argv: Sequence[str]) -> None:
    dtype, work = machine.dtype_of(DTYPE.value), workload.WORKS[WORK.value]
    shape = dataclasses.replace(workload.SHAPES[MODEL.value], compute_dtype=dtype, remat=_REMAT.value)
    limits = machine.ceilings(dtype)
    rows = dict(measure(_load(shape, work), limits))
    for number in map(int, _BATCHES.value):
        groups = dataclasses.replace(work, prompts=number // work.group_size)
        rows[f"decode, {number} answers"] = decode(shape, groups, limits)
    floor = launch_floor(shape, work, limits)
    found: dict[str, Any] = {
        "benchmark": "limits", "work": WORK.value, **dataclasses.asdict(work), "model": MODEL.value, "dtype": dtype,
        "machine": machine.describe(), "ceilings": [limits, machine.ceilings(dtype)],
        "launch_floor_share_of_decode": floor / rows["decode"]["seconds"], "phases": rows,
    }  # fmt: skip
    results.write(results.path_of(OUT.value, f"limits_{MODEL.value}_{WORK.value}"), found)
    print(table.of(found))


if __name__ == "__main__":
    with_huge_pages()
    app.run(main, flags_parser=parse_flags)
