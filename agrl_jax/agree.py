"""Measures how far a judge agrees with people, beside how far people agree with each other.

    python -m agrl_jax.agree --judged=judged.csv --raters=ann,ben,cleo --out=agreement.html
    python -m agrl_jax.agree --judged=judged.csv --rater=who

The file holds judged pairs, as `agrl_jax.judge` writes them, that several people have rated: a column for each of
`--raters`, or a row for each rating, with the rater's name in the column `--rater` and the tier in `label`. A tier is
given by name or grade; an empty cell is no rating. `--columns="{query: search}"` and `--labels="{E: 4}"` translate
other names.

The page, and the JSON file beside it, hold Krippendorff's alpha of the people, without and with the judge among them;
agreement, Cohen's kappa and quadratic-weighted kappa of every two raters, of the judge with the majority, and of each
rater with the majority of the others, all with 95% intervals by query; the judge by tier and family; and which pairs to
leave to people for an agreement of `--wanted`.
"""

from __future__ import annotations

import sys
from typing import Any

from absl import flags
from etils import epath

from agrl_jax.runtime.config import exit_with, parse_flags


def _define_flags() -> None:
    flags.DEFINE_string("judged", None, "A file of judged pairs that people have rated.", required=True)
    flags.DEFINE_list("raters", [], "The columns that hold their ratings.")
    flags.DEFINE_string("rater", "", "The column that names the rater, in a file with one row a rating.")
    flags.DEFINE_string("columns", "", "The file's names of our columns, where they differ: {query: search}.")
    flags.DEFINE_string("labels", "", "The tier of each rating, by name or grade: {E: 4, S: 3}.")
    flags.DEFINE_string("rulebook", "four_tier", "The rule book whose tiers the file has.")
    flags.DEFINE_float("wanted", 0.9, "The agreement with the majority to reach.", lower_bound=0, upper_bound=1)
    flags.DEFINE_integer("bootstrap", 1000, "Resamples of the intervals.", lower_bound=0)
    flags.DEFINE_string("out", "agreement.html", "Where to write the page.")


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Writes the page and the JSON file, and returns what they hold."""
    from agrl_jax.data.format import PairsFormat
    from agrl_jax.evaluation.html import render
    from agrl_jax.judging import raters
    from agrl_jax.rulebook import book
    from agrl_jax.runtime.files import check_writable, write_json, write_text

    out = epath.Path(values.out)
    check_writable(out, "--out", beside=".json")
    rules = book.load(values.rulebook)
    form = PairsFormat.parse(values.columns, values.labels)
    ratings = raters.read_ratings(values.judged, rules, values.raters, values.rater, form)
    found = raters.report(ratings, rules, values.wanted, values.bootstrap)
    write_text(out, render("agreement", {}, title=str(values.judged), found=found))
    write_json(out.with_suffix(".json"), found)
    return found


def main(argv: list[str]) -> None:
    """Exit code 2 for bad input."""
    _define_flags()
    parse_flags(argv)
    from agrl_jax.runtime.console import say

    try:
        found = run(flags.FLAGS)
    except (ValueError, OSError) as error:
        exit_with(error)
    for pair in found["pairs"][: 1 + len(found["raters"])]:
        value = pair["weighted_kappa"]["value"]
        say(f"{pair['one']} and {pair['other']}: weighted kappa {'-' if value is None else format(value, '.3f')} on "
            f"{pair['n']:,} pairs")  # fmt: skip
    say(f"written to {flags.FLAGS.out}")


if __name__ == "__main__":
    main(sys.argv)
