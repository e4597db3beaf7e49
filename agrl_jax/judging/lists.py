"""Reads ranked lists of items and judged pairs, and writes tiers as the judgement lists of other tools.

The gain of an item is the grade of its tier less the lowest grade: 3, 2, 1 and 0 of the default rule book, so that the
worst tier is worth nothing.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from etils import epath

from agrl_jax.data.cells import clean
from agrl_jax.data.format import PairsFormat, judged_reader
from agrl_jax.data.pairs import AS_DESCRIBED
from agrl_jax.data.rows import PairsError, RowFile, check_columns, listed, open_rows
from agrl_jax.judging import PREFIX
from agrl_jax.rulebook.schema import RuleBook
from agrl_jax.runtime.files import write_json, write_text
from agrl_jax.types import UNKNOWN

ITEMS = ("id", "product_id", "title")  # columns that identify an item: the first that all files have


@dataclass(frozen=True)
class JudgedItems:
    """The gains of judged items, by query and item."""

    gains: dict[str, dict[str, int]]
    query_ids: dict[str, str] = field(default_factory=dict)  # of each query, from the column `query_id`
    unjudged: int = 0  # rows without a tier


def item_column(paths: Sequence[epath.PathLike], columns: Mapping[str, str], item: str = "") -> str:
    """The column that identifies an item: `item`, or the first of ITEMS that all files have.

    Raises:
      PairsError: a file lacks it, or cannot be read.
    """
    files = [open_rows(path) for path in paths]
    named = [columns.get(name, name) for name in ITEMS]
    found = item or next((name for name in named if all(name in file.names for file in files)), named[-1])
    for file in files:
        check_columns(file, [found])
    return found


def read_judged_items(
    path: epath.PathLike, book: RuleBook, item: str, form: PairsFormat = AS_DESCRIBED
) -> JudgedItems:
    """Reads the gains of the items of a judged file: its columns `query`, `judge_tier`, `item`, optionally `query_id`.

    Raises:
      PairsError: the file cannot be read, lacks a column, has no tier, or has rows that cannot be used: an unknown
        tier, no item, or an item that has another tier for the same query.
    """
    file, columns = open_rows(path), form.columns
    query, tier = (columns.get(name, name) for name in ("query", f"{PREFIX}tier"))
    check_columns(file, [query, tier, item])
    tier_of, wanted = judged_reader(book, form)
    lowest = min(one.grade for one in book.tiers)
    found, bad, unjudged, ids, first = dict[str, dict[str, int]](), [], 0, {}, dict[tuple[str, str], int]()
    for number, row in enumerate(file.rows(), 1):
        asked, thing, said = (clean(row.record.get(name)) for name in (query, item, tier))
        if row.error or not said:
            unjudged += 1
            continue
        if not asked or not thing:
            bad.append(f"row {number}: {item if asked else query} is empty")
            continue
        index = tier_of(said)
        if index == UNKNOWN:
            bad.append(f"row {number}: {tier} {said!r} should be {wanted}")
            continue
        gain = book.tiers[index].grade - lowest
        if found.setdefault(asked, {}).setdefault(thing, gain) != gain:
            bad.append(f"row {number}: {item} {thing!r} has another tier in row {first[asked, thing]}")
        first.setdefault((asked, thing), number)
        ids.setdefault(asked, clean(row.record.get(columns.get("query_id", "query_id"))))
    _refuse(file, bad)
    if not found:
        raise PairsError(f"{path}: no row has a tier in {tier}")
    return JudgedItems(found, ids, unjudged)


def read_list(path: epath.PathLike, item: str, form: PairsFormat = AS_DESCRIBED) -> dict[str, list[str]]:
    """Reads the items of each query, best first: by the column `rank`, ascending, or `score`, descending, or else in
    the order of the file.

    Raises:
      PairsError: the file cannot be read, lacks a column, or has rows that cannot be used: a rank that is no number, or
        an item that stands twice.
    """
    file, columns = open_rows(path), form.columns
    query = columns.get("query", "query")
    check_columns(file, [query, item])
    order = next((name for name in ("rank", "score") if columns.get(name, name) in file.names), "")
    placed, bad = dict[str, dict[str, float]](), []
    for number, row in enumerate(file.rows(), 1):
        asked, thing = (clean(row.record.get(name)) for name in (query, item))
        if row.error or not asked or not thing:
            bad.append(f"row {number}: {row.error or f'{item if asked else query} is empty'}")
            continue
        text = clean(row.record.get(columns.get(order, order))) if order else str(number)
        try:
            place = float(text) * (-1 if order == "score" else 1)
            if math.isnan(place):
                raise ValueError("no order")
        except ValueError:
            bad.append(f"row {number}: {columns.get(order, order)} {text!r} should be a number")
            continue
        items = placed.setdefault(asked, {})
        if thing in items:
            bad.append(f"row {number}: {item} {thing!r} stands twice for the query {asked!r}")
        items[thing] = place
    _refuse(file, bad)
    return {asked: sorted(items, key=items.__getitem__) for asked, items in placed.items()}


def write_qrels(path: epath.PathLike, judged: JudgedItems) -> list[epath.Path]:
    """Writes TREC qrels, `QUERY 0 ITEM GAIN`, and returns the files written.

    Names in qrels hold no white space. Queries go by their `query_id`; where one has none, all are numbered, and
    PATH.queries.tsv maps numbers to queries. Items whose names have white space are numbered too, in PATH.items.tsv.
    """
    path = epath.Path(path)
    known = {query: judged.query_ids.get(query, "") for query in judged.gains}
    usable = all(_is_word(name) for name in known.values()) and len(set(known.values())) == len(known)
    queries = known if usable else _numbered(known)
    names = dict.fromkeys(item for items in judged.gains.values() for item in items)
    items = _numbered(names) if not all(map(_is_word, names)) else {name: name for name in names}
    lines = [
        f"{queries[query]} 0 {items[item]} {gain}\n" for query, of in judged.gains.items() for item, gain in of.items()
    ]
    write_text(path, "".join(lines))
    written = [path]
    for what, mapping, given in (("queries", queries, known), ("items", items, {name: name for name in names})):
        if mapping != given:
            written.append(path.parent / f"{path.name}.{what}.tsv")
            write_text(written[-1], "".join(f"{number}\t{name}\n" for name, number in mapping.items()))
    return written


def write_quepid(path: epath.PathLike, judged: JudgedItems) -> list[epath.Path]:
    """Writes the CSV that Quepid imports as ratings: query, docid, rating. The rating is the gain."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["query", "docid", "rating"])
    writer.writerows((query, item, gain) for query, of in judged.gains.items() for item, gain in of.items())
    write_text(path, text.getvalue())
    return [epath.Path(path)]


def write_opensearch(path: epath.PathLike, judged: JudgedItems) -> list[epath.Path]:
    """Writes the JSON that OpenSearch's Search Relevance Workbench imports as judgments. The rating is the gain."""
    path = epath.Path(path)
    ratings = [
        {"query": query, "ratings": [{"docId": item, "rating": f"{gain:.3f}"} for item, gain in of.items()]}
        for query, of in judged.gains.items()
    ]
    write_json(path, {"name": path.stem, "description": "", "type": "IMPORT_JUDGMENT", "judgmentRatings": ratings})
    return [path]


WRITERS = {"qrels": write_qrels, "quepid": write_quepid, "opensearch": write_opensearch}


def _numbered(names: Mapping[str, object]) -> dict[str, str]:
    return {name: str(number) for number, name in enumerate(names, 1)}


def _is_word(name: str) -> bool:
    return re.fullmatch(r"\S+", name) is not None


def _refuse(file: RowFile, bad: Sequence[str]) -> None:
    if bad:
        raise PairsError(listed(f"{file.path}: {len(bad)} of {file.count} rows cannot be used:", bad))
