"""The rule book: tiers, reasoning steps and the decision table, read from one YAML file and checked.

Everything else in this package follows from a `RuleBook`: `wording` gives its texts, `automaton` its
token tables. The file's own comments (`four_tier.yaml`) explain the format.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
import yaml
from etils import epath

from agrl_jax.hints import did_you_mean
from agrl_jax.rulebook import wording
from agrl_jax.rulebook.schema import FREE_TEXT, ORDERS, Prompt, Response, Row, RuleBook, Step, Tier, winners

MAX_COMBINATIONS = 1_000_000  # the table is written out for the device, one tier for each combination
_BUNDLED = epath.Path(__file__).parent


class RuleBookError(ValueError):
    """A rule book that cannot be used; the message names file, line and key."""


def load(
    path: epath.PathLike = "four_tier", order: str | None = None, free_text: str | None = None
) -> RuleBook:
    """Reads and checks a rule book.

    Args:
      path: a YAML file, local or remote; or the bare name of a bundled book.
      order: `think_then_respond` or `respond_then_think`, instead of the order in the file.
      free_text: `none` or `between`, instead of what the file says.

    Raises:
      RuleBookError: the file cannot be read, is misspelt, is not total, has a row that can never win, or has
        ambiguous wording.
    """
    book, problems = check(path, order, free_text)
    if problems:
        raise RuleBookError(problems[0])
    return book


def check(
    path: epath.PathLike, order: str | None = None, free_text: str | None = None
) -> tuple[RuleBook, list[str]]:
    """Reads a rule book as `load` does, and returns all problems of its table and wording instead of raising.

    A combination that no row covers has the tier UNKNOWN.

    Raises:
      RuleBookError: the file cannot be read, or is misspelt.
    """
    for what, value, options in (("order", order, ORDERS), ("free text", free_text, FREE_TEXT)):
        if value is not None and value not in options:
            raise RuleBookError(f"rule book {what}: unknown value {value!r}{_hint(value, options)}")
    root = _read(path)
    fields = root.fields(
        ("name", "order", "response", "prompt", "tiers", "steps", "table"), required=("tiers", "steps", "table")
    )
    book, places = _parse(fields, order)
    if free_text is not None:
        response = dataclasses.replace(book.response, free_text=free_text)
        book = dataclasses.replace(book, response=response)
    problems = list(_table_problems(book, fields["table"]))
    if found := wording.ambiguity(book):
        phrase, problem = found
        problems.append(places[phrase].located(problem))
    return book, problems


# Reading the file


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A node of the file, and what to call it in an error."""

    file: str
    key: str
    node: yaml.Node

    @property
    def line(self) -> int:
        return self.node.start_mark.line + 1

    def located(self, problem: str) -> str:
        return f"{self.file}:{self.line}: {self.key or 'rule book'}: {problem}"

    def fail(self, problem: str) -> NoReturn:
        raise RuleBookError(self.located(problem))

    def text(self, empty: bool = False) -> str:
        """A scalar as it is written: `no` and `4` are text here."""
        if not isinstance(self.node, yaml.ScalarNode):
            self.fail("should be a single value")
        if not empty and not self.node.value.strip():
            self.fail("is empty")
        return self.node.value

    def name(self) -> str:
        """A text that pairs state too; white space in pairs is cleaned."""
        text = self.text()
        if text != " ".join(text.split()):
            self.fail(f"{text!r} has white space at an end, or more than one space between words")
        return text

    def integer(self) -> int:
        text = self.text()
        try:
            return int(text)
        except ValueError:
            self.fail(f"should be a whole number, not {text!r}")

    def index(self, options: Sequence[str], what: str) -> int:
        """Which of the options the scalar is."""
        text = self.text()
        if text not in options:
            self.fail(f"unknown {what} {text!r}{_hint(text, options)}")
        return list(options).index(text)

    def choice(self, options: Sequence[str]) -> str:
        return options[self.index(options, "value")]

    def items(self) -> list[_Entry]:
        if not isinstance(self.node, yaml.SequenceNode):
            self.fail("should be a list")
        if not self.node.value:
            self.fail("is empty")
        return [_Entry(self.file, f"{self.key}[{i}]", node) for i, node in enumerate(self.node.value)]

    def pairs(self) -> list[tuple[_Entry, _Entry]]:
        """The keys and values of a mapping, each key once. The value's entry is named by its key."""
        if not isinstance(self.node, yaml.MappingNode):
            self.fail("should be a mapping of keys to values")
        pairs: dict[str, tuple[_Entry, _Entry]] = {}
        for key_node, value_node in self.node.value:
            key = _Entry(self.file, self.key, key_node)
            name = key.text()
            path = f"{self.key}.{name}" if self.key else name
            if name in pairs:
                key.fail(f"{name!r} stands twice; it is also on line {pairs[name][0].line}")
            pairs[name] = (_Entry(self.file, path, key_node), _Entry(self.file, path, value_node))
        return list(pairs.values())

    def fields(self, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, _Entry]:
        """A mapping with known keys only."""
        fields = {}
        for key, value in self.pairs():
            fields[known[key.index(known, "key")]] = value
        for name in required:
            if name not in fields:
                self.fail(f"lacks the key {name!r}")
        return fields


def _hint(text: str, options: Sequence[str]) -> str:
    return f"{did_you_mean(text, options) or ';'} It should be one of: {', '.join(options)}"


def file_of(path: epath.PathLike) -> epath.Path:
    """The file of a rule book, from its path or a bundled book's name."""
    name = os.fspath(path)
    if not re.fullmatch(r"[\w-]+", name):
        return epath.Path(path)
    bundled = sorted(file.stem for file in _BUNDLED.glob("*.yaml"))
    if name not in bundled:
        raise RuleBookError(f"no bundled rule book {name!r}{_hint(name, bundled)}, or a path to a .yaml file")
    return _BUNDLED / f"{name}.yaml"


def _read(path: epath.PathLike) -> _Entry:
    name = os.fspath(path)
    path = file_of(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise RuleBookError(f"{name}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RuleBookError(f"{name}:{line}: not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RuleBookError(f"{name}:{line}: not valid YAML: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        raise RuleBookError(f"{name}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}") from error
    if node is None:
        raise RuleBookError(f"{name}:1: is empty; a rule book has tiers, steps and a table")
    return _Entry(os.fspath(path), "", node)


# From entries to the book


def _parse(fields: dict[str, _Entry], order: str | None) -> tuple[RuleBook, list[_Entry]]:
    """The book, and for each of its phrases the entry that words it."""
    tiers, tier_places = _parse_tiers(fields["tiers"])
    steps, step_places = _parse_steps(fields["steps"])
    file_order = fields["order"].choice(ORDERS) if "order" in fields else ORDERS[0]
    book = RuleBook(
        name=fields["name"].text() if "name" in fields else epath.Path(fields["table"].file).stem,
        tiers=tiers,
        steps=steps,
        rows=tuple(_parse_row(entry, tiers, steps) for entry in fields["table"].items()),
        order=order or file_order,
        response=_parse_response(fields["response"]) if "response" in fields else Response(),
        prompt=_parse_prompt(fields["prompt"]) if "prompt" in fields else Prompt(),
    )
    return book, step_places + tier_places


def _parse_tiers(entry: _Entry) -> tuple[tuple[Tier, ...], list[_Entry]]:
    tiers, places = [], []
    for item in entry.items():
        fields = item.fields(("name", "grade", "good", "meaning"), required=("name", "grade", "good"))
        tier = Tier(
            name=fields["name"].name(),
            grade=fields["grade"].integer(),
            good=fields["good"].choice(("true", "false")) == "true",
            meaning=fields["meaning"].text(empty=True) if "meaning" in fields else "",
        )
        if tier.name.casefold() in [other.name.casefold() for other in tiers]:
            fields["name"].fail(f"the tier {tier.name!r} stands twice")
        if tiers and tier.grade >= tiers[-1].grade:
            fields["grade"].fail(f"tiers are listed best first, so this should be below {tiers[-1].grade}")
        if tiers and tier.good and not tiers[-1].good:
            fields["good"].fail(f"a better tier, {tiers[-1].name!r}, is not good")
        tiers.append(tier)
        places.append(fields["name"])
    if len(tiers) < 2:
        entry.fail(f"there should be at least two tiers, not {len(tiers)}")
    if not tiers[0].good or tiers[-1].good:
        entry.fail("the best tier should be good and the worst not, or good and bad cannot be told apart")
    return tuple(tiers), places


def _parse_steps(entry: _Entry) -> tuple[tuple[Step, ...], list[_Entry]]:
    steps, places = [], []
    for item in entry.items():
        fields = item.fields(("name", "label", "question", "values"), required=("name", "question", "values"))
        name = fields["name"].name()
        if name == "tier":
            fields["name"].fail("'tier' is the name of the conclusion; call the step something else")
        if name in [other.name for other in steps]:
            fields["name"].fail(f"the step {name!r} stands twice")
        values = _parse_values(fields["values"])
        label = fields["label"].text() if "label" in fields else name[:1].upper() + name[1:]
        meanings = tuple(meaning for _, meaning in values)
        steps.append(Step(name, label, fields["question"].text(), tuple(key.text() for key, _ in values), meanings))
        places += [key for key, _ in values]
    if math.prod(len(step.values) for step in steps) > MAX_COMBINATIONS:
        entry.fail(f"there should be at most {MAX_COMBINATIONS:,} combinations of values")
    return tuple(steps), places


def _parse_values(entry: _Entry) -> list[tuple[_Entry, str]]:
    """The values of a step and their meanings, from a mapping, or from a list of values alone."""
    if isinstance(entry.node, yaml.SequenceNode):
        values = [(item, "") for item in entry.items()]
    else:
        values = [(key, value.text(empty=True)) for key, value in entry.pairs()]
    names = [key.name().casefold() for key, _ in values]
    for i, (key, _) in enumerate(values):
        if names[i] in names[:i]:
            key.fail(f"the value {key.text()!r} stands twice, upper and lower case aside")
    if len(values) < 2:
        entry.fail(f"a step should have at least two values, not {len(values)}")
    return values


def _parse_row(entry: _Entry, tiers: Sequence[Tier], steps: Sequence[Step]) -> Row:
    fields = entry.fields(("when", "tier", "because"), required=("when", "tier"))
    names = [step.name for step in steps]
    when: list[tuple[int, ...]] = [()] * len(steps)
    if isinstance(fields["when"].node, yaml.ScalarNode):
        fields["when"].choice(("otherwise",))
    else:
        for key, value in fields["when"].pairs():
            step = key.index(names, "step")
            choices = value.items() if isinstance(value.node, yaml.SequenceNode) else [value]
            found = [choice.index(steps[step].values, f"value of {names[step]!r}") for choice in choices]
            if len(set(found)) < len(found):
                value.fail("a value stands twice")
            when[step] = tuple(found)
    return Row(
        when=tuple(when),
        tier=fields["tier"].index([tier.name for tier in tiers], "tier"),
        because=fields["because"].text(empty=True) if "because" in fields else "",
        line=entry.line,
    )



def _parse_response(entry: _Entry) -> Response:
    fields = entry.fields(("phrase", "separator", "tier", "free_text"))
    if "phrase" in fields:
        _check_template(fields["phrase"], ("part", "value"), ordered=False)
    if "free_text" in fields:
        fields["free_text"].choice(FREE_TEXT)
    return Response(**{name: field.text(empty=name == "separator") for name, field in fields.items()})


def _parse_prompt(entry: _Entry) -> Prompt:
    fields = entry.fields(tuple(field.name for field in dataclasses.fields(Prompt)))
    if "terse" in fields:
        _check_template(fields["terse"], ("query", "item"))
    if "full" in fields:
        _check_template(fields["full"], ("instructions", "query", "item"))
    return Prompt(**{name: field.text() for name, field in fields.items()})


def _check_template(entry: _Entry, names: Sequence[str], ordered: bool = True) -> None:
    """Refuses a template that does not have each of its placeholders once, in this order."""
    found = re.findall(r"\{(\w*)\}", entry.text())
    for name in found:
        if name not in names:
            entry.fail(f"unknown placeholder {{{name}}}{_hint(name, names)}")
    if (found if ordered else sorted(found)) != (list(names) if ordered else sorted(names)):
        wanted = ", ".join(f"{{{name}}}" for name in names)
        entry.fail(f"should have {wanted}, once each{' and in this order' if ordered else ''}")


# The decision table


def _table_problems(book: RuleBook, table: _Entry) -> Iterator[str]:
    """Rows that never win, combinations that no row covers, tiers that never result."""
    winner = winners(book.rows, book.num_values)
    for i, entry in enumerate(table.items()):
        if not (winner == i).any():
            block = np.ix_(*(w or range(n) for w, n in zip(book.rows[i].when, book.num_values, strict=True)))
            above = ", ".join(str(book.rows[j].line) for j in np.unique(winner[block]))
            yield entry.located(f"this row can never win: the rows on lines {above} match first")
    uncovered = np.argwhere(winner == -1)
    if len(uncovered):
        example = ", ".join(
            f"{step.name}: {step.values[value]}" for step, value in zip(book.steps, uncovered[0], strict=True)
        )
        yield table.located(
            f"not total: no row gives a tier for {{{example}}} ({len(uncovered)} combinations in all); "
            "add a row, or end the table with `when: otherwise`"
        )
    for tier in sorted(set(range(len(book.tiers))) - {row.tier for row in book.rows}):
        yield table.located(f"no row gives the tier {book.tiers[tier].name!r}")
