"""Judges pairs of a query and an item with a trained policy: by command a file, or anything from Python.

    python -m agrl_jax.judge --checkpoint=runs/quickstart --input=pairs.csv --output=judged.parquet

The checkpoint is `smollm2-four-tier` (the judge in the box), the workdir of a training run, a folder that
`agrl_jax.export` wrote, any other Hugging Face folder, or a GGUF file. Input and output are CSV, TSV, JSON lines or
Parquet, by their names. A row has a `query`, a `title`, and what else is known of the item: `description`, `brand`,
`color`, `category`, `price`. It keeps its place and all its columns, and gets

    judge_tier          the tier
    judge_tier_from     where it comes from: `answer`, `probabilities` or `cuts`
    judge_prob_TIER     the probability of each tier, through the rule book's table (see `evaluation.probabilities`)
    judge_stated        the tier that the answer states
    judge_likeliest     the likeliest tier by the probabilities
    judge_disagree      whether these two differ
    judge_step_STEP     the value of each step of the rule book
    judge_consistent    whether these steps imply this tier
    judge_response      what the policy wrote
    judge_error         why the row could not be judged; then the others are empty

Every answer can be read, even an untrained policy's. Without free text in the rule book, the values of each part of
the answer are scored at once and the likeliest is taken; with it, answers are sampled greedily from the tokens that
lead to a well-formed response. A command that was stopped goes on where it was when it is given again.

Input, output and checkpoint may be in a bucket: gs://BUCKET/pairs.parquet. Several machines share a file by
`--shard=1/8` to `--shard=8/8`, each with an output of its own: one after the other, these hold the rows of the whole. A
model that is too large for one device is split over four by `--mesh.tensor=4`.

Training fits a temperature of the probabilities on its validation pairs, and finds there whether the stated or the
likeliest tier is the better one: that is `judge_tier`. For any other model, `--fit_temperature=labelled.csv` does both
and keeps the result with the checkpoint; until then the temperature is 1, and `judge_tier` is the stated tier.

In Python:

    from agrl_jax.judging.engine import Judge

    judge = Judge.from_checkpoint("runs/quickstart")
    judge.judge([{"query": "red shoes", "title": "Nike running shoes, red"}])[0].tier

Of a judge that states the tier first, `--steps=False` asks for the tier alone: one decision a pair. The columns of
steps are then empty. `agrl_jax.distill` makes such a judge of one that reasons first.

Tiers by cumulative probability (see `cuts`): `--fit_cuts=labelled.csv` fits cut points and keeps them with the
checkpoint; `--use_cuts` then chooses the tier by them, in place of the one in the response.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from absl import flags

from agrl_jax.judging import PREFIX, checkpoint_flags
from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags
from agrl_jax.runtime.memory import with_huge_pages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agrl_jax.judging.engine import Judge
    from agrl_jax.rulebook.schema import RuleBook

_LISTS = ("qrels", "quepid", "opensearch")  # of judgements, for other tools


def _define_flags() -> None:
    checkpoint_flags.define(batch_size=64)
    flags.adopt_module_key_flags(checkpoint_flags)  # so that --help shows them
    flags.DEFINE_string("input", None, "A .csv, .tsv, .jsonl or .parquet file with the columns query and title.")
    flags.DEFINE_string("output", None, "Where to write the judged rows: a file of these kinds.")
    flags.DEFINE_string("shard", "1/1", "i/n: judge piece i of n pieces of the file, 1/8 to 8/8 by eight machines.")
    flags.DEFINE_bool("overwrite", False, "Replace an output that exists, and what another judge or input has begun.")
    flags.DEFINE_string("prefix", PREFIX, "Prefix of the columns that are added.")
    flags.DEFINE_string("qrels", None, "Where to write the tiers as TREC qrels too; see agrl_jax.rank.")
    flags.DEFINE_string("quepid", None, "Where to write them as the ratings that Quepid imports, CSV.")
    flags.DEFINE_string("opensearch", None, "Where to write them as the judgment list that OpenSearch imports, JSON.")
    flags.DEFINE_string("fit_cuts", None, "Labelled pairs: fit cut points on them, and keep them with the checkpoint.")
    flags.DEFINE_string("fit_temperature", None, "Labelled pairs: fit the temperature on them, and keep it likewise.")
    flags.DEFINE_string("columns", "", "The files' names of our columns, where they differ: '{title: product_title}'.")
    flags.DEFINE_string("labels", "", "For fits: the tier of each label, by name or grade: '{E: 4, S: 3}'.")
    flags.DEFINE_string("bins", "", "For fits: the lowest rating of each tier but the worst: '[1.5, 2.5, 3.5]'.")


def run(values: flags.FlagValues) -> None:
    """Does what the flags ask for."""
    from agrl_jax.data.format import PairsFormat  # after the flags: JAX takes seconds to start
    from agrl_jax.judging.files import check_free, judge_file, parse_shard
    from agrl_jax.runtime import processes
    from agrl_jax.runtime.console import say
    from agrl_jax.runtime.files import check_bucket, check_writable

    processes.require_one("judges")
    shard = parse_shard(values.shard)
    for path in filter(None, (values.input, values.output, values.checkpoint)):
        check_bucket(path)
    if values.output:
        check_free(values.output, values.overwrite)  # before a model is loaded
    for name in _LISTS:
        if values[name].value:
            check_writable(values[name].value, f"--{name}")
    form = PairsFormat.parse(values.columns, values.labels, values.bins)
    if values.use_cuts and values.fit_temperature and not values.fit_cuts:
        raise ConfigError("--use_cuts with --fit_temperature: cut points depend on the temperature; add --fit_cuts")
    fits = values.fit_cuts or values.fit_temperature
    judge = checkpoint_flags.load(values, values.use_cuts and not fits)
    if values.fit_temperature:
        judge.fit_temperature(values.fit_temperature, form)
    if values.fit_cuts:
        fitted = judge.fit_cuts(values.fit_cuts, form, values.use_cuts)
        say(f"cut points {fitted.cuts}: macro-F1 {fitted.macro_f1:.3f} on {values.fit_cuts}, "
            f"{fitted.macro_f1_before:.3f} without")  # fmt: skip
    say(_how(judge))
    if values.input:
        names = (values.input, values.output, values.prefix)
        say(str(judge_file(judge, *names, values.overwrite, form.columns, shard)))
        say(f"written to {values.output}")
        _write_lists(values, judge.book, form.columns)


def _write_lists(values: flags.FlagValues, book: RuleBook, columns: Mapping[str, str]) -> None:
    """Writes the judged file as the judgement lists that are asked for."""
    from agrl_jax.data.format import PairsFormat
    from agrl_jax.judging import lists
    from agrl_jax.runtime.console import say

    targets = [(name, values[name].value) for name in _LISTS if values[name].value]
    if not targets:
        return
    form = PairsFormat(columns={**columns, f"{PREFIX}tier": f"{values.prefix}tier"})
    judged = lists.read_judged_items(values.output, book, lists.item_column([values.output], columns), form)
    for name, path in targets:
        say("\n".join(f"written to {one}" for one in lists.WRITERS[name](path, judged)))


def _how(judge: Judge) -> str:
    """How the judge comes to its tiers and probabilities."""
    fitted = judge.calibration
    if fitted is None:
        return "no temperature is kept for this checkpoint: probabilities are as they are (see --fit_temperature)"
    return (
        f"probabilities at temperature {fitted.temperature:.2f}, tiers from {judge.tier_from}; on {fitted.pairs:,} "
        f"validation pairs macro-F1 {fitted.macro_f1_answer:.3f} from answer, {fitted.macro_f1_probabilities:.3f} "
        f"from probabilities, NLL {fitted.nll:.3f} ({fitted.nll_before:.3f} at temperature 1)"
    )


def main(argv: list[str]) -> None:
    """Exit codes: 2 for bad input, 130 if stopped by Ctrl-C."""
    _define_flags()
    parse_flags(argv)
    values = flags.FLAGS
    if any(values[name].value for name in _LISTS) and not values.output:
        exit_with(ConfigError("--qrels, --quepid and --opensearch need --input and --output"))
    if bool(values.input) != bool(values.output) or not (values.input or values.fit_cuts or values.fit_temperature):
        exit_with(ConfigError("--input and --output are both needed, or --fit_cuts or --fit_temperature alone"))
    from agrl_jax.judging.files import USER_ERRORS

    try:
        run(values)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    except USER_ERRORS as error:
        exit_with(error)


if __name__ == "__main__":
    with_huge_pages()
    main(sys.argv)
