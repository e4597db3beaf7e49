"""What a language model gains by reasons in words, by sampling under the grammar, and by distillation.

    python -m experiments.reasoning [--seeds=0,1] [--workers=2]

All judges are adapters over SmolLM2-135M-Instruct:

    verdicts     the judge in the box, trained further on bundled pairs: a verdict for each step, then the tier
    reasons      the same, by as many updates on the same pairs, with the reason of each verdict before it
    student      starts from `verdicts`, states the tier first, and learns the probabilities of `verdicts`
    free         RL with rewards for steps (`rrs`) after a short warm start, with answers sampled freely
    constrained  the same, with answers sampled under the rule book's grammar

In the end each judges pairs of both test splits as `agrl_jax.judge` does, under the grammar; the student states the
tier alone. `experiments/results/reasoning/` gets the judgements and, after each seed, `table.md`. A seed takes an hour
of two slow cores. A stopped command goes on where it was when it is given again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from agrl_jax.data import pipeline
from agrl_jax.evaluation import intervals, judgements, tables
from agrl_jax.evaluation.metrics import Judgements
from agrl_jax.judging import distillation
from agrl_jax.judging.engine import Judge
from agrl_jax.rulebook import book
from agrl_jax.runtime import markdown
from agrl_jax.runtime.config import ConfigError
from agrl_jax.runtime.console import say
from agrl_jax.runtime.files import write_json, write_text
from agrl_jax.training import assemble
from agrl_jax.training import run as training
from agrl_jax.types import UNKNOWN
from experiments import language_model, results, run
from experiments.study import Fields, Sweep
from experiments.table import METRICS, measure

SPLITS = ("b_eval", "w_eval")
TEACHER, STUDENT = "verdicts", "student"
TAUGHT = 600  # pairs that the teacher judges for its student
PAIRS = 250  # of each split, judged under the grammar

_BOX: Fields = {"method": "sft", "lora.start": "smollm2-four-tier", "sft.steps": 60, "sft.learning_rate": 7e-4}
_EARLY: Fields = {"method": "rrs", "sft.steps": 20}  # so few that the form of an answer is still to be learnt
RUNS = {
    "verdicts": _BOX,
    "reasons": _BOX | {"rulebook.free_text": "between", "data.response_len": 100},  # of the longest gold answer
    "free": _EARLY,
    "constrained": _EARLY | {"rl.constrained": True},
}
COMPARED = (("reasons", "verdicts"), (STUDENT, TEACHER), ("constrained", "free"))  # on the same pairs
_OF_STEPS = ("step_accuracy", "all_right", "adherence")
_SHOWN = ("accuracy", "macro_f1", *_OF_STEPS, "nll", "ece")


def base() -> ConfigDict:
    """Adapters like those in the box, on bundled pairs with their steps."""
    c = language_model.base()
    c.policy.compute_dtype = "float32"
    c.lora.update(rank=16, base_dtype="float32")
    c.sft.update(source="train", batch_size=16, learning_rate=1.5e-3, warmup=5, by_length=True)
    c.rl.update(steps=20, budget=0, batch_size=8, learning_rate=2e-4)
    c.eval.update(every=0, pairs=48, validation_pairs=32)  # of answers written freely, which may be ill-formed
    c.distill.update(steps=50, warmup=5)
    c.checkpoint.every = 20
    return c


SWEEP = Sweep("reasoning", RUNS, seeds=(0, 1), tuned=None, base=base)
get_config = SWEEP.get_config


class Measured(NamedTuple):
    """How a judge does under the grammar, with one seed."""

    figures: Mapping[str, Any]  # `free`: {split: share of well-formed answers}; `cpu_seconds` a pair
    judged: Mapping[str, Judgements]  # by split


# ------------------------------------------------------------------------------------- making the judges


def make(sweep: Sweep, seed: int, folder: Path, workers: int, overrides: Sequence[str]) -> int:
    """Trains the judges of one seed that are missing, lets them judge, and returns how many runs failed."""
    failed = run.run(sweep, __file__, folder, workers, [(name, seed) for name in sweep.runs], overrides)
    for name in sweep.runs:
        place = run.workdir(sweep, folder, name, seed, overrides)
        if sweep.method(name) not in tables.kept(place / "scorecard.json"):
            continue  # it failed, or diverged
        judge(sweep, name, seed, place)
        if name == TEACHER:
            student = place.with_name(f"{place.name}-{STUDENT}")
            distillation.distill(str(place), str(student), stage="sft_end", number=TAUGHT, batch_size=32)
            judge(sweep, STUDENT, seed, student)
    return failed


def judge(sweep: Sweep, name: str, seed: int, workdir: Path) -> None:
    """Writes what the judge in a workdir says of the test pairs, unless it is written."""
    target = sweep.result(f"judged/{name}", seed)
    if target.exists() and json.loads(target.read_text())["workdir"] == workdir.name:
        return
    place = epath.Path(workdir)
    config = assemble.read_config(place)
    rules = assemble.kept_rules(config, place)
    data = assemble.load_data(config, rules, place)
    encoded = assemble.encode(config, assemble.load_model(config, place, rules), data, SPLITS)
    stage = "sft_end" if config.method == "sft" else "rl"
    asked = Judge.from_checkpoint(str(workdir), stage=stage, batch_size=32, steps=config.method != "distill")
    judged, seconds = {}, 0.0
    for split in SPLITS:
        chosen = pipeline.stratified(encoded[split], PAIRS, config.data.seed)
        start = time.process_time()
        found, _ = asked.judgements([encoded[split].pairs[i] for i in chosen])
        seconds = time.process_time() - start  # of the last split: the programs are compiled
        numbers = np.unique(found.query, return_inverse=True)[1]  # in place of queries: a smaller file
        judged[split] = dataclasses.replace(found, query=[str(number) for number in numbers])
    card = tables.read(workdir / "scorecard.json")[config.method]
    target.parent.mkdir(parents=True, exist_ok=True)
    judgements.write(target.with_suffix(".parquet"), name, judged, rules)
    write_json(target, {
        "workdir": workdir.name, "cpu_seconds": seconds / len(judged[split]),
        "free": {split: card[split]["format"]["value"] for split in SPLITS},
        "jax": jax.__version__, "device": jax.devices()[0].device_kind,
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------- the table


def read(sweep: Sweep) -> dict[str, dict[int, Measured]]:
    """What was measured so far, by judge and seed."""
    rules, found = book.load(), {}
    for name in (*sweep.runs, STUDENT):
        for seed in sweep.seeds:
            path = sweep.result(f"judged/{name}", seed)
            if path.exists():
                judged = results.judged(path.with_suffix(".parquet"), rules)
                found.setdefault(name, {})[seed] = Measured(json.loads(path.read_text()), judged)
    return found


def write_table(sweep: Sweep, bootstrap: int = 2000) -> Path:
    """Writes `table.md` from the judgements so far, and returns its path."""
    found = read(sweep)
    path = sweep.result("RUN", 0).with_name("table.md")
    write_text(path, "# Reasons, grammar, students\n\n" + "\n".join(_parts(found, bootstrap)))
    return path


def _parts(found: Mapping[str, Mapping[int, Measured]], bootstrap: int) -> Iterator[str]:
    titles = ["seeds", *(METRICS.get(name, name) for name in _SHOWN)]
    for split in SPLITS:
        yield f"## {split}: {PAIRS} pairs, judged under the grammar\n"
        rows = [
            [name, str(len(seeds)), *_cells(_over_seeds(seeds.values(), split, bootstrap))]
            for name, seeds in found.items()
        ]
        yield markdown.table(["judge", *titles], rows) + "\n"
        rows = []
        for pair in COMPARED:
            both = sorted(set.intersection(*(set(found.get(name, ())) for name in pair)))
            if both:
                one, other = (_over_seeds([found[name][seed] for seed in both], split, bootstrap) for name in pair)
                difference = {metric: one[metric] - other[metric] for metric in _SHOWN}
                rows.append([" minus ".join(pair), str(len(both)), *_cells(difference)])
        yield markdown.table(["difference", *titles], rows) + "\n"
    yield "## Costs, and answers written freely\n"
    columns = ["judge", "tokens a pair", f"CPU time / that of {TEACHER}", *(f"{name}: well-formed" for name in SPLITS)]
    rows = [[name, *_costs(seeds, found.get(TEACHER, {}))] for name, seeds in found.items()]
    yield markdown.table(columns, rows) + "\n"


def _cells(figures: Mapping[str, np.ndarray]) -> list[str]:
    return [str(measure(figures[metric])) for metric in _SHOWN]


def _over_seeds(seeds: Iterable[Measured], split: str, bootstrap: int) -> dict[str, np.ndarray]:
    """`intervals.over_seeds` of a judge's seeds; a judge that states no steps has no figures of them."""
    judged = [one.judged[split] for one in seeds]
    found = intervals.over_seeds(judged, book.load(), bootstrap)
    if not any((one.predicted_steps != UNKNOWN).any() for one in judged):
        found |= {name: np.full_like(found[name], np.nan) for name in _OF_STEPS}
    return found


def _costs(seeds: Mapping[int, Measured], others: Mapping[int, Measured]) -> list[str]:
    tokens = np.mean([one.judged[SPLITS[-1]].response_tokens.mean() for one in seeds.values()])
    ratios = [one.figures["cpu_seconds"] / others[seed].figures["cpu_seconds"]
              for seed, one in seeds.items() if seed in others]  # fmt: skip
    free = [np.mean([one.figures["free"][split] for one in seeds.values()]) for split in SPLITS]
    return [f"{tokens:.1f}", f"{np.mean(ratios):.2f}" if ratios else "-", *(f"{share:.2f}" for share in free)]


def main(argv: list[str]) -> None:
    """Exit code 2 for an unknown seed, 1 if runs failed, 3 if a student diverged, 128 + signal if stopped by one."""
    run.define_flags()
    flags.DEFINE_list("seeds", [], "Which; by default all.")
    flags.DEFINE_bool("tables", False, "Make no run: only write the table of what was judged.")
    overrides = run.read_flags(argv)
    values = flags.FLAGS
    sweep = dataclasses.replace(SWEEP, results=Path(values.results).resolve())
    failed = 0
    with run.until_told(), training.exit_codes(distillation.USER_ERRORS):  # a student is trained in this process
        if of_student := [word for word in overrides if word.startswith("--config.distill.")]:
            raise ConfigError(f"{of_student[0]}: the student has its fields from `base` in {__file__}")
        for seed in dict.fromkeys(seed for _, seed in run.select(sweep, [], values.seeds)):
            if not values.tables:
                failed += make(sweep, seed, Path(values.dir).resolve(), values.workers, overrides)
                write_table(sweep)
    say(write_table(sweep).read_text())
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv)
