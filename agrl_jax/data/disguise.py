"""Rewrites the bundled benchmark's pairs as real shops would write them; their truth stays.

A brand may move from its field into the title, a price lose its sign, a query lose its capitals or a letter, and a
title gain a model's name or a seller's praise. The key decides every choice.
"""

from __future__ import annotations

import dataclasses
import re

from agrl_jax.data.bundled.dice import Dice
from agrl_jax.data.pairs import Pair

# Names of models and product lines: they say nothing that a shopper could ask for.
_LINES = (
    "Ridgewell", "Nomad", "Aurora", "Vertex", "Harbor", "Summit", "Atlas", "Solstice", "Meridian", "Juniper", "Orbit",
    "Cascade", "Pioneer", "Element", "Horizon", "Haven", "Vista", "Momentum", "Compass", "Lumen", "Tempo", "Quest",
    "Willow", "Sierra", "Ember", "Breeze", "Nova", "Drift", "Echo", "Fjord", "Grove", "Heron", "Indigo Line", "Kestrel",
    "Lyric", "Mosaic", "Nimbus", "Origin", "Prairie", "Quartz Series", "Rally", "Saga", "Tundra", "Union", "Voyager",
)  # fmt: skip
_SUFFIXES = ("", "", "", " II", " 2", " 3", " X", " Plus", " S", " Max", " Essential", " 2.0")
_PRAISE = (
    "Premium Quality", "Upgraded Version", "2023 New", "Best Seller", "Great Gift Idea", "Gift for Birthday Christmas",
    "Top Rated", "Everyday Use", "Easy to Use", "Satisfaction Guaranteed", "Official", "Original", "New Arrival",
    "Perfect Gift for Mom Dad", "Customer Favorite", "Heavy Duty Quality", "Designed in the USA", "Durable",
)  # fmt: skip
_NOTES = (
    "Ships in recyclable packaging.", "30 day return policy.", "One year warranty included.",
    "Please check the measurements before ordering.", "A favorite of our customers.",
    "If you have any questions, contact us.", "Thoughtfully designed for daily life.", "Colors may vary by screen.",
)  # fmt: skip
_PRICES = ("{}", "{}", "USD {}", "${} USD", "US ${}", "{} dollars")
_CAPS = ("{} dollars", "{} usd", "{}$", "{} bucks", "$ {}", "${}.00")
_SHOUTED = 48  # characters: capitals take several times the tokens
_AROUND = "qwertyuiop asdfghjkl zxcvbnm"  # rows of a keyboard


def disguise(pair: Pair, *key: object) -> Pair:
    """A pair of the bundled benchmark in the style of a marketplace."""
    dice = Dice("disguise", *key)
    title, brand = pair.title, pair.brand
    if brand and brand.casefold() not in title.casefold() and dice.chance(0.5):
        title = f"{brand} {title}" if dice.chance(0.8) else f"{title} by {brand}"
        brand = "" if dice.chance(0.5) else brand
    if dice.chance(0.35):
        title = _with_model(title, pair.brand, dice)
    if dice.chance(0.3):
        praise = dice.pick(_PRAISE)
        title = dice.pick((f"{title}, {praise}", f"{title} - {praise}", f"{title} ({praise})", f"[{praise}] {title}"))
    if dice.chance(0.2):
        title = title.replace(" - ", dice.pick((" | ", ", ", " – ", ": ")))
    if dice.chance(0.6):
        title = _capitalised(title)
    elif dice.chance(0.1):
        title = title.lower()
    description = pair.description
    if dice.chance(0.15):
        description = f"{description} {dice.pick(_NOTES)}".strip()
    price = pair.price
    if price.startswith("$") and dice.chance(0.5):
        price = dice.pick(_PRICES).format(price[1:])
    return dataclasses.replace(
        pair,
        query=typed(_capped(pair.query, dice), dice),
        title=title,
        brand=brand,
        price=price,
        description=description,
        category="" if dice.chance(0.6) else pair.category,
    )


def retyped(pair: Pair, *key: object) -> Pair:
    """A real pair with its query typed in another way; its item may lose the description or the capitals."""
    dice = Dice("retyped", *key)
    return dataclasses.replace(
        pair,
        query=typed(pair.query, dice),
        title=pair.title.lower() if dice.chance(0.1) else pair.title,
        description="" if dice.chance(0.4) else pair.description,
    )


def typed(query: str, dice: Dice) -> str:
    """The query as another shopper may type it: other capitals, now and then a slip."""
    if dice.chance(0.1):
        query = _slipped(query, dice)
    if dice.chance(0.12):
        query = dice.pick((str.title, str.upper, str.capitalize))(query) if len(query) < _SHOUTED else query
    elif dice.chance(0.3):
        query = query.lower()
    return query


def _slipped(query: str, dice: Dice) -> str:
    """The query with a slip in one longer word: two letters swapped, or one missing, doubled, or hit beside its key."""
    words = query.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    if not long:
        return query
    i = dice.pick(long)
    word = words[i]
    at = 1 + dice.below(len(word) - 2)
    near = _AROUND[(_AROUND.find(word[at].lower()) + 1) % len(_AROUND)].strip() or word[at]
    words[i] = dice.pick((
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:at] + near + word[at + 1 :],
    ))
    return " ".join(words)


def _capped(query: str, dice: Dice) -> str:
    """The query with another spelling of its price limit, if it has one."""
    if not dice.chance(0.3):
        return query
    spelling = dice.pick(_CAPS)
    return re.sub(r"\$(\d+)\b(?!\.)", lambda match: spelling.format(match[1]), query)


def _with_model(title: str, brand: str, dice: Dice) -> str:
    """The title with a model's name: after the brand if the title begins with it, else in front or at the end."""
    name = dice.pick(_LINES) + dice.pick(_SUFFIXES)
    if dice.chance(0.3):
        name = f"{dice.pick('ABCDGKMRSTX')}{dice.pick('ABDLPRTX')}-{100 + dice.below(900)}"
    if brand and title.casefold().startswith(brand.casefold()):
        return f"{title[: len(brand)]} {name}{title[len(brand) :]}"
    return f"{name} {title}" if dice.chance(0.5) else f"{title} {name}"


def _capitalised(text: str) -> str:
    """Title Case, as most marketplaces have it; units and codes stay."""
    return re.sub(r"(?<![\w'$])[a-z](?=[a-z]{2})", lambda match: match[0].upper(), text)
