"""Finds which rows, values and tiers of a rule book labelled pairs meet, and which of their tiers an edit changes.

Pairs are taken as their file states them: labels and values that the rule book does not have are counted, not refused.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from agrl_jax.data.cells import clean
from agrl_jax.data.format import PairsFormat, label_reader
from agrl_jax.data.pairs import AS_DESCRIBED, STEP_PREFIX
from agrl_jax.data.rows import MAX_LISTED, check_columns, open_rows
from agrl_jax.rulebook.schema import RuleBook, winners
from agrl_jax.rulebook.versions import condition, outcomes, same_tiers
from agrl_jax.runtime.files import write_csv
from agrl_jax.types import UNKNOWN


class Place(NamedTuple):
    """Where a pair stands in its file."""

    row: int  # the first is 1
    query: str
    title: str


@dataclasses.dataclass
class Alike:
    """Pairs that are labelled alike."""

    label: str
    steps: Mapping[str, str]  # the value of each step that the file states, by the step's name
    places: list[Place]


def read_stated(
    path: epath.PathLike, books: Sequence[RuleBook], form: PairsFormat = AS_DESCRIBED
) -> tuple[list[Alike], list[str]]:
    """The pairs of a file, grouped by their labels; and the rows and step columns that cannot be read, with reasons.

    Args:
      path: a file with the column `label`, and optionally `step_NAME` for steps of the books, `query` and `title`.
      books: rule books whose steps are read.
      form: of the file.

    Raises:
      PairsError: the file cannot be read, or lacks a column.
    """
    file = open_rows(path)
    names = list(dict.fromkeys(step.name for book in books for step in book.steps))
    columns = {name: form.columns.get(name, name) for name in ("label", "query", "title")}
    columns |= {name: form.columns.get(STEP_PREFIX + name, STEP_PREFIX + name) for name in names}
    check_columns(file, [columns["label"], *form.columns.values()])
    found: dict[Any, Alike] = {}
    steps = {name for name in file.names if name.startswith(STEP_PREFIX)}
    unreadable = [f"column {name!r}: no step of the rule book" for name in sorted(steps - {*columns.values()})]
    for number, row in enumerate(file.rows(), 1):
        if row.error:
            unreadable.append(f"row {number} (line {row.line}): {row.error}")
            continue
        cell = {name: clean(row.record.get(column)) for name, column in columns.items()}
        stated = {name: cell[name] for name in names if cell[name]}
        one = found.setdefault((cell["label"], *stated.items()), Alike(cell["label"], stated, []))
        one.places.append(Place(number, cell["query"], cell["title"]))
    return list(found.values()), unreadable


def meet(groups: Iterable[Alike], book: RuleBook, form: PairsFormat = AS_DESCRIBED) -> dict[str, Any]:
    """What pairs meet of a rule book, JSON-able.

    `rows` of the table, each with the `pairs` that it decides and those that it `may` decide, as some steps are not
    known; `values` of the steps with their pairs, stated or implied by the label; `tiers`; `contradicting` labels,
    which no completion of their steps gives, and whose steps are not counted; and `foreign` labels and values, which
    the book does not have.
    """
    reader = _Reader(book, form)
    winner = winners(book.rows, book.num_values)
    surely, maybe = np.zeros(len(book.rows), int), np.zeros(len(book.rows), int)
    tiers = np.zeros(len(book.tiers), int)
    values = [np.zeros(count, int) for count in book.num_values]
    contradicting, pairs = [], 0
    for one in groups:
        pairs += len(one.places)
        tier, steps = reader.tier(one), reader.steps(one)
        if tier == UNKNOWN:
            continue
        tiers[tier] += len(one.places)
        block = _block(steps)
        rows = np.unique(winner[block][reader.table[block] == tier])
        (surely if len(rows) == 1 else maybe)[rows] += len(one.places)
        for step, (stated, implied) in enumerate(zip(steps, book.implied(tier), strict=True)):
            value = stated if stated != UNKNOWN and len(rows) else implied
            if value != UNKNOWN:
                values[step][value] += len(one.places)
        if not len(rows):
            gives = " or ".join(book.tiers[i].name for i in np.unique(reader.table[block]) if i != UNKNOWN)
            contradicting += [place._asdict() | {"label": one.label, "table": gives} for place in one.places]
    rows_met = zip(book.rows, surely.tolist(), maybe.tolist(), strict=True)
    return {
        "pairs": pairs,
        "rows": [
            {
                "line": row.line, "when": condition(book, row), "tier": book.tiers[row.tier].name,
                "pairs": sure, "may": may,
            }
            for row, sure, may in rows_met
        ],
        "values": {
            step.name: dict(zip(step.values, counts.tolist(), strict=True))
            for step, counts in zip(book.steps, values, strict=True)
        },
        "tiers": {tier.name: count for tier, count in zip(book.tiers, tiers.tolist(), strict=True)},
        "contradicting": sorted(contradicting, key=lambda place: place["row"]),
        "foreign": [
            {"column": column, "value": value, "pairs": count}
            for (column, value), count in reader.foreign.most_common()
        ],
    }  # fmt: skip


def changed(
    groups: Iterable[Alike], old: RuleBook, new: RuleBook, form: PairsFormat = AS_DESCRIBED
) -> list[dict[str, Any]]:
    """The pairs, labelled by `old`, whose tier differs under `new`; in the order of the file.

    Each has its place, its `old` tier and the `new` tiers that its steps leave possible; it changes `surely` where the
    old tier is not among these. Pairs whose label `old` does not give count as unchanged.
    """
    reader, possible, same = _Reader(old, form), outcomes(old, new), same_tiers(old, new)
    found = []
    for one in groups:
        tier, block = reader.tier(one), _block(reader.steps(one))
        after = possible[block][reader.table[block] == tier].any(axis=0) if tier != UNKNOWN else np.zeros(0, bool)
        tiers = np.flatnonzero(after)
        if not set(tiers.tolist()) - {same[tier]}:
            continue
        names = [new.tiers[i].name for i in tiers]
        change = {"old": old.tiers[tier].name, "new": names, "surely": same[tier] not in tiers}
        found += [place._asdict() | change for place in one.places]
    return sorted(found, key=lambda pair: pair["row"])


def describe(found: Mapping[str, Any]) -> list[str]:
    """What `meet` found, in lines."""
    pairs, rows, values = found["pairs"], found["rows"], found["values"]
    shares = [f"{name} {count:,} ({count / max(pairs, 1):.1%})" for name, count in found["tiers"].items()]
    lines = [f"pairs: {pairs:,}; tiers: {', '.join(shares)}"]
    idle = [
        f"line {row['line']}: {row['when']} -> {row['tier']}" + (f" ({row['may']:,} may)" if row["may"] else "")
        for row in rows if not row["pairs"]
    ]  # fmt: skip
    never = [f"{step}: {value}" for step, counts in values.items() for value, n in counts.items() if not n]
    total = sum(map(len, values.values()))
    lines += listed(f"rows of the table that no pair is known to meet: {len(idle)} of {len(rows)}", idle, len(idle))
    lines += listed(f"values never labelled: {len(never)} of {total}", never, len(never))
    unlabelled = [name for name, count in found["tiers"].items() if not count]
    lines += [f"tiers never labelled: {', '.join(unlabelled)}"] if unlabelled else []
    contradicting = [
        f"row {one['row']}: labelled {one['label']}, its steps give {one['table'] or 'no tier'}"
        for one in found["contradicting"]
    ]
    lines += listed(f"labels that contradict the table: {len(contradicting):,} pairs", contradicting)
    foreign = [f"{one['column']} {one['value']!r}: {one['pairs']:,} pairs" for one in found["foreign"]]
    return lines + listed(f"cells that the rule book does not know: {len(foreign):,}", foreign)


def describe_changed(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `changed` found, in lines."""
    surely = [one for one in found if one["surely"]]
    moves = Counter(f"{one['old']} -> {' or '.join(one['new'])}" for one in found)
    maybe = len(found) - len(surely)
    lines = [f"pairs whose tier changes: {len(surely):,}, and may change by steps not known: {maybe:,}"]
    lines += [f"  {move}: {count:,}" for move, count in moves.most_common(MAX_LISTED)]
    return lines + listed(
        "the first of them:",
        [f"row {one['row']}: {one['query'][:40]!r} -> {one['title'][:60]!r}" for one in surely or found],
    )


def write_changed(path: epath.PathLike, found: Sequence[Mapping[str, Any]]) -> None:
    """Writes what `changed` found as CSV."""
    rows = ({**one, "new": " or ".join(one["new"])} for one in found)
    write_csv(path, [*Place._fields, "old", "new", "surely"], rows)


class _Reader:
    """Reads labels and steps in the terms of a rule book, and counts those that the book does not have."""

    def __init__(self, book: RuleBook, form: PairsFormat) -> None:
        self.table = book.tier_table().reshape(book.num_values)
        self.foreign: Counter[tuple[str, str]] = Counter()
        self._tier_of, _ = label_reader(book, form)
        self._values = {
            step.name: {clean(value).casefold(): i for i, value in enumerate(step.values)} for step in book.steps
        }

    def tier(self, one: Alike) -> int:
        return self._counted(one, "label", one.label, self._tier_of(one.label))

    def steps(self, one: Alike) -> list[int]:
        for name in one.steps.keys() - self._values.keys():
            self._counted(one, STEP_PREFIX + name, one.steps[name], UNKNOWN)
        return [
            self._counted(one, STEP_PREFIX + name, text, values.get(text.casefold(), UNKNOWN))
            if (text := one.steps.get(name)) else UNKNOWN
            for name, values in self._values.items()
        ]  # fmt: skip

    def _counted(self, one: Alike, column: str, text: str, index: int) -> int:
        if index == UNKNOWN:
            self.foreign[column, text] += len(one.places)
        return index


def _block(steps: Sequence[int]) -> tuple[Any, ...]:
    """An index into the table that selects all completions of the known steps, and keeps all axes."""
    return tuple(slice(None) if value == UNKNOWN else slice(value, value + 1) for value in steps)


def listed(what: str, lines: Sequence[str], most: int = MAX_LISTED) -> list[str]:
    """A heading and the first of the `lines`; nothing where there are none."""
    more = [f"  ... and {len(lines) - most:,} more"] if len(lines) > most else []
    return [what, *(f"  {line}" for line in lines[:most]), *more] if lines else []
