"""Measures how well judges follow rule books that training never saw.

    python -m experiments.rulebook_variants --workdirs=runs/sft,runs/grpo,runs/agrl [--variants=5] [--pairs=200]

A variant has the steps, values and tiers of the rule book that a judge was trained with, but another table and other
words around it. It replaces that book in the prompt, so the judge must have been trained with the instructions in its
prompt (`data.style=full` or `chat`). The true steps of a pair stay; the variant's table gives its true tier. Only pairs
whose steps are all known are judged.

The command prints, and writes to `--out`, accuracy, macro-F1, adherence (the stated steps imply the stated tier, by the
table in the prompt) and step accuracy, with the judge's own rule book and as a mean over the variants.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from agrl_jax.data import pipeline
from agrl_jax.data.pairs import Pair
from agrl_jax.data.relabel import all_known, under
from agrl_jax.evaluation import intervals
from agrl_jax.evaluation.metrics import Judgements
from agrl_jax.judging import STAGES, trained
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.rulebook.variants import variant
from agrl_jax.runtime import markdown, sharding
from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags
from agrl_jax.runtime.console import say
from agrl_jax.runtime.files import write_json
from agrl_jax.training import assemble
from agrl_jax.training.run import USER_ERRORS
from experiments.table import Measure

METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1", "adherence": "adherence", "step_accuracy": "step accuracy"}


def relabelled(pairs: Sequence[Pair], book: RuleBook) -> list[Pair]:
    """The pairs whose steps are all known, with the tier that a book gives them."""
    return [under(pair, book) for pair in pairs if all_known(pair)]


# ------------------------------------------------------------------------------------------ the judges


def judge(workdir: str, stage: str, split: str, pairs: int, variants: int) -> list[tuple[RuleBook, Judgements]]:
    """The judgements of a split by a workdir's judge, with its own rule book and with each variant of it.

    Raises:
      ConfigError: the judge was trained without instructions, or has no such split.
    """
    folder = epath.Path(workdir)
    config = assemble.read_config(folder)
    if config.data.style == "terse":
        raise ConfigError(f"{workdir}: was trained with data.style=terse, whose prompts hold no rules; full or chat do")
    own, mesh = assemble.kept_rules(config, folder), sharding.make_mesh()
    found = trained.find_stage(folder, config, own, stage)
    data = assemble.load_data(config, own, folder)
    if split not in data.splits:
        raise ConfigError(f"--split={split}: not a split of {workdir}; there are {', '.join(data.splits)}")
    model = assemble.load_model(config, folder, own, mesh=mesh)
    params = assemble.for_decoding(config, model, mesh)(assemble.load_params(folder, config, model, mesh, *found), None)
    judged = []
    for book in [own, *(variant(own, seed) for seed in range(variants))]:
        model = assemble.load_model(config, folder, book, mesh=mesh)
        encoded = pipeline.encode(
            relabelled(data.splits[split], book), book, model.tokenizer, config.data.prompt_len,
            config.data.response_len, config.data.style, families=data.families,
        )  # fmt: skip
        first = np.sort(np.random.default_rng(0).permutation(len(encoded))[:pairs])  # the same pairs for every book
        evaluator = assemble.make_evaluator(config, model, mesh)
        judged.append((book, evaluator.judge(params, encoded, first, sample=False)))
        say(f"{workdir}: {book.name} judged")
    return judged


def scores(judged: Sequence[tuple[RuleBook, Judgements]], bootstrap: int) -> dict[str, dict[str, Any]]:
    """Each metric with the judge's own book, and its mean over the variants with an interval."""
    own, *others = judged
    card = intervals.score(own[1], own[0], bootstrap)
    found = {"own": {name: {key: card[name][key] for key in ("value", "low", "high")} for name in METRICS}}
    if others:
        each = [intervals.score(one, book, 0) for book, one in others]
        found["variants"] = {name: _over([card[name]["value"] for card in each], bootstrap) for name in METRICS}
    return found


def _over(values: Sequence[float], bootstrap: int) -> dict[str, float | None]:
    """The mean over the variants, with an interval by a bootstrap over variants."""
    drawn = np.random.default_rng(0).choice(values, size=(bootstrap, len(values))).mean(axis=1)
    low, high = intervals.interval(float(np.mean(values)), drawn)
    return {"value": float(np.mean(values)), "low": low, "high": high}


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row for each judge and kind of book."""
    rows = [
        [name, kind, *(str(Measure(**of[metric])) for metric in METRICS)]
        for name, kinds in found.items() for kind, of in kinds.items()
    ]  # fmt: skip
    return markdown.table(["judge", "rule book", *METRICS.values()], rows)


def main(argv: list[str]) -> None:
    """Exit code 2 for a workdir, stage or split that cannot be used."""
    flags.DEFINE_list("workdirs", None, "Of training runs.", required=True)
    flags.DEFINE_enum("stage", "rl", STAGES, "Which checkpoint of each.")
    flags.DEFINE_string("split", "b_eval", "Whose pairs are judged.")
    flags.DEFINE_integer("pairs", 200, "How many of them.", lower_bound=1)
    flags.DEFINE_integer("variants", 5, "Rule books besides the one of the training.", lower_bound=0)
    flags.DEFINE_string("out", "", "A JSON file for the figures.")
    parse_flags(argv)
    values, found = flags.FLAGS, {}
    try:
        for workdir in values.workdirs:
            judged = judge(workdir, values.stage, values.split, values.pairs, values.variants)
            found[workdir] = scores(judged, bootstrap=1000)
            if values.out:
                write_json(Path(values.out), found, indent=1)
    except USER_ERRORS as error:
        exit_with(error)
    say(table(found))


if __name__ == "__main__":
    main(sys.argv)
