"""The study's policy, and sweeps.

Every sweep is a file beside this one with a `SWEEP`. It is a config file too, so `agrl_jax.main` can make a single run
of it:

    python -m agrl_jax.main --config=experiments/main_table.py:grpo,seed=3 --workdir=runs/grpo-3
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime.config import ConfigError, config_digest, flatten, last_branch, matches, parse_arg, resolve

Fields = Mapping[str, Any]  # of a config, by dotted names

RESULTS_VARIABLE = "AGRL_EXPERIMENT_RESULTS"  # tells a run where other results are, such as those of a search
RESULTS = Path(os.environ.get(RESULTS_VARIABLE) or Path(__file__).parent / "results")
# What the search chose: {method: fields}. A run takes it from here also where its results are kept elsewhere.
TUNED = Path(__file__).parent / "results" / "tuned.json"
BUDGET = 1_400_000  # forward-equivalent tokens of each run after the warm start: two minutes of AGRL on one core
SFT_STEP = 3411  # forward-equivalent tokens of a step of the study's warm start, the mean of `budget/tokens`

# The fields that a warm start depends on. Runs in which they are equal share a warm start.
START = (
    "seed", "rulebook", "data", "policy", "lora", "optim", "sft", "mixture", "eval.pairs", "eval.validation_pairs",
    "eval.pass_k", "eval.pass_pairs", "eval.constrained", "eval.batch_size", "eval.bootstrap",
    "objective.logprob_chunk",
)  # fmt: skip

# The labels that each method learns from, after a warm start on tiers and steps.
LABELS = {
    "sft": "tier, steps (sft split)", "sft_more": "tier, steps (sft split)", "sft_all": "tier, steps",
    "dpo": "tier", "grpo": "tier", "grpo_ds": "tier", "grpo_pr": "tier, steps", "rrs": "tier, steps",
    "agr": "tier, step texts", "agrl": "tier, steps, step texts",
}  # fmt: skip


def base() -> ConfigDict:
    """The quickstart's policy, with a longer warm start and a shorter RL stage that ends with the budget.

    The warm start sees its pairs three times; more of the same adds little after that. After a warm start of 600 steps,
    more SFT would gain three times as much from the budget of the RL stage as any method of RL.

    With so few tokens, half the quickstart's batch and a third of its learning rates do better.
    """
    c = recipes.base()
    c.sft.steps = 2250
    c.rl.steps = 130  # the length of the schedule; the budget ends a run
    c.rl.batch_size = 32
    c.rl.learning_rate = 1e-4
    c.rl.matrix_rate = 0.0013
    c.rl.budget = BUDGET
    c.dpo.mined = 2048  # with 8 answers to each, mining takes a quarter of the budget
    c.dpo.steps = 120
    c.more.steps = round(BUDGET / SFT_STEP)
    c.eval.every = 22
    c.eval.pairs = 1000
    c.eval.validation_pairs = 512
    c.eval.bootstrap = 0  # intervals are made over seeds and queries, by `experiments.table`
    c.eval.pass_pairs = 0
    c.checkpoint.every = 52
    c.log.samples_every = 0
    return c


@dataclass(frozen=True)
class Sweep:
    """Runs by name, and their seeds. A run has the fields in which it differs from its method in the study."""

    name: str
    # The fields of each run; also `method`, if it is not the run's name, and `labels`, if they are not those of LABELS.
    runs: Mapping[str, Fields]
    seeds: tuple[int, ...]
    tuned: Path | None = TUNED  # the settings that a search chose for each method
    reference: str = "agrl"  # the run that others are compared with
    base: Callable[[], ConfigDict] = base
    results: Path = RESULTS
    keep_checkpoints: bool = True  # False: the checkpoints of a run are deleted once its result exists

    def get_config(self, arg: str | None = None) -> ConfigDict:
        """The config of one run: `RUN` or `RUN,seed=K`."""
        spec = parse_arg(arg, variant=tuple(self.runs), seed=0)
        method = self.method(spec.variant)
        c = self.base()
        steps = c.more.steps
        recipes.with_method(c, method)
        c.more.steps = steps  # of the base: methods are compared at its budget
        c.seed = spec.seed
        if last_branch(method) == "more":
            c.eval.every *= 3  # its steps are a third as long
        c.update_from_flattened_dict(self.fields(spec.variant))
        return c

    def method(self, run: str) -> str:
        """The method of a run."""
        return self.runs[run].get("method", run)

    def fields(self, run: str) -> dict[str, Any]:
        """The fields in which a run differs from its method in the study; its own override the search's choice."""
        own = {name: value for name, value in self.runs[run].items() if name not in _ABOUT}
        return (tuned(self.tuned).get(self.method(run), {}) if self.tuned else {}) | own

    def labels(self, run: str) -> str:
        """The labels that a run learns from after the warm start."""
        return self.runs[run].get("labels", LABELS[self.method(run)])

    def jobs(self) -> Iterator[tuple[str, int]]:
        """Every run with every seed; all runs of a seed before the next seed."""
        return ((run, seed) for seed in self.seeds for run in self.runs)

    def result(self, run: str, seed: int) -> Path:
        """The file of a run's result."""
        return self.results / self.name / f"{run}-{seed}.json"


_ABOUT = ("method", "labels")  # entries of a run that are not fields


def settings(config: ConfigDict, overrides: Sequence[str]) -> dict[str, Any]:
    """What a result depends on: all fields. Of a path in the overrides, only the name of the file counts."""
    return flatten(resolve(config)) | dict(_named(overrides))


def same(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a run made with some settings is one with those wanted. A field that came later had its default."""
    return not changed(made, wanted)


def changed(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with which a run was made, where they are not those wanted; None for a setting that it had not."""
    made = flatten(resolve(recipes.base())) | made
    return {name: made.get(name) for name in made | wanted if made.get(name) != wanted.get(name)}


def digest(config: ConfigDict, overrides: Sequence[str]) -> str:
    """A short name for the settings of a run."""
    return sha256(repr([config_digest(config), sorted(_named(overrides))]).encode()).hexdigest()[:6]


def start_digest(config: ConfigDict, overrides: Sequence[str]) -> str:
    """A digest that is equal for all runs that share a warm start."""
    named = sorted((name, value) for name, value in _named(overrides) if matches(name, START))
    fields = sorted(start_of(config).items())
    return sha256(repr([fields, named] if named else fields).encode()).hexdigest()[:12]


def _named(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The fields and values of arguments such as `--config.data.path=FILE`; for a path, the name of its file."""
    for word in overrides:
        name, _, value = word.removeprefix("--config.").partition("=")
        yield name, Path(value).name if name.endswith("path") else value


def tuned(path: Path = TUNED) -> dict[str, dict[str, Any]]:
    """The settings that a search chose for each method; empty without a search."""
    return json.loads(path.read_text()) if path.exists() else {}


def start_of(config: ConfigDict) -> dict[str, Any]:
    """The fields that a config's warm start depends on."""
    return {name: value for name, value in flatten(resolve(config)).items() if matches(name, START)}


def load(path: str, folder: str) -> Sweep:
    """The `SWEEP` of a file, with its results in `folder`. Raises ConfigError if the file has none."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--sweep={path}: not a file; there are {', '.join(sorted(_sweeps()))}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass defined in the file looks its own module up
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "SWEEP", None), Sweep):
        raise ConfigError(f"--sweep={path}: defines no SWEEP; there are {', '.join(sorted(_sweeps()))}")
    return dataclasses.replace(module.SWEEP, results=Path(folder).resolve())


def _sweeps() -> list[str]:
    files = (file for file in Path(__file__).parent.glob("*.py") if "SWEEP =" in file.read_text())
    return [f"experiments/{file.name}" for file in files if file != Path(__file__)]
