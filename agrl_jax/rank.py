"""Measures ranked lists by judged pairs, compares two of them, and writes judgement lists for other tools.

    python -m agrl_jax.rank --judged=judged.csv --a=old.csv --b=new.csv --k=10
    python -m agrl_jax.rank --judged=judged.csv --qrels=out.qrels --quepid=out.csv --opensearch=out.json

A list is a file with the columns `query`, an item (`id`, `product_id` or `title`, the first that all files have, or
`--item`) and `rank` or `score`; with neither, its rows are in order. Without `--a` the judged file itself is the list.
The judged file has `judge_tier`, as `agrl_jax.judge` writes it; `--columns="{judge_tier: label}"` takes labels.

Prints nDCG@k and precision@k, the share of judged items, and of two lists the difference b minus a, with its 95%
interval and the p of a paired t-test over queries. `--out` holds them by query, the largest loss of b first, and the
JSON file beside it the summary. Gains are grades minus the lowest grade; an item that is not judged is worth nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from absl import flags
from etils import epath

from agrl_jax.runtime.config import exit_with, parse_flags

_TITLES = {"ndcg": "nDCG", "precision": "precision", "judged": "judged"}


def _define_flags() -> None:
    flags.DEFINE_string("judged", None, "A file of judged pairs.", required=True)
    flags.DEFINE_string("a", None, "A list; by default the judged file.")
    flags.DEFINE_string("b", None, "Another list, to compare with a.")
    flags.DEFINE_integer("k", 10, "How many items of a list count.", lower_bound=1)
    flags.DEFINE_enum("gains", "linear", ["linear", "exponential"], "What nDCG adds up: gains, or 2^gain - 1.")
    flags.DEFINE_string("item", "", "The column that identifies an item.")
    flags.DEFINE_string("columns", "", "The files' names of our columns, where they differ: '{query: search}'.")
    flags.DEFINE_string("labels", "", "The tier of each label, by name or grade: '{E: 4, S: 3}'.")
    flags.DEFINE_string("rulebook", "four_tier", "The rule book whose tiers the files have.")
    flags.DEFINE_string("out", "ranking.csv", "Where to write the figures by query.")
    flags.DEFINE_string("qrels", None, "Where to write the judged pairs as TREC qrels.")
    flags.DEFINE_string("quepid", None, "Where to write them as Quepid's ratings, CSV.")
    flags.DEFINE_string("opensearch", None, "Where to write them as a judgment list of OpenSearch, JSON.")


def run(values: flags.FlagValues) -> list[str]:
    """Does what the flags ask for, and returns what to print."""
    from agrl_jax.data.format import PairsFormat
    from agrl_jax.evaluation import rankings
    from agrl_jax.judging import lists
    from agrl_jax.rulebook import book
    from agrl_jax.runtime.files import check_writable

    targets = {name: values[name].value for name in lists.WRITERS if values[name].value}
    measured = bool(values.a or values.b or not targets)
    for name in (*targets, *(["out"] if measured else [])):
        check_writable(values[name].value, f"--{name}", beside=".json" if name == "out" else "")
    if measured:
        rankings.check_installed()
    rules = book.load(values.rulebook)
    form = PairsFormat.parse(values.columns, values.labels)
    sources = {"a": values.a or values.judged} | ({"b": values.b} if values.b else {})
    item = lists.item_column([values.judged, *sources.values()], form.columns, values.item)
    judged = lists.read_judged_items(values.judged, rules, item, form)
    said = [f"rows of {values.judged} without a tier: {judged.unjudged:,}"] if judged.unjudged else []
    for name, path in targets.items():
        said += [f"written to {one}" for one in lists.WRITERS[name](path, judged)]
    if not measured:
        return said
    lowest = min(tier.grade for tier in rules.tiers)
    good = min(tier.grade - lowest for tier in rules.tiers if tier.good)
    found = {}
    for name, path in sources.items():
        listed = lists.read_list(path, item, form)
        if missing := judged.gains.keys() - listed.keys():
            said.append(f"queries of {values.judged} that {path} does not list, worth 0: {len(missing):,}")
        if unknown := listed.keys() - judged.gains.keys():
            said.append(f"queries of {path} that are not judged, left out: {len(unknown):,}")
        found[name] = rankings.measure(judged.gains, listed, values.k, good, values.gains == "exponential")
    return said + _write(epath.Path(values.out), found, values.k)


def _write(out: epath.Path, found: dict[str, dict[str, dict[str, float]]], k: int) -> list[str]:
    """Writes the figures by query, and their summary; returns the summary in lines."""
    import polars as pl

    from agrl_jax.evaluation import rankings
    from agrl_jax.runtime.files import in_one_piece, write_json

    queries = list(found["a"])
    columns: dict[str, Any] = {"query": queries}
    summary: dict[str, Any] = {"k": k}
    lines = [f"{len(queries):,} queries"]
    for measure, title in _TITLES.items():
        of = {name: [one[query][measure] for query in queries] for name, one in found.items()}
        columns |= {f"{measure}_{name}": values for name, values in of.items()}
        if "b" not in of:
            summary[measure] = sum(of["a"]) / len(queries)
            lines.append(f"{title}@{k} {summary[measure]:.4f}")
            continue
        summary[measure] = one = rankings.compare(of["a"], of["b"])
        line = f"{title}@{k} a {one['a']:.4f}, b {one['b']:.4f}, difference {one['difference']:+.4f}"
        if one["p"] is not None:
            line += f" [{one['low']:+.4f}, {one['high']:+.4f}], p {one['p']:.4f}"
        lines.append(f"{line}; b better on {one['better']:,}, worse on {one['worse']:,}, equal on {one['equal']:,}")
    frame = pl.DataFrame(columns)
    if "b" in found:
        frame = frame.sort(pl.col("ndcg_b") - pl.col("ndcg_a"), maintain_order=True)
    with in_one_piece(out) as half, half.open("wb") as file:
        frame.write_csv(file)
    write_json(out.with_suffix(".json"), summary)
    return [*lines, f"written to {out} and {out.with_suffix('.json')}"]


def main(argv: list[str]) -> None:
    """Exit code 2 for bad input."""
    _define_flags()
    parse_flags(argv)
    from agrl_jax.runtime.console import say

    try:
        said = run(flags.FLAGS)
    except (ValueError, OSError) as error:
        exit_with(error)
    say("\n".join(said))


if __name__ == "__main__":
    main(sys.argv)
