"""The rule book: its tiers, steps, table and wording, and what follows from them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from agrl_jax.types import UNKNOWN

ORDERS = ("think_then_respond", "respond_then_think")
FREE_TEXT = ("none", "between")


@dataclasses.dataclass(frozen=True)
class Tier:
    name: str
    grade: int  # higher is better
    good: bool  # a shopper is glad to see it
    meaning: str


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    label: str  # how responses call it
    question: str
    values: tuple[str, ...]
    meanings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the decision table: it matches where every step has one of the values listed for it."""

    when: tuple[tuple[int, ...], ...]  # for each step the values that match; empty: any
    tier: int
    because: str
    line: int


@dataclasses.dataclass(frozen=True)
class Response:
    """How a response is worded."""

    phrase: str = "{part}: {value}"
    separator: str = "\n"
    tier: str = "Tier"  # how responses call the tier
    free_text: str = "none"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How a prompt is worded. Every English word in a prompt is here or in the tiers and steps."""

    terse: str = "Query: {query}\nItem: {item}\n"
    full: str = "{instructions}\n\nQuery: {query}\nItem: {item}\n\nAnswer:\n"
    task: str = "Judge how relevant an item is to a shopper's query."
    steps: str = "Take these steps. Each has one value:"
    tiers: str = "The tiers, best first:"
    table: str = "The tier follows from the first rule that applies:"
    otherwise: str = "otherwise"
    format: str = ""  # by default as `free_text` has it: see `wording.instructions`


class Phrase(NamedTuple):
    """A text that states the value of a part (part R is the tier) wherever it stands in a response."""

    part: int
    value: int
    text: str


@dataclasses.dataclass(frozen=True)
class RuleBook:
    """Tiers (best first), steps (in order of reasoning) and the table that gives the tier. See `load`."""

    name: str
    tiers: tuple[Tier, ...]
    steps: tuple[Step, ...]
    rows: tuple[Row, ...]
    order: str = ORDERS[0]
    response: Response = Response()
    prompt: Prompt = Prompt()

    @property
    def num_values(self) -> tuple[int, ...]:
        """Values of each step."""
        return tuple(len(step.values) for step in self.steps)

    @property
    def part_order(self) -> tuple[int, ...]:
        """Part indices in the order a response states them; the tier is part R."""
        steps = tuple(range(len(self.steps)))
        tier = (len(self.steps),)
        return steps + tier if self.order == "think_then_respond" else tier + steps

    @property
    def parts(self) -> tuple[str, ...]:
        """Part names in the order a response states them."""
        names = (*(step.name for step in self.steps), "tier")
        return tuple(names[part] for part in self.part_order)

    @functools.cached_property
    def phrases(self) -> tuple[Phrase, ...]:
        """Every phrase by part and value; its index is the phrase id of the token tables."""
        labelled = [(step.label, step.values) for step in self.steps]
        labelled.append((self.response.tier, tuple(tier.name for tier in self.tiers)))
        return tuple(
            Phrase(part, value, self.word(label, name))
            for part, (label, names) in enumerate(labelled)
            for value, name in enumerate(names)
        )

    def word(self, label: str, value: str) -> str:
        """The phrase template filled in."""
        before, after = self.response.phrase.split("{part}")
        return before.replace("{value}", value) + label + after.replace("{value}", value)

    def tier_for(self, values: Sequence[int]) -> int:
        """The tier that the table gives for one value of every step.

        Raises:
          ValueError: a value is UNKNOWN or out of range.
        """
        if len(values) != len(self.steps) or any(
            not 0 <= value < count for value, count in zip(values, self.num_values, strict=True)
        ):
            raise ValueError(f"tier_for needs a value of every step, each below {self.num_values}; got {tuple(values)}")
        return int(self._table[tuple(values)])

    def tier_table(self) -> np.ndarray:
        """[product of num_values] int32: the tier of each combination, mixed radix, first step slowest."""
        return self._table.reshape(-1).copy()

    def implied(self, tier: int) -> tuple[int, ...]:
        """For each step the one value that `tier` leaves possible, or UNKNOWN."""
        combinations = np.argwhere(self._table == tier)  # [n, R]
        return tuple(
            int(column[0]) if len(column) and (column == column[0]).all() else UNKNOWN for column in combinations.T
        )

    @property
    def digest(self) -> str:
        """sha256 of all that changes a prompt, a response or a reward; not of reasons, comments or layout."""
        content = [
            [dataclasses.astuple(tier) for tier in self.tiers],
            [dataclasses.astuple(step) for step in self.steps],
            self.tier_table().tolist(),
            [self.order, dataclasses.astuple(self.response), dataclasses.astuple(self.prompt)],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @functools.cached_property
    def _table(self) -> np.ndarray:
        winner = winners(self.rows, self.num_values)
        return np.append([row.tier for row in self.rows], UNKNOWN).astype(np.int32)[winner]


def winners(rows: Sequence[Row], num_values: Sequence[int]) -> np.ndarray:
    """[values of step 0, of step 1, ...] the first row that matches each combination; -1 if none does."""
    winner = np.full(num_values, -1, np.int32)
    for i in reversed(range(len(rows))):
        winner[np.ix_(*(when or range(count) for when, count in zip(rows[i].when, num_values, strict=True)))] = i
    return winner
