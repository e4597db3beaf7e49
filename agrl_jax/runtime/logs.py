"""The logs of a run: `metrics.jsonl`, `samples.jsonl`, TensorBoard events.

A killed run that is started again must leave the same files as one that was never killed. So a row is
written before the checkpoint of its step, a resumed run first cuts the rows past its checkpoint, and
numbers are written in one form: the shortest decimal that reads back as the same number.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from agrl_jax.runtime.files import is_remote, write_text

STAGES = ("sft", "rl")  # in the order in which a run goes through them


class MetricsWriter:
    """Appends rows to the logs of a working directory; usable as a context manager.

    `resume` is the stage and step of the checkpoint that the run continues from: rows past it, and a
    torn last line, are cut. Without it the logs start empty. In a run of several processes only the
    first one writes. Files in buckets (gs://...) cannot be appended to: logs of a remote directory are
    written on this machine, and `sync` copies them there.

    Files: `metrics.jsonl`, `samples.jsonl`, and `tensorboard/STAGE/` with the scalars of each stage
    (the stages count their steps apart, so each is a TensorBoard run of its own).
    """

    def __init__(self, workdir: epath.PathLike, resume: tuple[str, int] | None = None) -> None:
        self._dir = epath.Path(workdir)
        self._written = Path(tempfile.mkdtemp()) if is_remote(workdir) else self._dir
        self._active = jax.process_index() == 0
        self._resume = resume
        self._boards: dict[str, SummaryWriter] = {}
        if self._active:
            self._dir.mkdir(parents=True, exist_ok=True)
            if resume is None and (self._dir / "tensorboard").exists():
                (self._dir / "tensorboard").rmtree()
            self._metrics, self._samples = (self._open(name) for name in ("metrics.jsonl", "samples.jsonl"))

    def _open(self, name: str) -> Any:
        path, before = self._written / name, self._dir / name
        if path != before and before.exists():
            path.write_bytes(before.read_bytes())
        cut_rows(path, self._resume)
        return path.open("a")

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row `{"step", "stage", ...values by sorted name}` and its scalars to TensorBoard.

        Values are numbers, or arrays of one element; a value that is not finite is written as null, since
        JSON lacks it. Call it before the checkpoint of the same step is saved.
        """
        _place(stage, step)
        if not self._active:
            return
        row = {name: _plain(values[name]) for name in sorted(values)}
        _append(self._metrics, {"step": int(step), "stage": stage, **row})
        board = self._board(stage)
        for name, value in row.items():
            if isinstance(value, int | float):
                board.add_scalar(name, value, int(step))

    def write_samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends decoded rollouts, one row `{"step", "stage", ...}` each, in the order given."""
        _place(stage, step)
        if self._active:
            for row in rows:
                _append(self._samples, {"step": int(step), "stage": stage, **_plain(row)})

    def _board(self, stage: str) -> SummaryWriter:
        """The event writer of a stage. On resuming, TensorBoard drops the events past the checkpoint."""
        if stage not in self._boards:
            purge = None
            if self._resume is not None:
                resumed_stage, resumed_step = self._resume
                purge = resumed_step + 1 if stage == resumed_stage else 0
            directory = self._written / "tensorboard" / stage
            self._boards[stage] = SummaryWriter(str(directory), purge_step=purge, flush_secs=10)
        return self._boards[stage]

    def sync(self) -> None:
        """Copies the logs to a remote directory. Call it before a checkpoint is saved there."""
        if self._written == self._dir or not self._active:
            return
        for board in self._boards.values():
            board.flush()
        for path in self._written.rglob("*"):
            if path.is_file():
                copy = self._dir / path.relative_to(self._written)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())

    def close(self) -> None:
        """Closes all files, and copies them to a remote directory."""
        if self._active:
            for file in (self._metrics, self._samples, *self._boards.values()):
                file.close()
            self.sync()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_jsonl(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a log, without a torn last line. Raises ValueError for any other line that is not JSON."""
    path = epath.Path(path)
    *lines, _torn = path.read_bytes().split(b"\n")  # a whole line ends in a newline; a torn one, within a character
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def cut_rows(path: epath.PathLike, resume: tuple[str, int] | None) -> None:
    """Drops the rows of a log that lie past stage and step `resume`, all of them if it is None."""
    path = epath.Path(path)
    if not path.exists():
        return
    kept = []
    if resume is not None:
        limit = _place(*resume)
        kept = [row for row in read_jsonl(path) if _place(row["stage"], row["step"]) <= limit]
    write_text(path, "".join(_line(row) for row in kept))


def _place(stage: str, step: int) -> tuple[int, int]:
    """Where a step stands in a run, as a sortable key."""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r}, expected one of {', '.join(STAGES)}")
    return STAGES.index(stage), int(step)


def _append(file: Any, row: Mapping[str, Any]) -> None:
    file.write(_line(row))
    file.flush()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """`value` for JSON: arrays as numbers or lists, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int | float):
        return value if math.isfinite(value) else None
    array = np.asarray(value)
    if array.ndim:
        return [_plain(item) for item in array]
    if array.dtype.kind in "biu":
        return array.item()
    exact = array if array.dtype.itemsize > 4 else array.astype(np.float32)
    return _plain(float(str(exact)))  # 0.1 for float32(0.1), where float() would give 0.10000000149011612
