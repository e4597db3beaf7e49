"""Pairs by other rule books: the true steps of a pair stay, and another book's table gives its tier."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from agrl_jax.data.pairs import Pair, item_text
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN


def all_known(pair: Pair) -> bool:
    """Whether the true value of every step is known, so that any table gives a tier."""
    return bool(pair.steps) and UNKNOWN not in pair.steps


def under(pair: Pair, book: RuleBook) -> Pair:
    """A pair whose steps are all known, with the tier by `book`, and without the reason of its former tier."""
    reasons = (*pair.reasons[:-1], "") if pair.reasons else ()
    return dataclasses.replace(pair, tier=book.tier_for(pair.steps), reasons=reasons)


def spread(pairs: Sequence[Pair], variants: Sequence[RuleBook], seed: int) -> list[Pair]:
    """The pairs, spread evenly over their rule book and its `variants`, each with the tier by its own.

    Which book a pair has depends on its texts, the seed and the number of variants alone. So it is the same in every
    split, epoch and process. A pair of which a step is unknown keeps its label, and the book itself.
    """
    return [_under_some(pair, variants, seed) if all_known(pair) else pair for pair in pairs]


def _under_some(pair: Pair, variants: Sequence[RuleBook], seed: int) -> Pair:
    drawn = hashlib.sha256(repr((seed, pair.query, item_text(pair))).encode()).digest()
    variant = int.from_bytes(drawn[:8], "big") % (len(variants) + 1)
    return dataclasses.replace(under(pair, variants[variant - 1]), variant=variant) if variant else pair
