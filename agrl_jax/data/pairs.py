"""Labelled pairs of a query and an item, and the files that users keep them in: CSV, TSV, Parquet or JSON lines.

A row needs `query`, `title` and `label`. The label is a tier of the rule book by name ("4-Excellent") or grade ("4").
Files with other columns, other labels or ratings are read with a `PairsFormat`. All else is optional:

    id, description, brand, color, category, price   text of the item (`id` defaults to `product_id`, then the row)
    family      the kind of query, by which evaluation is cut
    split       train, validation or test
    step_NAME   the true value of the rule book's step NAME ("step_brand": "match"); empty where unknown
    reason_NAME why step NAME has its value, in words that a judge may write before it; `reason` explains the tier.
                They are read where the rule book has free text

Step columns carry a prefix because `brand` and `category` say what the item is, not how well it fits. Other columns are
ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from agrl_jax.data.cells import clean
from agrl_jax.data.format import PairsFormat, label_reader
from agrl_jax.data.rows import (
    PairsError,
    Row,
    RowFile,
    RowTable,
    Source,
    check_columns,
    listed,
    name_of,
    read_rows,
)
from agrl_jax.hints import did_you_mean
from agrl_jax.rulebook import wording
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN

SPLITS = ("train", "validation", "test")
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
TRAIN_SHARES = {"train": 0.9, "validation": 0.1}  # where the test pairs are known
STEP_PREFIX = "step_"
REASON_PREFIX = "reason_"
TIER_REASON = "reason"
_REQUIRED = ("query", "title", "label")
_TEXTS = ("id", "description", "brand", "color", "category", "price", "family")
AS_DESCRIBED = PairsFormat()


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
    reasons: tuple[str, ...] = ()  # of each step and then the tier, in words; empty where there are none
    variant: int = 0  # which variant of the rule book asks for it and gives its tier, from 1; 0: the book itself
    row: int = dataclasses.field(default=0, compare=False)  # its number in the file it comes from, the first being 1


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Pair)}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The pairs of a file in its order, and what was found in it."""

    pairs: list[Pair]
    contradicting: tuple[int, ...] = ()  # rows (the first is 1) whose steps contradict their label: masked
    skipped: tuple[str, ...] = ()  # rows that cannot be used, and why
    unread: tuple[str, ...] = ()  # columns of reasons, for which the rule book has no room


@dataclasses.dataclass(frozen=True)
class PairsFile:
    """What a file held."""

    splits: dict[str, list[Pair]]  # by name: train, validation, test; in the order of the file
    contradicting: tuple[int, ...] = ()  # rows (the first is 1) whose steps contradict their label: masked
    dropped: int = 0  # rows left out because an item has no title (public releases only)
    skipped: tuple[str, ...] = ()  # rows that cannot be used, and why
    unread: tuple[str, ...] = ()  # columns of reasons, for which the rule book has no room

    @property
    def notes(self) -> list[str]:
        """What a user should know of the file, in a line each."""
        lines = []
        if self.contradicting:
            lines.append(
                f"labels that contradict the rule book: {len(self.contradicting)} pairs, whose steps are masked"
            )
        if unlike := _labelled_twice(pair for pairs in self.splits.values() for pair in pairs):
            lines.append(f"pairs that stand more than once with different labels: {unlike}")
        if self.unread:
            columns = ", ".join(self.unread)
            lines.append(f"columns left out since the rule book has no free text for reasons: {columns}")
        if self.dropped:
            lines.append(f"rows left out since an item has no title: {self.dropped:,}")
        if self.skipped:
            lines.append(listed(f"rows left out since they cannot be used: {len(self.skipped):,}", self.skipped))
        if seen := shared_queries(self.splits.get("train", ()), self.splits.get("test", ())):
            lines.append(f"queries of the test pairs that are trained on too: {seen}")
        return lines


def shared_queries(pairs: Iterable[Pair], others: Iterable[Pair]) -> int:
    """How many queries both have."""
    return len({_same_query(pair) for pair in pairs} & {_same_query(pair) for pair in others})


def _labelled_twice(pairs: Iterable[Pair]) -> int:
    tiers: dict[tuple[str, str], set[int]] = {}
    for pair in pairs:
        tiers.setdefault((_same_query(pair), item_text(pair)), set()).add(pair.tier)
    return sum(len(found) > 1 for found in tiers.values())


def digest(pairs: Iterable[Pair]) -> str:
    """A short name for pairs in their order: the hash of all that training and evaluation take from them.

    A field that a later version adds does not change it where the field has its default.
    """
    total = hashlib.sha256()
    for pair in pairs:
        told = [(name, value) for name, value in vars(pair).items() if name != "row" and value != _DEFAULTS[name]]
        total.update(repr(told).encode())
    return total.hexdigest()[:16]


def hide_steps(pairs: Sequence[Pair], known: int, book: RuleBook, seed: int) -> list[Pair]:
    """The pairs, of which `known`, drawn by `seed`, keep their steps and reasons. The others keep the steps that the
    tier implies, like real pairs that are labelled with a tier alone. Order and number stay.
    """
    kept = set(np.random.default_rng(seed).permutation(len(pairs))[:known].tolist())
    return [
        pair if i in kept else dataclasses.replace(pair, steps=book.implied(pair.tier), reasons=())
        for i, pair in enumerate(pairs)
    ]


def item_text(pair: Pair) -> str:
    """The item as a prompt shows it, the most telling fields first, so that shortening the end loses least."""
    labelled = [("brand", pair.brand), ("price", pair.price), ("category", pair.category), ("color", pair.color)]
    fields = [pair.title, *(f"{name}: {text}" for name, text in labelled if text), pair.description]
    return " | ".join(field for field in fields if field)


def read_pairs(
    source: Source, book: RuleBook, seed: int = 0, form: PairsFormat = AS_DESCRIBED, test: Source | None = None
) -> PairsFile:
    """Reads labelled pairs and splits them; see the top of this module for their columns.

    Without a `split` column the pairs are split by query, 80/10/10: see `split_by_query`. With one that has no
    validation rows, a tenth of the training queries becomes the validation.

    Args:
      source: a file of a kind that `open_rows` reads, a frame (pandas, polars, pyarrow), or records.
      book: gives the tiers and steps.
      seed: of the split by query.
      form: how `source` and `test` differ from the description.
      test: all its pairs are the test split, and `source` has none.

    Raises:
      PairsError: as `read_labelled`, or a split has no pairs.
    """
    found = read_labelled(source, book, form)
    tests = Labelled([]) if test is None else read_labelled(test, book, form)
    splits = _into_splits(found.pairs, seed, SHARES if test is None else TRAIN_SHARES)
    if test is not None:
        if splits.get("test"):
            raise PairsError(f"{name_of(source)}: has rows for test in its column 'split', and so has {name_of(test)}")
        splits["test"] = [dataclasses.replace(pair, split="test") for pair in tests.pairs]
    if empty := [name for name, split in splits.items() if not split]:
        what = f"has no rows for {' and '.join(empty)}"
        if found.pairs[0].split:
            what += " in its column 'split'; add some, or leave the column out, and the pairs are split by query"
        else:
            what += ": each split needs a query of its own, and there are too few"
        raise PairsError(f"{name_of(source)}: {what}")
    unread = tuple(dict.fromkeys(found.unread + tests.unread))
    return PairsFile(
        splits, found.contradicting + tests.contradicting, skipped=found.skipped + tests.skipped, unread=unread
    )


def read_labelled(source: Source, book: RuleBook, form: PairsFormat = AS_DESCRIBED) -> Labelled:
    """The pairs of a file, a frame or records, in their order, not split; see `read_pairs`.

    Raises:
      PairsError: the file cannot be read, lacks a column, or has rows that cannot be used: all are counted. With
        `form.skip_bad_rows`, it has no others.
    """
    file = read_rows(source)
    columns = _columns(file, book, form.columns)
    room = book.response.free_text != "none"
    unread = () if room else tuple(columns[name] for name in _reason_columns(book) if name in columns)
    reader = _RowReader(book, form, columns)
    pairs, bad = [], []
    for number, row in enumerate(file.rows(), start=1):
        try:
            pairs.append(reader.read(number, row))
        except _BadRow as error:
            bad.append(f"row {number}{f' (line {row.line})' if row.line else ''}: {error}")
    if bad and not (form.skip_bad_rows and pairs):
        raise PairsError(listed(f"{file.path}: {len(bad)} of {file.count} rows cannot be used:", bad))
    return Labelled(pairs, tuple(reader.contradicting), tuple(bad), unread)


def split_by_query(pairs: Iterable[Pair], seed: int, shares: Mapping[str, float]) -> dict[str, list[Pair]]:
    """Splits pairs such that no query is on two sides, upper and lower case aside.

    The sha256 of seed and query decides a query's side, whatever the other rows are; only a split that would stay empty
    gets the query that is nearest to it.

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


def _into_splits(pairs: list[Pair], seed: int, shares: Mapping[str, float]) -> dict[str, list[Pair]]:
    if not pairs[0].split:
        return split_by_query(pairs, seed, shares)
    splits = {name: [pair for pair in pairs if pair.split == name] for name in SPLITS}
    if not splits["validation"]:
        splits |= split_by_query(splits["train"], seed, TRAIN_SHARES)
    return splits


# Columns


def _columns(file: RowFile | RowTable, book: RuleBook, renamed: Mapping[str, str]) -> dict[str, str]:
    """The file's names of our columns, for the columns that it has."""
    steps = [STEP_PREFIX + step.name for step in book.steps]
    reasons = _reason_columns(book)
    ours = (*_REQUIRED, *_TEXTS, "split", *steps, *reasons)
    for name in renamed:
        if name not in ours:
            raise PairsError(f"columns.{name}: there is no such column; {_nearest(name, ours)}")
    header = file.names
    prefixes = {STEP_PREFIX: steps} | ({REASON_PREFIX: reasons} if book.response.free_text != "none" else {})
    for name in header:
        for prefix, known in prefixes.items():
            if name.startswith(prefix) and name not in ours and name not in renamed.values():
                raise PairsError(f"{file.path}: column {name!r} is no step of the rule book; {_nearest(name, known)}")
    theirs = {name: renamed.get(name) or name for name in ours}
    check_columns(file, [theirs[name] for name in ours if name in _REQUIRED or renamed.get(name)])
    if theirs["id"] not in header:
        theirs["id"] = "product_id"
    return {name: column for name, column in theirs.items() if column in header}


def _reason_columns(book: RuleBook) -> tuple[str, ...]:
    """The columns of reasons by part index, the tier's last."""
    return (*(REASON_PREFIX + step.name for step in book.steps), TIER_REASON)


def _nearest(text: str, options: Sequence[str]) -> str:
    return f"it should be one of: {', '.join(options)}{did_you_mean(text, options)}"


# Rows


class _BadRow(Exception):
    """All that is wrong with a row."""


class _RowReader:
    """Turns rows into pairs, and notes those whose steps contradict their label."""

    def __init__(self, book: RuleBook, form: PairsFormat, columns: Mapping[str, str]) -> None:
        self.contradicting: list[int] = []
        self._book = book
        self._columns = columns
        self._reason_columns = _reason_columns(book) if book.response.free_text != "none" else ()
        self._tier_of, self._wanted = label_reader(book, form)
        self._values = [{clean(value).casefold(): i for i, value in enumerate(step.values)} for step in book.steps]
        self._table = book.tier_table().reshape(book.num_values)
        self._settled: dict[tuple[int, tuple[int, ...]], tuple[int, ...] | None] = {}

    def read(self, number: int, row: Row) -> Pair:
        if row.error:
            raise _BadRow(row.error)
        cells = {name: clean(row.record.get(column), name == "price") for name, column in self._columns.items()}
        problems = [f"{name} is empty" for name in ("query", "title") if not cells[name]]
        tier = self._tier_of(cells["label"])
        if tier == UNKNOWN:
            problems.append(f"label {cells['label']!r} is outside the tiers; it should be {self._wanted}")
        stated = self._steps(cells, problems)
        if "split" in cells and cells["split"] not in SPLITS:
            problems.append(f"split {cells['split']!r} is unknown; {_nearest(cells['split'], SPLITS)}")
        if problems:
            raise _BadRow("; ".join(problems))
        steps = self._settle(tier, stated)
        reasons = () if steps is None else self._reasons(cells, (*steps, tier))
        if steps is None:
            self.contradicting.append(number)
            steps = self._book.implied(tier)
        texts = {"id": str(number)} | {name: cells[name] for name in _TEXTS if cells.get(name)}
        split = cells.get("split", "")
        texts |= {name: cells[name] for name in ("query", "title")}
        return Pair(**texts, tier=tier, steps=steps, split=split, reasons=reasons, row=number)

    def _steps(self, cells: Mapping[str, str], problems: list[str]) -> tuple[int, ...]:
        steps = []
        for step, values in zip(self._book.steps, self._values, strict=True):
            text = cells.get(STEP_PREFIX + step.name, "")
            steps.append(values.get(text.casefold(), UNKNOWN))
            if text and steps[-1] == UNKNOWN:
                problems.append(f"{STEP_PREFIX}{step.name} {text!r} is unknown; {_nearest(text, step.values)}")
        return tuple(steps)

    def _reasons(self, cells: Mapping[str, str], values: Sequence[int]) -> tuple[str, ...]:
        """Why each part has its value; an unknown part has no reason."""
        known = zip(self._reason_columns, values, strict=False)
        reasons = tuple(cells.get(name, "") if value != UNKNOWN else "" for name, value in known)
        for part, reason in enumerate(reasons):
            if reason and (phrase := wording.misread_reason(self._book, part, values[part], reason)):
                name = self._reason_columns[part]
                raise _BadRow(f"{name} {reason!r} would be read as the answer {phrase!r}; word it differently")
        return reasons if any(reasons) else ()

    def _settle(self, tier: int, stated: tuple[int, ...]) -> tuple[int, ...] | None:
        """The steps with those that the tier implies filled in; None where no completion of them gives the tier."""
        if (tier, stated) not in self._settled:
            possible = self._table[tuple(slice(None) if value == UNKNOWN else value for value in stated)] == tier
            implied = self._book.implied(tier)
            filled = tuple(b if a == UNKNOWN else a for a, b in zip(stated, implied, strict=True))
            self._settled[tier, stated] = filled if possible.any() else None
        return self._settled[tier, stated]
