"""Scores a workdir's policy, on whole splits or any number of pairs; and any judge on any labelled file.

    python -m agrl_jax.evaluate --workdir=runs/quickstart --pairs=0
    python -m agrl_jax.evaluate --checkpoint=my_judge --pairs=human.csv
    python -m agrl_jax.evaluate --judged=gpt.csv --columns="{judge_tier: gpt, label: human}"

Training scores fixed subsets; `--pairs=0` takes every pair. The command prints the scorecard, and writes it in the form
of `scorecard.json` to `--out` (default: WORKDIR/scorecard_full.json). It keeps the other stages in that file, and the
other splits that were scored at the same step.

`--checkpoint` is anything that `agrl_jax.judge` takes, scored as it judges. `--judged` is a file of labelled pairs in
which anyone's judgements stand beside the labels, by default in the columns that `agrl_jax.judge` writes; an empty
`judge_tier` counts as wrong. Both write FILE.scorecard.json, and FILE.errors.csv (`--errors`) with the pairs that were
judged wrongly: those off by the most grades first, then those with the least probability of the label.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from agrl_jax.judging import STAGES
from agrl_jax.judging.checkpoint_flags import AXES
from agrl_jax.runtime.config import RULES, check_constrained, define_distributed_flag, exit_with, parse_flags
from agrl_jax.runtime.memory import with_huge_pages

if TYPE_CHECKING:  # JAX takes seconds to start: functions import what needs it, so that flags are answered at once
    from agrl_jax.evaluation import metrics


def evaluate(
    workdir: str, stages: list[str], splits: list[str], pairs: int, constrained: bool | None = None,
    axes: Mapping[str, int] | None = None,
) -> metrics.Scorecards:
    """Scorecards `{stage: {split: scores}}` of checkpoints of a workdir; stages are named as training names them.

    No `stages`: the end of the warm start, and the last checkpoint of what came after it, if anything did.
    `constrained` takes the place of `eval.constrained`, if given, and `axes` those of the run's mesh.
    """
    from agrl_jax.data import pipeline
    from agrl_jax.evaluation import intervals
    from agrl_jax.judging import trained
    from agrl_jax.runtime import processes, sharding
    from agrl_jax.runtime.checkpoint import SFT_END
    from agrl_jax.runtime.console import progress, say
    from agrl_jax.runtime.files import check_bucket
    from agrl_jax.training import assemble

    check_bucket(workdir)
    folder = epath.Path(workdir)
    config = assemble.read_config(folder)
    if constrained is not None:
        config.eval.constrained = constrained
    rules = assemble.kept_rules(config, folder)
    stages = stages or trained.stages_of(folder) or [SFT_END]
    found = {stage: trained.find_stage(folder, config, rules, stage) for stage in stages}
    with processes.first_alone("load"):
        data = assemble.load_data(config, rules, folder)
    unknown = [name for name in splits if name not in data.splits]
    if unknown:
        raise ValueError(f"--splits: {unknown[0]!r} is not a split of {workdir}; there are {', '.join(data.splits)}")
    if changed := trained.changed_pairs(folder, next(iter(found.values())), data.digests):
        say(f"pairs that have changed since training: {', '.join(changed)}; they are scored as they are now")
    config.mesh.update(axes or {})
    mesh = sharding.make_mesh(*(config.mesh[axis] for axis in sharding.AXES))
    config.eval.batch_size += -config.eval.batch_size % sharding.data_shards(mesh)  # no figure depends on it
    model = assemble.load_model(config, folder, rules, mesh=mesh)
    check_constrained(config, model.tables.shortest)
    splits = splits or list(data.eval_splits)
    encoded = assemble.encode(config, model, data, dict.fromkeys([*splits, "validation"]))
    validation = encoded["validation"] if "validation" in splits else encoded.pop("validation")
    known = pipeline.stratified(validation, config.eval.validation_pairs, config.data.seed)
    rows = {name: pipeline.stratified(split, pairs, config.data.seed) for name, split in encoded.items()}
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


def score_file(values: flags.FlagValues) -> None:
    """Scores a checkpoint, or judgements, on the labelled pairs of a file. Exit code 2 for bad input."""
    from agrl_jax.data.format import PairsFormat
    from agrl_jax.evaluation import tables
    from agrl_jax.judging import labelled
    from agrl_jax.judging.engine import Judge
    from agrl_jax.judging.files import USER_ERRORS
    from agrl_jax.judging.trained import Settings
    from agrl_jax.rulebook import book
    from agrl_jax.runtime.console import say
    from agrl_jax.runtime.files import check_writable

    file = epath.Path(values.judged or values.pairs)
    out = epath.Path(values.out or file.with_suffix(".scorecard.json"))
    listed = epath.Path(values.errors or file.with_suffix(".errors.csv"))
    try:
        form = PairsFormat.parse(values.columns, values.labels)
        check_writable(out, "--out")
        check_writable(listed, "--errors")
        if values.checkpoint:
            judge = Judge.from_checkpoint(
                values.checkpoint, stage=values.stage, settings=Settings(values.rulebook, values.order),
                batch_size=values.batch_size, use_cuts=values.use_cuts, steps=values.steps,
            )  # fmt: skip
            rules, scored = judge.book, labelled.judge_pairs(judge, file, form)
        else:
            rules = book.load(values.rulebook or "four_tier", values.order)
            scored = labelled.read_judged(file, rules, form)
        cards = {values.checkpoint or "judged": {file.stem: scored.scores(rules)}}
        errors = labelled.worst_first(scored, rules)
        tables.write(out, cards)
        labelled.write_errors(listed, errors)
    except (*USER_ERRORS, ValueError) as error:
        exit_with(error)
    say(tables.table(cards))
    say(labelled.summary(scored, errors))
    say(f"written to {out} and {listed}")


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The workdir of a training run, to score on its splits.")
    flags.DEFINE_string("checkpoint", None, "A judge to score on the file --pairs.")
    flags.DEFINE_string("judged", None, "A file of labelled pairs with judgements.")
    flags.DEFINE_string("columns", "", "Of a file: its names of our columns, where they differ: {label: human}.")
    flags.DEFINE_string("labels", "", "Of a file: the tier of each label, by name or grade: {E: 4, S: 3}.")
    flags.DEFINE_string("errors", None, "Of a file: where to write the pairs that were judged wrongly, as CSV.")
    flags.DEFINE_string("rulebook", None, "The rule book of --judged, or of a model that agrl_jax did not train.")
    flags.DEFINE_enum("order", None, RULES["rulebook.order"].choices, "The order of its responses.")
    flags.DEFINE_enum("stage", "best", STAGES, "The stage of a workdir that is the --checkpoint.")
    flags.DEFINE_bool("use_cuts", False, "Choose tiers by the cut points that were kept with the checkpoint.")
    flags.DEFINE_bool("steps", True, "False: the tier alone, of a --checkpoint that states it first.")
    flags.DEFINE_integer("batch_size", 64, "Pairs of a file judged at once.", lower_bound=1)
    flags.DEFINE_list("stages", [], "sft_end, rl (the last of RL), best (of RL); by default the first two.")
    flags.DEFINE_list("splits", [], "Splits to score on; by default all that the scorecard has.")
    flags.DEFINE_string("pairs", "0", "How many of each split, stratified; 0: all. With --checkpoint: a file.")
    flags.DEFINE_bool("constrained", None, "Of a workdir: judge under the grammar; by default as in eval.constrained.")
    for axis in AXES:
        flags.DEFINE_integer(f"mesh.{axis}", None, "Of a workdir: devices along this axis; by default as in training.")
    flags.DEFINE_string("out", None, "Where to write the scorecard.")
    define_distributed_flag()


def _axes(values: flags.FlagValues) -> dict[str, int]:
    given = {axis: values[f"mesh.{axis}"].value for axis in AXES}
    return {axis: size for axis, size in given.items() if size is not None}


def main(argv: list[str]) -> None:
    """Exit code 2 for a workdir, stage or split that is not there."""
    _define_flags()
    parse_flags(argv)
    values = flags.FLAGS
    if sum(map(bool, (values.workdir, values.checkpoint, values.judged))) != 1:
        exit_with(ValueError("one of --workdir, --checkpoint and --judged is needed"))
    if values.workdir and not values.pairs.isdecimal():
        exit_with(ValueError(f"--pairs={values.pairs} should be a whole number >= 0; a file goes with --checkpoint"))
    if values.checkpoint and values.pairs.isdecimal():
        exit_with(ValueError("--checkpoint is scored on a file: --pairs=human.csv"))
    if not values.workdir:
        return score_file(values)
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
        pairs, axes = int(values.pairs), _axes(values)
        cards = evaluate(values.workdir, values.stages, values.splits, pairs, values.constrained, axes)
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
