"""Files of any length, judged piece by piece; what is done stays done."""

from __future__ import annotations

import hashlib
import itertools
import re
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from etils import epath

from agrl_jax.data import rows
from agrl_jax.data.cells import TEXTS
from agrl_jax.data.rows import Journal, OutputError, PairsError, Record, Row, RowFile
from agrl_jax.judging import PREFIX, trained
from agrl_jax.judging.cuts import CutsError
from agrl_jax.judging.engine import Judge, Judgement
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.runtime.config import ConfigError
from agrl_jax.runtime.console import progress
from agrl_jax.runtime.files import check_writable, is_remote

_LISTED = 10  # bad rows named in the summary
_ERROR_WIDTH = 200  # of each
_OTHER_COLUMNS = 8  # that are added, besides those of tiers' probabilities and of steps
USER_ERRORS = (*trained.LOAD_ERRORS, CutsError, PairsError, OutputError)  # shown as one message


@dataclass
class Summary:
    """What became of the rows of a file."""

    first: int = 0  # rows of the file that come before these
    rows: int = 0
    tiers: Counter[str] = field(default_factory=Counter)
    inconsistent: int = 0
    disagreeing: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)  # number (the first row is 1) and error of the first few
    bad_rows: int = 0
    repeated: int = 0  # of those that were judged now

    def add(self, judgement: Mapping[str, Any]) -> None:
        """Counts the next row."""
        self.rows += 1
        if judgement["error"]:
            self.bad_rows += 1
            if self.bad_rows <= _LISTED:
                error = textwrap.shorten(judgement["error"], _ERROR_WIDTH, placeholder="…")
                self.bad.append((self.first + self.rows, error))
            return
        self.tiers[judgement["tier"]] += 1
        self.inconsistent += judgement["consistent"] is False
        self.disagreeing += judgement["stated"] != judgement["likeliest"]

    def __str__(self) -> str:
        counts = ", ".join(f"{tier} {count:,}" for tier, count in sorted(self.tiers.items(), reverse=True))
        lines = [f"judged {self.rows - self.bad_rows:,} of {self.rows:,} rows: {counts or 'none'}"]
        if self.inconsistent:
            lines.append(f"rows whose steps do not imply their tier: {self.inconsistent:,}")
        if self.disagreeing:
            lines.append(f"rows whose likeliest tier is not the one that the answer states: {self.disagreeing:,}")
        if self.repeated:
            lines.append(f"rows equal to another of their chunk, which were judged once: {self.repeated:,}")
        if self.bad_rows:
            lines.append(f"rows that could not be judged: {self.bad_rows:,}")
            lines += [f"  row {number}: {error}" for number, error in self.bad]
        if self.bad_rows > len(self.bad):
            lines.append(f"  ... and {self.bad_rows - len(self.bad):,} more")
        return "\n".join(lines)


def check_free(output: str, overwrite: bool) -> None:
    """Raises OutputError where an output could not be written, or exists and may not be overwritten."""
    check_writable(output, "--output")
    if epath.Path(output).exists() and not overwrite:
        raise OutputError(f"{output}: exists already; name another output, or replace it with --overwrite")


def judge_file(
    judge: Judge, source: str, output: str, prefix: str = PREFIX, overwrite: bool = False,
    columns: Mapping[str, str] | None = None, shard: tuple[int, int] = (1, 1),
) -> Summary:
    """Judges a file of rows into another, of any length in little memory, and goes on where it stopped before.

    Finished rows wait in `OUTPUT.partial` (for an output in a bucket, in the folder for temporary files) until all are
    done; then the output appears in one piece. `columns` maps our names of columns to the file's where they differ:
    {"title": "product_title"}. `shard` (i, n) judges piece i, from 1, of n pieces of the file: one after the other,
    their outputs hold the rows of the whole.

    Raises:
      PairsError: the input cannot be read, or lacks a column.
      OutputError: the output cannot be written, exists, or was begun from another input or judge.
    """
    file = rows.open_rows(source).shard(shard[0] - 1, shard[1])
    columns = dict(columns or {})
    for name in columns:
        if name not in TEXTS:
            raise PairsError(f"columns: there is no column {name!r}; there are {', '.join(TEXTS)}")
    rows.check_columns(file, {"query": "query", "title": "title", **columns}.values())
    added = added_columns(judge.book, prefix)
    rows.check_output(output, file, added)
    check_free(output, overwrite)
    summary, repeated = Summary(file.first), judge.repeated
    identity = judge.identity | {"input": file.digest, "columns": columns, "shard": list(shard)}
    with Journal(_partial(output), identity, judge.chunk, overwrite) as journal:
        _judge_rest(judge, file, journal, columns, rows.keeps_lines(output, file))
        rows.write_rows(output, file, added, _counted(journal, summary, added))
        journal.path.unlink()
    summary.repeated = judge.repeated - repeated
    return summary


def _partial(output: str) -> Path:
    """Where unfinished work lies: not in a bucket, whose files cannot be appended to."""
    if is_remote(output):
        return Path(tempfile.gettempdir(), f"agrl_jax-{hashlib.sha256(output.encode()).hexdigest()[:16]}.partial")
    return Path(f"{output}.partial")


def parse_shard(text: str) -> tuple[int, int]:
    """The i and n of "i/n". Raises ConfigError for any other text."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard={text}: should be i/n with i from 1 to n, such as 1/8 to 8/8 for eight shards")
    return int(match[1]), int(match[2])


def _judge_rest(
    judge: Judge, file: RowFile, journal: Journal, columns: Mapping[str, str], keeps_lines: bool
) -> None:
    """Judges the rows that the journal does not hold."""

    def asked(row: Row) -> Record:
        record = {} if row.error else row.record
        return record | {name: record.get(column) for name, column in columns.items()}

    def answer(row: Row, judged: Judgement) -> Judgement:
        if not row.error:
            return judged
        return Judgement(error=f"{row.error}: {row.text}" if row.text and not keeps_lines else row.error)

    left = itertools.islice(file.rows(), journal.done, None)
    with progress("judge", file.count, journal.done) as bar:
        if journal.done:
            where = f" of its shard, which begins after row {file.first:,}" if file.first else ""
            bar.print(f"going on after row {journal.done:,} of {file.count:,}{where}")
        first, began = journal.done, time.monotonic()
        while chunk := list(itertools.islice(left, judge.chunk)):
            judged = judge.judge(list(map(asked, chunk)), bar.advance)
            journal.append(map(asdict, map(answer, chunk, judged)))
            bar.update(journal.done, {"rows/s": (journal.done - first) / (time.monotonic() - began)})


def added_columns(book: RuleBook, prefix: str) -> pa.Schema:
    """The columns that are added, with their types."""
    text, number = pa.string(), pa.float64()
    return pa.schema([
        (f"{prefix}tier", text),
        (f"{prefix}tier_from", text),
        *((f"{prefix}prob_{tier.name}", number) for tier in book.tiers),
        (f"{prefix}stated", text),
        (f"{prefix}likeliest", text),
        (f"{prefix}disagree", pa.bool_()),
        *((f"{prefix}step_{step.name}", text) for step in book.steps),
        (f"{prefix}consistent", pa.bool_()),
        (f"{prefix}response", text),
        (f"{prefix}error", text),
    ])  # fmt: skip


def cells(judged: Mapping[str, Any], added: pa.Schema) -> Record:
    """A judgement, its fields by name, as cells of the added columns."""
    if judged["error"]:
        values = [None] * (len(added) - 1) + [judged["error"]]
    else:
        stated, likeliest = judged["stated"], judged["likeliest"]
        unasked = [None] * (len(added) - len(judged["probs"]) - len(judged["steps"]) - _OTHER_COLUMNS)
        values = [judged["tier"], judged["tier_from"], *judged["probs"].values(), stated, likeliest]
        values += [stated != likeliest, *judged["steps"].values(), *unasked]
        values += [judged["consistent"], judged["response"], ""]
    return dict(zip(added.names, values, strict=True))


def _counted(journal: Journal, summary: Summary, added: pa.Schema) -> Iterator[Record]:
    """The journal's judgements as cells, each counted in the summary."""
    for judged in journal.records():
        summary.add(judged)
        yield cells(judged, added)
