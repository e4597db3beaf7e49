"""Files of rows: nothing is lost or changed on the way through, and a bad row spoils no other."""

from __future__ import annotations

import csv
import datetime
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agrl_jax.data import rows as rows_module
from agrl_jax.data.pairs import PairsError
from agrl_jax.data.rows import Journal, OutputError, check_output, open_rows, write_rows

ADDED = pa.schema([("tier", pa.string()), ("prob", pa.float64()), ("fits", pa.bool_())])
VALUES = [{"tier": "good", "prob": 0.25, "fits": True}, {"tier": None, "prob": None, "fits": None}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path, column: str) -> list[tuple[str | None, str]]:
    return [(row.record.get(column), row.error) for row in open_rows(path).rows()]


# Reading


def test_csv_with_quotes_breaks_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = '\ufeffquery,title\r\nboots,"Boot, 10"" high"\r\n\r\nshoes,"two\nlines"\r\n'
    file = open_rows(write(tmp_path / "a.csv", content))
    assert (file.count, file.schema.names) == (2, ["query", "title"])
    assert [row.record["title"] for row in file.rows()] == ['Boot, 10" high', "two\nlines"]


def test_a_broken_csv_row_is_named_and_spoils_no_other(tmp_path: Path) -> None:
    lines = ["query,title", "a,A", 'b,"never closed', "c,C", "d", "e,E,E", 'f,"F" x', "g,G"]
    found = texts(write(tmp_path / "a.csv", "\n".join(lines) + "\n"), "query")
    assert [query for query, _ in found] == list("abcdefg")
    errors = [error for _, error in found]
    assert [bool(error) for error in errors] == [False, True, False, True, True, True, False]
    assert errors[3] == "has 1 cells where the header has 2"
    assert "not valid CSV" in errors[1]


def test_bytes_that_are_not_utf8_are_the_rows_own_trouble(tmp_path: Path) -> None:
    found = texts(write(tmp_path / "a.tsv", b"query\ttitle\nboots\tB\xff\nshoes\tS\n"), "title")
    assert found == [("B\ufffd", "is not UTF-8"), ("S", "")]


def test_json_lines_that_cannot_be_read_stay_rows(tmp_path: Path) -> None:
    lines = [b'{"query": "a"}', b"{", b"[1]", b'{"query": "\xff"}', b'{"query": "\\ud800"}', b"", b'{"query": "b"}']
    found = texts(write(tmp_path / "a.jsonl", b"\n".join(lines)), "query")
    assert [query for query, _ in found] == ["a", None, None, None, None, "b"]
    assert [bool(error) for _, error in found] == [False, True, True, True, True, False]


def test_json_columns_are_of_the_type_that_all_values_have(tmp_path: Path) -> None:
    records = [
        {"n": 1, "x": 1, "b": True, "mixed": 1, "large": 2**70, "none": None},
        {"n": None, "x": 0.5, "mixed": "a", "tags": ["p"]},
    ]
    file = open_rows(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records))))
    types = {field.name: str(field.type) for field in file.schema}
    assert types == {
        "n": "int64", "x": "double", "b": "bool", "mixed": "string", "large": "string", "none": "string",
        "tags": "string",
    }  # fmt: skip
    (table,) = file.tables()
    assert table["mixed"].to_pylist() == ["1", "a"]
    assert table["tags"].to_pylist() == [None, '["p"]']


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", None, "no such file"),
        ("a.xlsx", "x", "should end in one of: .csv, .tsv, .jsonl, .parquet"),
        ("a.csv", "", "header is missing"),
        ("a.csv", "query,title\n", "has no rows"),
        ("a.csv", "query,query\na,b\n", "'query' twice"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.parquet", "PAR1", "not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(PairsError, match=said) as error:
        open_rows(path)
    assert str(path) in str(error.value)


# Writing


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_holds_what_was_there_and_what_is_added(tmp_path: Path, kind: str) -> None:
    source = open_rows(write(tmp_path / "in.csv", 'query,title\nboots,"B, ""x"""\nshoes,S\n'))
    path = tmp_path / f"out.{kind}"
    write_rows(path, source, ADDED, VALUES)
    if kind == "parquet":
        found = pq.read_table(path).to_pylist()
    elif kind == "jsonl":
        found = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        with path.open(newline="") as file:
            found = list(csv.DictReader(file, delimiter="," if kind == "csv" else "\t"))
        assert found[0].pop("prob") == "0.25" and found[0].pop("fits") == "true"
        assert all(found[1].pop(name) == "" for name in ADDED.names)
        assert found == [{"query": "boots", "title": 'B, "x"', "tier": "good"}, {"query": "shoes", "title": "S"}]
        return
    assert found == [{"query": "boots", "title": 'B, "x"'} | VALUES[0], {"query": "shoes", "title": "S"} | VALUES[1]]


def test_parquet_keeps_its_types_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_BLOCK", 2)
    schema = pa.schema([
        ("query", pa.string()), ("at", pa.timestamp("ns")), ("price", pa.decimal128(6, 2)),
        ("tags", pa.list_(pa.string())), ("kind", pa.dictionary(pa.int32(), pa.string())),
    ])  # fmt: skip
    record = {
        "query": "boots", "at": datetime.datetime(2024, 5, 1), "price": Decimal("9.50"), "tags": ["a"], "kind": "k",
    }  # fmt: skip
    table = pa.Table.from_pylist([record | {"query": f"q{i}"} for i in range(5)], schema)
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=3)
    source = open_rows(tmp_path / "in.parquet")
    assert [row.record["query"] for row in source.rows()] == ["q0", "q1", "q2", "q3", "q4"]
    write_rows(tmp_path / "out.parquet", source, ADDED, VALUES[:1] * 5)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(schema.names).equals(table)
    assert found["tier"].to_pylist() == ["good"] * 5
    write_rows(tmp_path / "out.jsonl", source, ADDED, VALUES[:1] * 5)
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first["at"].startswith("2024-05-01") and first["price"] == "9.50" and first["tags"] == ["a"]


def test_json_values_stay_as_they_are(tmp_path: Path) -> None:
    lines = ['{"query": "a", "n": 1, "deep": {"x": [1, null]}}', '{"query": "é", "n": "one"}']
    write_rows(tmp_path / "out.jsonl", open_rows(write(tmp_path / "in.jsonl", "\n".join(lines))), ADDED, VALUES)
    found = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [line.partition(', "tier"')[0] + "}" for line in found] == lines


@pytest.mark.parametrize(
    ("output", "added", "said"),
    [
        ("in.csv", "tier", "is the input"),
        ("out.txt", "tier", "should end in one of"),
        ("no/such/out.csv", "tier", "there is no folder"),
        ("out.csv", "title", "'title' already.*--prefix"),
    ],
)
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, output: str, added: str, said: str) -> None:
    source = open_rows(write(tmp_path / "in.csv", "query,title\na,A\n"))
    with pytest.raises(OutputError, match=said):
        check_output(tmp_path / output, source, pa.schema([(added, pa.string())]))


# The journal


def journal(path: Path, chunk: int = 2, overwrite: bool = False, **identity: str) -> Journal:
    return Journal(path, {"input": "a"} | identity, chunk, overwrite)


def test_a_journal_goes_on_after_its_last_whole_chunk(tmp_path: Path) -> None:
    path = tmp_path / "work"
    with journal(path) as work:
        work.append({"i": i} for i in range(4))
        work.append({"i": i} for i in range(4, 6))
    whole = path.read_bytes()
    for cut, done in [(0, 6), (1, 4), (len('{"i": 5}\n'), 4), (len('{"i": 5}\n') + 1, 4), (len('{"i": 5}\n') * 3, 2)]:
        path.write_bytes(whole[: len(whole) - cut])
        with journal(path) as again:
            assert again.done == done
            assert list(again.records()) == [{"i": i} for i in range(done)]


def test_a_journal_of_other_work_is_refused_or_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "work"
    with journal(path) as work:
        work.append([{"i": 0}, {"i": 1}])
    with pytest.raises(OutputError, match=r"another input.*--overwrite"):
        journal(path, input="b")
    with journal(path, input="b", overwrite=True) as work:
        assert work.done == 0
        work.append({"i": i} for i in range(2))
    with journal(path, input="b", overwrite=True) as work:  # stopped, and given again
        assert work.done == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_journal_has_one_writer(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "work"
    with journal(path) as work:
        work.append([{"i": 0}, {"i": 1}])
        with pytest.raises(OutputError, match="work: another process is writing it"):
            journal(path, overwrite=overwrite)
        assert list(work.records()) == [{"i": 0}, {"i": 1}]
    with journal(path) as work:
        assert work.done == 2


def test_a_journal_whose_first_line_is_torn_begins_anew(tmp_path: Path) -> None:
    with journal(write(tmp_path / "work", '{"inp')) as work:
        assert work.done == 0
        work.append([{"i": 0}])
        assert list(work.records()) == [{"i": 0}]
