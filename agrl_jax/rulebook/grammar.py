"""The whole responses of a rule book as a grammar, for engines that decode under one.

It accepts the valid Unicode texts that `automaton.recognise` accepts, in two dialects: a regular expression without
look-around, and EBNF as llama.cpp (GBNF), xgrammar, vLLM and SGLang read it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from agrl_jax.rulebook import wording
from agrl_jax.rulebook.schema import RuleBook

LONGEST_REGEX = 1 << 16  # characters

# A state of free text: the place of the next part, and the start of a phrase that the text ends with. None stands for
# what most states of a place do alike.
_State = tuple[int, str | None]
_Edges = dict[_State, dict[_State, list[str]]]  # from state to state, by one of some expressions
_START, _FINAL = (-1, ""), (-1, None)


class GrammarError(ValueError):
    """A rule book whose responses have no regular expression of a reasonable length."""


def regex(book: RuleBook) -> str:
    """A regular expression of whole responses, to be matched in full, as Python, Rust and xgrammar read it.

    Raises:
      GrammarError: phrases that start within each other make it too long, with free text. EBNF has no such limit.
    """
    if book.response.free_text == "between":
        return _eliminate(dict(_amid_text(book, _REGEX)))
    return _without_text(book, _REGEX)


def ebnf(book: RuleBook) -> str:
    """EBNF of whole responses, from the rule `root`. With free text, each state has a rule."""
    if book.response.free_text == "none":
        return f"root ::= {_without_text(book, _EBNF)}\n"
    states = dict(_amid_text(book, _EBNF))
    names = {state: f"state{place}" for place, state in enumerate(states)} | {_START: "root", _FINAL: ""}
    rules = []
    for state, targets in states.items():
        ways = [_EBNF.follow(one, names[target]) for target, expressions in targets.items() for one in expressions]
        rules.append(f"{names[state]} ::= {' | '.join(ways)}\n")
    return "".join(rules)


class _Dialect(NamedTuple):
    """How expressions are written. The empty expression stands for the empty text."""

    literal: Callable[[str], str]
    space: str  # between expressions that follow each other

    def follow(self, *expressions: str) -> str:
        return self.space.join(filter(None, expressions))

    def either(self, expressions: Iterable[str]) -> str:
        some = dict.fromkeys(expressions)
        rest = [one for one in some if one]
        if len(some) == 1 or not rest:
            return "".join(rest)
        return f"({f'{self.space}|{self.space}'.join(rest)}){'?' * (len(rest) < len(some))}"

    def texts(self, texts: list[str]) -> str:
        """One of the texts; their common beginnings stand once."""
        common = os.path.commonprefix(texts)
        rest = self.either(self.literal(text[len(common) :]) for text in texts)
        return self.follow(self.literal(common), rest) if common else rest

    def characters(self, characters: Iterable[str], negated: bool = False) -> str:
        """One character of these, or of all others."""
        some = sorted(characters)
        if len(some) == 1 and not negated:
            return self.literal(some[0])
        return f"[{'^' * negated}{''.join(one if one.isalnum() else _code(one) for one in some)}]"


def _code(character: str) -> str:
    """An ASCII character by its number, which has no special meaning in any dialect."""
    return f"\\x{ord(character):02X}" if character.isascii() else character


def _escaped(text: str, special: str) -> str:
    escapes = {"\n": "\\n"} | {one: f"\\{one}" for one in special}
    return "".join(escapes.get(one) or (one if one.isprintable() else _code(one)) for one in text)


_REGEX = _Dialect(lambda text: _escaped(text, "\\.+*?()|[]{}^$"), "")
_EBNF = _Dialect(lambda text: f'"{_escaped(text, chr(92) + chr(34))}"', " ")


def _without_text(book: RuleBook, dialect: _Dialect) -> str:
    """The parts one after the other, each with the separator before it."""
    return dialect.follow(*(
        dialect.texts([wording.part_text(book, *one[:2], first=not place) for one in book.phrases if one.part == part])
        for place, part in enumerate(book.part_order)
    ))


def _amid_text(book: RuleBook, dialect: _Dialect) -> Iterator[tuple[_State, dict[_State, list[str]]]]:
    """Each state, and its edges to others. They do what `automaton.find_phrases` does, for each part that is still
    expected: a phrase of this part leads to the next part, any other phrase nowhere."""
    part_of = {phrase.text: phrase.part for phrase in book.phrases}
    starts = dict.fromkeys(text[:size] for text in part_of for size in range(len(text)))
    alphabet = sorted(set("".join(part_of)))

    def end(text: str) -> str:
        """The longest suffix of a text that is a phrase or starts one."""
        return next(text[k:] for k in range(len(text) + 1) if text[k:] in part_of or text[k:] in starts)

    def edges(place: int, moves: dict[str, str]) -> dict[_State, list[str]]:
        characters: dict[_State, list[str]] = {}
        for one, reached in moves.items():
            target: _State = (place, reached)
            if reached in part_of:
                if part_of[reached] != book.part_order[place]:
                    continue
                target = (place + 1, end(reached[1:])) if place + 1 < len(book.part_order) else _FINAL
            characters.setdefault(target, []).append(one)
        return {target: [dialect.characters(some)] for target, some in characters.items()}

    moves = {start: {one: reached for one in alphabet if (reached := end(start + one))} for start in starts}
    common = moves[""]
    yield _START, {(0, ""): [""]}
    for place in range(len(book.part_order)):
        yield (place, None), edges(place, common)
        for start, own in moves.items():
            alike = common.items() <= own.items()
            found = edges(place, {one: own[one] for one in own if not alike or one not in common})
            if alike:
                found[place, None] = [""]
            found.setdefault((place, ""), []).append(dialect.characters(own, negated=True))
            yield (place, start), found


def _eliminate(edges: _Edges) -> str:
    """The regular expression of an automaton. States are removed one by one, the longest starts of phrases first, and
    the expressions into and out of each are joined (Brzozowski and McCluskey, 1963)."""
    sources: dict[_State, dict[_State, None]] = {}  # in a fixed order
    for source, targets in edges.items():
        for target in targets:
            sources.setdefault(target, {})[source] = None
    states = (state for state in edges if state != _START)
    for gone in sorted(states, key=lambda state: -0.5 if state[1] is None else -len(state[1])):
        out = edges.pop(gone)
        loop = out.pop(gone, None)
        again = f"({_REGEX.either(loop)})*" if loop else ""
        for source in filter(edges.__contains__, sources.pop(gone, {})):
            into = _REGEX.either(edges[source].pop(gone))
            for target, onward in out.items():
                joined = _REGEX.follow(into, again, _REGEX.either(onward))
                if len(joined) > LONGEST_REGEX:
                    raise GrammarError(f"it would have over {LONGEST_REGEX:,} characters; use the EBNF")
                edges[source].setdefault(target, []).append(joined)
                sources[target][source] = None
    return _REGEX.either(edges[_START][_FINAL])
