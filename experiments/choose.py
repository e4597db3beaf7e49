"""Chooses the settings of each method from the search.

    python -m experiments.choose

The best settings have the highest macro-F1, as a mean over the last three validations. The command writes
`results/tuned.json`, {method: fields}, and prints what was tried. The schedule of each method is set to end with its
budget.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping

import numpy as np

from agrl_jax.runtime.config import ConfigError, exit_with, last_branch, parse_flags
from agrl_jax.runtime.console import console_table, say
from experiments import results, search, study
from experiments.study import Sweep

LAST = 3  # validations that are averaged: a single one is noisy


def choose(
    sweep: Sweep = search.SWEEP,
    searched: Mapping[str, Mapping[str, Mapping[str, object]]] = search.SEARCHED,
    budget: int = study.BUDGET,
    neighbours: Mapping[str, str] = search.NEIGHBOURS,
) -> tuple[dict[str, dict[str, object]], list[list[object]]]:
    """The fields chosen for each method that was searched to the end, and a row for each setting that was tried.

    A row is (method, setting, validation macro-F1, "chosen" or ""). Raises ConfigError if no method was searched to the
    end.

    Args:
      sweep: its runs are named METHOD.SETTING.
      searched: {method: {setting: fields}}.
      budget: forward-equivalent tokens at which the schedule of the chosen settings ends.
      neighbours: {method: the method whose fields it takes}.
    """
    found = results.read(sweep)
    reached = {
        method: {setting: _end(found[f"{method}.{setting}"]) for setting in settings}
        for method, settings in searched.items()
        if all(f"{method}.{setting}" in found for setting in settings)
    }
    if not reached:
        raise ConfigError(f"no method of {sweep.name} has been searched to the end; python -m experiments.run makes "
                          "what is missing")
    best = {method: max(settings, key=settings.get) for method, settings in reached.items()}
    rows = [
        [method, setting, value, "chosen" if best[method] == setting else ""]
        for method, settings in reached.items()
        for setting, value in settings.items()
    ]
    fields = {method: dict(searched[method][setting]) for method, setting in best.items()}
    for method, chosen in fields.items():
        steps, tokens = (_cost(found[f"{method}.{best[method]}"], name) for name in ("steps", "forward_equivalents"))
        # The schedule should end when the whole budget is spent.
        chosen[f"{last_branch(method)}.steps"] = math.ceil(budget * steps / tokens)
    return fields | {name: fields[other] for name, other in neighbours.items() if other in fields}, rows


def _cost(seeds: Mapping[int, dict], name: str) -> float:
    return float(np.mean([result["cost"][name] for result in seeds.values()]))


def _end(seeds: Mapping[int, dict]) -> float:
    """Macro-F1 at the end, the mean over seeds; 0 for a run that diverged."""
    ends = [[point["macro_f1"] for point in result["validation"][-LAST:]] for result in seeds.values()]
    return float(np.mean([
        0.0 if result["diverged"] else np.mean(end) for result, end in zip(seeds.values(), ends, strict=True)
    ]))  # fmt: skip


def main(argv: list[str]) -> None:
    """Exit code 2 where there is nothing to choose from yet."""
    parse_flags(argv)
    try:
        fields, rows = choose()
    except ConfigError as error:
        exit_with(error)
    study.TUNED.write_text(json.dumps(fields, indent=1) + "\n")
    say(console_table("search", ["method", "setting", "macro-F1", ""], rows))
    lacking = [method for method in search.SEARCHED if method not in fields]
    say(f"written to {study.TUNED}" + (f"; not searched to the end: {', '.join(lacking)}" if lacking else ""))


if __name__ == "__main__":
    main(sys.argv)
