"""Cells of a file or a frame as plain text for a prompt, and as plain values for a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

PREFIX = "judge_"  # of the columns that judging adds to a file
TEXTS = ("query", "title", "description", "brand", "color", "category", "price")  # what a prompt can show


def texts(row: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a row that a prompt can show; empty where it has none."""
    return {name: clean(row.get(name), cents=name == "price") for name in TEXTS}


def clean(value: Any, cents: bool = False) -> str:
    """The value as text on one line: empty where it is missing; 129.0 is "129", or "129.00" with `cents`.

    Runs of white space become one space, so that no text breaks the lines of a prompt.
    """
    if is_missing(value):
        return ""
    if isinstance(value, float) and math.isfinite(value):
        if cents and round(value, 2) == value:
            return f"{value:.2f}"
        if value.is_integer() and abs(value) < 2**53:
            return str(int(value))
    return " ".join(str(value).split())


def is_missing(value: Any) -> bool:
    """Whether the value is None, NaN, NaT or NA, as frames mark cells without a value."""
    if value is None:
        return True
    try:
        return bool(value != value)  # only NaN and NaT differ from themselves
    except (TypeError, ValueError):  # the truth of NA is unknown; an array has several
        return type(value).__name__ == "NAType"


def plain(value: Any) -> Any:
    """The value in types that JSON and CSV can hold, with None where it is missing."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if is_missing(value):
        return None
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return value if isinstance(value, str | int | float) else _text(value)


def _text(value: Any) -> str:
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogate (half of a character), which no file and no tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
