"""Files of rows: nothing is lost or changed between reading and writing, and a bad row affects no other."""

from __future__ import annotations

import csv
import datetime
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrl_jax.data import rows as rows_module
from agrl_jax.data.rows import Journal, OutputError, PairsError, check_output, open_rows, write_rows

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
ADDED = pa.schema([("tier", pa.string()), ("prob", pa.float64()), ("fits", pa.bool_())])
VALUES = [{"tier": "good", "prob": 0.25, "fits": True}, {"tier": None, "prob": None, "fits": None}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path, column: str) -> list[tuple[str | None, str]]:
    return [(row.record.get(column), row.error) for row in open_rows(path).rows()]


# Shards


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_shards_are_the_rows_in_their_order(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agrl_jax.data.rows._BLOCK", 2)  # so that a row group takes several blocks
    titles = [str(i) for i in range(11)]
    if name == "a.parquet":
        pq.write_table(pa.table({"title": titles}), tmp_path / name, row_group_size=3)
    else:
        line = "{}\n" if name == "a.csv" else '{{"title": "{}"}}\n'
        write(tmp_path / name, "title\n" * (name == "a.csv") + "".join(map(line.format, titles)))
    file = open_rows(tmp_path / name)
    for number in range(1, 14):
        shards = [file.shard(index, number) for index in range(number)]
        assert [row.record["title"] for shard in shards for row in shard.rows()] == titles
        assert [title for shard in shards for table in shard.tables() for title in table["title"].to_pylist()] == titles
        counts = [len(list(shard.rows())) for shard in shards]
        assert counts == [shard.count for shard in shards] and max(counts) - min(counts) <= 1
    halves = file.shard(1, 2).shard(0, 2)  # the first half of rows 5 to 10
    assert (halves.first, [row.record["title"] for row in halves.rows()]) == (5, ["5", "6", "7"])


# Reading


def test_csv_with_quotes_breaks_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = '\ufeffquery,title\r\nboots,"Boot, 10"" high"\r\n\r\nshoes,"two\nlines"\r\n'
    file = open_rows(write(tmp_path / "a.csv", content))
    assert (file.count, file.schema.names) == (2, ["query", "title"])
    assert [row.record["title"] for row in file.rows()] == ['Boot, 10" high', "two\nlines"]


def test_a_broken_csv_row_is_named_and_spoils_no_other(tmp_path: Path) -> None:
    lines = ["query,title", "a,A", 'b,"never closed', "c,C", "d", "e,E,E", 'f,"F" x', "g,G"]
    rows = list(open_rows(write(tmp_path / "a.csv", "\n".join(lines) + "\n")).rows())
    assert [row.record.get("query") for row in rows] == ["a", None, "c", "d", None, None, "g"]
    assert [row.text for row in rows] == ["", lines[2], "", "", lines[5], lines[6], ""]
    assert [row.line for row in rows] == [2, 3, 4, 5, 6, 7, 8]
    errors = [row.error for row in rows]
    assert [bool(error) for error in errors] == [False, True, False, True, True, True, False]
    assert errors[3] == "has 1 cells where the header has 2"
    assert errors[4] == "has 3 cells where the header has 2"
    assert "not valid CSV" in errors[1]


def test_quotes_in_tsv_are_text_where_they_quote_no_whole_cell(tmp_path: Path) -> None:
    titles = ['6" nails', '"Rustic" shelf', '"SALE hook', '"a\ttab"', "plain"]
    path = write(tmp_path / "in.tsv", "query\ttitle\n" + "".join(f"q\t{title}\n" for title in titles))
    source = open_rows(path)
    assert texts(path, "title") == [(title.replace('"a\ttab"', "a\ttab"), "") for title in titles]
    write_rows(tmp_path / "out.tsv", source, ADDED, VALUES[:1] * 5)
    lines = (tmp_path / "out.tsv").read_text().splitlines()
    assert lines[1:] == [f"q\t{title}\tgood\t0.25\ttrue" for title in titles]
    write_rows(tmp_path / "out.csv", source, ADDED, VALUES[:1] * 5)
    assert [title for title, _ in texts(tmp_path / "out.csv", "title")][:3] == titles[:3]


def test_a_title_that_begins_with_a_quote_survives_beside_a_cell_of_several_lines(tmp_path: Path) -> None:
    titles = ['"Star Wars" Lego', '6" nails', '"SALE hook']
    source = open_rows(write(tmp_path / "in.tsv", "query\ttitle\n" + "".join(f"q\t{title}\n" for title in titles)))
    answer = [{"judge_tier": 'first\nsecond "third"'}] * 3
    write_rows(tmp_path / "out.tsv", source, pa.schema([("judge_tier", pa.string())]), answer)
    assert texts(tmp_path / "out.tsv", "title") == [(title, "") for title in titles]
    assert texts(tmp_path / "out.tsv", "judge_tier") == [(answer[0]["judge_tier"], "")] * 3


def test_a_line_that_cannot_be_read_is_written_as_it_stands(tmp_path: Path) -> None:
    bad = '"sink","Steel 20\\" sink, round","3"'
    source = open_rows(write(tmp_path / "in.csv", f"query,title,stars\r\n{bad}\r\ncup,Cup,5\r\n"))
    write_rows(tmp_path / "out.csv", source, ADDED, VALUES)
    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == [bad + ",good,0.25,true", "cup,Cup,5,,,"]
    write_rows(tmp_path / "out.tsv", source, ADDED, VALUES)
    assert (tmp_path / "out.tsv").read_text().splitlines()[1:] == ["\t\t\tgood\t0.25\ttrue", "cup\tCup\t5\t\t\t"]


def test_columns_without_a_name_are_called_by_their_place(tmp_path: Path) -> None:
    file = open_rows(write(tmp_path / "a.csv", "query,,title, \nmug,1,Mug,2\n"))
    assert [row.record for row in file.rows()] == [{"query": "mug", "column_2": "1", "title": "Mug", "column_4": "2"}]


def test_a_cell_of_any_length_is_read(tmp_path: Path) -> None:
    long = "wool, " * 30_000
    found = texts(write(tmp_path / "a.csv", f'query,title\nsocks,"{long}"\ncap,Cap\n'), "title")
    assert found == [(long, ""), ("Cap", "")]


@pytest.mark.parametrize(
    ("name", "content", "line", "said"),
    [
        ("a.csv", "query,title\ncrêpe pan,Pan\n".encode("latin-1"), 2, "Latin-1"),
        ("a.tsv", "café\ttitle\n".encode("cp1252"), 1, "Latin-1"),
        ("a.jsonl", b'{"query": "a"}\n{"query": "\xe9"}\n', 2, "Latin-1"),
        ("a.csv", "query,title\nmug,Mug\n".encode("utf-16"), 1, "UTF-16"),
        ("a.csv", "query,title\nmug,Mug\n".encode("utf-16-le"), 1, "UTF-16"),
        ("a.csv", b"query,title\nmug,\x81\x8d\n", 2, "another encoding"),
        ("a.csv", b"PAR1\x15\xff", 1, "a Parquet file: name it so"),
        ("a.tsv", b"\x1f\x8b\x08\x00", 1, "compressed by gzip"),
    ],
)
def test_a_text_that_is_not_utf8_is_refused_with_what_it_looks_like(tmp_path, name, content, line, said) -> None:
    with pytest.raises(PairsError, match=f"{name}:{line}: not UTF-8; it looks like {said}"):
        open_rows(write(tmp_path / name, content))


def test_json_lines_that_cannot_be_read_stay_rows(tmp_path: Path) -> None:
    lines = [
        '{"query": "a"}', "{", "[1]", '{"query": "hat \\ud800", "n": 1}', "", '{"query": "b", "query": "c"}',
        '{"query": ' + "[" * 5000 + "]" * 5000 + "}", '{"query": ' + "[" * 102 + "]" * 102 + "}", '{"query": "b"}',
    ]  # fmt: skip
    rows = list(open_rows(write(tmp_path / "a.jsonl", "\n".join(lines))).rows())
    assert [row.record.get("query") for row in rows] == ["a", None, None, "hat \ufffd", None, None, None, "b"]
    assert [row.line for row in rows] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [row.text for row in rows] == ["", *lines[1:4], *lines[5:8], ""]
    errors = [row.error for row in rows]
    assert errors[2:5] == [
        "is not a JSON object", "is not valid Unicode: half of a character stands alone",
        "is not valid JSON: it has 'query' twice",
    ]  # fmt: skip
    assert errors[6] == "is not valid JSON: more than 100 levels deep"
    assert "not valid JSON" in errors[1] and "not valid JSON" in errors[5]


def test_lines_of_json_end_at_line_feeds_alone(tmp_path: Path) -> None:
    title = "Rug\u2028red\u0085\x1c\x0b\x0c thick"
    content = "".join(json.dumps({"title": title, "n": n}, ensure_ascii=False) + "\r\n" for n in range(2))
    assert texts(write(tmp_path / "a.jsonl", content), "title") == [(title, "")] * 2


def test_numbers_that_json_does_not_have_are_missing_or_text(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", '{"title": "a", "price": NaN}\n{"title": NaN, "price": [-Infinity, 1e999]}\n')
    source = open_rows(path)
    assert [row.record for row in source.rows()] == [
        {"title": "a", "price": None}, {"title": None, "price": ["-Infinity", "1e999"]}
    ]  # fmt: skip
    write_rows(tmp_path / "out.jsonl", source, ADDED, VALUES)
    assert "NaN" not in (tmp_path / "out.jsonl").read_text()


def test_whole_numbers_that_no_float_holds_stay_exact(tmp_path: Path) -> None:
    records = [{"sku": 2**53 + 1, "ean": 2**53 + 1, "n": 2**53}, {"sku": 0.5, "ean": 7, "n": 0.5}]
    source = open_rows(write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, records))))
    write_rows(tmp_path / "out.parquet", source, ADDED, VALUES)
    found = pq.read_table(tmp_path / "out.parquet").select(["sku", "ean", "n"]).to_pylist()
    assert found == [{"sku": str(2**53 + 1), "ean": 2**53 + 1, "n": 2.0**53}, {"sku": "0.5", "ean": 7, "n": 0.5}]


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
        ("a.csv", "", "is empty"),
        ("a.csv", "\ufeff", "is empty"),
        ("a.csv", "\ufeff\n\n", "is empty"),
        ("a.jsonl", "\ufeff", "has no rows"),
        ("a.parquet", "", "not a readable Parquet file"),
        ("a.parquet.gz", "x", "unknown kind"),
        ("a.csv.gz", "query,title", "cannot be read"),
        ("a.csv", LFS_POINTER, "pointer of Git LFS.*git lfs pull"),
        ("a.parquet", LFS_POINTER, "pointer of Git LFS.*git lfs pull"),
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
    write_rows(tmp_path / "out.csv", source, ADDED, VALUES[:1] * 5)
    with (tmp_path / "out.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["price"] == "9.50"


def test_values_of_parquet_that_json_does_not_have(tmp_path: Path) -> None:
    schema = pa.schema([
        ("x", pa.float64()), ("raw", pa.binary()), ("deep", pa.list_(pa.struct([("y", pa.float64())]))),
        ("cost", pa.list_(pa.decimal128(4, 2))), ("took", pa.duration("ns")),
    ])  # fmt: skip
    record = {"x": float("nan"), "raw": b"caf\xc3\xa9", "deep": [{"y": float("nan")}], "cost": [Decimal("1.50")],
              "took": 5}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([record, record | {"x": float("inf"), "raw": b"\xff"}], schema),
                   tmp_path / "in.parquet")  # fmt: skip
    source = open_rows(tmp_path / "in.parquet")
    write_rows(tmp_path / "out.jsonl", source, ADDED, VALUES)
    found = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out.jsonl").open()]
    first = {"x": None, "raw": "café", "deep": [{"y": None}], "cost": ["1.50"], "took": "5"}
    assert found == [first | VALUES[0], first | {"x": "inf", "raw": "ff"} | VALUES[1]]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_text_may_be_compressed(tmp_path: Path, kind: str, compression: str) -> None:
    source = open_rows(write(tmp_path / "in.csv", "query,title\ncafé,C\nmug,M\n"))
    path = tmp_path / f"out.{kind}.{compression}"
    write_rows(path, source, ADDED, VALUES)
    assert path.read_bytes()[:2] == {"gz": b"\x1f\x8b", "zst": b"\x28\xb5"}[compression]
    assert texts(path, "query") == [("café", ""), ("mug", "")]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PairsError, match="cannot be read"):
        open_rows(path)


_CELLS = st.text(
    st.sampled_from('a ",\t\r\n\u2028') | st.characters(codec="utf-8", exclude_characters="\0"), max_size=8
)
_NAMES = st.lists(st.text("abcdefgh \"',;\t", min_size=1, max_size=4).filter(lambda name: name == name.strip()),
                  min_size=1, max_size=3, unique=True)  # fmt: skip


@settings(deadline=None)
@given(st.data(), _NAMES, st.sampled_from(["csv", "tsv", "jsonl", "parquet", "csv.gz", "tsv.zst", "jsonl.zst"]))
def test_what_is_written_is_read_back_equal(tmp_path_factory, data, names, kind) -> None:
    folder = tmp_path_factory.mktemp("trip")
    records = data.draw(st.lists(st.fixed_dictionaries({name: _CELLS for name in names}), min_size=1, max_size=4))
    source = write(folder / "in.jsonl", "\n".join(map(json.dumps, records)))
    added = pa.schema([("added", pa.string())])
    write_rows(folder / f"out.{kind}", open_rows(source), added, [{"added": "x"}] * len(records))
    found = list(open_rows(folder / f"out.{kind}").rows())
    assert [row.record for row in found] == [record | {"added": "x"} for record in records]
    assert not any(row.error for row in found)


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a,b", 'a "b"'])
def test_a_csv_cell_that_another_reader_could_split_is_quoted(tmp_path: Path, text: str) -> None:
    source = open_rows(write(tmp_path / "in.jsonl", json.dumps({"title": text})))
    write_rows(tmp_path / "out.csv", source, pa.schema([("added", pa.string())]), [{"added": "x"}])
    quoted = text.replace('"', '""')
    assert (tmp_path / "out.csv").read_bytes().decode() == f'title,added\n"{quoted}",x\n'


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | _CELLS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_CELLS, inner, max_size=3), max_leaves=6,
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"a": _JSON, "b": st.integers() | st.floats(-1e9, 1e9)}), min_size=1, max_size=4))
def test_json_values_are_written_and_read_back_equal(tmp_path_factory, records) -> None:
    folder = tmp_path_factory.mktemp("trip")
    source = open_rows(write(folder / "in.jsonl", "\n".join(map(json.dumps, records))))
    added = pa.schema([("added", pa.string())])
    for kind in ("jsonl", "parquet"):
        write_rows(folder / f"out.{kind}", source, added, [{"added": None}] * len(records))
    assert [row.record for row in open_rows(folder / "out.jsonl").rows()] == [row | {"added": None} for row in records]
    stored = [row.record for row in open_rows(folder / "out.parquet").rows()]
    for before, after in zip(records, stored, strict=True):
        for name, value in before.items():
            same = after[name] == value or json.loads(after[name]) == value
            assert same, (name, value, after[name])


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
    with journal(path, input="b", overwrite=True) as work:  # stopped, and started again
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


@pytest.mark.parametrize("content", ["notes of mine", "notes\n", '{"a": 1}\n', "[1]\n", "[" * 10_000 + "\n", b"\xff\n"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: str | bytes) -> None:
    path = write(tmp_path / "work", content)
    before = path.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is not the work of this command.*move it away"):
            journal(path, overwrite=overwrite)
    assert path.read_bytes() == before
