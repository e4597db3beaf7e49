"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], figures: bool = False) -> str:
    """A table in Markdown; with `figures` all columns but the first are aligned to the right."""
    rule = ["---"] * len(columns)
    if figures:
        rule = [":--", *["--:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in (columns, rule, *rows))


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
