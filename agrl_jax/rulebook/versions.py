"""Compares two versions of a rule book: their wording, and the tiers that they give."""

from __future__ import annotations

import dataclasses
import difflib
from typing import NamedTuple

import numpy as np

from agrl_jax.rulebook.schema import Row, RuleBook
from agrl_jax.types import UNKNOWN


class Change(NamedTuple):
    """A text of a rule book that differs between two versions."""

    key: str  # where it stands, such as `steps.brand.values.match`
    old: str | None  # None: the old version does not have it
    new: str | None

    def __str__(self) -> str:
        if self.old is None:
            return f"{self.key}: new: {self.new!r}"
        return f"{self.key}: {self.old!r} is gone" if self.new is None else f"{self.key}: {self.old!r} -> {self.new!r}"


def changes(old: RuleBook, new: RuleBook) -> list[Change]:
    """Every text in which the books differ, in the order of the file: keys first, then rows of the table."""
    before, after = _texts(old), _texts(new)
    found = [
        Change(key, before.get(key), after.get(key))
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key)
    ]
    rows = difflib.ndiff([_row_text(old, row) for row in old.rows], [_row_text(new, row) for row in new.rows])
    lines = [(line[0], line[2:]) for line in rows if line[0] in "-+"]
    return found + [Change("table", *((text, None) if sign == "-" else (None, text))) for sign, text in lines]


def condition(book: RuleBook, row: Row) -> str:
    """When a row of the table matches, in words: `category: same; brand: match or not asked`."""
    named = [
        f"{step.name}: {' or '.join(step.values[value] for value in values)}"
        for step, values in zip(book.steps, row.when, strict=True)
        if values
    ]
    return "; ".join(named) or "otherwise"


def outcomes(old: RuleBook, new: RuleBook) -> np.ndarray:
    """[values of step 0, of step 1, ... of `old`; tiers of `new`] bool: the tiers that `new` may give for an answer
    by `old`.

    Steps and values are matched by name. A step that is new, or whose old value is gone, may have any value.
    """
    tiers = len(new.tiers)
    possible = (new.tier_table()[:, None] == np.arange(tiers)).reshape(*new.num_values, tiers)
    places = {step.name: place for place, step in enumerate(old.steps)}
    for axis, step in enumerate(new.steps):
        values = old.steps[places[step.name]].values if step.name in places else ("",)
        same = np.array([[one.casefold() == other.casefold() for other in step.values] for one in values])
        same |= ~same.any(axis=1, keepdims=True)
        possible = np.moveaxis(np.tensordot(same, possible, axes=(1, axis)), 0, axis)
    known = [axis for axis, step in enumerate(new.steps) if step.name in places]
    possible = possible.any(axis=tuple(axis for axis in range(len(new.steps)) if axis not in known))
    order = sorted(range(len(known)), key=lambda i: places[new.steps[known[i]].name])
    possible = possible.transpose(*order, len(known))
    gone = tuple(place for place, step in enumerate(old.steps) if step.name not in {one.name for one in new.steps})
    return np.broadcast_to(np.expand_dims(possible, gone), (*old.num_values, tiers))


def same_tiers(old: RuleBook, new: RuleBook) -> np.ndarray:
    """[tiers of `old`] int: each tier's index in `new`, by its name, else by its grade; UNKNOWN where it is gone."""
    names = {tier.name.casefold(): i for i, tier in enumerate(new.tiers)}
    kept = {tier.name.casefold() for tier in old.tiers}
    grades = {tier.grade: i for i, tier in enumerate(new.tiers) if tier.name.casefold() not in kept}
    return np.array([names.get(tier.name.casefold(), grades.get(tier.grade, UNKNOWN)) for tier in old.tiers])


def _texts(book: RuleBook) -> dict[str, str]:
    """All texts outside the table, by key."""
    found = {"order": book.order}
    for name in ("response", "prompt"):
        found |= {f"{name}.{key}": text for key, text in dataclasses.asdict(getattr(book, name)).items()}
    found["tiers"] = ", ".join(tier.name for tier in book.tiers)
    for tier in book.tiers:
        found |= {f"tiers.{tier.name}.{key}": str(getattr(tier, key)) for key in ("grade", "good", "meaning")}
    found["steps"] = ", ".join(step.name for step in book.steps)
    for step in book.steps:
        found |= {f"steps.{step.name}.{key}": getattr(step, key) for key in ("label", "question")}
        found[f"steps.{step.name}.values"] = ", ".join(step.values)
        values = zip(step.values, step.meanings, strict=True)
        found |= {f"steps.{step.name}.values.{value}": meaning for value, meaning in values}
    return found


def _row_text(book: RuleBook, row: Row) -> str:
    because = f" ({row.because})" if row.because else ""
    return f"{condition(book, row)} -> {book.tiers[row.tier].name}{because}"
