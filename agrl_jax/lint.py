"""Checks a rule book: its table, the rows that labelled pairs meet, and what an edit changes.

    python -m agrl_jax.lint rules.yaml --pairs=mine.csv
    python -m agrl_jax.lint rules.yaml --against=old.yaml --pairs=mine.csv --changed=changed.csv

Lists everything for which training would refuse the book: rows of the table that earlier rows cover, combinations
without a tier, tiers that no row gives, ambiguous wording. For labelled pairs, with or without step columns, it lists
the rows of the table that no pair meets, the values and tiers that no pair has, and the labels that the table
contradicts.

`--against` names another version of the book, by which the pairs are labelled. The command then lists every text that
differs, and every pair whose tier differs; it matches steps and values by name. `--changed` writes these pairs to a
file. `--out` writes all findings as JSON.
"""

from __future__ import annotations

import sys
from typing import Any

from absl import flags
from etils import epath

from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags


def _define_flags() -> None:
    flags.DEFINE_string("pairs", None, "A file of labelled pairs.")
    flags.DEFINE_string("against", None, "Another version of the rule book, by which the pairs are labelled.")
    flags.DEFINE_string("columns", "", "The file's names of our columns, where they differ: {label: human}.")
    flags.DEFINE_string("labels", "", "The tier of each label, by name or grade: {E: 4, S: 3}.")
    flags.DEFINE_string("bins", "", "The lowest rating of each tier but the worst: [1.5, 2.5, 3.5].")
    flags.DEFINE_string("changed", None, "Where to write the pairs whose tier changes, as CSV.")
    flags.DEFINE_string("out", None, "Where to write the findings, as JSON.")


def run(path: str, values: flags.FlagValues) -> dict[str, Any]:
    """The findings, JSON-able; `lines` says them in words."""
    from agrl_jax.data import coverage
    from agrl_jax.data.format import PairsFormat
    from agrl_jax.rulebook import book, versions
    from agrl_jax.runtime.files import check_writable, write_json

    for name in ("changed", "out"):
        if values[name].value:
            check_writable(values[name].value, f"--{name}")
    rules, problems = book.check(path)
    old = book.load(values.against) if values.against else None
    form = PairsFormat.parse(values.columns, values.labels, values.bins)
    found: dict[str, Any] = {"problems": problems}
    lines = [f"{path}: {len(rules.rows)} rows, {len(rules.steps)} steps, {len(rules.tiers)} tiers", *problems]
    if old:
        changes = versions.changes(old, rules)
        found["changes"] = [change._asdict() for change in changes]
        lines += [f"texts that differ from {values.against}: {len(changes)}"]
        lines += [f"  {change}" for change in changes]
        lines += ["judges of the old book fit this one" if old.digest == rules.digest else
                  "judges of the old book have to be trained anew: prompts, answers or tiers differ"]  # fmt: skip
    if values.pairs:
        groups, unreadable = coverage.read_stated(values.pairs, [rules, *([old] if old else [])], form)
        found |= coverage.meet(groups, rules, form) | {"unreadable": unreadable}
        lines += [f"{values.pairs}:", *coverage.describe(found)]
        lines += coverage.listed(f"rows and columns that cannot be used: {len(unreadable):,}", unreadable)
    if old and values.pairs and not problems:
        found["changed"] = coverage.changed(groups, old, rules, form)
        lines += coverage.describe_changed(found["changed"])
        if values.changed:
            coverage.write_changed(values.changed, found["changed"])
    if values.out:
        write_json(epath.Path(values.out), found)
    return found | {"lines": lines}


def main(argv: list[str]) -> None:
    """Exit codes: 1 for a rule book that training refuses, 2 for bad input."""
    _define_flags()
    rest = parse_flags(argv, positional=True)
    values = flags.FLAGS
    if len(rest) != 2:
        exit_with(ConfigError("one rule book is needed: python -m agrl_jax.lint rules.yaml"))
    if values.changed and not (values.against and values.pairs):
        exit_with(ConfigError("--changed needs --against and --pairs"))
    from agrl_jax.runtime.console import say

    try:
        found = run(rest[1], values)
    except (ValueError, OSError) as error:
        exit_with(error)
    say("\n".join(found["lines"]))
    raise SystemExit(1 if found["problems"] else 0)


if __name__ == "__main__":
    main(sys.argv)
