"""Judgements that stand in the rows of a file, in the columns that `agrl_jax.judge` adds, whoever made them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from agrl_jax.data import cells
from agrl_jax.data.cells import PREFIX, clean
from agrl_jax.data.format import PairsFormat, judged_reader
from agrl_jax.data.pairs import Pair
from agrl_jax.data.rows import PairsError, check_columns, listed, open_rows
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN


@dataclass(frozen=True)
class Taught:
    """Pairs and what a judge says of them: what its student learns."""

    pairs: list[Pair]  # N, of the tier and the steps that the judge states
    probs: np.ndarray  # [N, tiers] float32, the judge's probabilities
    digest: str  # of the file
    unjudged: int  # rows without a judgement, which are left out


def read_taught(path: epath.PathLike, book: RuleBook, columns: Mapping[str, str]) -> Taught:
    """Reads pairs with `judge_tier`, `judge_prob_TIER` and, where they are known, `judge_step_STEP`.

    If all steps are known, the pair takes the tier that they imply, so that tier and steps of an answer agree.
    `columns` are the file's names of the texts, where they are not ours.

    Raises:
      PairsError: the file cannot be read, lacks a column, has rows that cannot be used, or no judgement.
    """
    file = open_rows(path)
    names, texts = list(judge_columns(book)), {name: columns.get(name, name) for name in cells.TEXTS}
    check_columns(file, [texts["query"], texts["title"], *names[: 1 + len(book.tiers)]])
    reader = JudgedReader(book, PairsFormat(), {name: name for name in names if name in file.names})
    pairs, probs = [], []
    for number, row in enumerate(file.rows(), 1):
        judged = reader.read(number, row.record)
        if judged.tier != UNKNOWN:
            whole = UNKNOWN not in judged.steps
            tier = book.tier_for(judged.steps) if whole else judged.tier
            record = {name: row.record.get(column) for name, column in texts.items()}
            pairs.append(Pair(id="", **cells.texts(record), tier=tier, steps=tuple(judged.steps)))
            probs.append(judged.probs)
    if reader.bad:
        raise PairsError(listed(f"{path}: {len(reader.bad)} of {file.count} rows cannot be used:", reader.bad))
    if not pairs:
        raise PairsError(f"{path}: no row has a judgement in {PREFIX}tier")
    return Taught(pairs, np.array(probs, np.float32), file.digest, file.count - len(pairs))


def judge_columns(book: RuleBook) -> Iterator[str]:
    """The columns of judging that scoring reads: tier, probabilities, steps."""
    yield f"{PREFIX}tier"
    yield from (f"{PREFIX}prob_{tier.name}" for tier in book.tiers)
    yield from (f"{PREFIX}step_{step.name}" for step in book.steps)


class Cells(NamedTuple):
    """What a row says of a judgement, as indices of the rule book; UNKNOWN where it says nothing."""

    tier: int
    probs: list[float]
    steps: list[int]


class JudgedReader:
    """Reads judgements out of rows, and notes what is wrong with them in `bad`.

    `columns` maps our names of columns to the file's. The labels of the form hold for tiers too.
    """

    def __init__(self, book: RuleBook, form: PairsFormat, columns: Mapping[str, str]) -> None:
        self.bad: list[str] = []
        self._book, self._columns = book, columns
        self._tier_of, self._wanted = judged_reader(book, form)
        self.has_probs = all(f"{PREFIX}prob_{tier.name}" in columns for tier in book.tiers)
        self.has_steps = all(f"{PREFIX}step_{step.name}" in columns for step in book.steps)

    def read(self, number: int, record: Mapping[str, Any]) -> Cells:
        """The judgement of a row."""
        cells = {name: clean(record.get(column)) for name, column in self._columns.items()}
        tier = self._choice(number, cells, f"{PREFIX}tier", self._tier_of, self._wanted)
        steps = [UNKNOWN] * len(self._book.steps)
        if self.has_steps:
            for i, step in enumerate(self._book.steps):
                values = {value.casefold(): place for place, value in enumerate(step.values)}
                steps[i] = self._choice(
                    number, cells, f"{PREFIX}step_{step.name}",
                    lambda text, values=values: values.get(text.casefold(), UNKNOWN),
                    f"one of: {', '.join(step.values)}",
                )  # fmt: skip
        return Cells(tier, self._probs(number, cells, tier), steps)

    def _choice(
        self, number: int, cells: Mapping[str, str], name: str, value_of: Callable[[str], int], wanted: str
    ) -> int:
        value = value_of(cells[name]) if cells[name] else UNKNOWN
        if cells[name] and value == UNKNOWN:
            self.bad.append(f"row {number}: {self._columns[name]} {cells[name]!r} should be {wanted}")
        return value

    def _probs(self, number: int, cells: Mapping[str, str], tier: int) -> list[float]:
        """The probabilities that are stated; if none are, 1 for the tier."""
        tiers = self._book.tiers
        if not self.has_probs or tier == UNKNOWN:
            return [float(i == tier) for i in range(len(tiers))]
        try:
            probs = [float(cells[f"{PREFIX}prob_{one.name}"]) for one in tiers]
        except ValueError:
            self.bad.append(f"row {number}: has a tier, but not a number as the probability of each")
            return [0.0] * len(tiers)
        if not (min(probs) >= 0 and abs(sum(probs) - 1) < 1e-3):
            self.bad.append(f"row {number}: its probabilities should be at least 0, and sum to 1, not {sum(probs):.6g}")
        return probs
