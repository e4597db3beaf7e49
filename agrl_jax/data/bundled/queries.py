"""What shoppers ask: queries of every family, with their meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from agrl_jax.data.bundled.dice import Dice
from agrl_jax.data.bundled.world import LEVELS, ProductType, UseCase, World, follows_noun

FAMILIES = ("plain", "attribute", "brand", "negation", "affordable", "question", "misspelling", "longtail")
HEAD = FAMILIES[:3]
POPULAR = {"color": 4.0, "material": 3.0, "size": 2.0, "audience": 2.0}  # weights; other attributes: 1
PLAIN = 0.85  # how often a product or value goes by its plain name; else by any of its names
_CAPS = (5, 8, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 500, 800, 1000)  # round prices, in dollars


class Limit(NamedTuple):
    """A value or brand that is ruled out, or a price that is capped."""

    kind: str  # "not": an attribute's value; "not brand"; "under": a price; "cheaper": than a brand
    subject: str  # the attribute, the brand, or empty
    value: str | int = ""  # the value, or the cap in dollars


@dataclasses.dataclass(frozen=True)
class Query:
    """What a shopper typed, and what they mean by it."""

    text: str
    family: str
    types: tuple[str, ...]  # any of these will do
    brand: str = ""
    asked: tuple[tuple[str, str], ...] = ()  # attributes and the values asked for
    limits: tuple[Limit, ...] = ()
    phrasings: tuple[str, ...] = ()  # those that it is worded in

    @property
    def constraints(self) -> int:
        return bool(self.brand) + len(self.asked) + len(self.limits)

    def limits_of(self, kind: str) -> list[Limit]:
        return [limit for limit in self.limits if limit.kind == kind]


@dataclasses.dataclass(frozen=True)
class Stock:
    """The words that may be used: a part of the world, popular types and brands first."""

    types: tuple[str, ...]
    brands: tuple[str, ...]
    phrasings: Mapping[str, tuple[str, ...]]  # of queries

    def plus(self, other: Stock) -> Stock:
        phrasings = {name: texts + other.phrasings[name] for name, texts in self.phrasings.items()}
        return Stock(self.types + other.types, self.brands + other.brands, phrasings)


def make_query(dice: Dice, world: World, stock: Stock, family: str) -> Query | None:
    """A query of the family, in words of the stock; None where a draw fails."""
    maker = _Maker(dice, world, stock)
    if family == "question":
        return maker.question()
    if family == "misspelling":
        return maker.misspelling()
    kind = world.types[dice.popular(stock.types)]
    return getattr(maker, family)(kind)


class _Maker:
    """Makes queries of each family; each method gives None where the draw fails."""

    def __init__(self, dice: Dice, world: World, stock: Stock) -> None:
        self._dice, self._world, self._stock = dice, world, stock
        self._phrasings: list[str] = []  # used so far

    # The families

    def plain(self, kind: ProductType) -> Query | None:
        return self._query("plain", kind, wrap=True)

    def attribute(self, kind: ProductType) -> Query | None:
        count = self._dice.weighted({1: 6, 2: 3.5, 3: 0.5})
        return self._query("attribute", kind, attributes=count, wrap=True)

    def brand(self, kind: ProductType) -> Query | None:
        count = self._dice.weighted({0: 4.5, 1: 4, 2: 1.5})
        return self._query("brand", kind, attributes=count, brand=True)

    def negation(self, kind: ProductType) -> Query | None:
        limits = self._dice.weighted({("not",): 7, ("not brand",): 2, ("not", "not"): 1})
        count = self._dice.weighted({0: 5, 1: 4, 2: 1})
        return self._query("negation", kind, attributes=count, brand=self._dice.chance(0.1), limits=limits)

    def affordable(self, kind: ProductType) -> Query | None:
        limits = self._dice.weighted({("under",): 5, ("cheaper",): 5})
        count = self._dice.weighted({0: 5, 1: 4, 2: 1})
        return self._query("affordable", kind, attributes=count, brand=self._dice.chance(0.15), limits=limits)

    def longtail(self, kind: ProductType) -> Query | None:
        """Three or four constraints."""
        shapes = {  # attributes asked for, a brand, limits
            (3, False, ()): 1,
            (2, True, ()): 3,
            (2, False, ("not",)): 2,
            (1, True, ("not",)): 2,
            (2, False, ("under",)): 2,
            (1, True, ("under",)): 2,
            (1, False, ("not", "under")): 2,
            (2, False, ("cheaper",)): 1,
            (1, False, ("not", "cheaper")): 1,
            (2, False, ("not brand",)): 1,
            (2, True, ("under",)): 1,
            (1, False, ("not brand", "under")): 1,
        }
        attributes, brand, limits = self._dice.weighted(shapes)
        query = self._query("longtail", kind, attributes=attributes, brand=brand, limits=limits)
        return query if query and query.constraints >= 3 else None

    def question(self) -> Query | None:
        case: UseCase = self._dice.pick(self._world.use_cases)
        if not set(case.types) & set(self._stock.types):
            return None
        text = self._phrasing(case.ask).replace("{use}", self._dice.pick(case.uses))
        return Query(text, "question", case.types, asked=case.needs, phrasings=tuple(self._phrasings))

    def misspelling(self) -> Query | None:
        family = self._dice.weighted({"plain": 2, "attribute": 4, "brand": 4})
        query = make_query(self._dice, self._world, self._stock, family)
        text = query and _misspell(self._dice, query.text, self._world.words)
        return dataclasses.replace(query, text=text, family="misspelling") if text else None

    # Their parts

    def _query(
        self, family: str, kind: ProductType, attributes: int = 0, brand: bool = False, limits: tuple[str, ...] = (),
        wrap: bool = False,
    ) -> Query | None:  # fmt: skip
        """A query for `kind` with `attributes` attributes, a brand, and limits of these kinds, worded inside out."""
        rules = self._limits(kind, limits)
        asked = self._asked(kind, attributes, {rule.subject for rule in rules or ()})
        brands = [name for name in self._stock.brands if kind.department in self._world.brands[name]]
        if rules is None or len(asked) < attributes or (brand and not brands):
            return None
        text = self._dice.first(kind.names, PLAIN)
        if asked or not wrap:
            text = self._with_attributes(text, asked, self._phrasing("attribute") if wrap else "{before} {x} {after}")
        else:
            text = self._phrasing("plain").replace("{x}", text)
        name = ""
        if brand and not any(rule.kind in ("not brand", "cheaper") for rule in rules):
            name = self._dice.popular(brands)
            text = self._phrasing("brand").replace("{x}", text).replace("{brand}", self._typed(name))
        for rule in rules:
            text = self._with_limit(text, rule)
        phrasings = tuple(self._phrasings)
        return Query(_tidy(text), family, (kind.name,), name, tuple(asked), tuple(rules), phrasings)

    def _asked(self, kind: ProductType, count: int, taken: set[str]) -> list[tuple[str, str]]:
        """Attributes to ask for, none of those taken."""
        options = []
        for name, values in kind.attributes.items():
            askable = [value for value in values if value in self._world.attributes[name].asked]
            if askable and name not in taken:
                options.append((name, self._dice.popular(askable)))
        return self._dice.some(options, count, [POPULAR.get(name, 1.0) for name, _ in options])

    def _limits(self, kind: ProductType, kinds: tuple[str, ...]) -> list[Limit] | None:
        """A limit of each kind; None if one is impossible."""
        limits: list[Limit] = []
        for name in kinds:
            options = self._options(kind, name, {limit.subject for limit in limits})
            if not options:
                return None
            limits.append(self._dice.some(options, 1, [POPULAR.get(limit.subject, 1.0) for limit in options])[0])
        return limits

    def _options(self, kind: ProductType, name: str, taken: set[str]) -> list[Limit]:
        world = self._world
        if name == "under":
            return [Limit(name, "", cap) for cap in _CAPS if kind.prices[0] < cap < kind.prices[-1]]
        if name == "not":
            options = []
            for attribute, values in kind.attributes.items():
                able = [value for value in values if value in world.attributes[attribute].ruled_out]
                if able and attribute not in taken:
                    options.append(Limit(name, attribute, self._dice.popular(able)))
            return options
        levels = {brand: world.brands[brand].get(kind.department) for brand in self._stock.brands}
        if name == "cheaper":  # nothing is sure to be cheaper than the cheapest
            return [Limit(name, brand) for brand, level in levels.items() if level in LEVELS[1:]]
        return [Limit(name, brand) for brand, level in levels.items() if level]

    # Their wording

    def _with_attributes(self, text: str, asked: list[tuple[str, str]], phrasing: str) -> str:
        ways = [self._dice.first(self._world.attributes[name].values[value], PLAIN) for name, value in asked]
        before = " ".join(way for way in ways if not follows_noun(way))
        after = " ".join(way for way in ways if follows_noun(way))
        return _tidy(phrasing.replace("{x}", text).replace("{before}", before).replace("{after}", after))

    def _with_limit(self, text: str, limit: Limit) -> str:
        phrasing, value = limit.kind, ""
        if limit.kind == "not":
            attribute = self._world.attributes[limit.subject]
            words = {"not adjective": attribute.adjectives, "not noun": attribute.nouns}
            phrasing = self._dice.pick([name for name, options in words.items() if limit.value in options])
            value = words[phrasing][limit.value]
        brand = self._typed(limit.subject) if "brand" in limit.kind or limit.kind == "cheaper" else ""
        text = self._phrasing(phrasing).replace("{x}", text).replace("{value}", value).replace("{brand}", brand)
        return text.replace("{price}", str(limit.value))

    def _phrasing(self, name: str) -> str:
        self._phrasings.append(self._dice.first(self._stock.phrasings[name], 0.4))
        return self._phrasings[-1]

    def _typed(self, brand: str) -> str:
        return brand.lower() if self._dice.chance(0.2) else brand


def _tidy(text: str) -> str:
    """The text without the gaps that empty places of a phrasing leave."""
    text = " ".join(text.split()).replace(" ,", ",")
    return text.strip(" ,-")


def _misspell(dice: Dice, text: str, vocabulary: frozenset[str]) -> str | None:
    """`text` with one or two words misspelt; None where that makes another word of `vocabulary`."""
    words = text.split()
    long = [i for i, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    for i in dice.some(long, 2 if dice.chance(0.25) else 1):
        words[i] = _slip(dice, words[i])
        if words[i].lower() in vocabulary:
            return None
    misspelt = " ".join(words)
    return misspelt if misspelt != text else None


def _slip(dice: Dice, word: str) -> str:
    """A slip of the finger inside the word: a letter dropped, doubled, or swapped with the next."""
    i = 1 + dice.below(len(word) - 2)
    slip = dice.weighted({"drop": 4, "double": 2, "swap": 4})
    if slip == "drop":
        return word[:i] + word[i + 1 :]
    if slip == "double":
        return word[:i] + word[i] + word[i:]
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
