"""Files of any number of rows (CSV, TSV, JSON lines, Parquet), read and written as a stream.

A row that cannot be read stays a row: it holds the cells that could be read, and says what is wrong.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from agrl_jax.data.cells import is_missing, is_unicode, plain
from agrl_jax.hints import did_you_mean
from agrl_jax.runtime.files import OutputError, in_one_piece, is_remote

MAX_LISTED = 10  # bad rows named in a message
KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 1 << 16  # rows of a Parquet file held at once
_LONGEST_CELL = 1 << 24  # characters; a quote in a CSV file that is never closed does not take in the rest of the file
_DEEPEST = 100  # levels of a JSON value, well within what Python can read and write again
_EXACT = 2**53  # whole numbers up to here are floats without loss
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FIRST_BYTES = {
    b"PAR1": "a Parquet file", b"PK\x03\x04": "a spreadsheet or ZIP archive", b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
}  # fmt: skip

NOT_UNICODE = "is not valid Unicode: half of a character stands alone"

csv.field_size_limit(_LONGEST_CELL)

Record = dict[str, Any]


class PairsError(ValueError):
    """Pairs that cannot be used; the message names file, rows and columns."""


def listed(what: str, lines: Sequence[str]) -> str:
    """A heading and the first of the `lines`, each on a line of its own."""
    more = [f"... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "\n  ".join([what, *lines[:MAX_LISTED], *more])


class Row(NamedTuple):
    """A row: its cells by column, and what is wrong with it (empty if nothing is)."""

    record: Record
    error: str = ""
    line: int = 0  # of the file, where the row begins; the first is 1. 0 in Parquet
    text: str = ""  # the line as it stands in the file, if its cells are not known or hold quotes as text


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file that has been read through once."""

    path: epath.Path
    count: int  # of its rows
    schema: pa.Schema  # its columns in their order
    digest: str  # sha256 of its bytes
    delimiter: str = ""  # between the cells of CSV and TSV
    first: int = 0  # rows of the file that come before these

    def shard(self, index: int, number: int) -> RowFile:
        """Piece `index`, from 0, of `number` pieces of the file, which follow each other and are as equal as can be."""
        start, end = (self.count * place // number for place in (index, index + 1))
        return dataclasses.replace(self, first=self.first + start, count=end - start)

    @property
    def names(self) -> list[str]:
        """Of its columns."""
        return self.schema.names

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        if _kind(self.path) == ".parquet":
            return itertools.chain.from_iterable(map(_table_rows, self.tables()))
        return self._text_rows()

    def tables(self) -> Iterator[pa.Table]:
        """The rows in blocks, in the types of the schema."""
        if _kind(self.path) == ".parquet":
            for batch in self._batches():
                yield pa.Table.from_batches([batch]).cast(self.schema)
            return
        rows = self._text_rows()
        while block := list(itertools.islice(rows, _BLOCK)):
            columns = [
                pa.array([_as_type(row.record.get(field.name), field.type) for row in block], field.type)
                for field in self.schema
            ]
            yield pa.table(columns, schema=self.schema)

    def _text_rows(self) -> Iterator[Row]:
        rows = _csv_rows(self.path, self.delimiter) if self.delimiter else _json_rows(self.path)
        return itertools.islice(rows, self.first, self.first + self.count)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """The rows of a Parquet file; only row groups that hold some of them are read."""
        with self.path.open("rb") as stream, pq.ParquetFile(stream) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            starts = list(itertools.accumulate(sizes, initial=0))
            groups = [
                i for i in range(len(sizes)) if starts[i] < self.first + self.count and self.first < starts[i + 1]
            ]
            skip, left = self.first - starts[groups[0]] if groups else 0, self.count
            for batch in file.iter_batches(_BLOCK, row_groups=groups) if groups else ():
                part = batch.slice(min(skip, len(batch)), left)
                skip, left = max(0, skip - len(batch)), left - len(part)
                yield part


@dataclasses.dataclass(frozen=True)
class RowTable:
    """Rows in memory, with the part of `RowFile` that readers of rows need."""

    records: Sequence[Record]
    path: str = "the rows"
    delimiter: str = ""

    @property
    def count(self) -> int:
        """Of its rows."""
        return len(self.records)

    @property
    def names(self) -> list[str]:
        """Of its columns."""
        return list(dict.fromkeys(name for record in self.records for name in record))

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        for record in self.records:
            broken = [name for name, value in record.items() if isinstance(value, str) and not is_unicode(value)]
            yield Row(record, f"{broken[0]} {NOT_UNICODE}" if broken else "")


# A file, by its path or opened; or records, or a frame of pandas, polars or pyarrow.
Source = epath.PathLike | RowFile | RowTable | Iterable[Record] | Any


def name_of(source: Source) -> str:
    """How messages call a source of rows."""
    if isinstance(source, RowFile | RowTable):
        return str(source.path)
    return str(source) if isinstance(source, str | os.PathLike) else RowTable.path


def records_of(source: Source) -> Sequence[Record]:
    """The rows of a frame (pandas, polars, pyarrow), a dataset or any records, each as a dict by column."""
    if hasattr(source, "to_pylist"):  # pyarrow
        return _as_written(source.to_pylist(), {field.name: field.type for field in source.schema})
    if hasattr(source, "column_names") and hasattr(source, "features"):  # datasets
        return [dataset_row(record, source.features) for record in source]
    if hasattr(source, "iter_rows"):  # polars
        return _as_written(list(source.iter_rows(named=True)), source.schema)
    if hasattr(source, "to_records"):  # pandas
        return _as_written(source.to_dict("records"), dict(source.dtypes))
    return list(source)


_FLOAT32 = ("float", "float32", "float[pyarrow]")  # as pyarrow, polars and pandas call it, in lower case


def _as_written(records: Sequence[Record], types: Mapping[str, Any]) -> Sequence[Record]:
    """Records whose numbers of 32 bits have as few digits as they need: 9.99, not 9.989999771118164."""
    short = [name for name, kind in types.items() if str(kind).lower() in _FLOAT32]
    if not short:
        return records
    return [{**record, **{name: _shortest(record[name]) for name in short}} for record in records]


def _shortest(value: Any) -> Any:
    return float(str(np.float32(value))) if isinstance(value, float) and not is_missing(value) else value


def dataset_row(record: Record, features: Mapping[str, Any] | None) -> Record:
    """A row of the library `datasets`: classes by their names, a missing one None; numbers as they were written."""
    features = features or {}
    classes = {name: kind for name, kind in features.items() if hasattr(kind, "int2str")}
    named = {
        name: kind.int2str(record[name]) if record[name] is not None and record[name] >= 0 else None
        for name, kind in classes.items()
    }
    short = [name for name, kind in features.items() if getattr(kind, "dtype", "") == "float32"]
    return record | named | {name: _shortest(record[name]) for name in short}


def read_rows(source: Source) -> RowFile | RowTable:
    """The rows of a file, see `open_rows`, or of a source in memory; an opened one is returned as it is.

    Raises:
      PairsError: as `open_rows`.
    """
    if isinstance(source, str | os.PathLike):
        return open_rows(source)
    table = source if isinstance(source, RowFile | RowTable) else RowTable(records_of(source))
    if not table.count:
        raise PairsError(f"{table.path}: there are none")
    return table


def open_rows(path: epath.PathLike, delimiter: str = "") -> RowFile:
    """Reads a file through once: counts its rows and finds its columns.

    Columns of CSV and TSV are text; one without a name is called `column_N`, by its place. A column of JSON lines is
    of the type that all its values have, else text.

    Args:
      path: a .csv, .tsv, .jsonl or .parquet file, local or remote; text is UTF-8, and may be compressed (.gz, .zst).
      delimiter: between the cells of a .csv or .tsv file, where it is not the usual one.

    Raises:
      PairsError: the file cannot be read, is of another kind, has no rows, or has a column twice.
    """
    path = epath.Path(path)
    kind = _kind(path)
    delimiter = DELIMITERS.get(kind, "") and (delimiter or DELIMITERS[kind])
    try:
        digest = _digest(path)
        if kind == ".parquet":
            count, schema = _survey_parquet(path)
        elif kind == ".jsonl":
            count, schema = _survey_json(path)
        else:
            schema = pa.schema([(name, pa.string()) for name in _header(path, delimiter)])
            count = sum(1 for _ in _csv_rows(path, delimiter))
    except FileNotFoundError as error:
        raise PairsError(f"{path}: there is no such file") from error
    except OSError as error:
        raise PairsError(f"{path}: cannot be read: {error.strerror or error}") from error
    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise PairsError(f"{path}: has the column {repeated[0]!r} twice")
    if not count:
        raise PairsError(f"{path}: has no rows")
    return RowFile(path, count, schema, digest, delimiter)


def check_columns(file: RowFile | RowTable, names: Iterable[str]) -> None:
    """Raises PairsError where the file lacks one of the columns."""
    header = file.names
    for name in names:
        if name not in header:
            raise PairsError(f"{file.path}: lacks the column {name!r}; it has {', '.join(header)}{_hint(file, name)}")


def _hint(file: RowFile | RowTable, name: str) -> str:
    """A guess at why a column is not found."""
    (first, *others) = file.names
    if file.delimiter and not others:
        for other, kind in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
            if other != file.delimiter and other in first:
                wanted = "commas" if file.delimiter == "," else "tabs"
                return f"; its cells are separated by {kind}, where {file.path.suffix} has {wanted}"
    return did_you_mean(name, file.names)


def _kind(path: epath.Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED else "".join(suffixes[-1:])
    if kind not in KINDS or (kind == ".parquet" and suffixes[-1] != kind):
        raise PairsError(
            f"{path}: unknown kind of file; it should end in one of: {', '.join(KINDS)}, "
            f"or for compressed text in .csv.gz, .csv.zst and so on"
        )
    return kind


def _compression(path: epath.Path) -> str | None:
    return _COMPRESSED.get(path.suffix.lower())


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise PairsError(f"{path}: is a pointer of Git LFS, not the file itself; fetch that with: git lfs pull")
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


# Text


def _read(path: epath.Path) -> BinaryIO:
    file = path.open("rb")
    kind = _compression(path)
    return io.BufferedReader(pa.CompressedInputStream(file, kind)) if kind else file


def _lines(path: epath.Path, newline: str) -> Iterator[str]:
    """The lines with their ends; `newline` as in `open`."""
    with _read(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
        try:
            yield from text
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _not_utf8(path: epath.Path) -> PairsError:
    """The error that names the first line that is not UTF-8, and its likely encoding."""
    with _read(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return PairsError(f"{path}:{number}: not UTF-8; it looks like {_looks_like(line, number == 1)}")
    return PairsError(f"{path}: not UTF-8: it ends within a character")


def _looks_like(line: bytes, first: bool) -> str:
    known = [what for start, what in _FIRST_BYTES.items() if first and line.startswith(start)]
    if known:
        return f"{known[0]}: name it so"
    if first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16; save the file as UTF-8"
    try:
        line.decode("cp1252")
    except UnicodeDecodeError:
        return "another encoding; save the file as UTF-8"
    return "Latin-1 or Windows-1252; save the file as UTF-8"


# Parquet


def _survey_parquet(path: epath.Path) -> tuple[int, pa.Schema]:
    try:
        with path.open("rb") as stream, pq.ParquetFile(stream) as file:
            return file.metadata.num_rows, file.schema_arrow.remove_metadata()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise PairsError(f"{path}: not a readable Parquet file: {error}") from error


def _table_rows(table: pa.Table) -> Iterator[Row]:
    """The rows of a table in types that JSON and CSV can hold: dates, times and decimals as text."""
    for place, field in enumerate(table.schema):
        if pa.types.is_temporal(field.type):  # Python's types have no nanoseconds
            table = table.set_column(place, field.name, table[place].cast(pa.string()))
        elif pa.types.is_float32(field.type):  # as 9.99, not 9.989999771118164
            table = table.set_column(place, field.name, table[place].cast(pa.string()).cast(pa.float64()))
    return (Row(plain(record)) for record in table.to_pylist())


# CSV


def _csv_rows(path: epath.Path, delimiter: str) -> Iterator[Row]:
    header = _header(path, delimiter)
    lines = _csv_lines(_lines(path, ""), delimiter, len(header))
    next(lines)
    for line in lines:
        yield Row(dict(zip(header, line.cells, strict=False)), line.error, line.number, line.text)


def _header(path: epath.Path, delimiter: str) -> list[str]:
    first = next(_csv_lines(_lines(path, ""), delimiter), None)
    if first is None or not (first.error or "".join(first.cells).strip()):
        raise PairsError(f"{path}: is empty; it should begin with the names of its columns")
    if first.error:
        raise PairsError(f"{path}: its header {first.error}")
    if "\0" in "".join(first.cells):
        raise PairsError(f"{path}:1: not UTF-8; it looks like UTF-16; save the file as UTF-8")
    return [cell.strip() or f"column_{place}" for place, cell in enumerate(first.cells, 1)]


class _CsvLine(NamedTuple):
    """A row of a CSV file, which may be several lines."""

    number: int  # of its first line
    cells: list[str]
    error: str = ""
    text: str = ""  # as in Row


def _csv_lines(lines: Iterable[str], delimiter: str, width: int | None = None) -> Iterator[_CsvLine]:
    """The rows, without blank lines.

    A quote that is never closed would swallow the rows after it. So a broken row ends with its first line, and reading
    goes on with the next one. In TSV, the quotes of such a line are text if the line then has all its cells.
    """
    numbered, again, taken = enumerate(lines, 1), deque[tuple[int, str]](), list[tuple[int, str]]()

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(numbered, None)) is not None:
            taken.append(line)
            yield line[1]

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
        number, text = taken[0]
        if not error:
            if cells:
                yield _CsvLine(number, cells)
            continue
        if 0 < len(cells) < width and len(taken) == 1:
            yield _CsvLine(number, cells, error)  # a short row has no last cells
            continue
        again.extendleft(reversed(taken[1:]))
        reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        text = text.rstrip("\r\n")
        unquoted = text.split(delimiter)
        if delimiter == "\t" and len(unquoted) == (width or len(unquoted)):
            yield _CsvLine(number, unquoted, "", text)
        else:
            yield _CsvLine(number, [], error, text)


# JSON lines


def _survey_json(path: epath.Path) -> tuple[int, pa.Schema]:
    count, kinds = 0, dict[str, set[str]]()
    for row in _json_rows(path):
        count += 1
        for name, value in row.record.items():
            kinds.setdefault(name, set()).add(_type_name(value))
    return count, pa.schema([(name, _arrow_type(kind - {"NoneType"})) for name, kind in kinds.items()])


def _type_name(value: Any) -> str:
    if type(value) is not int or -_EXACT <= value <= _EXACT:
        return type(value).__name__
    return "long" if -(2**63) <= value < 2**63 else "str"  # beyond 64 bits Arrow has no number


def _arrow_type(kinds: set[str]) -> pa.DataType:
    """The type that holds all values without loss."""
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds and kinds <= {"int", "long"}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {"int", "float"} else pa.string()


def _json_rows(path: epath.Path) -> Iterator[Row]:
    return (_json_row(number, line) for number, line in enumerate(_lines(path, "\n"), 1) if line.strip())


def _json_row(number: int, line: str) -> Row:
    text = line.rstrip("\r\n")
    try:
        record = json.loads(
            line, parse_constant=_constant, parse_float=_number, object_pairs_hook=_without_repeats
        )
        if _deeper(record, _DEEPEST):
            raise RecursionError(f"more than {_DEEPEST} levels deep")
    except (ValueError, RecursionError) as error:
        return Row({}, f"is not valid JSON: {error}", number, text)
    if not isinstance(record, dict):
        return Row({}, "is not a JSON object", number, text)
    if "\\u" in line and not is_unicode(whole := json.dumps(record, ensure_ascii=False)):
        mended = whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Row(json.loads(mended), NOT_UNICODE, number, text)
    return Row(record, "", number)


def _constant(name: str) -> str | None:
    """NaN is a missing value, as frames write it; an infinite number is text."""
    return None if name == "NaN" else name


def _number(text: str) -> float | str:
    return float(text) if math.isfinite(float(text)) else text


def _without_repeats(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {repeated!r} twice")
    return record


def _deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value is more than so many levels deep."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(one, levels - 1) for one in inner)


def _as_type(value: Any, kind: pa.DataType) -> Any:
    """A JSON value for a column of this type; a text column holds other values as JSON."""
    if value is None or kind != pa.string() or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


# Writing


def check_output(path: str | Path, source: RowFile, added: pa.Schema) -> None:
    """Raises OutputError where rows of `source` with `added` columns cannot be written to `path`."""
    path = epath.Path(path)
    try:
        _kind(path)
    except PairsError as error:
        raise OutputError(str(error)) from None
    if not is_remote(path) and not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}")
    if path.exists() and path.resolve() == source.path.resolve():
        raise OutputError(f"{path}: is the input; name another output")
    if clash := [name for name in added.names if name in source.schema.names]:
        raise OutputError(f"{source.path}: has a column {clash[0]!r} already; take another --prefix for what is added")


def keeps_lines(path: epath.PathLike, source: RowFile) -> bool:
    """Whether `write_rows` writes a line of `source` that cannot be read into `path` as it stands."""
    return bool(source.delimiter) and DELIMITERS.get(_kind(epath.Path(path))) == source.delimiter


def write_rows(path: epath.PathLike, source: RowFile, added: pa.Schema, values: Iterable[Record]) -> None:
    """Writes the rows of `source`, each with the `added` columns that `values` holds for it.

    The kind of file follows from the name. It appears in one piece, when it is whole.
    """
    with in_one_piece(path) as half, half.open("wb") as file:
        _write(file, epath.Path(path), source, added, values)


def _write(file: BinaryIO, path: epath.Path, source: RowFile, added: pa.Schema, values: Iterable[Record]) -> None:
    kind, compression = _kind(path), _compression(path)
    if kind == ".parquet":
        _write_parquet(file, source, added, iter(values))
        return
    stream = pa.CompressedOutputStream(file, compression) if compression else file
    with io.TextIOWrapper(stream, "utf-8", newline="") as text:
        if kind == ".jsonl":
            _write_json(text, source, values)
        else:
            _write_csv(text, source, added, values, DELIMITERS[kind])


def _write_parquet(file: BinaryIO, source: RowFile, added: pa.Schema, values: Iterator[Record]) -> None:
    schema = pa.schema([*source.schema, *added])
    with pq.ParquetWriter(file, schema) as writer:
        for table in source.tables():
            more = pa.Table.from_pylist(list(itertools.islice(values, len(table))), added)
            writer.write_table(pa.table([*table.columns, *more.columns], schema=schema))


def _write_json(file: io.TextIOWrapper, source: RowFile, values: Iterable[Record]) -> None:
    rows = (row.record | value for row, value in zip(source.rows(), values, strict=True))
    file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _write_csv(
    file: io.TextIOWrapper, source: RowFile, added: pa.Schema, values: Iterable[Record], delimiter: str
) -> None:
    """Writes a line whose quotes are text, or that could not be read, as it stands, where the delimiter is the same.
    Beside cells that need quotes of their own, only a line that could not be read."""
    file.write(_csv_line([*source.schema.names, *added.names], delimiter))
    for row, value in zip(source.rows(), values, strict=True):
        more = _csv_line([value.get(name) for name in added.names], delimiter)
        if row.text and delimiter == source.delimiter and (row.error or '"' not in more):
            file.write(row.text + delimiter + more)
        else:
            file.write(_csv_line([row.record.get(name) for name in source.schema.names], delimiter)[:-1])
            file.write(delimiter + more)


def _csv_line(values: Iterable[Any], delimiter: str) -> str:
    return delimiter.join(_cell(value, delimiter) for value in values) + "\n"


def _cell(value: Any, delimiter: str) -> str:
    """A value as a cell, quoted where it has to be; in TSV a quote within it is text."""
    if value is None or isinstance(value, str):
        text = value or ""
    else:
        text = json.dumps(value, ensure_ascii=False)
    quotes = text.startswith('"') if delimiter == "\t" else '"' in text
    if not quotes and not any(character in text for character in (delimiter, "\n", "\r")):
        return text
    return '"' + text.replace('"', '""') + '"'


# Work in progress


class Journal:
    """The results of the rows so far, in a file beside the output, so that work can go on where it stopped.

    The first line is the `identity`, all that the results depend on; then each row has a line of JSON. A journal of
    this identity is continued. A journal of another identity is refused, or begun anew with `overwrite`; one that
    another process is writing is refused. After a stop, the journal is cut back to a multiple of `chunk` rows: so rows
    always come in the same chunks, with the same results.
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
        before = self._identity_before()
        differ = [name for name, value in self._identity.items() if before and before.get(name) != value]
        if differ and not overwrite:
            raise OutputError(
                f"{self.path}: holds the work of another run (another {', '.join(differ)}); "
                "give its command again to finish it, name another output, or start over with --overwrite"
            )
        if before and not differ:
            self._cut(chunk)
        else:
            self._file.truncate(0)

    def _identity_before(self) -> Record:
        """The identity in the first line; empty if the line is torn or not written yet. A file that is no journal is
        left alone."""
        self._file.seek(0)
        try:
            first = self._file.readline()
            torn = not first.endswith("\n") and json.dumps(self._identity).startswith(first)
            before = {} if torn else json.loads(first)
            ours = torn or (isinstance(before, dict) and before.keys() <= self._identity.keys())
        except (ValueError, RecursionError):
            ours = False
        if not ours:
            raise OutputError(
                f"{self.path}: is not the work of this command, or of another version of it; move it away, or name "
                "another output"
            )
        return before

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.path}: another process is writing it; let it finish, or name another output"
            ) from None
        except OSError:
            return  # this file system has no locks

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
            next(file, None)  # the identity; a journal of no rows lacks it
            yield from map(json.loads, file)
