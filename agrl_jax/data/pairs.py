"""Labelled pairs of a query and an item, and the files that users keep them in: CSV, TSV, Parquet or JSON lines.

A row needs `query`, `title` and `label`. The label is a tier of the rule book by name ("4-Excellent") or grade ("4").
All else is optional:

    id, description, brand, color, category, price   text of the item (`id` defaults to `product_id`, then the row)
    family      the kind of query, by which evaluation is cut
    split       train, validation or test
    step_NAME   the true value of the rule book's step NAME ("step_brand": "match"); empty where unknown

Step columns carry a prefix because `brand` and `category` say what the item is, not how well it fits. Other columns
are ignored.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import polars as pl
from etils import epath

from agrl_jax.hints import did_you_mean
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN

SPLITS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)
STEP_PREFIX = "step_"
_REQUIRED = ("query", "title", "label")
_TEXTS = ("id", "description", "brand", "color", "category", "price", "family")
MAX_LISTED = 10  # bad rows spelt out in a message


class PairsError(ValueError):
    """Pairs that cannot be used; the message names file, rows and columns."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A shopper's query, an item, and what is known of how well they fit."""

    id: str
    query: str
    title: str
    description: str = ""
    brand: str = ""
    color: str = ""
    category: str = ""
    price: str = ""
    tier: int = UNKNOWN  # index of the true tier in the rule book, best first
    steps: tuple[int, ...] = ()  # true value of each step, or UNKNOWN; empty where none is known
    family: str = "all"  # kind of query, by which evaluation is cut
    split: str = ""
    seen: bool = True  # False: its words were held out of training on purpose
    row: int = dataclasses.field(default=0, compare=False)  # its number in the file it comes from, the first being 1


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Pair)}


@dataclasses.dataclass(frozen=True)
class PairsFile:
    """What a file held."""

    splits: dict[str, list[Pair]]  # by name: train, validation, test; in the order of the file
    contradicting: tuple[int, ...] = ()  # rows (the first is 1) whose steps contradict their label: masked
    dropped: int = 0  # rows left out because an item has no title (public releases only)


def digest(pairs: Iterable[Pair]) -> str:
    """A short name for pairs in their order, by all that training and evaluation take from them.

    A field that a later version adds leaves it as it is, where it has its default.
    """
    total = hashlib.sha256()
    for pair in pairs:
        told = [(name, value) for name, value in vars(pair).items() if name != "row" and value != _DEFAULTS[name]]
        total.update(repr(told).encode())
    return total.hexdigest()[:16]


def item_text(pair: Pair) -> str:
    """The item as a prompt shows it, the most telling fields first, so that shortening the end loses least."""
    labelled = [("brand", pair.brand), ("price", pair.price), ("category", pair.category), ("color", pair.color)]
    fields = [pair.title, *(f"{name}: {text}" for name, text in labelled if text), pair.description]
    return " | ".join(field for field in fields if field)


def read_pairs(
    path: epath.PathLike, book: RuleBook, seed: int = 0, columns: Mapping[str, str] | None = None
) -> PairsFile:
    """Reads a file of labelled pairs; see the top of this module for its columns.

    Without a `split` column the pairs are split by query, 80/10/10: see `split_by_query`. With one that has no
    validation rows, a tenth of the training queries becomes the validation.

    Args:
      path: a .csv, .tsv, .parquet or .jsonl file, local or remote, in UTF-8.
      book: gives the tiers and steps.
      seed: of the split by query.
      columns: for our column names the file's own, where they differ: {"query": "search_term"}.

    Raises:
      PairsError: the file cannot be read, lacks a column, or has rows that cannot be used: all are counted.
    """
    table = _read_table(epath.Path(path))
    reader = _RowReader(book, table.header, _columns(table, book, columns or {}))
    pairs, bad = [], []
    for number, (where, row) in enumerate(table.rows, start=1):
        try:
            pairs.append(reader.read(number, row))
        except _BadRow as error:
            bad.append(f"row {number}{where}: {error}")
    if bad:
        raise PairsError(_bad_rows(table.file, bad, len(bad) + len(pairs)))
    if not pairs:
        raise PairsError(f"{table.file}: has no rows below its header")
    return PairsFile(_into_splits(pairs, seed), tuple(reader.contradicting))


def split_by_query(pairs: Iterable[Pair], seed: int, shares: Mapping[str, float]) -> dict[str, list[Pair]]:
    """Splits pairs such that no query is on two sides, upper and lower case aside.

    A query's side follows from sha256 of seed and query, whatever the other rows are; only where a split would
    stay empty does it get the one query that is nearest to it.

    Args:
      pairs: in any order, which each split keeps.
      seed: another seed gives another split.
      shares: the share of each split, summing to 1. With fewer queries than splits, the last ones stay empty.
    """
    pairs = list(pairs)
    points = {query: _point(seed, query) for query in {_same_query(pair) for pair in pairs}}
    queries = sorted(points, key=lambda query: (points[query], query))
    sides: dict[str, str] = {}
    start, bound = 0, 0.0
    names = list(shares)
    for i, name in enumerate(names):
        bound += shares[name]
        last = i == len(names) - 1
        end = len(queries) if last else sum(points[query] < bound for query in queries)
        room = len(queries) - (len(names) - 1 - i)  # leaves one query for each split to come
        end = min(max(end, start + 1), max(room, start + 1), len(queries))
        sides.update(dict.fromkeys(queries[start:end], name))
        start = end
    splits: dict[str, list[Pair]] = {name: [] for name in names}
    for pair in pairs:
        name = sides[_same_query(pair)]
        splits[name].append(dataclasses.replace(pair, split=name))
    return splits


def _same_query(pair: Pair) -> str:
    return pair.query.casefold()


def _point(seed: int, query: str) -> float:
    """A number in [0, 1) that stands for the query."""
    digest = hashlib.sha256(f"{seed}:{query}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _into_splits(pairs: list[Pair], seed: int) -> dict[str, list[Pair]]:
    if not pairs[0].split:
        return split_by_query(pairs, seed, dict(zip(SPLITS, SHARES, strict=True)))
    splits = {name: [pair for pair in pairs if pair.split == name] for name in SPLITS}
    if not splits["validation"]:
        splits |= split_by_query(splits["train"], seed, {"train": 0.9, "validation": 0.1})
    return splits


# Files


@dataclasses.dataclass(frozen=True)
class _Table:
    """A file's cells as text. A row is None where it has no cells at all."""

    file: str
    header: list[str]
    rows: Iterable[tuple[str, list[str] | None]]  # where it is in the file (" (line 3)" or ""), cells


def _read_table(path: epath.Path) -> _Table:
    readers: dict[str, Callable[[str, bytes], _Table]] = {
        ".csv": functools.partial(_read_csv, delimiter=","),
        ".tsv": functools.partial(_read_csv, delimiter="\t"),
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
    }
    if path.suffix.lower() not in readers:
        raise PairsError(f"{path}: unknown kind of file; it should end in one of: {', '.join(readers)}")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PairsError(f"{path}: there is no such file") from error
    except OSError as error:
        raise PairsError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not data.strip():
        raise PairsError(f"{path}: is empty; it should have the columns {', '.join(_REQUIRED)}")
    return readers[path.suffix.lower()](str(path), data)


def _read_csv(file: str, data: bytes, delimiter: str) -> _Table:
    lines = csv.reader(io.StringIO(_decode(file, data), newline=""), delimiter=delimiter, strict=True)

    def rows() -> Iterator[tuple[str, list[str] | None]]:
        line = lines.line_num + 1
        try:
            for row in lines:
                if row:  # blank lines stand for nothing
                    yield f" (line {line})", row
                line = lines.line_num + 1
        except csv.Error as error:
            raise PairsError(f"{file}:{line}: not valid CSV: {error}") from error

    cells = rows()
    _, header = next(cells)
    return _Table(file, [name.strip() for name in header or []], cells)


def _read_jsonl(file: str, data: bytes) -> _Table:
    lines = _decode(file, data).splitlines()
    records: list[tuple[str, dict | None]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise PairsError(f"{file}:{number}: not valid JSON: {error}") from error
        records.append((f" (line {number})", record if isinstance(record, dict) else None))
    header = list(dict.fromkeys(name for _, record in records for name in record or ()))
    rows = [
        (where, None if record is None else [_as_text(record.get(name)) for name in header])
        for where, record in records
    ]
    return _Table(file, header, rows)


def _read_parquet(file: str, data: bytes) -> _Table:
    try:
        frame = pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise PairsError(f"{file}: not a readable Parquet file: {error}") from error
    rows = (("", [_as_text(value) for value in row]) for row in frame.iter_rows())
    return _Table(file, frame.columns, rows)


def _decode(file: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PairsError(f"{file}:{line}: not UTF-8: {error.reason}; save the file as UTF-8") from error


def _as_text(value: object) -> str:
    return "" if value is None else str(value)


# Columns


def _columns(table: _Table, book: RuleBook, renamed: Mapping[str, str]) -> dict[str, int]:
    """Where each of our columns is in the file."""
    steps = [STEP_PREFIX + step.name for step in book.steps]
    ours = (*_REQUIRED, *_TEXTS, "split", *steps)
    for name in renamed:
        if name not in ours:
            raise PairsError(f"columns.{name}: there is no such column; {_nearest(name, ours)}")
    header = table.header
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        raise PairsError(f"{table.file}: has the column {repeated[0]!r} twice")
    for name in header:
        if name.startswith(STEP_PREFIX) and name not in ours and name not in renamed.values():
            raise PairsError(f"{table.file}: column {name!r} is no step of the rule book; {_nearest(name, steps)}")
    theirs = {name: renamed.get(name) or name for name in ours}
    for name in ours:
        if theirs[name] not in header and (name in _REQUIRED or renamed.get(name)):
            raise PairsError(
                f"{table.file}: lacks the column {theirs[name]!r}; it has {', '.join(header)}"
                f"{did_you_mean(theirs[name], header)}"
            )
    if theirs["id"] not in header:
        theirs["id"] = "product_id"
    return {name: header.index(column) for name, column in theirs.items() if column in header}


def _nearest(text: str, options: Sequence[str]) -> str:
    return f"it should be one of: {', '.join(options)}{did_you_mean(text, options)}"


# Rows


class _BadRow(Exception):
    """All that is wrong with a row."""


class _RowReader:
    """Turns rows into pairs, and notes those whose steps contradict their label."""

    def __init__(self, book: RuleBook, header: Sequence[str], places: Mapping[str, int]) -> None:
        self.contradicting: list[int] = []
        self._book = book
        self._width = len(header)
        self._places = places
        self._tiers = {str(tier.grade): i for i, tier in enumerate(book.tiers)}
        self._tiers |= {tier.name.casefold(): i for i, tier in enumerate(book.tiers)}
        self._values = [{value.casefold(): i for i, value in enumerate(step.values)} for step in book.steps]
        self._table = book.tier_table().reshape(book.num_values)
        self._settled: dict[tuple[int, tuple[int, ...]], tuple[int, ...] | None] = {}

    def read(self, number: int, row: Sequence[str] | None) -> Pair:
        if row is None:
            raise _BadRow("is not a JSON object")
        if len(row) != self._width:
            raise _BadRow(f"has {len(row)} cells where the header has {self._width}")
        # Runs of white space become one space, so that no text breaks the lines of a prompt.
        cells = {name: " ".join(row[place].split()) for name, place in self._places.items()}
        problems = [f"{name} is empty" for name in ("query", "title") if not cells[name]]
        tier = self._tier(cells["label"], problems)
        stated = self._steps(cells, problems)
        if "split" in cells and cells["split"] not in SPLITS:
            problems.append(f"split {cells['split']!r} is unknown; {_nearest(cells['split'], SPLITS)}")
        if problems:
            raise _BadRow("; ".join(problems))
        steps = self._settle(tier, stated)
        if steps is None:
            self.contradicting.append(number)
            steps = self._book.implied(tier)
        texts = {"id": str(number)} | {name: cells[name] for name in _TEXTS if cells.get(name)}
        split = cells.get("split", "")
        texts |= {name: cells[name] for name in ("query", "title")}
        return Pair(**texts, tier=tier, steps=steps, split=split, row=number)

    def _tier(self, label: str, problems: list[str]) -> int:
        tier = self._tiers.get(label.casefold())
        if tier is None:
            tier = self._tiers.get(_whole_number(label), UNKNOWN)
        if tier == UNKNOWN:
            names = ", ".join(f"{tier.name} or {tier.grade}" for tier in self._book.tiers)
            problems.append(f"label {label!r} is outside the tiers; it should be one of: {names}")
        return tier

    def _steps(self, cells: Mapping[str, str], problems: list[str]) -> tuple[int, ...]:
        steps = []
        for step, values in zip(self._book.steps, self._values, strict=True):
            text = cells.get(STEP_PREFIX + step.name, "")
            steps.append(values.get(text.casefold(), UNKNOWN))
            if text and steps[-1] == UNKNOWN:
                problems.append(f"{STEP_PREFIX}{step.name} {text!r} is unknown; {_nearest(text, step.values)}")
        return tuple(steps)

    def _settle(self, tier: int, stated: tuple[int, ...]) -> tuple[int, ...] | None:
        """The steps with those that the tier implies filled in; None where no completion of them gives the tier."""
        if (tier, stated) not in self._settled:
            possible = self._table[tuple(slice(None) if value == UNKNOWN else value for value in stated)] == tier
            implied = self._book.implied(tier)
            filled = tuple(b if a == UNKNOWN else a for a, b in zip(stated, implied, strict=True))
            self._settled[tier, stated] = filled if possible.any() else None
        return self._settled[tier, stated]


def _whole_number(text: str) -> str:
    """ "4" for "4.0", as spreadsheets write whole numbers; empty where it is none."""
    try:
        number = float(text)
    except ValueError:
        return ""
    return str(int(number)) if math.isfinite(number) and number == int(number) else ""


def _bad_rows(file: str, bad: list[str], total: int) -> str:
    listed = "\n  ".join(bad[:MAX_LISTED])
    more = f"\n  ... and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
    return f"{file}: {len(bad)} of {total} rows cannot be used:\n  {listed}{more}"
