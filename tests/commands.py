"""Runs commands in this process, in which JAX has started already: starting it takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from absl import app, flags


def exit_code(main: Callable[[list[str]], None], *arguments: str) -> int:
    """Runs the `main` of a command and forgets its flags. `capsys` and `capfd` catch what it prints."""
    app.define_help_flags()
    with _without_benchmarks():
        others = set(flags.FLAGS)
        try:
            main([main.__module__, *arguments])
        except SystemExit as stop:
            return stop.code or 0
        finally:
            for name in set(flags.FLAGS) - others:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
    return 0


@contextmanager
def _without_benchmarks() -> Iterator[None]:
    """Takes away the flags that benchmarks define when they are imported. Some have the names of a command's flags."""
    definers = {name: flags.FLAGS.find_module_defining_flag(name, "") for name in flags.FLAGS}
    aside = [(flags.FLAGS[name], module) for name, module in definers.items() if module.startswith("benchmarks.")]
    for flag, _ in aside:
        delattr(flags.FLAGS, flag.name)
    try:
        yield
    finally:
        for flag, module in aside:
            flags.DEFINE_flag(flag, module_name=module)
