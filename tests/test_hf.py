"""Pairs from datasets of the `datasets` library, made here: nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agrl_jax.data.format import PairsFormat
from agrl_jax.data.hf import open_dataset
from agrl_jax.data.pairs import read_labelled
from agrl_jax.data.rows import PairsError
from agrl_jax.data.sources import read_source, read_training
from agrl_jax.rulebook import book

datasets = pytest.importorskip("datasets")
BOOK = book.load()
FORM = PairsFormat(columns={"query": "search", "label": "esci"}, labels={"E": "4", "S": "3", "C": "2", "I": "1"})


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def made(queries: str, labels: str) -> datasets.Dataset:
    """A row for each letter of the queries; labels are classes."""
    features = datasets.Features({
        "search": datasets.Value("string"), "title": datasets.Value("string"), "price": datasets.Value("float32"),
        "esci": datasets.ClassLabel(names=["I", "C", "S", "E"]), "step_brand": datasets.Value("string"),
    })  # fmt: skip
    rows = [
        {"search": query, "title": f"a {query}", "price": 9.5, "esci": label, "step_brand": None}
        for query, label in zip(queries, labels, strict=True)
    ]
    return datasets.Dataset.from_list(rows, features=features)


def test_a_dataset_without_splits_is_split_by_query_as_a_file_is(tmp_path: Path) -> None:
    queries, labels = "abcdefghijkl", "ESCI" * 3
    made(queries, labels).save_to_disk(tmp_path / "mine")
    found = read_source("hf", tmp_path / "mine", BOOK, 0, FORM)
    rows = [f"{query},a {query},{label}" for query, label in zip(queries, labels, strict=True)]
    (tmp_path / "mine.csv").write_text("\n".join(["search,title,esci", *rows]))
    as_file = read_source("pairs", tmp_path / "mine.csv", BOOK, 0, FORM)
    assert {name: [(p.query, p.tier, p.steps) for p in pairs] for name, pairs in found.splits.items()} == {
        name: [(p.query, p.tier, p.steps) for p in pairs] for name, pairs in as_file.splits.items()
    }
    assert found.splits["train"][0].price == "9.50"


def test_the_splits_of_a_dataset_are_those_of_the_pairs(tmp_path: Path) -> None:
    parts = {"train": made("ab", "ES"), "dev": made("c", "C"), "test": made("d", "I")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "mine")
    found = read_source("hf", tmp_path / "mine", BOOK, 0, FORM)
    assert {name: [(p.query, p.tier) for p in pairs] for name, pairs in found.splits.items()} == {
        "train": [("a", 0), ("b", 1)], "validation": [("c", 2)], "test": [("d", 3)]
    }  # fmt: skip
    trained = read_training("hf", tmp_path / "mine", BOOK, 0, FORM)
    assert [pair.query for pair in trained.splits["train"]] == ["a", "b"]


def test_the_api_takes_a_dataset_and_the_names_of_its_classes() -> None:
    """The label 3 means class E, not grade 3."""
    pairs = read_labelled(made("ab", "EC"), BOOK, FORM).pairs
    assert [(pair.query, pair.tier) for pair in pairs] == [("a", 0), ("b", 2)]


def test_a_price_of_32_bits_is_as_it_was_written(tmp_path: Path) -> None:
    features = datasets.Features({"query": datasets.Value("string"), "title": datasets.Value("string"),
                                  "label": datasets.Value("string"), "price": datasets.Value("float32")})  # fmt: skip
    rows = datasets.Dataset.from_dict({"query": ["a"], "title": ["t"], "label": ["4"], "price": [9.99]}, features)
    assert read_labelled(rows, BOOK).pairs[0].price == "9.99"
    rows.save_to_disk(tmp_path / "mine")
    assert read_labelled(open_dataset(tmp_path / "mine"), BOOK).pairs[0].price == "9.99"


def test_test_pairs_may_be_a_dataset_of_their_own(tmp_path: Path) -> None:
    made("abcdef", "ESCIES").save_to_disk(tmp_path / "mine")
    made("xy", "ES").save_to_disk(tmp_path / "tests")
    found = read_source("hf", tmp_path / "mine", BOOK, 0, FORM, tmp_path / "tests")
    assert [pair.query for pair in found.splits["test"]] == ["x", "y"]
    assert sum(map(len, found.splits.values())) == 8


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "folder"])
def test_data_files_are_datasets_too(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / f"train.{'parquet' if kind == 'folder' else kind}"
    plain = made("ab", "ES").cast_column("esci", datasets.Value("string"))
    getattr(plain, f"to_{'parquet' if kind == 'folder' else kind}")(path)
    labels = {"3": "4", "2": "3"}  # a class that is cast to a number
    rows = open_dataset(path.parent if kind == "folder" else path)
    found = read_labelled(rows, BOOK, PairsFormat(FORM.columns, labels))
    assert [(pair.query, pair.tier, pair.row) for pair in found.pairs] == [("a", 0, 1), ("b", 1, 2)]


def test_a_row_without_a_class_is_refused_by_its_number(tmp_path: Path) -> None:
    features = made("a", "E").features
    rows = [{"search": "q", "title": "t", "price": 1.0, "esci": label, "step_brand": None} for label in ("E", None, -1)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "mine")
    with pytest.raises(PairsError, match=r"mine: 2 of 3 rows cannot be used:\n  row 2: label '' is outside the tiers"):
        read_source("hf", tmp_path / "mine", BOOK, 0, FORM)


def test_what_is_no_dataset_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    datasets.DatasetDict({"train": made("a", "E"), "extra": made("b", "E")}).save_to_disk(tmp_path / "odd")
    said = {
        "me/mine": r"me/mine: there is no such folder or file; .*load_dataset\('.*me/mine'\).save_to_disk",
        "empty": "empty: not a dataset that can be read: ",
        "notes.txt": "notes.txt: unknown kind of file; it should end in one of: .csv, ",
        "odd": "odd: has the splits train, extra; there should be train, validation, test",
    }
    for name, message in said.items():
        with pytest.raises(PairsError, match=message):
            open_dataset(tmp_path / name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PairsError, match=r"needs the library `datasets`: pip install 'agrl_jax\[hf\]'"):
        open_dataset(tmp_path / "odd")


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    made("ab", "ES").save_to_disk(tmp_path / "mine")
    with pytest.raises(PairsError, match="mine: lacks the column 'serch'; it has search, .*did you mean 'search'"):
        read_source("hf", tmp_path / "mine", BOOK, 0, PairsFormat(columns={"query": "serch", "label": "esci"}))
