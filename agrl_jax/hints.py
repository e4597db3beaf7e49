"""What a mistyped name was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of `known` that resemble `name`, best first, case aside; a dotted name by its last part too."""

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a.casefold(), b.casefold()).ratio()

    last = name.rpartition(".")[2]
    scored = [(ratio(name, k), ratio(last, k.rpartition(".")[2]), k) for k in known]
    close = [(whole + part, k) for whole, part, k in scored if part >= 0.6 or whole >= 0.8]
    return [k for _, k in sorted(close, key=lambda pair: -pair[0])[:count]]


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    """The end of a message, "; did you mean 'grpo'?", with up to `count` of `known`; empty where none resembles."""
    found = nearest(name, known, count)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
