"""How a user describes a file of pairs that was not written for this program: names of columns, labels, ratings."""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Callable, Mapping

import yaml

from agrl_jax.data.cells import clean
from agrl_jax.data.rows import PairsError
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN

ON_BAD_ROWS = ("refuse", "skip")
_WHOLE = re.compile(r"([0-9]+)\.0*")  # as spreadsheets write whole numbers
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?")


@dataclasses.dataclass(frozen=True)
class PairsFormat:
    """How a file differs from what `agrl_jax.data.pairs` describes."""

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our name of a column: the file's
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)  # a label of the file: name or grade of a tier
    bins: tuple[float, ...] = ()  # the lowest rating of each tier but the worst, ascending
    skip_bad_rows: bool = False  # leave out rows that cannot be used; else the file is refused

    @classmethod
    def parse(cls, columns: str = "", labels: str = "", bins: str = "", on_bad_rows: str = "refuse") -> PairsFormat:
        """Parses config fields or flags: "{title: product_title}", "{E: 4, S: 3}", "[1.5, 2.5, 3.5]".

        Raises:
          PairsError: a text is not of that form.
        """
        edges = _parsed("bins", bins, list, "[1.5, 2.5, 3.5]")
        if not all(_NUMBER.fullmatch(edge) for edge in edges):
            raise PairsError(f"bins={bins}: should be numbers, such as [1.5, 2.5, 3.5]")
        return cls(
            columns=_parsed("columns", columns, dict, "{title: product_title}"),
            labels=_parsed("labels", labels, dict, "{E: 4, S: 3}"),
            bins=tuple(map(float, edges)),
            skip_bad_rows=on_bad_rows == "skip",
        )


def _parsed(name: str, text: str, kind: type, example: str) -> dict[str, str] | list[str]:
    """A flat YAML list or mapping of words; numbers and booleans stay words."""
    try:
        found = yaml.load(text, yaml.BaseLoader) if text.strip() else kind()
    except yaml.YAMLError:
        found = None
    inner = [*found, *found.values()] if isinstance(found, dict) else found
    if not isinstance(found, kind) or not all(isinstance(word, str) for word in inner):
        raise PairsError(f"{name}={text}: should be written like {example}")
    return found


def label_reader(book: RuleBook, form: PairsFormat) -> tuple[Callable[[str], int], str]:
    """The function from a label to the index of its tier, or UNKNOWN; and what labels should be, in words.

    Raises:
      PairsError: a label is mapped to something that is not a tier, or the bins do not fit the tiers.
    """
    if form.bins and form.labels:
        raise PairsError("labels and bins are given: labels are either mapped or binned")
    if form.bins:
        return _binned(book, form.bins)
    tiers = {str(tier.grade): i for i, tier in enumerate(book.tiers)}
    tiers |= {_key(tier.name): i for i, tier in enumerate(book.tiers)}
    names = ", ".join(f"{tier.name} or {tier.grade}" for tier in book.tiers)
    for label, tier in form.labels.items():
        if _key(tier) not in tiers:
            raise PairsError(f"labels: {label!r} is mapped to {tier!r}, which should be one of: {names}")
    mapped = {_key(label): tiers[_key(tier)] for label, tier in form.labels.items()}
    if mapped:
        return lambda label: mapped.get(_key(label), UNKNOWN), f"one of: {', '.join(form.labels)}"
    wanted = f"one of: {names}; other labels can be mapped to them with labels={{LABEL: TIER}}, ratings with bins"
    return lambda label: tiers.get(_key(label), UNKNOWN), wanted


def judged_reader(book: RuleBook, form: PairsFormat) -> tuple[Callable[[str], int], str]:
    """As `label_reader`, for a judge's tiers: they may be labels as people give them, or the names of the tiers."""
    tier_of, wanted = label_reader(book, form)
    names = {_key(tier.name): i for i, tier in enumerate(book.tiers)}

    def read(text: str) -> int:
        tier = tier_of(text)
        return names.get(_key(text), UNKNOWN) if tier == UNKNOWN else tier

    return read, wanted


def _key(label: str) -> str:
    whole = _WHOLE.fullmatch(label)
    return whole[1] if whole else clean(label).casefold()


def _binned(book: RuleBook, bins: tuple[float, ...]) -> tuple[Callable[[str], int], str]:
    if len(bins) != len(book.tiers) - 1 or list(bins) != sorted(set(bins)):
        raise PairsError(
            f"bins={list(bins)}: should be {len(book.tiers) - 1} ascending numbers, the lowest rating of each tier "
            f"of the rule book but {book.tiers[-1].name}"
        )

    def tier(label: str) -> int:
        return len(bins) - bisect.bisect_right(bins, float(label)) if _NUMBER.fullmatch(label) else UNKNOWN

    return tier, "a number, for the bins"
