"""Says which pairs to label next, and which labels are likely errors.

    python -m agrl_jax.suggest --input=pool.parquet --checkpoint=runs/quickstart --number=200 --out=to_label.csv
    python -m agrl_jax.suggest --judged=judged.csv,gpt.csv --labelled=mine.csv --out=to_label.csv
    python -m agrl_jax.suggest --doubt --input=mine.csv --checkpoint=my_judge --out=to_check.csv

The judges are checkpoints, as `agrl_jax.judge` takes them, files that it has judged, or both. A judged file holds the
rows of `--input`, and can replace it. Judge a long pool first, with `agrl_jax.judge`, which resumes where it was
stopped.

A pair is worth a label where a judge is unsure of its tier, judges are sure of different tiers, steps do not imply
their tier, or a row of the decision table decides it that no label has met. `--by` takes some of these reasons. Rows of
the pool with a `label`, and the pairs of `--labelled`, are left out, and the rows of the table that they meet are not
new.

The output holds the rows as they are, an empty `label`, an empty column for each step, and in `suggest_because` the
reasons. Once it is labelled, `data.source=pairs` trains on it.

With `--doubt` the input is labelled. The output lists the labels that are most likely errors: another tier is
likelier, the table contradicts the label, or the same pair is labelled otherwise in another row. A judge does not doubt
what it was trained on; take one that was not trained on these pairs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from absl import flags

from agrl_jax.judging import REASONS, STAGES
from agrl_jax.runtime.config import RULES, ConfigError, exit_with, parse_flags
from agrl_jax.runtime.memory import with_huge_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agrl_jax.data.format import PairsFormat
    from agrl_jax.data.rows import RowFile
    from agrl_jax.judging.engine import Judge
    from agrl_jax.judging.suggest import Suggestion
    from agrl_jax.rulebook.schema import RuleBook

    _Chosen = tuple[RowFile, RuleBook, list[Suggestion]]


def _define_flags() -> None:
    flags.DEFINE_string("input", None, "The pool: a .csv, .tsv, .jsonl or .parquet file with query and title.")
    flags.DEFINE_list("checkpoint", [], "The judges: workdirs, Hugging Face folders or GGUF files.")
    flags.DEFINE_list("judged", [], "Files with judgements of the pool.")
    flags.DEFINE_string("labelled", None, "A file of pairs that are labelled already.")
    flags.DEFINE_bool("doubt", False, "The input is labelled: list the labels that are likely errors.")
    flags.DEFINE_integer("number", 200, "How many rows at most.", lower_bound=1)
    flags.DEFINE_multi_enum("by", list(REASONS), REASONS, "A reason to count; may be given several times.")
    flags.DEFINE_integer("per_rule", 3, "Pairs of each row of the table that is not yet met.", lower_bound=0)
    flags.DEFINE_integer("per_query", 0, "How many pairs of one query at most; 0: any number.", lower_bound=0)
    flags.DEFINE_string("out", "to_label.csv", "Where to write the rows: .csv, .tsv, .jsonl or .parquet.")
    flags.DEFINE_string("columns", "", "The files' names of our columns, where they differ: '{title: product_title}'.")
    flags.DEFINE_string("labels", "", "The tier of each label, by name or grade: '{E: 4, S: 3}'.")
    flags.DEFINE_string("bins", "", "The lowest rating of each tier but the worst: '[1.5, 2.5, 3.5]'.")
    flags.DEFINE_string("rulebook", None, "The rule book of judged files, or of a model not trained by agrl_jax.")
    flags.DEFINE_enum("order", None, RULES["rulebook.order"].choices, "The order of its responses.")
    flags.DEFINE_enum("stage", "best", STAGES, "Of workdirs.")
    flags.DEFINE_integer("batch_size", 64, "Pairs judged at once.", lower_bound=1)


def run(values: flags.FlagValues) -> list[Suggestion]:
    """Writes the file, and returns what it holds."""
    from agrl_jax.data.format import PairsFormat
    from agrl_jax.judging import suggest
    from agrl_jax.rulebook import book
    from agrl_jax.runtime.files import check_writable

    check_writable(values.out, "--out")
    suggest.check_kind(values.out)
    form = PairsFormat.parse(values.columns, values.labels, values.bins)
    source = values.input or values.judged[0]
    rules = None if values.checkpoint else book.load(values.rulebook or "four_tier", values.order)
    work = _doubt if values.doubt else _suggest
    file, rules, chosen = work(values, source, form, rules)
    suggest.write(values.out, file, chosen, rules, form.columns, keep_labels=values.doubt)
    return chosen


def _suggest(values: flags.FlagValues, source: str, form: PairsFormat, rules: RuleBook | None) -> _Chosen:
    from agrl_jax.data.pairs import read_labelled
    from agrl_jax.judging import suggest

    own, pool, opinions = suggest.without_judgements(form), None, []

    def opened(rules: RuleBook) -> suggest.Pool:
        labelled = read_labelled(values.labelled, rules, own).pairs if values.labelled else []
        return suggest.open_pool(source, own.columns, labelled)

    for judge in _judges(values):
        rules = rules or judge.book
        _check_same_tiers(rules, judge)
        pool = pool or opened(rules)
        opinions.append(suggest.ask(judge, pool))
        del judge  # before the next one is loaded
    pool = pool or opened(rules)
    opinions += [suggest.read_opinions(path, pool, rules, form) for path in values.judged]
    files = [values.labelled] if values.labelled else []
    files += [source] if pool.columns["label"] in pool.file.names else []
    met = suggest.met_rows(files, rules, own)
    chosen = suggest.choose(opinions, pool, rules, values.number, met, values.by, values.per_rule, values.per_query)
    return pool.file, rules, chosen


def _doubt(values: flags.FlagValues, source: str, form: PairsFormat, rules: RuleBook | None) -> _Chosen:
    from agrl_jax.data.pairs import read_labelled
    from agrl_jax.data.rows import open_rows
    from agrl_jax.judging import labelled, suggest

    scored, own = [], suggest.without_judgements(form)
    for judge in _judges(values):
        rules = rules or judge.book
        _check_same_tiers(rules, judge)
        scored.append(labelled.judge_pairs(judge, source, own))
        del judge  # before the next one is loaded
    stated = read_labelled(source, rules, own)
    for path in values.judged:
        scored.append(labelled.read_judged(path, rules, form))
        suggest.check_rows(scored[-1], path, stated.pairs, source)
    return open_rows(source), rules, suggest.doubts(scored, stated.contradicting, rules, values.number)


def _judges(values: flags.FlagValues) -> Iterator[Judge]:
    from agrl_jax.judging.engine import Judge
    from agrl_jax.judging.trained import Settings

    settings = Settings(values.rulebook, values.order)
    for path in values.checkpoint:
        yield Judge.from_checkpoint(path, stage=values.stage, settings=settings, batch_size=values.batch_size)


def _check_same_tiers(rules: RuleBook, judge: Judge) -> None:
    if (rules.tiers, rules.steps) != (judge.book.tiers, judge.book.steps):
        raise ConfigError("the judges have rule books with different tiers or steps, and cannot be compared")


def main(argv: list[str]) -> None:
    """Exit code 2 for bad input."""
    _define_flags()
    parse_flags(argv)
    values = flags.FLAGS
    if not (values.checkpoint or values.judged):
        exit_with(ConfigError("a judge is needed: --checkpoint or --judged"))
    if values.checkpoint and not values.input:
        exit_with(ConfigError("--checkpoint judges a pool: --input=pool.csv"))
    from agrl_jax.judging.files import USER_ERRORS
    from agrl_jax.runtime.console import say

    try:
        chosen = run(values)
    except (*USER_ERRORS, ValueError, OSError) as error:
        exit_with(error)
    for one in chosen[:10]:
        say(f"row {one.row}: {one.score:.2f}: {one.because}")
    say(f"{len(chosen):,} rows written to {values.out}")


if __name__ == "__main__":
    with_huge_pages()
    main(sys.argv)
