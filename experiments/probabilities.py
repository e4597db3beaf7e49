"""Measures what probabilities through the rule book are worth, on finished runs of several seeds.

    python -m experiments.probabilities --workdirs=runs/quick-0,runs/quick-1,runs/quick-2

The runs have one config and different seeds. The best checkpoint of each run judges b_eval and w_eval. "Before" means
the probabilities of the tier's text after the policy's own steps, and the tier that the answer states. "After" means
the probabilities through the decision table, at the temperature fitted on validation, and the likeliest tier.

The command writes `experiments/results/probabilities/SEED.json` for each run, and `table.md` from all such files, so
that runs can be added one by one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from agrl_jax import recipes
from agrl_jax.data import pipeline
from agrl_jax.data.pipeline import EncodedSplit
from agrl_jax.evaluation import intervals, probabilities
from agrl_jax.evaluation.evaluator import judge_batch
from agrl_jax.evaluation.metrics import Judgements
from agrl_jax.judging import trained
from agrl_jax.policy.scoring import instructed
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.runtime import markdown, sharding
from agrl_jax.runtime.config import ConfigError, exit_with, flatten, parse_flags
from agrl_jax.runtime.console import progress, say
from agrl_jax.runtime.files import write_json, write_text
from agrl_jax.training import assemble
from agrl_jax.types import Params

RESULTS = Path(__file__).parent / "results" / "probabilities"
SPLITS = ("b_eval", "w_eval")
METRICS = {"auc": "AUC Good/Bad", "nll": "NLL [nats]", "ece": "ECE", "macro_f1": "macro-F1"}


def measure(workdir: epath.Path, stage: str, pairs: int) -> dict[str, Any]:
    """`{seed, temperature, pairs, b_eval: {before: {auc, …}, after: {…}}, w_eval: …}` of a run's checkpoint.

    Args:
      workdir: of a finished run.
      stage: `best`, `rl` or `sft_end`.
      pairs: of each split, stratified; 0: all.
    """
    config = assemble.read_config(workdir)
    rules = assemble.kept_rules(config, workdir)
    found = trained.find_stage(workdir, config, rules, stage)
    data = assemble.load_data(config, rules, workdir)
    mesh = sharding.make_mesh()
    model = assemble.load_model(config, workdir, rules, mesh=mesh)
    encoded = assemble.encode(config, model, data, [*SPLITS, "validation"])
    evaluator = assemble.make_evaluator(config, model, mesh)
    loaded = assemble.load_params(workdir, config, model, mesh, *found)
    params = assemble.for_decoding(config, model, mesh)(loaded, None)
    validation = encoded["validation"]
    known = pipeline.stratified(validation, config.eval.validation_pairs, config.data.seed)
    rows = {name: pipeline.stratified(encoded[name], pairs, config.data.seed) for name in SPLITS}
    with progress("judge", len(known) + 2 * sum(map(len, rows.values()))) as bar:
        temperature = evaluator.calibrate(params, validation, known, bar.advance).temperature
        result = {"seed": config.seed, "stage": stage, "temperature": temperature}
        for name in SPLITS:
            split, sizes = encoded[name], (config.eval.batch_size, config.data.response_len)
            after = evaluator.judge(params, split, rows[name], False, temperature, bar.advance)
            alone = tier_alone(model, *sizes, params, split, rows[name])
            bar.advance(len(alone))
            before = dataclasses.replace(after, probs=alone)
            result[name] = {"pairs": len(after)} | compare(before, after, rules)
    return result | {"config": {name: value for name, value in flatten(config).items() if name != "seed"}}


def tier_alone(
    model: assemble.Model, batch_size: int, length: int, params: Params, split: EncodedSplit, rows: np.ndarray
) -> np.ndarray:
    """[N, tiers] probabilities of the tiers' texts, after the part of the policy's greedy answer before the tier."""
    texts = probabilities.statements(model.book, model.tokenizer, len(model.tables.token_class))
    texts = dataclasses.replace(texts, scored=(texts.order.index(len(model.book.steps)),))
    policy, instruct = instructed(model.policy, model.instructions)
    judge = jax.jit(partial(judge_batch, policy, model.tables, texts, length))
    params, found = jax.jit(instruct)(params), []
    for batch, mask in pipeline.eval_batches(split, batch_size, rows):
        answer = jax.device_get(judge(params, batch))
        probs = np.exp(answer["part_logprobs"][:, 0, : len(model.book.tiers)].astype(np.float64))
        found.append(np.where(answer["well_formed"][:, None], probs, 1 / probs.shape[1])[mask])
    return np.concatenate(found)


def compare(before: Judgements, after: Judgements, rules: RuleBook) -> dict[str, dict[str, float | None]]:
    """The metrics of both. macro-F1 is that of the stated tiers before, and that of the likeliest tiers after."""
    scored = {name: intervals.score(one, rules, bootstrap=0) for name, one in (("before", before), ("after", after))}
    found = {name: {metric: card[metric]["value"] for metric in METRICS} for name, card in scored.items()}
    found["after"]["macro_f1"] = scored["after"]["likeliest_macro_f1"]["value"]
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation (ddof 1) over seeds, then each seed."""
    columns = ["", *(f"{split}, {when}" for split in SPLITS for when in ("before", "after"))]

    def cells(metric: str, some: Sequence[dict[str, Any]]) -> list[str]:
        values = [[one[split][when][metric] for one in some] for split in SPLITS for when in ("before", "after")]
        return [_spread(of) for of in values]

    rows = [[title, *cells(metric, results)] for metric, title in METRICS.items()]
    each = [
        [f"seed {one['seed']}: {title}", *cells(metric, [one])] for one in results for metric, title in METRICS.items()
    ]
    seeds = ", ".join(str(one["seed"]) for one in results)
    temperatures = ", ".join(f"{one['temperature']:.2f}" for one in results)
    return (
        f"Seeds {seeds}: mean ± standard deviation. Temperatures {temperatures}. Pairs of each split: "
        f"{', '.join(str(results[0][split]['pairs']) for split in SPLITS)}.\n\n{markdown.table(columns, rows)}\n\n"
        f"{markdown.table(columns, each)}\n"
    )


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results in a folder, in the order of seeds. A field that the config of a result lacks has its default.

    Raises:
      ConfigError: their configs differ in more than the seed.
    """
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem))]
    configs = [_acting(flatten(recipes.base()) | one["config"]) for one in found]
    for one, config in zip(found[1:], configs[1:], strict=True):
        differ = [name for name in config if config[name] != configs[0].get(name)]
        if differ or one["stage"] != found[0]["stage"]:
            raise ConfigError(
                f"{folder}: the runs of seeds {found[0]['seed']} and {one['seed']} differ in "
                f"{', '.join(differ) or 'stage'}; a table is of one config"
            )
    return found


def _acting(config: dict[str, Any]) -> dict[str, Any]:
    """The config without the seed, and without the fields of adapters if there are none."""
    without = ("seed",) if config["lora.rank"] else ("seed", "lora.")
    return {name: value for name, value in config.items() if not name.startswith(without)}


def _define_flags() -> None:
    flags.DEFINE_list("workdirs", [], "Of finished runs; with none, the table is made of the results that are there.")
    flags.DEFINE_enum("stage", "best", ["best", "rl", "sft_end"], "Which checkpoint.")
    flags.DEFINE_integer("pairs", 500, "Of each split, stratified; 0: all.", lower_bound=0)
    flags.DEFINE_string("results", str(RESULTS), "Where the results lie.")


def main(argv: list[str]) -> None:
    """Exit code 2 for bad input."""
    _define_flags()
    parse_flags(argv)
    values = flags.FLAGS
    folder = Path(values.results)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for workdir in values.workdirs:
            result = measure(epath.Path(workdir), values.stage, values.pairs)
            write_json(folder / f"{result['seed']}.json", result)
        results = read_results(folder)
        if not results:
            raise ConfigError(f"{folder}: no results yet: --workdirs=RUN,RUN")
    except (ValueError, OSError) as error:
        exit_with(error)
    write_text(folder / "table.md", table(results))
    say(table(results))


if __name__ == "__main__":
    main(sys.argv)
