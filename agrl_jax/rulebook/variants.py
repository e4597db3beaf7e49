"""Variants of a rule book: the same steps, values and tiers, with another table and other words around it.

A judge that is trained under variants has to read the rules in its prompt. Other variants measure whether it does. No
table serves both: a hash of the table says whether training may use it.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from agrl_jax.rulebook.book import RuleBook, RuleBookError
from agrl_jax.rulebook.schema import winners

LEAST_CHANGED = 0.1  # a variant gives at least this share of the combinations of values another tier
_TRIES = 1000  # tables drawn for a variant before a rule book counts as one that has none
# Other words for the texts around steps and table in a prompt; the rule book's own words may be drawn too.
_WORDS = {
    "task": ("Decide how well an item answers a shopper's query.", "Rate an item against what a shopper searched for."),
    "steps": ("Answer these in turn, with one of the values given:", "Check these points. Each takes one value:"),
    "tiers": ("Tiers, from best to worst:", "These are the grades, the best first:"),
    "table": ("Take the first rule that fits; it gives the tier:", "The first matching rule decides:"),
}  # fmt: skip


def training_variants(book: RuleBook, number: int) -> tuple[RuleBook, ...]:
    """The variants that training uses; more of them begin with the same ones. Raises as `variant`."""
    return tuple(variant(book, seed, held_out=False) for seed in range(number))


def variant(book: RuleBook, seed: int, held_out: bool = True) -> RuleBook:
    """A rule book with the same steps, values and tiers, but another table and other words; `seed` draws them.

    All rows of the table but the last are in another order, and some give a neighbouring tier. Every row can win, every
    tier can result, and at least `LEAST_CHANGED` of the combinations have another tier than in `book`.

    Args:
      book: whose variant it is.
      seed: the same seed gives the same variant.
      held_out: True for a variant that measures judges, False for one that training uses.

    Raises:
      RuleBookError: no such table was found.
    """
    rng = np.random.default_rng([seed, 1])
    for _ in range(_TRIES):
        rows = [book.rows[i] for i in rng.permutation(len(book.rows) - 1)] + [book.rows[-1]]
        moved = [
            dataclasses.replace(row, tier=_neighbour(row.tier, len(book.tiers), rng), because="")
            if rng.random() < 0.4 else row
            for row in rows
        ]  # fmt: skip
        name = f"{book.name}-{seed}" if held_out else f"{book.name}-trained-{seed}"
        other = dataclasses.replace(book, name=name, rows=tuple(moved))
        if _fit(other, book) and _is_held_out(other) == held_out:
            words = {name: str(rng.choice([getattr(book.prompt, name), *some])) for name, some in _WORDS.items()}
            return dataclasses.replace(other, prompt=dataclasses.replace(book.prompt, **words))
    raise RuleBookError(
        f"rule book {book.name}: found no other table of its rows in which every row can win, every tier results and "
        f"{LEAST_CHANGED:.0%} of the combinations have another tier; so it has no variants"
    )


def _neighbour(tier: int, tiers: int, rng: np.random.Generator) -> int:
    return int(rng.choice([other for other in (tier - 1, tier + 1) if 0 <= other < tiers]))


def _fit(other: RuleBook, book: RuleBook) -> bool:
    """Whether every row of a variant can win, every tier can result, and its table differs enough from the book's."""
    table = other.tier_table()
    every_row = len(np.unique(winners(other.rows, other.num_values))) == len(other.rows)
    changed = np.mean(table != book.tier_table())
    return every_row and len(np.unique(table)) == len(book.tiers) and changed >= LEAST_CHANGED


def _is_held_out(book: RuleBook) -> bool:
    """Whether a table, however its rows give it, is one of the half that training never uses."""
    return hashlib.sha256(book.tier_table().astype("<i4").tobytes()).digest()[0] % 2 == 0
