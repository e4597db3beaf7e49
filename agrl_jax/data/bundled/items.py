"""What sellers offer: items for a query, from just what was meant to something else, and their noisy texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from agrl_jax.data.bundled.dice import Dice
from agrl_jax.data.bundled.queries import PLAIN, POPULAR, Query, Stock
from agrl_jax.data.bundled.world import LEVELS, ProductType, World, follows_noun

_OUTCOMES = {"good": 6.0, "off": 2.5, "unsaid": 1.5}  # of a constraint that an item may miss: weights
_VERSIONS = ("pro", "plus", "v2", "s3", "x5", "basic", "one", "prime")


@dataclasses.dataclass(frozen=True)
class Item:
    """An item, and what its text says of it: nothing else is known of it."""

    type: str
    brand: str  # its own; empty where the text names none
    says: Mapping[str, str]  # attributes and their values
    denies: tuple[tuple[str, str], ...]  # attributes and values that it says it does not have: "leather free"
    price: int | None  # in cents; None where it is not shown
    title: str = ""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # its other texts, by field of `Pair`


def make_item(dice: Dice, world: World, query: Query, stock: Stock, relation: str, clean: float) -> Item | None:
    """An item that stands in `relation` to what the query asks for.

    Args:
      dice: all choices are drawn from it.
      world: what there is.
      query: what was asked.
      stock: the types and brands that may be used.
      relation: same, substitute, complement or different.
      clean: how likely an item of the type asked for meets every constraint. Else it misses one or two: near misses.

    Returns:
      The item; None if the stock has no type in that relation.
    """
    kind = _type(dice, world, query, stock, relation)
    if kind is None:
        return None
    brand_aim, *aims = _aims(dice, 1 + len(query.asked) + len(query.limits), relation, clean, bool(query.brand))
    asked_aims, limit_aims = aims[: len(query.asked)], aims[len(query.asked) :]
    says, denies = _attributes(dice, world, kind, query, asked_aims, limit_aims)
    brand, price = _brand_and_price(dice, world, kind, query, stock, brand_aim, limit_aims)
    item = Item(kind.name, brand, says, denies, price)
    return _Seller(dice, world, stock).write(item, query, relation)


# What it is


def _type(dice: Dice, world: World, query: Query, stock: Stock, relation: str) -> ProductType | None:
    if relation == "different":
        return _different_type(dice, world, query, stock)
    if relation == "same":
        near: Sequence[str] = query.types
    else:
        wanted = [world.types[name] for name in query.types]
        near = sorted({name for kind in wanted for name in (kind.substitutes | kind.complements)})
    allowed = frozenset(stock.types)
    options = [name for name in near if name in allowed and world.relation(query.types, name) == relation]
    return world.types[dice.pick(options)] if options else None


def _different_type(dice: Dice, world: World, query: Query, stock: Stock) -> ProductType | None:
    """Another type, mostly one of the same department or with a word of the query in its name."""
    wanted = world.types[query.types[0]]
    how = dice.weighted({"department": 3, "word": 2, "any": 5})
    for _ in range(200):
        kind = world.types[dice.popular(stock.types)]
        if world.relation(query.types, kind.name) != "different":
            continue
        words = set(" ".join(kind.names).split())
        if (
            how == "any"
            or (how == "department" and kind.department == wanted.department)
            or (how == "word" and words & set(" ".join(wanted.names).split()))
        ):
            return kind
        if how == "word" and dice.chance(0.02):
            how = "any"
    return None


def _aims(dice: Dice, count: int, relation: str, clean: float, has_brand: bool) -> list[str]:
    """What the item does about the brand and each constraint: good, off or unsaid."""
    aims = ["good"] * count
    if relation != "same":
        return [dice.weighted(_OUTCOMES) for _ in aims]
    if not dice.chance(clean):
        slots = range(0 if has_brand else 1, count)
        for i in dice.some(slots, 2 if dice.chance(0.3) else 1):
            aims[i] = "off" if dice.chance(0.6) else "unsaid"
    return aims


# What it says of its attributes


def _attributes(
    dice: Dice, world: World, kind: ProductType, query: Query, asked_aims: list[str], limit_aims: list[str]
) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    says: dict[str, str] = {}
    denies = []

    def state(attribute: str, value: str, other: bool) -> None:
        """Says the value, or another one."""
        values = kind.attributes.get(attribute, ())
        others = [option for option in values if option != value]
        noun = world.attributes[attribute].nouns.get(value)
        if not other:
            says.update({attribute: value} if value in values else {})
        elif noun and value in values and (not others or dice.chance(0.3)):
            denies.append((attribute, value))
        elif others:
            says[attribute] = dice.popular(others)

    for (attribute, value), aim in zip(query.asked, asked_aims, strict=True):
        if aim != "unsaid":
            state(attribute, value, other=aim == "off")
    for limit, aim in zip(query.limits, limit_aims, strict=True):
        if limit.kind == "not" and aim != "unsaid":
            state(limit.subject, str(limit.value), other=aim == "good")
    mentioned = {name for name, _ in query.asked} | {limit.subject for limit in query.limits}
    free = [name for name in kind.attributes if name not in mentioned]
    count = max(0, dice.weighted({0: 2, 1: 3, 2: 3, 3: 1}) - len(says) // 2)
    for name in dice.some(free, count, [POPULAR.get(name, 1.0) for name in free]):
        says[name] = dice.popular(kind.attributes[name])
    return says, tuple(denies)


# Its brand and price


def _brand_and_price(
    dice: Dice, world: World, kind: ProductType, query: Query, stock: Stock, brand_aim: str, limit_aims: list[str]
) -> tuple[str, int | None]:
    """A brand (empty: none is named) and a price in cents (None: not shown) that follow the aims."""
    sellers = [name for name in stock.brands if kind.department in world.brands[name]]
    levels = {name: world.brands[name][kind.department] for name in sellers}
    brands = list(levels)
    named, shown = not dice.chance(0.12), dice.chance(0.4)
    low, high = 0, kind.prices[-1]

    def keep(some: list[str]) -> None:
        if some:
            brands[:] = some

    if query.brand:
        named = brand_aim == "good" or (brand_aim == "off" and dice.chance(0.85))
        keep([name for name in brands if (name == query.brand) == (brand_aim == "good")])
    for limit, aim in zip(query.limits, limit_aims, strict=True):
        if limit.kind == "not brand":
            named = aim != "unsaid"
            keep([name for name in brands if (name == limit.subject) == (aim == "off")])
        elif limit.kind == "cheaper":
            rank = LEVELS.index(world.brands[limit.subject][world.types[query.types[0]].department])
            if aim == "off" and limit.subject in levels and dice.chance(0.25):
                keep([limit.subject])
            keep([name for name in brands if (LEVELS.index(levels[name]) < rank) == (aim == "good")])
            named, shown = (False, False) if aim == "unsaid" else (named, shown or not named)
        elif limit.kind == "under":
            shown = aim != "unsaid"
            cap = int(limit.value)
            low, high = (low, min(high, cap)) if aim == "good" else (max(low, cap), high)
            keep([name for name in brands if _between(kind, levels[name], low, high)])
    level = levels[dice.pick(brands)] if not named else ""
    brand = dice.popular(brands) if named else ""
    start, end = kind.band(level or levels[brand])
    start, end = _overlap(start, end, low, high) or (start, end)
    cents = 100 * (start + dice.below(end - start)) + dice.pick((99, 95, 49))
    return brand, cents if shown else None


def _between(kind: ProductType, level: str, low: int, high: int) -> bool:
    return _overlap(*kind.band(level), low, high) is not None


def _overlap(start: int, end: int, low: int, high: int) -> tuple[int, int] | None:
    start, end = max(start, low), min(end, high)
    return (start, end) if start < end else None


# Its text


class _Seller:
    """Writes an item's texts, so that they say what the item says and no more."""

    def __init__(self, dice: Dice, world: World, stock: Stock) -> None:
        self._dice, self._world, self._stock = dice, world, stock

    def write(self, item: Item, query: Query, relation: str) -> Item:
        dice, kind = self._dice, self._world.types[item.type]
        title, description, color = self._place(item)
        name = dice.first(kind.names, PLAIN)
        product = name + self._company(kind, query, relation)
        brand_in_title = bool(item.brand) and dice.chance(0.75)
        fields = {
            "description": self._description(description),
            "brand": item.brand if not brand_in_title or dice.chance(0.2) else "",
            "color": color,
            "category": kind.department if dice.chance(0.15) else "",
            "price": "" if item.price is None else f"${item.price // 100}.{item.price % 100:02d}",
        }
        text = self._title(item.brand if brand_in_title else "", product, title)
        if dice.chance(0.12):
            text += f", {dice.pick([other for other in kind.names if other != name])}"
        return dataclasses.replace(item, title=text, fields={name: text for name, text in fields.items() if text})

    def _place(self, item: Item) -> tuple[list[str], list[str], str]:
        """What is said in the title, in the description, and in the field for the colour."""
        title: list[str] = []
        description: list[str] = []
        color = ""
        for attribute, value in item.says.items():
            way = self._dice.first(self._world.attributes[attribute].values[value], PLAIN)
            if attribute == "color" and self._dice.chance(0.25):
                color = way
            else:
                (description if self._dice.chance(0.2) and len(description) < 2 else title).append(way)
        for attribute, value in item.denies:
            noun = self._world.attributes[attribute].nouns[value]
            (description if self._dice.chance(0.3) else title).append(self._dice.pick((f"no {noun}", f"{noun} free")))
        return title, description, color

    def _company(self, kind: ProductType, query: Query, relation: str) -> str:
        """The product that an accessory is for, or that goes with the item: often one that the query names."""
        hosts = [name for name in kind.hosts if name in self._stock.types]
        hosts = [name for name in hosts if name in query.types] or hosts
        if hosts and self._dice.chance(0.75):
            host = self._world.types[self._dice.pick(hosts)]
            brands = [name for name in self._stock.brands if host.department in self._world.brands[name]]
            brand = query.brand if query.brand in brands else self._dice.popular(brands)
            name = self._dice.first(host.names, PLAIN)
            return f" for {brand} {name}" if self._dice.chance(0.5) else f" for {name}"
        if relation == "complement" and self._dice.chance(0.5):
            # A product that the item goes with: another type would make it something else.
            friends = [name for name in query.types if name in kind.complements and name in self._stock.types]
            if friends:
                name = self._dice.first(self._world.types[self._dice.pick(friends)].names, PLAIN)
                return ", " + self._dice.pick(self._world.item_phrasings["company"]).replace("{type}", name)
        return ""

    def _title(self, brand: str, product: str, ways: list[str]) -> str:
        dice = self._dice
        before = " ".join(way for way in ways if not follows_noun(way))
        after = [way for way in ways if follows_noun(way)]
        version = f" {dice.pick(_VERSIONS)}" if brand and dice.chance(0.12) else ""
        form = dice.weighted({"plain": 35, "brand last": 12, "list": 20, "brand inside": 18, "product first": 15})
        if form == "list":
            text = _join(f"{brand}{version} {product}", " - " if ways else "", ", ".join(ways))
        elif form == "product first":
            text = _join(f"{product} {brand}{version}", ", " if before else "", before) + _tail(after)
        elif form == "brand inside":
            text = f"{before} {brand}{version} {product}" + _tail(after)
        elif form == "brand last" and brand:
            text = f"{before} {product} by {brand}{version}" + _tail(after)
        else:
            text = f"{brand}{version} {before} {product}" + _tail(after)
        if dice.chance(0.25):
            filler = dice.pick(self._world.item_phrasings["filler"])
            text = f"{filler} {text}" if dice.chance(0.4) else f"{text}, {filler}"
        return " ".join(text.split()).replace(" ,", ",")

    def _description(self, ways: list[str]) -> str:
        phrasings = self._world.item_phrasings
        texts = []
        if ways:
            texts.append(self._dice.pick(phrasings["description"]).replace("{said}", ", ".join(ways)))
        if self._dice.chance(0.15):
            texts.append(self._dice.pick(phrasings["chatter"]))
        return " ".join(texts)


def _join(left: str, between: str, right: str) -> str:
    return left.strip() + between + right


def _tail(ways: list[str]) -> str:
    """What follows the noun: "boots with zip", but "soap, contains alcohol"."""
    return "".join((" " if way.split()[0] in ("for", "with", "without") else ", ") + way for way in ways)
