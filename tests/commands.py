"""Commands run in this process, where JAX, which takes seconds to start, is there already."""

from __future__ import annotations

from collections.abc import Callable

from absl import app, flags


def exit_code(main: Callable[[list[str]], None], *arguments: str) -> int:
    """Runs the `main` of a command and forgets its flags; what it prints is for `capsys` and `capfd`."""
    app.define_help_flags()
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
