"""Scores a workdir's policy, on whole splits or any number of pairs.

    python -m agrl_jax.evaluate --workdir=runs/quickstart --pairs=0

Training evaluates fixed subsets; here `--pairs=0` takes every pair. Prints the scorecard and writes it,
as `scorecard.json` is written, to `--out` (default: WORKDIR/scorecard_full.json), where other stages stay,
and other splits that were scored at the same step.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from agrl_jax.runtime.config import define_distributed_flag, exit_with, parse_flags
from agrl_jax.runtime.memory import with_huge_pages

if TYPE_CHECKING:  # JAX takes seconds to start: functions import what needs it, so that flags are answered at once
    from agrl_jax.evaluation import metrics


def evaluate(workdir: str, stages: list[str], splits: list[str], pairs: int) -> metrics.Scorecards:
    """Scorecards `{stage: {split: scores}}` of checkpoints of a workdir; stages are named as training names them."""
    from agrl_jax.data import pipeline
    from agrl_jax.evaluation import intervals
    from agrl_jax.judging import trained
    from agrl_jax.runtime import processes, sharding
    from agrl_jax.runtime.checkpoint import SFT_END
    from agrl_jax.runtime.console import progress, say
    from agrl_jax.training import assemble

    if not stages:
        raise ValueError(f"--stages: name at least one of {', '.join(trained.STAGES)}")
    folder = epath.Path(workdir)
    config = assemble.read_config(folder)
    rules = assemble.kept_rules(config, folder)
    found = {stage: trained.find_stage(folder, config, rules, stage) for stage in stages}
    with processes.first_alone("load"):
        data = assemble.load_data(config, rules, folder)
    unknown = [name for name in splits if name not in data.splits]
    if unknown:
        raise ValueError(f"--splits: {unknown[0]!r} is not a split of {workdir}; there are {', '.join(data.splits)}")
    if changed := trained.changed_pairs(folder, next(iter(found.values())), data.digests):
        say(f"pairs that have changed since training: {', '.join(changed)}; scored is what they are now")
    mesh = sharding.make_mesh(*(config.mesh[axis] for axis in sharding.AXES))
    model = assemble.load_model(config, folder, rules, mesh=mesh)
    splits = splits or list(data.eval_splits)
    encoded = assemble.encode(config, model, data, dict.fromkeys([*splits, "validation"]))
    validation = encoded["validation"] if "validation" in splits else encoded.pop("validation")
    known = pipeline.stratified(validation, config.eval.validation_pairs, config.data.seed)
    rows = {name: pipeline.stratified(split, pairs or len(split), config.data.seed) for name, split in encoded.items()}
    evaluator = assemble.make_evaluator(config, model, mesh)
    for_decoding = assemble.for_decoding(config, model, mesh)
    cards: metrics.Scorecards = {}
    judged_pairs = len(known) + sum(len(some) + evaluator.sampled(len(some)) for some in rows.values())
    with progress("evaluate", len(stages) * judged_pairs) as bar:
        for stage in stages:
            params = for_decoding(assemble.load_params(folder, config, model, mesh, *found[stage]), None)
            settings = {"settings": assemble.card_settings(config, found[stage].step, pairs)}
            temperature = evaluator.calibrate(params, validation, known, bar.advance).temperature
            card = cards.setdefault({SFT_END: "sft", "rl": config.method}.get(stage, stage), {})
            for name, split in encoded.items():
                judged = evaluator.judge(params, split, rows[name], temperature=temperature, advance=bar.advance)
                scores = intervals.score(judged, rules, bootstrap=config.eval.bootstrap, seed=config.seed)
                card[name] = scores | settings
    return cards


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_list("stages", ["sft_end", "rl"], "What to score: sft_end, rl (its end), best (of rl, by validation).")
    flags.DEFINE_list("splits", [], "Splits to score on; by default all that the scorecard has.")
    flags.DEFINE_integer("pairs", 0, "Pairs of each split, stratified; 0: all.", lower_bound=0)
    flags.DEFINE_string("out", None, "Where to write the scorecard.")
    define_distributed_flag()


def main(argv: list[str]) -> None:
    """Exit code 2 for a workdir, stage or split that is not there."""
    _define_flags()
    parse_flags(argv)
    values = flags.FLAGS
    import jax

    from agrl_jax.evaluation import tables
    from agrl_jax.runtime import processes
    from agrl_jax.runtime.console import say
    from agrl_jax.runtime.files import check_writable

    out = epath.Path(values.out or epath.Path(values.workdir) / "scorecard_full.json")
    try:
        check_writable(out, "--out")
        if out.exists():
            tables.read(out)  # refuses what is no scorecard
        processes.connect(values.distributed)
        cards = evaluate(values.workdir, values.stages, values.splits, values.pairs)
    except ValueError as error:
        exit_with(error)
    except Exception as error:
        processes.leave(error)
    with processes.first_alone("write"):  # the others leave after it
        if jax.process_index() == 0:
            tables.write(out, cards)
    say(tables.table(cards))
    say(f"written to {out}")


if __name__ == "__main__":
    with_huge_pages()
    main(sys.argv)
