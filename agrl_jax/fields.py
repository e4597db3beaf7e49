"""Every field of a config: its default, what it may be, and what it means.

    python -m agrl_jax.fields                                      all fields
    python -m agrl_jax.fields guidance rl.steps                    these, by name or by group
    python -m agrl_jax.fields --config=configs/quickstart.py:grpo  with the values of a config file

`--config.rl.steps=500` sets a field on the command line of `agrl_jax.main`.
The meanings are the comments in `agrl_jax/recipes.py`; the ranges are those that `runtime/config.py` checks.
"""

from __future__ import annotations

import ast
import functools
import inspect
import io
import itertools
import sys
import tokenize
from collections.abc import Mapping
from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

from agrl_jax import recipes
from agrl_jax.hints import did_you_mean
from agrl_jax.runtime.config import RULES, ConfigError, exit_with, flatten, matches, parse_flags
from agrl_jax.runtime.markdown import table

_COMMAND = "python -m agrl_jax.fields --markdown > docs/config.md"


class Field(NamedTuple):
    """One field of a config."""

    name: str  # dotted, such as rl.steps
    value: object  # its default, or what a config file sets
    may_be: str
    meaning: str


def fields(config: Mapping | None = None) -> list[Field]:
    """All fields of `config`, by default of `recipes.base`, in the order of that function."""
    means = meanings(inspect.getsource(recipes.base))
    values = flatten(recipes.base() if config is None else config)
    order = [name for name in means if name in values]
    return [Field(name, values[name], RULES[name].expected(), means[name]) for name in order]


def meanings(source: str) -> dict[str, str]:
    """The comment of each field and group in the source of a function that assigns them as `c.group.field = value`.

    It stands behind the assignment or, if it is long, in the lines above. A field without a comment means "".
    """
    return {
        ast.unparse(node.targets[0]).partition(".")[2]: _comment(node.end_lineno, source)
        for node in ast.parse(source).body[0].body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)
    }


def _comment(line: int, source: str) -> str:
    """The comment on a line of the source: behind it, or in the comment lines right above."""
    comments = _comments(source)
    if line in comments:
        return comments[line]
    lines, first = source.splitlines(), line
    while lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return " ".join(comments[number] for number in range(first, line))


@functools.cache
def _comments(source: str) -> dict[int, str]:
    """The comments of a source by line; the first is 1."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def method_meanings() -> dict[str, str]:
    """The comment of each of `recipes.METHODS`."""
    source = inspect.getsource(recipes)
    (methods,) = (node.value for node in ast.parse(source).body
                  if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "METHODS")  # fmt: skip
    return {key.value: _comment(key.lineno, source) for key in methods.keys}


def markdown() -> str:
    """docs/config.md."""
    groups = meanings(inspect.getsource(recipes.base))
    lines = [
        "# Every field of a config", "",
        f"`{_COMMAND}` writes this page from the comments in `agrl_jax/recipes.py`.", "",
        "Set a field on the command line, `--config.rl.steps=500`, or in your own config file, `c.rl.steps = 500`.",
        "A field that is misspelt or out of its range is refused before anything is computed.", "",
        "## Methods", "", "`--config=configs/quickstart.py:NAME` trains by another method.", "",
    ]  # fmt: skip
    methods = []
    for name, meaning in method_meanings().items():
        changes = (f"`{field}={'(computed)' if callable(v) else v}`" for field, v in recipes.METHODS[name].items())
        methods.append([f"`{name}`", meaning, ", ".join(changes)])
    lines.append(table(["name", "what it is", "fields that differ from agrl"], methods))
    for group, of in itertools.groupby(fields(), _group):
        lines += ["", f"## {group or 'run'}", ""]
        lines += [_sentence(groups[group]), ""] if group else []
        rows = [[f"`{f.name}`", f"`{_shown(f.value)}`", f.may_be, f.meaning] for f in of]
        lines.append(table(["field", "default", "may be", "meaning"], rows))
    return "\n".join(lines) + "\n"


def _group(field: Field) -> str:
    """The group of a field; empty for one at the top."""
    return field.name.rpartition(".")[0].partition(".")[0]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _shown(value: object) -> str:
    return '""' if value == "" else str(value)


def listing(chosen: list[Field]) -> str:
    """The fields as text for a terminal, each as it is set on the command line."""
    lines = []
    for field in chosen:
        lines.append(f"--config.{field.name}={_shown(field.value)}")
        lines.append(f"    {field.meaning} [{field.may_be}]")
    return "\n".join(lines)


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "A config file, whose values are shown in place of the defaults.")
    flags.DEFINE_bool("markdown", False, "Print docs/config.md.")


def main(argv: list[str]) -> None:
    """Exit code 2 for a field that does not exist."""
    _define_flags()
    names = parse_flags(argv, positional=True)[1:]
    if flags.FLAGS.markdown:
        print(markdown(), end="")
        return
    known = fields(flags.FLAGS.config)
    for name in names:
        if not any(matches(field.name, [name]) for field in known):
            exit_with(ConfigError(f"there is no field {name!r}{did_you_mean(name, [field.name for field in known])}"))
    print(listing([field for field in known if not names or matches(field.name, names)]))


if __name__ == "__main__":
    main(sys.argv)
