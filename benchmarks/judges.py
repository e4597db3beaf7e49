"""Rows judged per second, against llama.cpp and Hugging Face's `generate`, with the same weights, prompts and answers.

    python -m benchmarks.judges [--rows=32] [--repeats=3] [--only=ours,llama,hf] [--model=smollm2] [--out=FILE.json]

Every contender is given the same tokens of each prompt, instructions included. Ours judges with `Judge`, which also
tokenises the prompts and gives the probabilities of the tiers. llama.cpp (through llama-cpp-python, from a GGUF file)
reuses the longest start that a prompt shares with the one before it, and decodes under the rule book's grammar. Hugging
Face has no grammar, and generates as many tokens as the longest answer has. All are greedy. They run in turn, each in a
process of its own, after one round to warm up. `--cache` and `--here` are those of `benchmarks.peers`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from agrl_jax.data import pipeline
from agrl_jax.data.bundled import catalog
from agrl_jax.data.pairs import Pair
from agrl_jax.judging import trained
from agrl_jax.policy.smollm2 import find_smollm2
from agrl_jax.rulebook import grammar
from agrl_jax.runtime import sharding
from agrl_jax.runtime.config import parse_flags
from agrl_jax.runtime.memory import with_huge_pages
from benchmarks import environments, results, table, workload
from benchmarks.contenders import protocol
from benchmarks.environments import Contender
from benchmarks.options import MODEL, OUT, REPEATS

CONTENDERS = {
    "ours": Contender("our_judge"),
    "llama": Contender("llama_judge", (("llama-cpp-python==0.3.16",),)),
    "hf": Contender("hf_judge", (("torch==2.13.0",), ("transformers==5.0.0",))),
}
_ROWS = flags.DEFINE_integer("rows", 32, "pairs that are judged in each round", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "pairs that ours and Hugging Face judge at once", lower_bound=1)
_ONLY = flags.DEFINE_list("only", list(CONTENDERS), "the contenders")


def task_of(folder: Path, gguf: str, rows: Sequence[Pair], batch: int, rounds: int) -> protocol.JudgeTask:
    """The task of every contender, for a model in a Hugging Face folder and, if there is one, in a GGUF file."""
    judge = trained.load(str(folder), mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    prompts = pipeline.prompts(rows, judge.book, judge.tokenizer, judge.prompt_len, judge.style)
    shared = judge.instructions.tolist()
    return protocol.JudgeTask(
        str(folder), gguf, [{"query": pair.query, "title": pair.title} for pair in rows],
        [shared + prompt.tokens for prompt in prompts], grammar.ebnf(judge.book),
        pipeline.part_texts(judge.book, judge.tokenizer).longest_response, batch, rounds,
    )  # fmt: skip


def rows_of(number: int) -> list[Pair]:
    """Pairs of the bundled benchmark, with query and title alone."""
    pairs = catalog.splits(0, dict.fromkeys(catalog.SIZES, max(number, 64)))["train"][:number]
    return [Pair(id=pair.id, query=pair.query, title=pair.title) for pair in pairs]


def run(name: str, python: str, task: protocol.JudgeTask) -> dict[str, Any]:
    """The answers of one contender, or its error."""
    said, failed = environments.answers_of(CONTENDERS[name], python, task)
    if failed:
        return failed
    end = next(one for one in said if one["kind"] == "end")
    return end | {"rounds": [one for one in said if one["kind"] == "round"]}


def main(argv: Sequence[str]) -> None:
    if wrong := set(_ONLY.value) - set(CONTENDERS):
        raise app.UsageError(f"--only={wrong.pop()}: not one of {', '.join(CONTENDERS)}")
    jax.config.update("jax_platforms", "cpu")  # in this process alone: the contenders use the device
    out = results.path_of(OUT.value, f"judges_{MODEL.value}")
    cache = environments.cache_beside(out)
    folder = environments.weights(MODEL.value, cache)
    gguf = str(find_smollm2()) if MODEL.value == "smollm2" and workload.is_pretrained("smollm2") else ""
    task = task_of(folder, gguf, rows_of(_ROWS.value), _BATCH.value, REPEATS.value)
    found: dict[str, Any] = {
        "benchmark": "judges", "model": MODEL.value, "rows": _ROWS.value, "batch": _BATCH.value,
        "prompt_tokens": statistics.mean(map(len, task.prompts)), "machine": environments.machine("float32"),
        "runs": [],
    }  # fmt: skip
    for name in _ONLY.value:
        python = environments.python_of(name, CONTENDERS[name], cache, found["machine"]["platform"])
        if python is not None:
            done = run(name, python, task)
            found["runs"].append({"contender": name, **done})
            results.write(out, found)
            print(f"{name}: {done['error']}\n{done['output']}" if "error" in done else f"{name}: done", flush=True)
    print(table.of(found))


if __name__ == "__main__":
    with_huge_pages()
    app.run(main, flags_parser=parse_flags)
