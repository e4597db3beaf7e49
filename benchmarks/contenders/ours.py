"""agrl_jax's own step.

Settings: `micro_batches`, `logprob_chunk` and `remat` as in the configs. With `parts`, the parts of the step are timed
too, after the steps, each compiled by itself.
"""

from __future__ import annotations

import dataclasses

import jax

from benchmarks import phases, workload
from benchmarks.contenders.protocol import Report, Task, main
from benchmarks.machine import describe, median_time


def run(task: Task, report: Report) -> None:
    settings = dict(task.settings)
    parts, remat = settings.pop("parts", False), settings.pop("remat", False)
    shape, params, tokenizer = workload.load("", task.dtype, task.folder)
    work = workload.Work(len(task.texts), task.prompt_len, task.group_size, task.response_len, task.shared_len)
    load = workload.build(
        (dataclasses.replace(shape, remat=remat), params, tokenizer), work, workload.step_config(work, **settings),
        [tokenizer.encode(text) for text in task.texts],
    )  # fmt: skip
    del params
    step, state = jax.jit(load.step, donate_argnums=0), load.state
    report.begin()
    for _ in range(task.warmup + task.steps):
        state, metrics, _ = jax.block_until_ready(step(state, load.batch, load.reference))
        prompts = int(metrics["tokens/prompt"]) + work.shared_len * work.prompts
        report.step(prompts, int(metrics["tokens/rolled"]))
    stats = jax.devices()[0].memory_stats() or {}
    report.end(
        versions=describe()["versions"],
        peak_device=stats.get("peak_bytes_in_use"),
        compiles=step._cache_size(),
    )
    if parts:
        report.parts(_parts(dataclasses.replace(load, state=state), task.steps))


def _parts(load: workload.Workload, repeats: int) -> dict[str, float]:
    """Seconds of each part of the step, in a program of its own."""
    return {name: phase.times * median_time(phase.run, repeats) for name, phase in phases.of(load)}


if __name__ == "__main__":
    main(run)
