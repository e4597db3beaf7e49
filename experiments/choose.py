"""Chooses each method's settings from the search: the highest validation macro-F1, the mean of its last three.

    python -m experiments.choose

Writes `results/tuned.json`, {method: fields}, and prints what was tried. The schedule of each method is set to
end where its budget does.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping

import numpy as np

from agrl_jax.runtime.config import ConfigError, exit_with, last_branch
from agrl_jax.runtime.metrics import console_table, say
from experiments import results, search, study

LAST = 3  # validations: one alone is noisy


def choose() -> tuple[dict[str, dict[str, object]], list[list[object]]]:
    """The fields chosen for each method, and all rows: method, setting, validation macro-F1, chosen.

    Raises ConfigError where a method was not searched to the end.
    """
    found = results.read(search.SWEEP)
    lacking = [run for run in search.SWEEP.runs if run not in found]
    if lacking:
        make = "python -m experiments.run --sweep=experiments/search.py"
        raise ConfigError(f"the search lacks {', '.join(lacking)}; {make} makes them")
    reached: dict[str, dict[str, float]] = {}
    for run, seeds in found.items():
        method, setting = run.split(".")
        reached.setdefault(method, {})[setting] = float(np.mean([_end(result) for result in seeds.values()]))
    best = {method: max(settings, key=settings.get) for method, settings in reached.items()}
    rows = [
        [method, setting, value, "chosen" if best[method] == setting else ""]
        for method, settings in reached.items()
        for setting, value in settings.items()
    ]
    fields = {method: dict(search.SWEEP.runs[f"{method}.{setting}"]) for method, setting in best.items()}
    for method, chosen in fields.items():
        del chosen["method"]
        steps, tokens = (_cost(found[f"{method}.{best[method]}"], name) for name in ("steps", "forward_equivalents"))
        # Where its schedule should end with the whole budget.
        chosen[f"{last_branch(method)}.steps"] = math.ceil(study.BUDGET * steps / tokens)
    return fields, rows


def _cost(seeds: Mapping[int, dict], name: str) -> float:
    return float(np.mean([result["cost"][name] for result in seeds.values()]))


def _end(result: dict) -> float:
    """Macro-F1 at the end of a run; 0 where it diverged."""
    values = [point["macro_f1"] for point in result["validation"]]
    return 0.0 if result["diverged"] or not values else float(np.mean(values[-LAST:]))


def main(argv: list[str]) -> None:
    """Exit code 2 where the search is not over."""
    try:
        fields, rows = choose()
    except ConfigError as error:
        exit_with(error)
    study.TUNED.write_text(json.dumps(fields, indent=1) + "\n")
    say(console_table("search", ["method", "setting", "macro-F1", ""], rows))
    say(f"written to {study.TUNED}")


if __name__ == "__main__":
    main(sys.argv)
