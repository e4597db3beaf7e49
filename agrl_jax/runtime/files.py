"""Files that appear in one piece, and outputs that are refused before the work for them has begun."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from etils import epath


class OutputError(ValueError):
    """An output that cannot be written or continued; the message names the file."""


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in a bucket, such as gs://bucket/runs."""
    return "://" in os.fspath(epath.Path(path))


def check_bucket(path: epath.PathLike) -> None:
    """Raises OutputError where a path is in a bucket, and the package that reads such buckets is missing."""
    try:
        if is_remote(path):
            epath.Path(path).exists()
    except ImportError as error:
        raise OutputError(f"{path}: {error}") from error


@contextmanager
def in_one_piece(path: epath.PathLike) -> Iterator[epath.Path]:
    """A temporary path beside `path` to write to in the block; at its end the new file replaces `path`.

    `path` holds the old content or the new one, never a part, even if the process is killed. After an error in the
    block, `path` is as it was.
    """
    path = epath.Path(path)
    half = path.parent / (path.name + ".tmp")
    try:
        yield half
    except BaseException:
        half.unlink(missing_ok=True)
        raise
    half.replace(path)


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a text file in one piece, in UTF-8."""
    with in_one_piece(path) as half:
        half.write_bytes(text.encode())


def write_csv(path: epath.PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows with these columns as CSV, in one piece; without rows, only the header."""
    with in_one_piece(path) as half, half.open("w") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: epath.PathLike, content: Any, indent: int = 2) -> None:
    """Writes a JSON file in one piece. Raises ValueError for numbers that are not finite, which JSON lacks."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: epath.PathLike, error: type[Exception], hint: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Raises `error` where it cannot be read or is not an object; the message names the file, and ends with `hint`.
    """
    path = epath.Path(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}{hint}") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON: {problem}{hint}") from problem
    if not isinstance(content, dict):
        raise error(f"{path}: should be a JSON object{hint}")
    return content


def check_writable(path: epath.PathLike, name: str, beside: str = "") -> None:
    """Raises OutputError where `path`, given as `name`, cannot be written, or ends as the file that is written beside
    it. Call it before the work begins."""
    if beside and epath.Path(path).suffix == beside:
        raise OutputError(f"{name}={path}: figures are written beside it as {beside}; it should end otherwise")
    if is_remote(path):  # only writing shows who may write to a bucket
        return
    path = epath.Path(path)
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{name}={path}: there is no folder {folder}")
    if path.is_dir():
        raise OutputError(f"{name}={path}: is a folder; name a file in it")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{name}={path}: the folder {folder} cannot be written to")
