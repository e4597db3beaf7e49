"""The bundled benchmark: labelled pairs of a query and an item whose step values and tier are true by construction.

A query is made of what it means (`queries`), an item of what it says (`items`), both in the words of one world
(`world`), and `judge` compares the two. The tier follows from the steps by the rule book. How the steps are judged:

    Each step is judged on its own, from what the item's text says, whatever the other steps are. What the text does
    not say is unknown, even where a shopper would guess it.

    category    same: the type asked for, by whatever name; for a question, any type that would do. substitute and
                complement: as the ontology relates the two types; accessories are complements, although their titles
                name the product that they are for. different: all else.
    brand       The item's own, in its title or its brand field. A brand after "for" belongs to another product. An
                item that names no brand is a mismatch. A brand that is ruled out or compared with is not asked for.
    attributes  met: all that was asked for is stated. violated: at least one is contradicted, by another value of the
                same attribute or by a denial ("leather free"). partly met: some are stated and none is contradicted.
                unknown: none is stated.
    limits      broken: at least one is. unknown: none is broken, but one cannot be told. kept: all are.
                - a value ruled out: broken if it is stated, kept if another value or its denial is
                - a brand ruled out: broken if it is the item's, kept if the item has another, unknown if none is named
                - "under $50": by the price; unknown where it is not shown
                - "cheaper than BRAND": kept if the price shown is below what the brand charges for what is wanted, the
                  lower end of its price band; where no price is shown, if the item's brand is of a lower price level;
                  unknown where neither is shown

Some types, brands and phrasings of queries are held out: `sft`, `train` and `validation` never use them. A pair whose
query has one of them is marked `seen=False`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from agrl_jax.data.bundled import world as worlds
from agrl_jax.data.bundled.dice import Dice, point
from agrl_jax.data.bundled.items import Item, make_item
from agrl_jax.data.bundled.queries import FAMILIES, HEAD, Limit, Query, Stock, make_query
from agrl_jax.data.bundled.reasons import explain
from agrl_jax.data.bundled.world import LEVELS, World
from agrl_jax.data.pairs import Pair
from agrl_jax.rulebook import book
from agrl_jax.rulebook.book import RuleBook

__all__ = ["FAMILIES", "HEAD", "SIZES", "CatalogError", "judge", "holdout", "splits"]

SIZES = {"sft": 24_000, "train": 40_000, "validation": 2_000, "b_eval": 2_000, "w_eval": 2_000}  # pairs of each split
VERSION = "1.2.1"  # rises when this code comes to give other pairs, or more of them

_HELD_OUT = 0.15  # of types, brands and phrasings
_UNSEEN = 0.25  # of the evaluation queries drawn; about a fifth of the rows, since many such draws fail
_ITEMS_PER_QUERY = (3, 4, 5, 6)


class CatalogError(ValueError):
    """Splits that cannot be made."""


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What a split is made of."""

    families: Mapping[str, float]  # relative frequency of queries
    side: tuple[float, float]  # the interval of the points of its queries: disjoint sides share no query
    relations: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"same": 68, "substitute": 12, "complement": 10, "different": 10}
    )
    clean: float = 0.55  # how likely an item of the type asked for meets every constraint
    unseen: float = 0.0  # share of queries with words that were held out
    balanced: bool = False  # the same number of pairs of each tier


_TRAINING_SIDE = (0.0, 0.8)
_CONTRAST = {"same": 55, "substitute": 17, "complement": 14, "different": 14}  # near misses teach most
_RECIPES = {
    "sft": _Recipe(
        {"plain": 28, "attribute": 38, "brand": 33} | dict.fromkeys(FAMILIES[3:], 0.2),
        _TRAINING_SIDE,
        _CONTRAST,
    ),
    "train": _Recipe(
        {"plain": 8, "attribute": 17, "brand": 17}
        | {"negation": 14, "affordable": 14, "question": 8, "misspelling": 8, "longtail": 14},
        _TRAINING_SIDE,
        _CONTRAST,
    ),
    "validation": _Recipe(dict.fromkeys(FAMILIES, 1), (0.8, 0.86)),
    "b_eval": _Recipe(
        dict.fromkeys(FAMILIES, 1),
        (0.86, 0.93),
        {"same": 58, "substitute": 14, "complement": 8, "different": 20},
        unseen=_UNSEEN,
        balanced=True,
    ),
    "w_eval": _Recipe(
        {"plain": 6, "attribute": 12, "brand": 12}
        | {"negation": 16, "affordable": 16, "question": 11, "misspelling": 11, "longtail": 16},
        (0.93, 1.0),
        unseen=_UNSEEN,
    ),
}


def splits(seed: int, sizes: Mapping[str, int] | None = None, rules: RuleBook | None = None) -> dict[str, list[Pair]]:
    """Generates the benchmark: the same bytes for the same arguments, everywhere.

    No query of `validation`, `b_eval` or `w_eval` stands in another split, and no pair of query and title in two.

    Args:
      seed: of everything.
      sizes: pairs of each split; by default SIZES.
      rules: gives the tiers; the default rule book if None. It needs the default's steps and values.

    Raises:
      CatalogError: a split is unknown, its size is negative, or `b_eval` cannot be balanced over the tiers.
    """
    rules = rules or book.load()
    world = worlds.load()
    sizes = SIZES | dict(sizes or {})
    for name, size in sizes.items():
        if name not in _RECIPES:
            raise CatalogError(f"unknown split {name!r}; it should be one of: {', '.join(_RECIPES)}")
        if size < 0 or (_RECIPES[name].balanced and size % len(rules.tiers)):
            raise CatalogError(f"{name}: size {size} should be a multiple of {len(rules.tiers)}, the number of tiers")
    seen, unseen = holdout(world, seed)
    taken: set[tuple[str, str]] = set()
    return {name: _Split(name, seed, world, rules, seen, unseen, taken).make(size) for name, size in sizes.items()}


def holdout(world: World, seed: int) -> tuple[Stock, Stock]:
    """The words that all splits may use, and those held out for evaluation, in the seed's order of popularity.

    The plain phrasing of a list is never held out.
    """
    dice = Dice("held out", seed)

    def divide(options: Iterable[str], least: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
        options = tuple(options)
        shuffled = tuple(dice.some(options, len(options)))
        out = max(least, round(_HELD_OUT * len(options)))
        return shuffled[out:], shuffled[:out]

    types, brands = divide(world.types), divide(world.brands)
    phrasings = {name: divide(texts[1:], least=1) for name, texts in world.query_phrasings.items()}
    known = {name: (texts[0], *phrasings[name][0]) for name, texts in world.query_phrasings.items()}
    return (
        Stock(types[0], brands[0], known),
        Stock(types[1], brands[1], {name: out for name, (_, out) in phrasings.items()}),
    )


# Judging


def judge(world: World, query: Query, item: Item) -> tuple[str, str, str, str]:
    """The true value of each step: category, brand, attributes, limits."""
    brand = "not asked" if not query.brand else "match" if item.brand == query.brand else "mismatch"
    category = world.relation(query.types, item.type)
    return category, brand, _attributes(query, item), _limits(world, query, item)


def _attributes(query: Query, item: Item) -> str:
    if not query.asked:
        return "none asked"
    found = {_stated(item, attribute, value) for attribute, value in query.asked}
    if False in found:
        return "violated"
    if found == {True}:
        return "met"
    return "partly met" if True in found else "unknown"


def _stated(item: Item, attribute: str, value: str) -> bool | None:
    """Whether the item says that it has the value (True) or has it not (False); None where it says neither."""
    if attribute in item.says:
        return item.says[attribute] == value
    return False if (attribute, value) in item.denies else None


def _limits(world: World, query: Query, item: Item) -> str:
    if not query.limits:
        return "none asked"
    kept = {_kept(world, query, limit, item) for limit in query.limits}
    return "broken" if False in kept else "unknown" if None in kept else "kept"


def _kept(world: World, query: Query, limit: Limit, item: Item) -> bool | None:
    """Whether the item stays within a limit; None where it does not say enough to tell."""
    if limit.kind == "not":
        stated = _stated(item, limit.subject, str(limit.value))
        return None if stated is None else not stated
    if limit.kind == "not brand":
        return item.brand != limit.subject if item.brand else None
    if limit.kind == "under":
        return None if item.price is None else item.price < 100 * int(limit.value)
    wanted = world.types[query.types[0]]
    level = world.brands[limit.subject][wanted.department]
    if item.price is not None:
        return item.price < 100 * wanted.band(level)[0]
    if not item.brand:
        return None
    mine = world.brands[item.brand][world.types[item.type].department]
    return LEVELS.index(mine) < LEVELS.index(level)


# Splits


class _Split:
    """Makes the pairs of one split; `taken` holds the pairs of query and title of all splits so far."""

    def __init__(
        self, name: str, seed: int, world: World, rules: RuleBook, seen: Stock, unseen: Stock,
        taken: set[tuple[str, str]],
    ) -> None:  # fmt: skip
        self._name, self._seed, self._world, self._rules = name, seed, world, rules
        self._seen, self._unseen, self._all = seen, unseen, seen.plus(unseen)
        self._taken = taken
        self._recipe = _RECIPES[name]
        self._dice = Dice(name, seed)

    def make(self, size: int) -> list[Pair]:
        share = size // len(self._rules.tiers) if self._recipe.balanced else size
        room = [share] * len(self._rules.tiers)  # pairs that each tier still takes
        pairs: list[Pair] = []
        while len(pairs) < size:
            query, seen = self._query()
            if query is None:
                continue
            for _ in range(self._dice.pick(_ITEMS_PER_QUERY)):
                pair = self._pair(query, seen, len(pairs))
                if pair is not None and room[pair.tier] and len(pairs) < size:
                    room[pair.tier] -= 1
                    self._taken.add(_key(pair))
                    pairs.append(pair)
        return pairs

    def _query(self) -> tuple[Query | None, bool]:
        """A query of this split, or None; and whether all its words were seen in training."""
        dice = self._dice
        family = dice.weighted(self._recipe.families)
        seen = not dice.chance(self._recipe.unseen)
        query = make_query(dice, self._world, self._seen if seen else self._new_words(), family)
        low, high = self._recipe.side
        if query is None or not low <= point("side", self._seed, query.text.lower()) < high:
            return None, seen
        return (None if self._is_seen(query) != seen else query), seen

    def _new_words(self) -> Stock:
        """A stock with one kind of words held out (types, brands or phrasings) and the others not."""
        field = self._dice.weighted({"types": 3, "brands": 3, "phrasings": 4})
        return dataclasses.replace(self._seen, **{field: getattr(self._unseen, field)})

    def _is_seen(self, query: Query) -> bool | None:
        """Whether no word of the query was held out; None where it compares prices with a brand that was."""
        if any(limit.subject in self._unseen.brands for limit in query.limits_of("cheaper")):
            return None  # its price band is known from training alone
        brands = {query.brand, *(limit.subject for limit in query.limits_of("not brand"))}
        phrasings = {text for texts in self._unseen.phrasings.values() for text in texts}
        return (
            # A question names none of the types that would do.
            (query.family == "question" or query.types[0] not in self._unseen.types)
            and brands.isdisjoint(self._unseen.brands)
            and phrasings.isdisjoint(query.phrasings)
        )

    def _pair(self, query: Query, seen: bool, number: int) -> Pair | None:
        """A pair of the query and a new item; None where a draw fails or the pair exists already."""
        dice, recipe = self._dice, self._recipe
        relations = dict(recipe.relations)
        if not query.constraints:  # every item of the type is excellent
            relations["same"] /= 2
        relation = dice.weighted(relations)
        stock = self._seen if seen else self._all
        if query.limits_of("cheaper"):  # the price band of a held-out brand cannot be known
            stock = dataclasses.replace(stock, brands=self._seen.brands)
        item = make_item(dice, self._world, query, stock, relation, recipe.clean)
        if item is None:
            return None
        steps = tuple(
            step.values.index(value)
            for step, value in zip(self._rules.steps, judge(self._world, query, item), strict=True)
        )
        pair = Pair(
            id=f"{self._name}-{number:05d}",
            query=query.text,
            title=item.title,
            **item.fields,
            tier=self._rules.tier_for(steps),
            steps=steps,
            family=query.family,
            split=self._name,
            seen=seen,
        )
        if _key(pair) in self._taken:
            return None
        reasons = explain(Dice("reasons", self._seed, pair.id), self._world, stock, query, item)
        return dataclasses.replace(pair, reasons=(*reasons, ""))


def _key(pair: Pair) -> tuple[str, str]:
    return pair.query.lower(), pair.title.lower()
