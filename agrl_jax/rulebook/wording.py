"""The texts of a rule book: prompts, gold responses, and the reader of text that the device reader must equal.

A response states its parts by phrases, such as "Category: same". A phrase counts wherever it stands, so
the reader needs no parser, and no phrase may be mistaken for another: see `ambiguity`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from agrl_jax.rulebook.schema import RuleBook
from agrl_jax.types import UNKNOWN

STYLES = ("terse", "full", "chat")
_FORMAT = {
    "none": "Answer in exactly this form, with one of the values in each place of <>:",
    "between": "Answer in this form, with one of the values in each place of <>; you may reason before each line:",
}


# Prompts


def instructions(book: RuleBook) -> str:
    """The task, steps, tiers, rules and form of response, for a language model that knows none of them.

    Values are in angle brackets where a phrase could arise, so that the text states nothing.
    """
    words = book.prompt
    steps = [
        f"{step.label}: {step.question}\n"
        + "\n".join(f"- {_explained(*pair)}" for pair in zip(step.values, step.meanings, strict=True))
        for step in book.steps
    ]
    tiers = "\n".join(f"- {_explained(tier.name, tier.meaning)}" for tier in book.tiers)
    labels = [(step.label, step.values) for step in book.steps]
    labels.append((book.response.tier, tuple(tier.name for tier in book.tiers)))
    form = book.response.separator.join(
        book.word(label, f"<{' | '.join(values)}>") for label, values in (labels[part] for part in book.part_order)
    )
    return "\n\n".join([
        words.task,
        "\n\n".join([words.steps, *steps]),
        f"{words.tiers}\n{tiers}",
        f"{words.table}\n{_rules(book)}",
        f"{words.format or _FORMAT[book.response.free_text]}\n{form}",
    ])


def _explained(name: str, meaning: str) -> str:
    return f"{name} ({meaning})" if meaning else name


def _rules(book: RuleBook) -> str:
    lines = []
    for row in book.rows:
        conditions = [
            f"{step.label} <{' | '.join(step.values[value] for value in values)}>"
            for step, values in zip(book.steps, row.when, strict=True)
            if values
        ]
        lines.append(f"- {', '.join(conditions) or book.prompt.otherwise} -> {book.tiers[row.tier].name}")
    return "\n".join(lines)


def turns(book: RuleBook) -> tuple[str, str]:
    """What the system and the user say in the `chat` style; the user's text holds {query} and {item}."""
    return instructions(book).strip(), book.prompt.terse.strip()


def prompt_pieces(book: RuleBook, style: str = "terse") -> tuple[str, str, str]:
    """The fixed text before the query, between query and item, and after the item.

    For `chat` this leaves out the model's chat template, which is no part of the rule book.

    Raises:
      ValueError: the style is unknown.
    """
    if style not in STYLES:
        raise ValueError(f"unknown prompt style {style!r}; it should be one of: {', '.join(STYLES)}")
    templates = {"terse": book.prompt.terse, "full": book.prompt.full, "chat": "{instructions}\n\n" + turns(book)[1]}
    template = templates[style]
    before, rest = template.split("{query}")
    between, after = rest.split("{item}")
    return before.replace("{instructions}", instructions(book)), between, after


def prompt(book: RuleBook, query: str, item: str, style: str = "terse") -> str:
    """The prompt for one query and one item: `terse` for small policies, `full` or `chat` for language models."""
    before, between, after = prompt_pieces(book, style)
    return before + query + between + item + after


# Gold responses


def part_text(book: RuleBook, part: int, value: int, first: bool) -> str:
    """What a canonical response says for one part, with the separator before it unless the part is the `first`."""
    text = next(phrase.text for phrase in book.phrases if phrase[:2] == (part, value))
    return text if first else book.response.separator + text


def reason_text(book: RuleBook, reason: str, first: bool) -> str:
    """The reason that stands before the canonical text of a part, with the separator before it, or after it where the
    part is the `first`. Empty without a reason, or where the book has no free text.
    """
    if not reason or book.response.free_text == "none":
        return ""
    return reason + book.response.separator if first else book.response.separator + reason


class Piece(NamedTuple):
    """What a gold response says for one part. The two are tokenised apart, so that a statement has the same tokens
    everywhere."""

    reason: str  # with a separator, or empty
    statement: str  # the canonical text


def gold_pieces(
    book: RuleBook, tier: int, steps: Sequence[int], reasons: Sequence[str] = ()
) -> list[Piece | None]:
    """The gold response part by part, in response order; None for parts that are UNKNOWN.

    Args:
      book: words it.
      tier: the true tier.
      steps: the true value of each step; empty where none is known.
      reasons: for each step and then the tier, what a judge may write before it; empty where there are none.
    """
    values = (*(steps or [UNKNOWN] * len(book.steps)), tier)
    reasons = reasons or ("",) * len(values)
    return [
        None if values[part] == UNKNOWN else Piece(
            reason_text(book, reasons[part], first=place == 0),
            part_text(book, part, values[part], first=place == 0),
        )
        for place, part in enumerate(book.part_order)
    ]  # fmt: skip


def gold_segments(book: RuleBook, tier: int, steps: Sequence[int], reasons: Sequence[str] = ()) -> list[str]:
    """The gold response, one text per part in response order: reason and statement, separators included.

    It stops before the first part that is UNKNOWN, so the texts always begin a whole response. See `gold_pieces`.
    """
    return ["".join(piece) for piece in itertools.takewhile(bool, gold_pieces(book, tier, steps, reasons))]


# Reading


class TextReading(NamedTuple):
    """What a text states, by part index (part R is the tier)."""

    value: tuple[int, ...]  # UNKNOWN if not stated, or if repeats conflict
    count: tuple[int, ...]  # how often a value of the part was stated


def read(book: RuleBook, text: str | bytes) -> TextReading:
    """Reads every phrase in the text, wherever it stands, overlapping ones too."""
    stated: list[list[int]] = [[] for _ in range(len(book.steps) + 1)]
    for phrase, _ in _statements(book, text):
        part, value, _ = book.phrases[phrase]
        stated[part].append(value)
    value = tuple(values[0] if len(set(values)) == 1 else UNKNOWN for values in stated)
    return TextReading(value, tuple(len(values) for values in stated))


def well_formed(book: RuleBook, text: str | bytes) -> bool:
    """Whether the text is a whole response: each part once, in order, free text only where the book allows it."""
    data = text.encode() if isinstance(text, str) else text
    statements = list(_statements(book, data))
    if tuple(book.phrases[phrase].part for phrase, _ in statements) != book.part_order:
        return False
    if book.response.free_text == "between":
        return statements[-1][1] == len(data)
    return data == book.response.separator.join(book.phrases[phrase].text for phrase, _ in statements).encode()


def statements(book: RuleBook, text: str) -> list[str]:
    """The phrases that a text states, in their order; the rest of it is free text."""
    return [book.phrases[phrase].text for phrase, _ in _statements(book, text)]


def _statements(book: RuleBook, text: str | bytes) -> list[tuple[int, int]]:
    """Every occurrence of a phrase as (phrase, end in bytes), in order of completion."""
    data = text.encode() if isinstance(text, str) else text
    found = [
        (end, index) for index, phrase in enumerate(book.phrases) for end in _ends(phrase.text.encode(), data)
    ]
    return [(index, end) for end, index in sorted(found)]


def _ends(phrase: bytes | str, text: bytes | str) -> Iterator[int]:
    start = text.find(phrase)
    while start >= 0:
        yield start + len(phrase)
        start = text.find(phrase, start + 1)


# What would be misread


def ambiguity(book: RuleBook) -> tuple[int, str] | None:
    """The index of a phrase that could be misread, and why; None if every phrase is clear."""
    return _nested_phrase(book) or _phrase_in_prompt(book) or _misread_response(book)


def _nested_phrase(book: RuleBook) -> tuple[int, str] | None:
    for i, inner in enumerate(book.phrases):
        for j, outer in enumerate(book.phrases):
            if i != j and inner.text in outer.text:
                return i, f"ambiguous wording: {inner.text!r} stands inside {outer.text!r}; word one differently"
    return None


def _phrase_in_prompt(book: RuleBook) -> tuple[int, str] | None:
    wordings = [(f"the {style} prompt", "\0".join(prompt_pieces(book, style))) for style in STYLES]
    for place, text in [("the separator", book.response.separator), *wordings]:
        for i, phrase in enumerate(book.phrases):
            if (at := text.find(phrase.text)) >= 0:
                context = text[max(0, at - 30) : at + len(phrase.text) + 30]
                return i, f"ambiguous wording: {phrase.text!r} stands inside {place}: {context!r}"
    return None


def _misread_response(book: RuleBook) -> tuple[int, str] | None:
    """Looks for a phrase that arises where two parts of a canonical response meet.

    How a text may go on to a phrase depends only on its longest suffix that starts one. There are few such suffixes, so
    all canonical responses can be read at once, part by part.
    """
    phrases = [phrase.text for phrase in book.phrases]
    pending = {""}
    for place, part in enumerate(book.part_order):
        ends = set()
        for i, phrase in enumerate(book.phrases):
            if phrase.part != part:
                continue
            for tail in pending:
                text = tail + part_text(book, part, phrase.value, first=place == 0)
                heard = [(end, j) for j, other in enumerate(phrases) for end in _ends(other, text) if end > len(tail)]
                if heard != [(len(text), i)]:
                    other = next(j for end, j in heard if (end, j) != (len(text), i))
                    return other, f"ambiguous wording: {phrases[other]!r} can be read where parts meet, in {text!r}"
                ends.add(next(text[k:] for k in range(len(text) + 1) if any(p.startswith(text[k:]) for p in phrases)))
        pending = ends
    return None


def misread_reason(book: RuleBook, part: int, value: int, reason: str) -> str | None:
    """The phrase that would be read in a reason before a part's statement, or where the reason meets the texts around
    it; None if the reason states nothing. Always None where the rule book has no free text.
    """
    place = book.part_order.index(part)
    before = reason_text(book, reason, first=place == 0)
    if not before:
        return None
    own = part_text(book, part, value, first=place == 0)
    for tail in _tails(book, place):
        text = tail + before + own
        for phrase in book.phrases:
            if phrase.text in text and any(
                (phrase.part, end) != (part, len(text)) for end in _ends(phrase.text, text) if end > len(tail)
            ):
                return phrase.text
    return None


@functools.lru_cache(maxsize=64)
def _tails(book: RuleBook, place: int) -> frozenset[str]:
    """The starts of phrases with which the texts of the part before `place` end: the longest suffixes, not whole."""
    if place == 0:
        return frozenset([""])
    phrases = [phrase.text for phrase in book.phrases]
    texts = [phrase.text for phrase in book.phrases if phrase.part == book.part_order[place - 1]]
    return frozenset(
        next(text[k:] for k in range(1, len(text) + 1) if any(phrase.startswith(text[k:]) for phrase in phrases))
        for text in texts
    )
