"""The cost of guided replay: steps with 0%, 25% and 50% of the groups guided, divided by a step without guidance.

    python -m benchmarks.guidance [--models=quickstart,smollm2] [--works=quickstart,A] [--repeats=3] [--out=FILE.json]

Half of a guided group's answers are sampled again after the first part of the gold response; no answer ends early. All
groups fail here, and the data decide which of them can be guided. So one program, compiled once, makes steps with any
number of guided groups up to its capacity; with none, the replay is skipped. A program always replays as many groups as
its capacity, used or not. So 25% is measured with a capacity of 25% and, as the worst case, with one of 50%.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from agrl_jax.rl.guidance import GuidanceConfig, initial_state
from agrl_jax.rl.step import StepConfig
from agrl_jax.runtime.config import parse_flags
from agrl_jax.runtime.memory import with_huge_pages
from agrl_jax.types import Batch, TrainState
from benchmarks import machine, results, table, workload
from benchmarks.options import CHUNK, DTYPE, OUT, REPEATS
from benchmarks.workload import Workload

_MODELS = flags.DEFINE_list("models", ["quickstart", "smollm2"], "shapes of policies, whose weights are random")
_WORKS = flags.DEFINE_list("works", ["quickstart", "A"], "the work of each")

CAPACITIES = (0.0, 0.25, 0.5)  # 0: the step without guidance


def measure(model: str, work_name: str, repeats: int, dtype: str) -> dict[str, Any]:
    """All seconds of steps by capacity and share of guided groups, and how often each program was compiled."""
    work = workload.WORKS[work_name]
    policy = workload.draw(dataclasses.replace(workload.SHAPES[model], compute_dtype=dtype))
    loads = {capacity: workload.build(policy, work, _config(work, capacity)) for capacity in CAPACITIES}
    programs = {capacity: jax.jit(load.step) for capacity, load in loads.items()}
    kinds = [(capacity, share) for capacity in CAPACITIES for share in CAPACITIES if share <= capacity]
    seconds: dict[tuple[float, float], list[float]] = {kind: [] for kind in kinds}
    first = loads[0.0]
    for round_ in range(repeats + 1):
        for capacity, share in kinds:
            batch = _guidable(first, share)
            state = _remembering(first.state, loads[capacity])
            began = time.perf_counter()
            _, metrics, _ = jax.block_until_ready(programs[capacity](state, batch, first.reference))
            if round_:  # the first one compiles
                seconds[capacity, share].append(time.perf_counter() - began)
            if share != metrics.get("guide/share", 0.0):
                raise RuntimeError(f"{metrics['guide/share']} of the groups were guided where {share} should have been")
    plain = statistics.median(seconds[0.0, 0.0])
    return {
        "model": model,
        "work": work_name,
        **dataclasses.asdict(work),
        "compilations": [program._cache_size() for program in programs.values()],
        "steps": [
            {
                "capacity": capacity, "guided": share, "over_unguided": statistics.median(times) / plain,
                "seconds": times,
            }
            for (capacity, share), times in seconds.items()
        ],
    }  # fmt: skip


def _config(work: workload.Work, capacity: float) -> StepConfig:
    guided = GuidanceConfig(
        threshold=0.0, capacity=capacity, replace=work.group_size // 2, source="gold", level="fixed",
        initial_level=1.0, eta=0.0, per_family=False, cap="none",
    )  # fmt: skip
    return workload.step_config(work, guided=guided if capacity else None, logprob_chunk=CHUNK.value)


def _guidable(load: Workload, share: float) -> Batch:
    """The batch, with a known truth for a `share` of its groups. The others fail too, but have nothing to reveal."""
    known = jnp.arange(load.work.prompts) < round(share * load.work.prompts)
    return load.batch.replace(known_parts=jnp.where(known, load.batch.known_parts, 0))


def _remembering(state: TrainState, load: Workload) -> TrainState:
    """A state with the memory of guidance that a step needs; its arrays are shared."""
    settings = load.config.guidance
    return state.replace(guidance=None if settings is None else initial_state(load.work.prompts, 1, settings))


def main(argv: Sequence[str]) -> None:
    dtype = machine.dtype_of(DTYPE.value)
    found = {"benchmark": "guidance", "dtype": dtype, "machine": machine.describe(), "policies": []}
    pairs = zip(_MODELS.value, _WORKS.value, strict=True)
    for model, work in pairs:
        found["policies"].append(measure(model, work, REPEATS.value, dtype))
        results.write(results.path_of(OUT.value, "guidance"), found)
    print(table.of(found))


if __name__ == "__main__":
    with_huge_pages()
    app.run(main, flags_parser=parse_flags)
