"""The retail world of the bundled benchmark: what is sold, by whom, and in which words.

All of it is data, in the YAML files of `ontology/`: one for each department with its product types, and
`attributes`, `brands`, `use_cases` and `phrasings`. They are checked when they are read.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import yaml
from etils import epath

FOLDER = epath.Path(__file__).parent / "ontology"
LEVELS = ("budget", "mid", "premium")  # price bands, cheapest first
_SHARED = ("attributes", "brands", "phrasings", "use_cases")  # the other files are departments
_ABSENT = ("no", "not", "without", "contains")  # such values are stated by sellers, never asked for
_AFTER = ("for", "with", "in", "contains", "no", "not", "without")  # such words follow the noun
_loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class OntologyError(ValueError):
    """An ontology that cannot be used; the message names file and key."""


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Something that can be said of a product, such as its colour."""

    name: str
    values: Mapping[str, tuple[str, ...]]  # by value the ways of saying it, the plain one first
    nouns: Mapping[str, str]  # by value the word after "without", where it can be ruled out so
    adjectives: Mapping[str, str]  # by value the word after "not", where it can be ruled out so

    @functools.cached_property
    def asked(self) -> frozenset[str]:
        """The values that shoppers ask for: they do not ask for "contains gluten"."""
        return frozenset(
            value for value, ways in self.values.items() if not any(way.split()[0] in _ABSENT for way in ways)
        )

    @functools.cached_property
    def ruled_out(self) -> frozenset[str]:
        """The values that shoppers rule out."""
        return frozenset(self.nouns) | (frozenset(self.adjectives) & self.asked)


@dataclasses.dataclass(frozen=True)
class ProductType:
    """A kind of product. Relations hold both ways."""

    name: str
    names: tuple[str, ...]  # `name` and its synonyms
    department: str
    prices: tuple[int, ...]  # in dollars: budget from the first to the second, mid to the third, premium to the last
    attributes: Mapping[str, tuple[str, ...]]  # those that it has, with the values they can take
    substitutes: frozenset[str]
    complements: frozenset[str]
    hosts: tuple[str, ...]  # types that it is an accessory of: its titles may name them

    def band(self, level: str) -> tuple[int, int]:
        """The lowest and the highest price of a price level, in dollars."""
        return self.prices[LEVELS.index(level)], self.prices[LEVELS.index(level) + 1]


@dataclasses.dataclass(frozen=True)
class UseCase:
    """A need that shoppers describe without naming a product."""

    uses: tuple[str, ...]  # its wordings
    ask: str  # which questions fit: `wear` or `need`
    types: tuple[str, ...]  # what would do
    needs: tuple[tuple[str, str], ...]  # attribute values that it needs to have


@dataclasses.dataclass(frozen=True)
class World:
    """All that there is, in the order of the files."""

    attributes: Mapping[str, Attribute]
    types: Mapping[str, ProductType]
    brands: Mapping[str, Mapping[str, str]]  # by brand and department that it sells in, its price level there
    use_cases: tuple[UseCase, ...]
    query_phrasings: Mapping[str, tuple[str, ...]]
    item_phrasings: Mapping[str, tuple[str, ...]]
    digest: str  # sha256 of the files

    @functools.cached_property
    def departments(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind.department for kind in self.types.values()))

    @functools.cached_property
    def words(self) -> frozenset[str]:
        """The words of all products, values and brands, in lower case."""
        names = [name for kind in self.types.values() for name in kind.names]
        ways = [way for attribute in self.attributes.values() for said in attribute.values.values() for way in said]
        return frozenset(word.lower() for name in (*names, *ways, *self.brands) for word in name.split())

    def relation(self, wanted: Iterable[str], name: str) -> str:
        """What the type `name` is to a shopper who wants one of the types `wanted`: the first of same, substitute,
        complement and different that holds for any of them."""
        wanted = tuple(wanted)
        kind = self.types[name]
        if name in wanted:
            return "same"
        if not kind.substitutes.isdisjoint(wanted):
            return "substitute"
        return "different" if kind.complements.isdisjoint(wanted) else "complement"


def follows_noun(way: str) -> bool:
    """Whether a way of saying a value stands after the noun: "boots with zip", but "red boots"."""
    return way.split()[0] in _AFTER


@functools.cache
def load(folder: epath.PathLike = FOLDER) -> World:
    """Reads and checks an ontology.

    Raises:
      OntologyError: a file is missing, a name is used that does not exist, prices do not rise, two types stand in two
        relations or share a name, or a name or wording says an attribute that is not meant.
    """
    folder = epath.Path(folder)
    files = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.yaml"))}
    for name in _SHARED:
        if name not in files:
            raise OntologyError(f"{folder / name}.yaml: not found")
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + files[name] + b"\0" for name in files)).hexdigest()
    data = {name: yaml.load(text, Loader=_loader) for name, text in files.items()}
    attributes = {str(name): _attribute(str(name), entry) for name, entry in data["attributes"].items()}
    world = World(
        attributes=attributes,
        types=_types({name: entry for name, entry in data.items() if name not in _SHARED}, attributes),
        brands=data["brands"],
        use_cases=tuple(_use_case(entry) for entry in data["use_cases"]),
        query_phrasings={name: tuple(texts) for name, texts in data["phrasings"]["query"].items()},
        item_phrasings={name: tuple(texts) for name, texts in data["phrasings"]["item"].items()},
        digest=digest,
    )
    _check_brands(world)
    _check_use_cases(world)
    _check_wording(world)
    return world


# From entries to records


def _attribute(name: str, entry: Mapping[str, Any]) -> Attribute:
    values = {str(value): tuple(ways) for value, ways in entry["values"].items()}
    plain = {value: ways[0] for value, ways in values.items()}
    rule = entry.get("ruled_out")
    if rule not in (None, "adjective", "noun", "both") and not (isinstance(rule, dict) and rule.keys() <= plain.keys()):
        _fail("attributes", name, "ruled_out should be adjective, noun, both or a mapping of its values")
    nouns = rule if isinstance(rule, dict) else plain if rule in ("noun", "both") else {}
    return Attribute(name, values, nouns, plain if rule in ("adjective", "both") else {})


def _types(departments: Mapping[str, Mapping[str, Any]], attributes: Mapping[str, Attribute]) -> dict[str, ProductType]:
    entries = {name: (file, entry) for file, data in departments.items() for name, entry in data["types"].items()}
    substitutes: dict[str, set[str]] = {name: set() for name in entries}
    complements: dict[str, set[str]] = {name: set() for name in entries}
    hosts: dict[str, list[str]] = {name: [] for name in entries}
    for name, (file, entry) in entries.items():
        for key, relation in (("substitutes", substitutes), ("complements", complements), ("accessories", complements)):
            for other in entry.get(key, ()):
                if other not in entries:
                    _fail(file, name, f"{key}: there is no type {other!r}")
                relation[name].add(other)
                relation[other].add(name)
                if key == "accessories":
                    hosts[other].append(name)
    types = {}
    for name, (file, entry) in entries.items():
        if both := substitutes[name] & complements[name]:
            _fail(file, name, f"{', '.join(sorted(both))}: both a substitute and a complement")
        prices = tuple(entry["price"])
        if len(prices) != len(LEVELS) + 1 or list(prices) != sorted(set(prices)):
            _fail(file, name, f"price should be {len(LEVELS) + 1} rising numbers, not {list(prices)}")
        types[name] = ProductType(
            name=name,
            names=(name, *entry["also"]),
            department=departments[file]["department"],
            prices=prices,
            attributes=_values(file, name, entry["has"], attributes),
            substitutes=frozenset(substitutes[name]),
            complements=frozenset(complements[name]),
            hosts=tuple(hosts[name]),
        )
    return types


def _values(
    file: str, name: str, has: Mapping[str, Any], attributes: Mapping[str, Attribute]
) -> dict[str, tuple[str, ...]]:
    """By attribute of a type its values; `any` stands for all."""
    found = {}
    for attribute, values in has.items():
        if attribute not in attributes:
            _fail(file, name, f"has: there is no attribute {attribute!r}")
        known = attributes[attribute].values
        found[attribute] = tuple(known) if values == "any" else tuple(str(value) for value in values)
        if unknown := [value for value in found[attribute] if value not in known]:
            _fail(file, name, f"has.{attribute}: there is no value {unknown[0]!r}")
    return found


def _use_case(entry: Mapping[str, Any]) -> UseCase:
    needs = tuple((attribute, str(value)) for attribute, value in entry["needs"].items())
    return UseCase(tuple(entry["uses"]), entry["ask"], tuple(entry["types"]), needs)


# Checks


def _check_brands(world: World) -> None:
    for brand, levels in world.brands.items():
        for department, level in levels.items():
            if department not in world.departments or level not in LEVELS:
                _fail("brands", brand, f"{department}: {level} should be a department and one of {', '.join(LEVELS)}")


def _check_use_cases(world: World) -> None:
    for case in world.use_cases:
        for name in case.types:
            if name not in world.types:
                _fail("use_cases", case.uses[0], f"there is no type {name!r}")
            for attribute, value in case.needs:
                if value not in world.types[name].attributes.get(attribute, ()):
                    _fail("use_cases", case.uses[0], f"{name} cannot be {attribute} {value}")


def _check_wording(world: World) -> None:
    """No name stands for two types, and no text says a value that is not meant."""
    meaning: dict[str, str] = {}
    for kind in world.types.values():
        for name in kind.names:
            if meaning.setdefault(name, kind.name) != kind.name:
                _fail(kind.department, kind.name, f"the name {name!r} is also one of {meaning[name]!r}")
    ways = [
        (attribute.name, value, way)
        for attribute in world.attributes.values() for value, said in attribute.values.items() for way in said
    ]  # fmt: skip
    for name, kind in meaning.items():
        for attribute, value, way in ways:
            if says(name, way):
                _fail(world.types[kind].department, kind, f"the name {name!r} says {attribute} {value}")
    for kind in world.types.values():
        own = [entry for entry in ways if entry[1] in kind.attributes.get(entry[0], ())]
        for *meant, way in own:
            for *other, longer in own:
                if meant != other and says(longer, way) and longer.split()[0] not in _ABSENT:
                    _fail(kind.department, kind.name, f"{longer!r} also says {' '.join(meant)}")


def says(text: str, words: str) -> bool:
    """Whether `words` stand in `text`, as whole words."""
    return words in text and _whole(words).search(text) is not None


@functools.cache
def _whole(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(words)}(?![\w-])")


def _fail(file: str, key: str, problem: str) -> NoReturn:
    raise OntologyError(f"ontology/{file}.yaml: {key}: {problem}")
