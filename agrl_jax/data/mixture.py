"""Mixes training pairs of a judge for real shops: bundled pairs, partly disguised, and real pairs with known tiers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from agrl_jax.data.bundled.dice import Dice, point
from agrl_jax.data.disguise import disguise, retyped
from agrl_jax.data.pairs import Pair, PairsError
from agrl_jax.rulebook.book import RuleBook

_TRIES = 100  # draws for each stranger


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """What a mixture is made of; the rest are bundled pairs."""

    rows: int  # in all; with as many as training takes, every row is seen once
    real: float  # share of real pairs, which are repeated as needed
    strangers: float  # share of strangers: see `strangers`
    disguised: float  # share of the bundled pairs that are rewritten as a marketplace would write them


def mix(bundled: Sequence[Pair], real: Sequence[Pair], book: RuleBook, cfg: MixtureConfig, seed: int) -> list[Pair]:
    """Returns `cfg.rows` pairs. Real ones keep the tiers that they have. Bundled ones have every tier equally often, so
    that the style of a pair does not tell its tier.

    The same arguments give the same pairs, everywhere. Shuffle them for batches: real and bundled pairs come apart.

    Raises:
      PairsError: there are no real pairs, or none of some tier among the bundled ones; or too few strangers are found.
    """
    number = round(cfg.rows * cfg.real)
    pairs = [retyped(pair, seed, i) for i, pair in zip(range(number), _again(real, seed, "real"), strict=False)]
    pairs += strangers(real, round(cfg.rows * cfg.strangers), book, seed)
    tiers = len(book.tiers)
    kinds = [_again([pair for pair in bundled if pair.tier == tier], seed, tier) for tier in range(tiers)]
    for i in range(cfg.rows - len(pairs)):
        pair = next(kinds[i % tiers])
        pairs.append(disguise(pair, seed, i) if Dice("mixture", seed, i).chance(cfg.disguised) else pair)
    return [dataclasses.replace(pair, split="train") for pair in pairs]


def strangers(real: Sequence[Pair], count: int, book: RuleBook, seed: int) -> list[Pair]:
    """Pairs of a real query and another query's item, which share no word; their tier is the worst."""
    dice, found = Dice("strangers", seed), []
    worst = len(book.tiers) - 1
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        one, other = dice.pick(real), dice.pick(real)
        if not _words(one.query) & (_words(other.query) | _words(other.title)):
            stranger = dataclasses.replace(other, query=one.query, tier=worst, steps=book.implied(worst), reasons=())
            found.append(retyped(stranger, seed, "stranger", len(found)))
    if len(found) < count:
        raise PairsError(f"of {len(real)} pairs too few share no word: lower mixture.strangers, {count} pairs")
    return found


def _again(pairs: Sequence[Pair], *key: object) -> Iterator[Pair]:
    """Repeats the pairs without end, each time in a new order."""
    if not pairs:
        raise PairsError("a mixture needs real pairs, and bundled ones of every tier")
    for time in range(1 << 20):
        yield from (pairs[i] for i in sorted(range(len(pairs)), key=lambda i: point("again", *key, time, i)))


def _words(text: str) -> set[str]:
    return {word.rstrip("s") for word in text.casefold().replace(",", " ").split() if len(word) > 2}
