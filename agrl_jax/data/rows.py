"""Files of any number of rows (CSV, TSV, JSON lines, Parquet), read and written as a stream.

A row that cannot be read stays a row: it comes with what could be read of it, and with what is wrong.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from agrl_jax.data.pairs import PairsError
from agrl_jax.runtime.files import OutputError, in_one_piece

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
_DELIMITER = {".csv": ",", ".tsv": "\t"}
_BLOCK = 1 << 16  # rows of a Parquet file held at once

Record = dict[str, Any]


class Row(NamedTuple):
    """A row: its cells by column, and what is wrong with it, empty if nothing is."""

    record: Record
    error: str


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file that has been read through once."""

    path: Path
    count: int  # of its rows
    schema: pa.Schema  # its columns in their order
    digest: str  # sha256 of its bytes

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        if _kind(self.path) != ".parquet":
            return _text_rows(self.path)
        return itertools.chain.from_iterable(map(_table_rows, self.tables()))

    def tables(self) -> Iterator[pa.Table]:
        """The rows in blocks, in the types of the schema."""
        if _kind(self.path) == ".parquet":
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_BLOCK):
                    yield pa.Table.from_batches([batch]).cast(self.schema)
            return
        rows = _text_rows(self.path)
        while block := list(itertools.islice(rows, _BLOCK)):
            columns = [
                pa.array([_as_type(row.record.get(field.name), field.type) for row in block], field.type)
                for field in self.schema
            ]
            yield pa.table(columns, schema=self.schema)


def open_rows(path: str | Path) -> RowFile:
    """Reads a file through once: counts its rows and finds its columns.

    Columns of CSV and TSV are text. A column of JSON lines is of the type that all its values have, else text.

    Raises:
      PairsError: the file cannot be read, is of another kind, has no rows, or has a column twice.
    """
    path = Path(path)
    kind = _kind(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if kind == ".parquet":
            count, schema = _survey_parquet(path)
        elif kind == ".jsonl":
            count, schema = _survey_json(path)
        else:
            count, schema = sum(1 for _ in _csv_rows(path)), pa.schema([(name, pa.string()) for name in _header(path)])
    except FileNotFoundError as error:
        raise PairsError(f"{path}: there is no such file") from error
    except OSError as error:
        raise PairsError(f"{path}: cannot be read: {error.strerror or error}") from error
    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise PairsError(f"{path}: has the column {repeated[0]!r} twice")
    if not count:
        raise PairsError(f"{path}: has no rows")
    return RowFile(path, count, schema, digest)


def _kind(path: Path) -> str:
    if path.suffix.lower() not in KINDS:
        raise PairsError(f"{path}: unknown kind of file; it should end in one of: {', '.join(KINDS)}")
    return path.suffix.lower()


def _text_rows(path: Path) -> Iterator[Row]:
    return _json_rows(path) if _kind(path) == ".jsonl" else _csv_rows(path)


# Parquet


def _survey_parquet(path: Path) -> tuple[int, pa.Schema]:
    try:
        with pq.ParquetFile(path) as file:
            return file.metadata.num_rows, file.schema_arrow.remove_metadata()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise PairsError(f"{path}: not a readable Parquet file: {error}") from error


def _table_rows(table: pa.Table) -> Iterator[Row]:
    """The rows of a table, dates and times as text, which JSON and CSV can hold."""
    times = [field.name for field in table.schema if pa.types.is_temporal(field.type)]
    for name in times:
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.string()))
    return (Row(record, "") for record in table.to_pylist())


# CSV


def _csv_rows(path: Path) -> Iterator[Row]:
    header = _header(path)
    with _open_csv(path) as file:
        rows = _csv_cells(file, _DELIMITER[_kind(path)], len(header))
        next(rows)
        for cells, error in rows:
            whole = [_encoded(cell) for cell in cells]
            yield Row(dict(zip(header, whole, strict=False)), error or ("is not UTF-8" if whole != cells else ""))


def _header(path: Path) -> list[str]:
    with _open_csv(path) as file:
        cells, error = next(_csv_cells(file, _DELIMITER[_kind(path)]), ([], "is missing"))
    if error:
        raise PairsError(f"{path}: its header {error}")
    return [_encoded(cell).strip() for cell in cells]


def _open_csv(path: Path) -> io.TextIOWrapper:
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _encoded(text: str) -> str:
    """The text with U+FFFD for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _csv_cells(file: Iterable[str], delimiter: str, width: int | None = None) -> Iterator[tuple[list[str], str]]:
    """The cells of each row but for blank lines, and what is wrong with it.

    A quote that is never closed would swallow the rows after it. So a broken row ends at the end of its first
    line, and reading goes on with the next one.
    """
    lines, again, taken = iter(file), deque[str](), list[str]()

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line

    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        try:
            cells = next(reader)
            wrong = width is not None and cells and len(cells) != width
            error = f"has {len(cells)} cells where the header has {width}" if wrong else ""
        except StopIteration:
            return
        except csv.Error as problem:
            cells, error = [], f"is not valid CSV: {problem}"
        if error and (len(taken) > 1 or not cells):
            again.extendleft(reversed(taken[1:]))
            cells = _leniently(taken[0], delimiter)
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        if cells or error:
            yield cells, error


def _leniently(line: str, delimiter: str) -> list[str]:
    """What can be read of a broken line."""
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # a cell of more than 131,072 characters
        return []


# JSON lines


def _survey_json(path: Path) -> tuple[int, pa.Schema]:
    count, kinds = 0, dict[str, set[type]]()
    for row in _json_rows(path):
        count += 1
        for name, value in row.record.items():
            large = type(value) is int and not -(2**63) <= value < 2**63  # for which Arrow has no number
            kinds.setdefault(name, set()).add(str if large else type(value))
    return count, pa.schema([(name, _arrow_type(kind - {type(None)})) for name, kind in kinds.items()])


def _arrow_type(kinds: set[type]) -> pa.DataType:
    if kinds in ({bool}, {int}):
        return pa.bool_() if kinds == {bool} else pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield _json_row(line)


def _json_row(line: bytes) -> Row:
    try:
        record = json.loads(line.decode("utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()  # an escape such as \ud800 alone is no character
    except UnicodeError:
        return Row({}, "is not valid Unicode")
    except (ValueError, RecursionError) as error:
        return Row({}, f"is not valid JSON: {error}")
    return Row(record, "") if isinstance(record, dict) else Row({}, "is not a JSON object")


def _as_type(value: Any, kind: pa.DataType) -> Any:
    """A JSON value for a column of this type: a text column may hold what is not text, as JSON."""
    if value is None or kind != pa.string() or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


# Writing


def check_output(path: str | Path, source: RowFile, added: pa.Schema) -> None:
    """Raises OutputError where rows of `source` with `added` columns cannot be written to `path`."""
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise OutputError(f"{path}: unknown kind of file; it should end in one of: {', '.join(KINDS)}")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.absolute().parent}")
    if path.exists() and path.samefile(source.path):
        raise OutputError(f"{path}: is the input; name another output")
    if clash := [name for name in added.names if name in source.schema.names]:
        raise OutputError(f"{source.path}: has a column {clash[0]!r} already; take another --prefix for what is added")


def write_rows(path: str | Path, source: RowFile, added: pa.Schema, values: Iterable[Record]) -> None:
    """Writes the rows of `source`, each with the `added` columns that `values` holds for it.

    The kind of file follows from the name. It appears in one piece, when it is whole.
    """
    with in_one_piece(path) as half:
        _write(Path(half), _kind(Path(path)), source, added, values)


def _write(path: Path, kind: str, source: RowFile, added: pa.Schema, values: Iterable[Record]) -> None:
    if kind == ".parquet":
        _write_parquet(path, source, added, iter(values))
        return
    rows = (row.record | value for row, value in zip(source.rows(), values, strict=True))
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        else:
            names = source.schema.names + added.names
            writer = csv.writer(file, delimiter=_DELIMITER[kind], lineterminator="\n")
            writer.writerow(names)
            writer.writerows([_cell(row.get(name)) for name in names] for row in rows)


def _write_parquet(path: Path, source: RowFile, added: pa.Schema, values: Iterator[Record]) -> None:
    schema = pa.schema([*source.schema, *added])
    with pq.ParquetWriter(path, schema) as writer:
        for table in source.tables():
            more = pa.Table.from_pylist(list(itertools.islice(values, len(table))), added)
            writer.write_table(pa.table([*table.columns, *more.columns], schema=schema))


def _cell(value: Any) -> str:
    """A value as a cell of a CSV file."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


# Work in progress


class Journal:
    """What has been found out of each row so far, in a file beside the output: work can go on where it stopped.

    The first line says what all else depends on, the `identity`; then there is one line of JSON for each row.
    A journal of another identity, or that another process is writing, is refused; one of another identity is begun
    anew with `overwrite`, one of this identity is gone on with. After a stop, what is there is cut back to a multiple
    of `chunk` rows: so rows are always taken in the same chunks, and come out the same.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any], chunk: int, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.done = 0  # rows
        self._identity = dict(identity)
        self._file = self.path.open("a+", encoding="utf-8")  # held, and with it the lock, until the journal is closed
        try:
            self._lock()
            self._take_up(chunk, overwrite)
        except OutputError:
            self._file.close()
            raise

    def _take_up(self, chunk: int, overwrite: bool) -> None:
        self._file.seek(0)
        first = self._file.readline()
        differ = self._differences(first)
        if differ and not overwrite:
            raise OutputError(
                f"{self.path}: holds the work of another run (another {', '.join(differ)}); "
                "give its command again to finish it, name another output, or start over with --overwrite"
            )
        if first.endswith("\n") and not differ:
            self._cut(chunk)
        else:
            self._file.truncate(0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.path}: another process is writing it; let it finish, or name another output"
            ) from None
        except OSError:
            return  # this file system has no locks

    def _differences(self, first: str) -> list[str]:
        """In what the run whose journal begins with this line differs; nothing for a line that is torn."""
        if not first.endswith("\n"):
            return []
        before = json.loads(first)
        return [name for name, value in self._identity.items() if before.get(name) != value]

    def _cut(self, chunk: int) -> None:
        with self.path.open("rb+") as file:
            end = len(file.readline())
            while lines := list(itertools.islice(file, chunk)):
                if len(lines) < chunk or not lines[-1].endswith(b"\n"):
                    break
                end += sum(map(len, lines))
                self.done += chunk
            file.truncate(end)

    def append(self, records: Iterable[Record]) -> None:
        """Adds rows; they are on disk when it returns."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        if not os.fstat(self._file.fileno()).st_size:
            self._file.write(json.dumps(self._identity) + "\n")
        self._file.writelines(lines)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += len(lines)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def records(self) -> Iterator[Record]:
        """All rows so far."""
        with self.path.open(encoding="utf-8") as file:
            next(file)
            yield from map(json.loads, file)
