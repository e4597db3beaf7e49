"""Tables and plots of a sweep's results.

    python -m experiments.table --sweep=experiments/main_table.py

It writes `table.md`, `table.csv`, `scores.png`, `curves.png` and `training.png` to `experiments/results/SWEEP/`.
Intervals are 95%, by a hierarchical bootstrap: seeds are drawn, then queries. Every method gets the same draws, so that
differences between methods are paired.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import flags

from agrl_jax.evaluation import intervals
from agrl_jax.evaluation.metrics import Judgements
from agrl_jax.runtime import markdown
from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags
from agrl_jax.runtime.console import say
from experiments import results, study
from experiments.study import Sweep

matplotlib.use("Agg")  # draws into files and opens no window
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen before pyplot is first imported)

METRICS = {
    "macro_f1": "macro-F1", "accuracy": "accuracy", "good_f1": "Good-F1", "step_accuracy": "step accuracy",
    "all_right": "all right", "adherence": "rule adherence", "format": "well-formed",
}  # fmt: skip
_LEGEND_ROWS = 18  # of each column of a legend
_NOTE = "An interval without 0 in it is a difference that other seeds and queries would most likely show too."
COMPARED = ("macro_f1", "accuracy", "step_accuracy", "all_right", "adherence")
Found = Mapping[str, Mapping[int, Mapping[str, Any]]]  # results by run and seed
Part = Callable[[Judgements], Judgements]  # selects a part of a split
Measured = Mapping[str, Mapping[str, np.ndarray]]  # by run and metric, [1 + bootstrap]: the mean, then its resamples


class Measure(NamedTuple):
    """A figure with its interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{interval}"


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        body = markdown.table(self.columns, self.rows)
        return f"### {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


# ------------------------------------------------------------------------------------------------ figures


def resampled(found: Found, split: str, bootstrap: int, part: Part = lambda judged: judged) -> Measured:
    """The metrics of each run on a split, or on a part of it, as means over seeds."""
    measured = {}
    for run, seeds in found.items():
        judged = [part(result["judged"][split]) for result in seeds.values() if not result["diverged"]]
        if judged:
            rules = results.rules(next(iter(seeds.values())))
            measured[run] = intervals.over_seeds(judged, rules, bootstrap)
    return measured


def ahead(
    found: Found, measured: Measured, split: str, reference: str, bootstrap: int
) -> dict[str, dict[str, np.ndarray]]:
    """By run and metric, the reference minus each other run, over the seeds that both have."""
    differences = {}
    for run in measured:
        seeds = [_finished(found[name]) for name in (reference, run)]
        if run == reference or not seeds[0] & seeds[1]:
            continue
        ours, theirs = measured[reference], measured[run]
        if seeds[0] != seeds[1]:
            common = {name: {seed: found[name][seed] for seed in seeds[0] & seeds[1]} for name in (reference, run)}
            ours, theirs = resampled(common, split, bootstrap).values()
        differences[run] = {metric: ours[metric] - theirs[metric] for metric in ours}
    return differences


def _finished(seeds: Mapping[int, Mapping[str, Any]]) -> set[int]:
    return {seed for seed, result in seeds.items() if not result["diverged"]}


def measure(values: np.ndarray) -> Measure:
    """Value and interval of [1 + bootstrap]."""
    value, rest = values[0], values[1:][~np.isnan(values[1:])]
    if np.isnan(value):
        return Measure(None, None, None)
    low, high = np.percentile(rest, [2.5, 97.5]) if len(rest) else (None, None)
    return Measure(float(value), low, high)


def _family(name: str) -> Part:
    return lambda judged: judged.take(np.flatnonzero(np.array(judged.family) == name))


def _seen(whether: bool) -> Part:
    return lambda judged: judged.take(np.flatnonzero(judged.seen.astype(bool) == whether))


# ------------------------------------------------------------------------------------------------- tables


def tables(sweep: Sweep, found: Found, measured: Mapping[str, Measured], bootstrap: int) -> Iterator[Table]:
    """All tables of a sweep, from its results and the metrics of each split; the first is the summary."""
    differences = {
        split: ahead(found, of, split, sweep.reference, bootstrap) if sweep.reference in of else {}
        for split, of in measured.items()
    }
    yield _in_short(sweep.reference, found, measured, differences)
    for split, of in measured.items():
        yield _scores(split, found, of)
        if differences[split]:
            yield _differences(split, sweep.reference, differences[split])
        yield _families(split, found, bootstrap)
        if not _some_judgements(found, split).seen.all():
            yield _held_out(split, found, bootstrap)
        yield _further(split, of)
    yield _stability(found, list(measured))
    yield _cost(found)


def _in_short(
    reference: str, found: Found, measured: Mapping[str, Measured], differences: Mapping[str, Measured]
) -> Table:
    """macro-F1 and answers right in every step, on each split, and how far the reference is ahead."""
    short = {"macro_f1": METRICS["macro_f1"], "all_right": METRICS["all_right"]}
    columns = ["method", "seeds"]
    for split in measured:
        columns += [f"{split}: {title}" for title in (*short.values(), f"{reference} minus it")]
    rows = []
    for run, seeds in found.items():
        row = [run, str(len(seeds))]
        for split, of in measured.items():
            row += [str(measure(of[run][metric])) if run in of else "diverged" for metric in short]
            row.append(str(measure(differences[split][run]["macro_f1"])) if run in differences[split] else "")
        rows.append(row)
    return Table("In short", columns, rows, _NOTE)


def _scores(split: str, found: Found, measured: Measured) -> Table:
    rows = []
    for run, seeds in found.items():
        cells = [str(measure(measured[run][metric])) if run in measured else "diverged" for metric in METRICS]
        rows.append([run, str(len(seeds)), next(iter(seeds.values()))["labels"], *cells])
    judged = _some_judgements(found, split)
    title = f"{split}: scores on {len(judged):,} pairs of {len(set(judged.query)):,} queries"
    return Table(title, ["method", "seeds", "labels after the start", *METRICS.values()], rows)


def _further(split: str, measured: Measured) -> Table:
    """The rest of the scorecard."""
    names = [metric for metric in next(iter(measured.values()), {}) if metric not in METRICS]
    rows = [[run, *(str(measure(values[metric])) for metric in names)] for run, values in measured.items()]
    return Table(f"{split}: further scores", ["method", *names], rows)


def _differences(split: str, reference: str, differences: Measured) -> Table:
    rows = [
        [run, *(str(measure(values[metric])) for metric in COMPARED)] for run, values in differences.items()
    ]
    columns = ["minus", *(METRICS[name] for name in COMPARED)]
    return Table(f"{split}: {reference} minus each other method", columns, rows, _NOTE)


def _families(split: str, found: Found, bootstrap: int) -> Table:
    judged = _some_judgements(found, split)
    names = sorted(set(judged.family))
    by_family = {name: resampled(found, split, bootstrap, _family(name)) for name in names}
    supports = [f"{name} ({list(judged.family).count(name)})" for name in names]
    rows = [
        [run, *(str(measure(by_family[name][run]["accuracy"])) if run in by_family[name] else "-" for name in names)]
        for run in found
    ]
    return Table(f"{split}: accuracy by query family (pairs)", ["method", *supports], rows)


def _held_out(split: str, found: Found, bootstrap: int) -> Table:
    """Scores on pairs whose product types, brands or phrasings no training pair has, and on the others."""
    shown = {metric: METRICS[metric] for metric in ("macro_f1", "accuracy", "step_accuracy")}
    seen = _some_judgements(found, split).seen.astype(bool)
    parts = {f"seen ({seen.sum()})": _seen(True), f"unseen ({(~seen).sum()})": _seen(False)}
    measured = {title: resampled(found, split, bootstrap, part) for title, part in parts.items()}
    rows = [
        [run, *(str(measure(of[run][metric])) if run in of else "-" for of in measured.values() for metric in shown)]
        for run in found
    ]
    columns = [f"{title}: {metric}" for title in parts for metric in shown.values()]
    return Table(f"{split}: words that were held out of training", ["method", *columns], rows)


def _some_judgements(found: Found, split: str) -> Judgements:
    """The judgements of any run: all judge the same pairs."""
    return next(result["judged"][split] for seeds in found.values() for result in seeds.values() if result["judged"])


def _stability(found: Found, splits: Sequence[str]) -> Table:
    columns = ["method", *(f"{split} macro-F1: spread, worst seed" for split in splits), "diverged", "skipped updates",
               "equal-reward groups: first, last", "entropy: first, last", "gradient norm: max / median",
               "KL: max / median"]  # fmt: skip
    rows = []
    for run, seeds in found.items():
        every = list(seeds.values())
        finished = [result for result in every if not result["diverged"]]
        cells = []
        for split in splits:
            scores = [result["scores"][split]["macro_f1"] for result in finished]
            spread = f"{np.std(scores):.3f}" if len(scores) > 1 else "-"  # one seed has none
            cells.append(f"{spread}, {min(scores):.3f}" if scores else "-")
        cells += [str(len(every) - len(finished)), str(sum(result["skipped"] for result in every))]
        cells += [_ends(every, name) for name in ("reward/equal_groups", "policy/entropy")]
        cells += [_mean([result["excursions"][name] for result in every]) for name in ("optim/grad_norm", "policy/kl")]
        rows.append([run, *cells])
    return Table("Stability", columns, rows, "Spread: standard deviation over seeds.")


def _ends(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    curves = [result["watched"][name] for result in runs if result["watched"].get(name)]
    return f"{np.mean([c[0] for c in curves]):.2f}, {np.mean([c[-1] for c in curves]):.2f}" if curves else "-"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.1f}" if known else "-"


def _cost(found: Found) -> Table:
    """Costs as means over seeds; seconds divided by GRPO's, and the budget needed to reach GRPO's last score."""
    seconds = {run: np.mean([result["cost"]["seconds"] for result in seeds.values()]) for run, seeds in found.items()}
    goal = goal_of(found.get("grpo", {}))
    rows = []
    for run, seeds in found.items():
        cost = [
            c | {"tokens_run": c["forward_equivalents"] - 3 * c["tokens_trained"]}
            for c in (result["cost"] for result in seeds.values())
        ]
        cells = [
            f"{np.mean([c[name] or 0 for c in cost]):,.0f}"
            for name in ("steps", "pairs", "tokens_run", "tokens_trained", "forward_equivalents")
        ]
        ratio = f"{seconds[run] / seconds['grpo']:.2f}" if seconds.get("grpo") else "-"
        rows.append([run, *cells, ratio, needed(seeds, goal)])
    columns = ["method", "steps", "labelled pairs", "tokens sampled or scored", "tokens trained", "forward-equivalents",
               "time / GRPO's", "budget to reach GRPO's end"]  # fmt: skip
    note = (
        "All figures are after the shared warm start. A labelled pair that is met twice counts twice. In "
        "forward-equivalents, a token that is sampled or scored counts 1, a token trained on 3, and a prompt once for "
        "its group; mining, refills and replays count. Times leave mining out. The last column is the budget at which "
        "the mean validation macro-F1 first reached that of GRPO's end, as a share of the budget that GRPO spent."
    )
    return Table("Cost", columns, rows, note)


def goal_of(seeds: Mapping[int, Mapping[str, Any]]) -> tuple[float, float] | None:
    """Tokens spent and validation macro-F1 at the last validation, means over seeds."""
    last = [result["validation"][-1] for result in seeds.values() if result["validation"]]
    if not last:
        return None
    tokens, macro_f1 = ([point[name] or 0 for point in last] for name in ("tokens", "macro_f1"))
    return float(np.mean(tokens)), float(np.mean(macro_f1))


def needed(seeds: Mapping[int, Mapping[str, Any]], goal: tuple[float, float] | None) -> str:
    """The tokens spent until the goal's macro-F1 is reached, as a share of the goal's tokens."""
    curve = mean_curve(seeds)
    if goal is None or not goal[0] or not len(curve):
        return "-"
    reached = curve[curve[:, 1] >= goal[1]]
    return f"{reached[0, 0] / goal[0]:.0%}" if len(reached) else "never"


def mean_curve(seeds: Mapping[int, Mapping[str, Any]]) -> np.ndarray:
    """[points, 2]: tokens spent and validation macro-F1, means over seeds, at each validation that all seeds had."""
    curves = [
        [(point["tokens"] or 0, point["macro_f1"]) for point in result["validation"]] for result in seeds.values()
    ]
    length = min(map(len, curves), default=0)
    return np.mean([curve[:length] for curve in curves], axis=0) if length else np.zeros((0, 2))


# -------------------------------------------------------------------------------------------- files, plots


def write_csv(path: Path, found: Found, measured: Mapping[str, Measured]) -> None:
    """One line for each split, run and metric of the scorecard."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["split", "run", "seeds", "metric", "value", "low", "high"])
        for split, runs in measured.items():
            for run, values in runs.items():
                for metric in values:
                    out.writerow([split, run, len(found[run]), metric, *measure(values[metric])])


def _label(found: Found, run: str) -> str:
    """The name of a run in a plot, with the number of its seeds if other runs have more."""
    number, most = len(found[run]), max(map(len, found.values()))
    return run if number == most else f"{run} ({number} of {most} seeds)"


def plot_scores(path: Path, found: Found, measured: Mapping[str, Measured]) -> None:
    """macro-F1 of every run on every split, with intervals, and each seed as a dot."""
    size = (5 * len(measured), 0.35 * len(found) + 1.5)
    figure, axes = plt.subplots(1, len(measured), figsize=size, layout="constrained")
    for panel, (split, of) in zip(np.atleast_1d(axes), measured.items(), strict=True):
        for y, run in enumerate(reversed(list(found))):
            if run not in of:
                continue
            value, low, high = measure(of[run]["macro_f1"])
            spread = None if low is None else [[value - low], [high - value]]
            panel.errorbar(value, y, xerr=spread, fmt="s", color="C0", capsize=3)
            seeds = [result["scores"][split]["macro_f1"] for result in found[run].values() if not result["diverged"]]
            panel.plot(seeds, [y] * len(seeds), ".", color="C1", alpha=0.7)
        panel.set_yticks(range(len(found)), [_label(found, run) for run in reversed(list(found))])
        panel.set_ylim(-0.6, len(found) - 0.4)
        panel.set_title(f"{split}: macro-F1", fontsize=10)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curves(path: Path, found: Found) -> None:
    """Validation macro-F1 over the budget, means over seeds."""
    columns = -(-len(found) // _LEGEND_ROWS)
    figure, panel = plt.subplots(figsize=(6 + 1.3 * columns, 4), layout="constrained")
    for i, (run, seeds) in enumerate(found.items()):
        curve = mean_curve(seeds)
        if len(curve):
            panel.plot(curve[:, 0] / 1e6, curve[:, 1], marker="os^v"[i % 4], markersize=3, label=_label(found, run))
    panel.set_xlabel("million forward-equivalent tokens")
    panel.set_ylabel("validation macro-F1")
    panel.grid(alpha=0.3)
    if panel.lines:
        figure.legend(loc="outside right upper", fontsize=8, ncols=columns)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_training(path: Path, found: Found) -> None:
    """Plots how steady training was: metrics of the RL steps, as means over seeds and short stretches of steps."""
    every = [result["watched"] for seeds in found.values() for result in seeds.values()]
    names = [name for name in results.WATCHED if any(watched[name] for watched in every)]
    if not names:
        return
    figure, axes = plt.subplots(2, -(-len(names) // 2), figsize=(4.2 * -(-len(names) // 2), 6), layout="constrained")
    shown = {}
    for panel, name in zip(axes.flat, names, strict=False):
        for i, (run, seeds) in enumerate(found.items()):
            curves = [result["watched"][name] for result in seeds.values() if result["watched"][name]]
            if not curves:
                continue
            length = min(map(len, curves))
            curve = np.mean([curve[:length] for curve in curves], axis=0)
            share = (np.arange(length) + 0.5) / length
            line = panel.plot(share, curve, color=f"C{i % 10}", ls=("-", "--")[i // 10 % 2], lw=1)
            shown[_label(found, run)] = line[0]
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("share of the budget", fontsize=8)
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(names) :]:
        panel.set_axis_off()
    if shown:
        figure.legend(shown.values(), shown, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _missing(sweep: Sweep) -> str:
    """A sentence about the runs without a result; empty if all have one."""
    lacking = [job for job in sweep.jobs() if not sweep.result(*job).exists()]
    if not lacking:
        return ""
    listed = ", ".join(f"{run} (seed {seed})" for run, seed in lacking)
    return f"\n{len(lacking)} of {len(list(sweep.jobs()))} runs are still missing: {listed}.\n"


def _mixed(sweep: Sweep, found: Found) -> str:
    """Which results were made with other settings than the sweep has now, where others were not; else empty."""
    settings: dict[str, list[str]] = {}
    for run, seeds in found.items():
        for seed, result in seeds.items():
            if "settings" in result:  # very old ones have none
                wanted = study.settings(sweep.get_config(f"{run},seed={seed}"), [])
                of = ", ".join(f"{name}={value}" for name, value in study.changed(result["settings"], wanted).items())
                settings.setdefault(of or "the settings of the sweep", []).append(f"{run} (seed {seed})")
    usual = max(settings, key=lambda name: len(settings[name]), default=None)
    return "".join(
        f"\nMade with other settings than the sweep has now, {of}: {', '.join(runs)}.\n"
        for of, runs in settings.items() if of != usual
    )  # fmt: skip


def write(sweep: Sweep, bootstrap: int) -> Path:
    """Writes all files; returns the table's path. Raises ConfigError if there are no results yet."""
    found = results.read(sweep)
    if not found:
        raise ConfigError(f"{sweep.result('RUN', 0).parent}: no results; python -m experiments.run makes them")
    folder = sweep.result("RUN", 0).parent
    head = f"# {sweep.name}\n" + _missing(sweep) + _mixed(sweep, found)
    every = [result["start"] for seeds in found.values() for result in seeds.values()]
    splits = [split for split in every[0] if all(split in start for start in every)]
    measured = {split: resampled(found, split, bootstrap) for split in splits}
    (folder / "table.md").write_text("\n".join([head, *map(str, tables(sweep, found, measured, bootstrap))]))
    write_csv(folder / "table.csv", found, measured)
    plot_scores(folder / "scores.png", found, measured)
    plot_curves(folder / "curves.png", found)
    plot_training(folder / "training.png", found)
    return folder / "table.md"


def main(argv: list[str]) -> None:
    """Exit code 2 for a sweep that does not exist or has no results."""
    flags.DEFINE_string("sweep", None, "A file with a SWEEP, such as experiments/main_table.py.", required=True)
    flags.DEFINE_string("results", str(study.RESULTS), "Where results are kept.")
    flags.DEFINE_integer("bootstrap", 2000, "Resamples.", lower_bound=0)
    parse_flags(argv)
    try:
        path = write(study.load(flags.FLAGS.sweep, flags.FLAGS.results), flags.FLAGS.bootstrap)
    except ConfigError as error:
        exit_with(error)
    say(path.read_text())


if __name__ == "__main__":
    main(sys.argv)
