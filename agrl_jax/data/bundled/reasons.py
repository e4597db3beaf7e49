"""Why each step has its value: the words of query and item that decide it, as a judge may write them.

They come from what a query means and an item says, from which `catalog.judge` takes the values too; so they are true by
construction. They use the words of the texts, or else the plain ones; for a misspelt query, the words that were meant.
Each fact is worded in one of several ways.
"""

from __future__ import annotations

from collections.abc import Iterable

from agrl_jax.data.bundled.dice import Dice
from agrl_jax.data.bundled.items import Item
from agrl_jax.data.bundled.queries import Limit, Query, Stock
from agrl_jax.data.bundled.world import World, says

_MOST_TYPES = 3  # how many of the types that would do are named for an item of another type
_FACTS = ("{what}: {asked}; item: {found}", "{what}: {asked}, item: {found}", "{asked} {what}, item: {found}")
_NO_BRAND = ("no brand to buy is named", "the query names no brand", "no brand in the query")
_NO_FEATURES = ("the query asks for no features", "no features in the query", "no features are asked for")
_NO_LIMITS = ("the query sets no limits", "nothing is ruled out or capped", "no limits in the query")
_UNSAID = ("not said", "does not say", "no word of it")


def explain(dice: Dice, world: World, stock: Stock, query: Query, item: Item) -> tuple[str, str, str, str]:
    """The reasons of each step, in the order of `catalog.judge`; all choices are drawn from the dice.

    The types that would do are those of the stock, so that training never sees those that are held out of it.
    """
    writer = _Writer(dice, world, stock, query, item)
    return writer.category(), writer.brand(), writer.attributes(), writer.limits()


class _Writer:
    def __init__(self, dice: Dice, world: World, stock: Stock, query: Query, item: Item) -> None:
        self._dice, self._world, self._stock, self._query, self._item = dice, world, stock, query, item
        self._item_text = " | ".join((item.title, *item.fields.values()))

    def category(self) -> str:
        kinds = self._world.types
        found = _word(self._item_text, kinds[self._item.type].names)
        if self._query.family == "question":  # which names none of the types that would do
            types = [name for name in self._query.types if name in self._stock.types]
            some = [self._item.type] if self._item.type in types else types[:_MOST_TYPES]
            return self._fact("would do", " or ".join(some), found)
        return self._fact("wanted", _word(self._query.text, kinds[self._query.types[0]].names), found)

    def brand(self) -> str:
        if not self._query.brand:
            named = self._query.limits_of("not brand") or self._query.limits_of("cheaper")  # but not to buy
            return _NO_BRAND[0] if named else self._dice.pick(_NO_BRAND)
        return self._fact("brand asked", self._query.brand, self._item.brand or "no brand")

    def attributes(self) -> str:
        if not self._query.asked:
            return self._dice.pick(_NO_FEATURES)
        what = "needed" if self._query.family == "question" else "asked"
        return "; ".join(
            self._fact(what, self._asked(attribute, value), self._said(attribute, value))
            for attribute, value in self._query.asked
        )

    def limits(self) -> str:
        if not self._query.limits:
            return self._dice.pick(_NO_LIMITS)
        return "; ".join(self._limit(limit) for limit in self._query.limits)

    def _limit(self, limit: Limit) -> str:
        item, price = self._item, _dollars(self._item.price)
        if limit.kind == "not":
            attribute, value = self._world.attributes[limit.subject], str(limit.value)
            words = [words[value] for words in (attribute.adjectives, attribute.nouns) if value in words]
            return self._fact("ruled out", _word(self._query.text, words), self._said(limit.subject, value))
        if limit.kind == "not brand":
            return self._fact("ruled out", limit.subject, item.brand or "no brand")
        if limit.kind == "under":
            return self._fact("at most", f"${limit.value}", price or "no price")
        wanted = self._world.types[self._query.types[0]]
        level = self._world.brands[limit.subject][wanted.department]
        if price:
            return self._fact("the least at", f"{limit.subject} ${wanted.band(level)[0]}", price)
        if not item.brand:
            return self._fact("cheaper than", limit.subject, "no price, no brand")
        mine = self._world.brands[item.brand][self._world.types[item.type].department]
        return self._fact("cheaper than", f"{limit.subject} ({level})", f"{item.brand} ({mine})")

    def _asked(self, attribute: str, value: str) -> str:
        return _word(self._query.text, self._world.attributes[attribute].values[value])

    def _said(self, attribute: str, value: str) -> str:
        """What the item says of an attribute, where the value matters."""
        said = self._world.attributes[attribute]
        if attribute in self._item.says:
            return _word(self._item_text, said.values[self._item.says[attribute]])
        if (attribute, value) in self._item.denies:
            noun = said.nouns[value]
            return _word(self._item_text, (f"no {noun}", f"{noun} free"))
        return self._dice.pick(_UNSAID)

    def _fact(self, what: str, asked: str, found: str) -> str:
        return self._dice.pick(_FACTS).format(what=what, asked=asked, found=found)


def _word(text: str, ways: Iterable[str]) -> str:
    """The longest of the `ways` that stands in the text; the first where none does."""
    ways = list(ways)
    there = [way for way in ways if says(text, way) or says(text.lower(), way.lower())]
    return max(there, key=len, default=ways[0])


def _dollars(cents: int | None) -> str:
    return "" if cents is None else f"${cents // 100}.{cents % 100:02d}"
