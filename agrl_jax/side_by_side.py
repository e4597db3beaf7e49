"""Compares how two judges order a query's items: a blinded page for people to answer, and GSB of the answers.

    python -m agrl_jax.side_by_side --a=runs/grpo --b=runs/quickstart --queries=items.csv
    python -m agrl_jax.side_by_side --answers=answers.json

Both judges judge all items of the file (a row as for `agrl_jax.judge`; several rows a query). Each orders the items
of a query by tier, then by the expected grade of the tier probabilities, then as in the file. `side_by_side.html`,
which loads nothing, shows the first `--top` of both lists beside each other. A person says which is better and saves
the answers to a file; the second command counts them: Good where B is better, Bad where A is, and
GSB = (good - bad) / (good + same + bad), the offline form of the evaluation of arXiv 2510.08048.

The side of each judge is drawn for each query. The page cannot reveal it: whichever judge is called A, the page is
the same to the last byte. The key lies beside it, in `side_by_side.key.json`: do not hand it out.

A query for which both judges would show equal lists is not asked, and counts as Same. A query of one item has no order
and is left out, as is an item that one of the judges cannot judge; the command prints how many there are of each.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import rich.table
from absl import flags

from agrl_jax.data import cells
from agrl_jax.evaluation.html import render
from agrl_jax.judging import STAGES
from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags
from agrl_jax.runtime.console import console_table, progress, say
from agrl_jax.runtime.files import check_writable, read_json, write_json, write_text

if TYPE_CHECKING:  # JAX takes seconds to start: functions import what needs it, so that flags are answered at once
    from agrl_jax.data.rows import Record
    from agrl_jax.judging.engine import Judge, Judgement

_SHOWN = ("title", "brand", "color", "category", "price", "description")
_ANSWERS = ("left", "same", "right")
_RESAMPLES = 10_000


class SideBySideError(ValueError):
    """A key or answers that cannot be used; the message names the file."""


# ---------------------------------------------------------------------------------------------- the lists

Rank = tuple[float, float]  # of an item; the lowest comes first


def read_queries(path: str) -> tuple[list[Record], dict[str, list[int]]]:
    """The rows of a file, and by query which of them are its items.

    Raises:
      PairsError: the file cannot be read, lacks a column, or has a row that cannot be read.
    """
    from agrl_jax.data.rows import PairsError, check_columns, open_rows

    file = open_rows(path)
    check_columns(file, ("query", "title"))
    rows, queries = [], dict[str, list[int]]()
    for number, row in enumerate(file.rows(), 1):
        query = cells.clean(row.record.get("query"))
        if row.error or not query:
            raise PairsError(f"{path}: row {number}: {row.error or 'query is empty'}")
        queries.setdefault(query, []).append(len(rows))
        rows.append(row.record)
    return rows, queries


def rank(judged: Judgement, grades: Mapping[str, int]) -> Rank:
    """Where an item belongs: by its tier, then by the expected grade of the tier probabilities."""
    expected = sum(grades[tier] * prob for tier, prob in judged.probs.items())
    return -grades[judged.tier], -expected


def judge_rows(judge: Judge, rows: Mapping[int, Record], name: str) -> tuple[dict[int, Rank], dict[int, str]]:
    """The ranks of the rows by number, and the errors of the rows that could not be judged."""
    grades = {tier.name: tier.grade for tier in judge.book.tiers}
    ranks, errors = {}, {}
    numbers = list(rows)
    with progress(f"judge {name}", len(numbers)) as bar:
        for first in range(0, len(numbers), judge.chunk):
            chunk = numbers[first : first + judge.chunk]
            for number, judged in zip(chunk, judge.judge([rows[number] for number in chunk]), strict=True):
                if judged.error:
                    errors[number] = judged.error
                else:
                    ranks[number] = rank(judged, grades)
            bar.update(first + len(chunk))
    return ranks, errors


class Study(NamedTuple):
    """What the page shows, what only the key knows, and what is not asked."""

    data: dict[str, Any]  # of the page: its name, the comparisons, the items by row
    left: dict[str, str]  # by query asked: the judge, "a" or "b", whose list is on the left
    equal: list[str]  # queries whose lists are equal
    single: list[str]  # queries of fewer than two items


def arrange(
    rows: Sequence[Record], queries: Mapping[str, Sequence[int]], a: Mapping[int, Rank], b: Mapping[int, Rank],
    top: int, seed: int,
) -> Study:
    """The first `top` items of each query in the orders of both judges; items without a rank are left out.

    The two lists of a query are sorted by what they hold, and then swapped or not by a coin that depends on seed and
    query alone: so the page is the same whichever judge is `a`.
    """
    texts = [{name: text for name, text in cells.texts(row).items() if name in _SHOWN and text} for row in rows]
    comparisons, left, equal, single = [], {}, [], []
    for query, numbers in queries.items():
        items = [number for number in numbers if number in a and number in b]
        if len(items) < 2:
            single.append(query)
            continue
        lists = {name: sorted(items, key=ranks.__getitem__)[:top] for name, ranks in (("a", a), ("b", b))}
        if [texts[i] for i in lists["a"]] == [texts[i] for i in lists["b"]]:
            equal.append(query)
            continue
        names = sorted(lists, key=lists.__getitem__, reverse=random.Random(f"{seed}:{query}").random() < 0.5)
        left[query] = names[0]
        comparisons.append({"query": query, "left": lists[names[0]], "right": lists[names[1]]})
    seen = sorted({number for comparison in comparisons for number in comparison["left"] + comparison["right"]})
    data = {"comparisons": comparisons, "items": {number: texts[number] for number in seen}}
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()
    return Study({"page": digest[:12], **data}, left, equal, single)


# --------------------------------------------------------------------------------------------- the answers


class Gsb(NamedTuple):
    """How often B was better, equal and worse; (good - bad) / all with its 95% bootstrap interval over queries."""

    good: int
    same: int
    bad: int
    value: float | None = None  # None where there are no answers
    low: float | None = None  # None with fewer than two answers
    high: float | None = None


def gsb(good: int, same: int, bad: int, seed: int = 0) -> Gsb:
    """GSB of counts of queries. Resampling queries of three kinds is one draw from a multinomial."""
    n = good + same + bad
    if n < 2:
        return Gsb(good, same, bad, float(good - bad) if n else None)
    drawn = np.random.default_rng(seed).multinomial(n, np.array([good, same, bad]) / n, size=_RESAMPLES)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 2]) / n, [2.5, 97.5])
    return Gsb(good, same, bad, (good - bad) / n, float(low), float(high))


def read_key(path: Path) -> dict[str, Any]:
    """The key of a page."""
    return _read(path, ("page", "a", "b", "left", "equal"), "a key that side_by_side wrote")


def read_answers(path: Path, key: Mapping[str, Any]) -> dict[str, str]:
    """The answers by query; raises SideBySideError where they are not answers to the page of the key."""
    content = _read(path, ("page", "answers"), "answers that the page saved")
    if content["page"] != key["page"]:
        raise SideBySideError(
            f"{path}: answers to the page {content['page']}, and the key is that of {key['page']}; "
            "name with --out the page that was answered"
        )
    answers = content["answers"]
    if not isinstance(answers, dict):
        raise SideBySideError(f"{path}: answers should be {{query: answer}}")
    for query, answer in answers.items():
        if query not in key["left"]:
            raise SideBySideError(f"{path}: the page does not ask for {query!r}")
        if answer not in _ANSWERS:
            raise SideBySideError(f"{path}: the answer to {query!r} is {answer!r}, should be {', '.join(_ANSWERS)}")
    return answers


def _read(path: Path, names: Sequence[str], what: str) -> dict[str, Any]:
    content = read_json(path, SideBySideError, f"; it should be {what}")
    missing = [name for name in names if name not in content]
    if missing:
        raise SideBySideError(f"{path}: lacks {missing[0]!r}; it should be {what}")
    return content


def count(answers: Mapping[str, str], left: Mapping[str, str]) -> Gsb:
    """GSB of the answers, by whose list was on the left."""
    better = Counter("same" if a == "same" else left[q] if a == "left" else _other(left[q]) for q, a in answers.items())
    return gsb(better["b"], better["same"], better["a"])


def _other(judge: str) -> str:
    return "b" if judge == "a" else "a"


def table(asked: Gsb, equal: int) -> rich.table.Table:
    """The counts of the queries that were answered, without and with the queries whose lists are equal."""
    whole = gsb(asked.good, asked.same + equal, asked.bad)
    rows = [
        [title, one.good + one.same + one.bad, one.good, one.same, one.bad, one.value,
         "-" if one.low is None else f"{one.low:+.3f} to {one.high:+.3f}"]
        for title, one in (("lists differ, answered", asked), ("with equal lists as Same", whole))
    ]  # fmt: skip
    return console_table("B against A", ["queries", "n", "Good", "Same", "Bad", "GSB", "95% interval"], rows)


# --------------------------------------------------------------------------------------------- the command


def write_page(values: flags.FlagValues) -> None:
    """Judges the queries with both judges, and writes the page and its key."""
    from agrl_jax.judging.engine import Judge

    out = Path(values.out)
    check_writable(out, "--out")
    rows, queries = read_queries(values.queries)
    if values.sample and values.sample < len(queries):
        drawn = set(random.Random(values.seed).sample(sorted(queries), values.sample))
        queries = {query: numbers for query, numbers in queries.items() if query in drawn}
    wanted = {number: rows[number] for numbers in queries.values() for number in numbers}
    judges = {"a": (values.a, values.a_stage), "b": (values.b, values.b_stage)}
    ranks, errors = {}, {}
    for name, (checkpoint, stage) in judges.items():
        judge = Judge.from_checkpoint(checkpoint, stage=stage, batch_size=values.batch_size)
        ranks[name], found = judge_rows(judge, wanted, name.upper())
        errors |= found
        del judge  # before the other one is loaded
    study = arrange(rows, queries, ranks["a"], ranks["b"], values.top, values.seed)
    key = {
        "page": study.data["page"],
        **{name: {"checkpoint": checkpoint, "stage": stage} for name, (checkpoint, stage) in judges.items()},
        "queries": values.queries, "top": values.top, "seed": values.seed, "left": study.left, "equal": study.equal,
    }  # fmt: skip
    _write(out, study.data, key, values.overwrite)
    say(f"{len(study.left):,} queries to compare; {len(study.equal):,} with equal lists, which count as Same; "
        f"{len(study.single):,} with fewer than two items, left out")  # fmt: skip
    if errors:
        first = min(errors)
        say(f"{len(errors):,} items could not be judged, left out; the first: row {first + 1}: {errors[first]}")
    say(f"written to {out}; the key, not to be handed out, to {key_file(out)}")


def key_file(out: Path) -> Path:
    """Where the key of the page `out` lies."""
    return out.with_suffix(".key.json")


def _write(out: Path, data: Mapping[str, Any], key: Mapping[str, Any], overwrite: bool) -> None:
    place = key_file(out)
    if place.exists() and not overwrite and read_key(place)["page"] != key["page"]:
        raise SideBySideError(
            f"{place}: is the key of another page, whose answers would be lost; name another --out, "
            "or replace it with --overwrite"
        )
    write_json(place, key, indent=1)
    write_text(out, render("side_by_side", data))


def count_answers(values: flags.FlagValues) -> None:
    """Prints GSB of the answers in a file."""
    key = read_key(key_file(Path(values.out)))
    answers = read_answers(Path(values.answers), key)
    for name in ("a", "b"):
        say(f"{name.upper()}: {key[name]['checkpoint']} ({key[name]['stage']})")
    say(table(count(answers, key["left"]), len(key["equal"])))
    say("GSB = (good - bad) / (good + same + bad); good: B is better. Interval: bootstrap over queries.")
    if unanswered := len(key["left"]) - len(answers):
        say(f"{unanswered:,} of {len(key['left']):,} queries are not answered, and not counted.")


def _define_flags() -> None:
    flags.DEFINE_string("a", None, "Judge A, the baseline: workdir, Hugging Face folder or GGUF file.")
    flags.DEFINE_string("b", None, "Judge B, likewise.")
    flags.DEFINE_string("queries", None, "A .csv, .tsv, .jsonl or .parquet file with the columns query and title.")
    flags.DEFINE_string("out", "side_by_side.html", "The page; its key is beside it, as NAME.key.json.")
    flags.DEFINE_string("answers", None, "Answers that the page saved: count them.")
    flags.DEFINE_integer("top", 10, "Items shown of each list.", lower_bound=1)
    flags.DEFINE_integer("sample", 0, "Queries drawn from the file; 0: all.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Seed of the sides, and of the sample.")
    flags.DEFINE_enum("a_stage", "best", STAGES, "Of a workdir: the best or the last of RL, or its start.")
    flags.DEFINE_enum("b_stage", "best", STAGES, "Likewise.")
    flags.DEFINE_integer("batch_size", 64, "Pairs judged at once.", lower_bound=1)
    flags.DEFINE_bool("overwrite", False, "Replace the page and key of other queries or judges.")


def run(values: flags.FlagValues) -> None:
    """Does what the flags ask for."""
    given = [name for name in ("a", "b", "queries") if getattr(values, name)]
    if values.answers and given:
        raise ConfigError(f"--answers counts answers with the key beside --out; --{given[0]} does not go with it")
    if values.answers:
        count_answers(values)
        return
    if len(given) < 3:
        raise ConfigError("--a, --b and --queries are all needed to write a page, or --answers to count its answers")
    from agrl_jax.runtime import processes

    processes.require_one("compares judges")
    write_page(values)


def main(argv: list[str]) -> None:
    """Exit code 2 for bad input."""
    _define_flags()
    parse_flags(argv)
    from agrl_jax.judging.files import USER_ERRORS

    try:
        run(flags.FLAGS)
    except (*USER_ERRORS, SideBySideError) as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv)
