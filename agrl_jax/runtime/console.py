"""Messages, progress bars with the time left, and tables on the terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import rich.console
import rich.progress
import rich.table
import rich.text


class Progress(AbstractContextManager):
    """A stage's progress bar with ETA and live figures; see `progress`."""

    def __init__(self, stage: str, total: int, start: int, every_s: float, console: rich.console.Console) -> None:
        self._stage, self._total, self._done = stage, total, start
        self._every_s, self._console = every_s, console
        self._began = self._said = time.monotonic()
        self._last: float | None = None  # time of the latest update
        self._steps, self._seconds = 0, 0.0  # from which the time left follows
        self._bar = None
        if console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("[bold]{task.description}"), rich.progress.BarColumn(bar_width=24),
                rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("eta {task.fields[eta]}"), rich.progress.TextColumn("{task.fields[figures]}"),
                console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(stage, total=total, completed=start, eta="?", figures="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, figures: Mapping[str, float | str] | None = None, compiled: bool = False) -> None:
        """Says that `step` steps are done, with figures to show, such as `{"reward": 0.61}`.

        The time left follows from the steps before this update, unless it is the first or some of them `compiled`.
        """
        now = time.monotonic()
        if self._last is not None and not compiled:
            self._steps += step - self._done
            self._seconds += now - self._last
        ended = self._done < self._total <= step
        self._done, self._last = step, now
        text = "  ".join(f"{name} {_short(value)}" for name, value in (figures or {}).items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, eta=self._eta(), **({"figures": text} if figures else {}))
            return
        if now - self._said >= self._every_s or ended:
            self._said = now
            times = f"{_clock(now - self._began)} eta {self._eta()}"
            self.print(f"{self._stage} {step}/{self._total}  {times}  {text}".rstrip())

    def _eta(self) -> str:
        left = max(self._total - self._done, 0)
        return _clock(left * self._seconds / max(self._steps, 1)) if self._steps or not left else "?"

    def advance(self, steps: int) -> None:
        """Says that `steps` more steps are done."""
        self.update(self._done + steps)

    def note(self, text: str) -> None:
        """Says what a long step is doing, such as a validation: beside the bar, or now and then."""
        if self._bar is not None:
            self._bar.update(self._task, figures=text)
        elif (now := time.monotonic()) - self._said >= self._every_s:
            self._said = now
            self.print(f"{self._stage} {self._done}/{self._total}  {text}")

    def print(self, *objects: Any) -> None:
        """Prints text or rich objects above the bar; text as it is, without markup."""
        self._console.print(*objects, markup=False, highlight=False, soft_wrap=True)


def say(*objects: Any) -> None:
    """Prints text, as it is, or rich objects such as tables."""
    _stdout().print(*objects, markup=False, highlight=False, soft_wrap=True)


def _stdout() -> rich.console.Console:
    """Standard output of the first process of a run; the others show nothing."""
    import jax  # here, so that --help does not wait for it

    return rich.console.Console(file=sys.stdout, quiet=jax.process_index() > 0)


def progress(
    stage: str, total: int, start: int = 0, every_s: float = 10.0, console: rich.console.Console | None = None
) -> Progress:
    """A context manager that shows the progress of a stage from step `start` to `total`.

    On a terminal it is a live bar; elsewhere one plain line every `every_s` seconds and one at the end.

    >>> with progress("rl", total=400) as bar:
    ...     bar.update(1, {"reward": 0.61, "tok/s": 5200.0})
    """
    return Progress(stage, total, start, every_s, console or _stdout())


def console_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> rich.table.Table:
    """A table to print: the first column to the left, the others to the right, numbers shortened."""
    table = rich.table.Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=position == 0)
    for row in rows:
        table.add_row(*(rich.text.Text(_short(cell)) for cell in row))
    return table


def _short(value: Any) -> str:
    """A figure to read: three decimals if small, thousands separated if large."""
    if isinstance(value, str | bool | int) or value is None:
        return str(value) if value is not None else "-"
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
