"""The study of a language model, SmolLM2-135M-Instruct: methods after each of three warm starts, and two baselines.

    python -m experiments.language_model [--config.data.test_path=PAIRS.csv]

One command searches the settings, makes every run that is missing, and writes the tables after each run. It can be
stopped at any point, by Ctrl-C or `--minutes=N`, and started again. The first seed of all methods comes first. A run
takes about a quarter of an hour on two cores, all of them most of a day. `--search=False` leaves out the nine runs of
the search: all methods take its middle setting. No run trains on the real pairs of PAIRS.csv: they are judged beside
the benchmark, as the split `test`.

The regimes differ in what the warm start, and RL after it, learn from:

    scarce  500 pairs with steps; the other pairs have the tier alone, as most real ones do
    head    the head of the distribution of queries; RL sees all of it, with steps
    all     every pair with its steps
    plain   none: the model untrained, and trained on the tier alone

The results are in `experiments/results/language_model/REGIME/`. This makes a single run:

    python -m agrl_jax.main --config=experiments/language_model.py:scarce/agrl,seed=0 --workdir=runs/scarce
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime import markdown
from agrl_jax.runtime.config import ConfigError
from agrl_jax.runtime.console import say
from agrl_jax.runtime.files import write_json, write_text
from experiments import choose, run, study, table
from experiments.study import Fields, Sweep

BUDGET = 450_000  # forward-equivalent tokens of each run after the warm start: some 60 steps of AGRL
SEEDS = (0, 1, 2)

_TIERS = "tier, steps of 500"

# The fields that each regime changes, and its methods with the fields that they change.
REGIMES: dict[str, tuple[Fields, Mapping[str, Fields]]] = {
    "scarce": (
        {
            "data.steps_known": 500, "sft.source": "known", "sft.steps": 200,
            "guidance.source": "own", "guidance.threshold": 0.25,
        },
        {
            "sft": {"labels": "steps of 500"}, "sft_more": {"labels": "steps of 500"},
            "sft_tiers": {"method": "sft_all", "labels": _TIERS, "more.steps": 115},  # the policy fills in the steps
            "sft_sum": {"method": "sft_all", "labels": _TIERS, "more.steps": 115, "sft.unknown_steps": "sum"},
            "dpo": {}, "grpo": {}, "agrl": {"labels": _TIERS},
            # Forced tokens do not teach.
            "agrl_mask": {"method": "agrl", "labels": _TIERS, "guidance.treatment": "mask"},
        },
    ),
    "head": (
        {"sft.steps": 320},
        {method: {} for method in ("sft", "sft_more", "dpo", "grpo", "grpo_pr", "rrs", "agr", "agrl")},
    ),
    "all": (
        {"sft.source": "train", "sft.steps": 1200},
        {"sft": {}, "sft_more": {"labels": "tier, steps"}, "dpo": {}, "grpo": {}, "agrl": {}},
    ),
    # `tier_alone` learns the tiers of as many pairs as the warm start of `head` and `sft_more` after it. It states the
    # tier first, and the rest of the answer has no loss. `untrained` asks the model as it is, through its chat template
    # and under the grammar.
    "plain": (
        {"method": "sft"},
        {
            "untrained": {
                "labels": "none", "sft.steps": 0, "data.style": "chat", "data.prompt_len": 112,
            },
            "tier_alone": {
                "labels": "tier", "rulebook.order": "respond_then_think", "data.steps_known": 0,
                "sft.source": "train", "sft.steps": 635,
            },
        },
    ),
}  # fmt: skip

# The search tries learning rates of the three methods that differ most, with one seed, after the warm start of `head`.
_RATES = {"slow": 7e-6, "centre": 2e-5, "fast": 6e-5}
SEARCHED = {
    method: {setting: {f"{branch}.learning_rate": rate} for setting, rate in _RATES.items()}
    for method, branch in (("dpo", "dpo"), ("grpo", "rl"), ("agrl", "rl"))
}
NEIGHBOURS = {"grpo_pr": "grpo", "rrs": "agrl", "agr": "agrl"}  # methods that take the settings of another one


def base(times: int = 1) -> ConfigDict:
    """SmolLM2 with terse prompts and all weights trained; the stage after the warm start is `times` as long."""
    c = recipes.language_model()
    c.data.update(style="terse", prompt_len=64, response_len=32)  # the longest gold answer has 30 tokens
    c.reward.overlong_from = 31
    c.policy.update(pretrained="smollm2", compute_dtype="bfloat16", remat=False)  # on a CPU 1.4 times float32's speed
    c.objective.logprob_chunk = 0
    c.sft.update(batch_size=16, learning_rate=1.5e-4)
    c.rl.update(steps=60 * times, batch_size=16, group_size=4, learning_rate=2e-5, warmup=5, budget=BUDGET * times)
    c.guidance.replace = 2
    c.dpo.update(mined=384 * times, steps=65 * times, batch_size=16, learning_rate=2e-5, warmup=5)
    c.more.update(steps=158 * times, batch_size=16, learning_rate=5e-5, warmup=10)
    c.eval.update(every=20 * times, pairs=500, validation_pairs=256, pass_pairs=0, batch_size=32, bootstrap=0)
    c.checkpoint.update(every=60, keep=1)  # each takes 1.6 GB
    c.log.samples_every = 40
    return c


@dataclass(frozen=True)
class Plan:
    """The study under a name; the stage after the warm start is `times` as long in every run."""

    name: str
    file: str  # where its `get_config` is
    times: int = 1
    results: Path = study.RESULTS

    @property
    def sweep(self) -> Sweep:
        """All runs but those of the search, named REGIME/METHOD."""
        runs = {f"{regime}/{name}": fields for regime in REGIMES for name, fields in self._runs(regime).items()}
        return self._sweep(self.name, runs, SEEDS, self.tuned)

    @property
    def search(self) -> Sweep:
        """The runs of the search, half as long, named search/METHOD.SETTING."""
        half = {
            "rl.budget": self.times * BUDGET // 2, "rl.steps": 30 * self.times, "dpo.steps": 32 * self.times,
            "dpo.mined": 192 * self.times, "eval.every": 10 * self.times,
        }  # fmt: skip
        runs = {
            f"search/{method}.{setting}": {"method": method, **REGIMES["head"][0], **half, **fields}
            for method, settings in SEARCHED.items()
            for setting, fields in settings.items()
        }
        return self._sweep(self.name, runs, SEEDS[:1], None)

    def part(self, whole: Sweep, name: str) -> Sweep:
        """The runs of one regime, or of the search, as a sweep of their own; names lose the part before the slash."""
        runs = {run.partition("/")[2]: fields for run, fields in whole.runs.items() if run.startswith(f"{name}/")}
        return dataclasses.replace(whole, name=f"{self.name}/{name}", runs=runs)

    def _runs(self, regime: str) -> dict[str, Fields]:
        shared, methods = REGIMES[regime]
        runs = {name: {"method": name, **shared, **fields} for name, fields in methods.items()}
        for fields in runs.values():
            if "more.steps" in fields:  # filling in steps costs tokens, so the budget allows fewer
                fields["more.steps"] *= self.times
        return runs

    def _sweep(self, name: str, runs: Mapping[str, Fields], seeds: tuple[int, ...], tuned: Path | None) -> Sweep:
        return Sweep(name, runs, seeds, tuned, base=lambda: base(self.times), results=self.results,
                     keep_checkpoints=False)  # fmt: skip

    @property
    def tuned(self) -> Path:
        """The file of the settings that the search chose."""
        return self.results / self.name / "tuned.json"

    def get_config(self, arg: str | None = None) -> ConfigDict:
        """The config of one run: `REGIME/METHOD,seed=K`, or `search/METHOD.SETTING` for a run of the search."""
        sweep = self.search if arg and arg.startswith("search/") else self.sweep
        return sweep.get_config(arg)

    def jobs(self, regimes: Sequence[str]) -> Iterator[list[tuple[str, int]]]:
        """The runs of the study, in lists that share a warm start; all regimes of a seed come before the next seed."""
        for seed in SEEDS:
            for regime in regimes:
                yield [(f"{regime}/{name}", seed) for name in REGIMES[regime][1]]

    def choose(self) -> None:
        """Writes the settings that the search chose, and those that it tried."""
        search = self.part(self.search, "search")
        fields, rows = choose.choose(search, SEARCHED, self.times * BUDGET, NEIGHBOURS)
        if self.tuned.exists() and json.loads(self.tuned.read_text()) == fields:
            return
        cells = [[str(method), setting, f"{value:.4f}", chosen] for method, setting, value, chosen in rows]
        tried = markdown.table(["method", "setting", "validation macro-F1", ""], cells)
        folder = self.results / search.name
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.md", f"# search\n\n{tried}\n")
        write_json(self.tuned, fields, indent=1)

    def tables(self, regimes: Sequence[str], bootstrap: int = 1000) -> None:
        """Writes the tables of the regimes from the results so far."""
        for regime in regimes:
            sweep = self.part(self.sweep, regime)
            if any(sweep.result(*job).exists() for job in sweep.jobs()):
                table.write(sweep, bootstrap)

    def run(self, folder: Path, workers: int, regimes: Sequence[str], overrides: Sequence[str], search: bool) -> int:
        """Makes what is missing; returns how many runs failed."""
        if search:
            failed = run.run(self.search, self.file, folder, workers, list(self.search.jobs()), overrides)
            if failed:
                return failed  # all other runs need its settings
            self.choose()
        failed = 0
        for jobs in self.jobs(regimes):
            failed += run.run(self.sweep, self.file, folder, workers, jobs, overrides, lambda: self.tables(regimes))
        self.tables(regimes)
        return failed


PLAN = Plan("language_model", __file__)
SWEEP = PLAN.sweep
get_config = PLAN.get_config


def main(argv: list[str], plan: Plan = PLAN) -> None:
    """Exit code 2 for an unknown regime, 1 if runs failed, 130 if stopped by Ctrl-C or `--minutes`."""
    run.define_flags()
    flags.DEFINE_list("regimes", list(REGIMES), "Which, in their order.")
    flags.DEFINE_bool("search", True, "Search the rates first; else all methods take those that it would start from.")
    flags.DEFINE_bool("tables", False, "Make no run: only write the tables of the results that exist.")
    overrides = run.read_flags(argv)
    values = flags.FLAGS
    plan = dataclasses.replace(plan, results=Path(values.results).resolve())
    failed = 0
    with run.until_told():
        if unknown := [name for name in values.regimes if name not in REGIMES]:
            raise ConfigError(f"--regimes={unknown[0]}: there are {', '.join(REGIMES)}")
        if values.tables:
            plan.tables(values.regimes)
        else:
            failed = plan.run(Path(values.dir).resolve(), values.workers, values.regimes, overrides, values.search)
    say(f"the tables are in {plan.results / plan.name}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv)
