"""Measures what running the instructions once saves, in a supervised step and in judging.

    python -m benchmarks.instructions [--model=smollm2] [--rows=16] [--repeats=3] [--layouts=once,terse]

`once` is what training and judging do. `in every prompt` puts the same tokens at the head of each prompt, which gives
the same numbers (tests/test_instructions.py). `terse` has no instructions. All figures are medians over the repeats of
one run, taken in turns. Processor time is measured as well as clock time, since a busy machine adds only to clock time.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from agrl_jax.data import chat, pipeline
from agrl_jax.data.bundled import catalog
from agrl_jax.evaluation.probabilities import likeliest_parts, statements
from agrl_jax.policy import transformer
from agrl_jax.policy.scoring import instructed, prefill
from agrl_jax.rulebook import book
from agrl_jax.runtime import optim
from agrl_jax.runtime.config import parse_flags
from agrl_jax.runtime.memory import with_huge_pages
from agrl_jax.supervised import sft
from agrl_jax.supervised.step import make_step
from agrl_jax.types import Batch, Params, TrainState
from benchmarks import machine, results, table, workload
from benchmarks.options import DTYPE, MODEL, OUT, REPEATS

LAYOUTS = ("once", "in every prompt", "terse")

_ROWS = flags.DEFINE_integer("rows", 16, "pairs of a supervised step, and of a batch that is judged", lower_bound=1)
_LAYOUTS = flags.DEFINE_list("layouts", list(LAYOUTS), "which of them to measure, `once` among them")
_PROMPT, _RESPONSE = 64, 40  # tokens: of a prompt after the instructions, and of a response

Model = tuple[transformer.PolicyConfig, Params, Any]
Layout = tuple[Batch, np.ndarray]  # a batch, and the instructions that are run once for it


def layouts(model: Model, rows: int) -> dict[str, Layout]:
    """The same pairs in each layout."""
    tokenizer, rules = model[2], book.load()
    style = "full" if tokenizer.chat_template is None else "chat"
    if style == "chat":
        tokenizer = tokenizer.ending_with(chat.end_of_turn(tokenizer))
    pairs = catalog.splits(0, dict.fromkeys(catalog.SIZES, max(rows, 64)))["train"][:rows]

    def encoded(style: str) -> Layout:
        shared = pipeline.instructions(rules, tokenizer, style)
        return pipeline.encode(pairs, rules, tokenizer, _PROMPT, _RESPONSE, style).batch, shared

    batch, shared = encoded(style)
    front = np.broadcast_to(shared, (rows, len(shared)))
    whole = batch.replace(prompt=np.hstack([front, batch.prompt]), prompt_len=batch.prompt_len + len(shared))
    return dict(zip(LAYOUTS, ((batch, shared), (whole, shared[:0]), encoded("terse")), strict=True))


def supervised(model: Model, batch: Batch, shared: np.ndarray) -> Callable[[], Any]:
    """A step of AdamW on the gold responses, compiled and run once."""
    shape, params, _ = model
    policy, _, axes = transformer.build(dataclasses.replace(shape, remat=True))
    tx = optim.make(1e-5, warmup=0, steps=100, schedule="constant", decay=optim.decay_mask(axes))
    step = jax.jit(make_step(sft.gold_loss, policy, partial(optim.guarded_update, tx), shared), donate_argnums=0)
    key = jax.random.key_data(jax.random.key(0))
    held = [jax.tree.map(jnp.copy, TrainState(params, tx.init(params), jnp.int32(0), key, None, jnp.int32(0)))]

    def once() -> None:
        held[0], _ = jax.block_until_ready(step(held[0], batch))

    once()
    return once


def judging(model: Model, batch: Batch, shared: np.ndarray) -> Callable[[], Any]:
    """Judging, compiled and run once: the likeliest value of each part, and the probabilities of all values. The
    instructions have been run before."""
    shape, params, tokenizer = model
    policy, instruct = instructed(transformer.build(shape)[0], shared)
    texts = statements(book.load(), tokenizer, shape.vocab_size)
    params = jax.jit(instruct)(params)

    @jax.jit
    def judge(params: Params, prompt: jax.Array, prompt_len: jax.Array) -> Any:
        return likeliest_parts(policy, params, prefill(policy, params, prompt, prompt_len), texts)

    def once() -> None:
        jax.block_until_ready(judge(params, batch.prompt, batch.prompt_len))

    once()
    return once


def measure(make: Callable[..., Callable[[], Any]], model: Model, kinds: dict[str, Layout], repeats: int) -> Any:
    """Median seconds of each layout, divided by those of `once` too, in clock and processor time; and all seconds."""
    runs = {name: make(model, *layout) for name, layout in kinds.items()}
    taken: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, run in runs.items():
            began = np.array([time.perf_counter(), time.process_time()])
            run()
            taken[name].append(np.array([time.perf_counter(), time.process_time()]) - began)
    figures = {}
    for clock, column in (("seconds", 0), ("processor_seconds", 1)):
        medians = {name: statistics.median(times[column] for times in taken[name]) for name in kinds}
        figures[clock] = medians
        figures[f"{clock}_over_once"] = {name: medians[name] / medians["once"] for name in kinds}
    return figures | {"all": {name: [list(times) for times in each] for name, each in taken.items()}}


def main(argv: Sequence[str]) -> None:
    dtype = machine.dtype_of(DTYPE.value)
    model = workload.load(MODEL.value, dtype)
    kinds = layouts(model, _ROWS.value)
    kinds = {name: kinds[name] for name in _LAYOUTS.value}
    figures = {
        "supervised step": measure(supervised, model, kinds, REPEATS.value),
        "judging": measure(judging, model, kinds, REPEATS.value),
    }
    found = {
        "benchmark": "instructions", "model": MODEL.value, "dtype": dtype, "rows": _ROWS.value,
        "instructions": len(kinds["once"][1]), "prompt_len": _PROMPT, "response_len": _RESPONSE,
        "machine": machine.describe(), "figures": figures,
    }  # fmt: skip
    results.write(results.path_of(OUT.value, f"instructions_{MODEL.value}"), found)
    print(table.of(found))


if __name__ == "__main__":
    with_huge_pages()
    app.run(main, flags_parser=parse_flags)
