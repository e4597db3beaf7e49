"""The pairs that a run trains on and is scored on, for each source that a config may name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.data.bundled import benchmark
from agrl_jax.data.pairs import Pair, PairsError
from agrl_jax.rulebook import book
from agrl_jax.runtime.config import ConfigError, validate, validate_together
from agrl_jax.training import assemble
from agrl_jax.training.assemble import Data
from agrl_jax.types import UNKNOWN

BOOK = book.load()
BUNDLED = {
    name: [Pair(id=f"{name}{n}", query=f"{name} {n}", title="t", tier=0) for n in range(2)]
    for name in ("sft", "train", "validation", "b_eval", "w_eval")
}


@pytest.fixture(autouse=True)
def bundled(monkeypatch: pytest.MonkeyPatch) -> list:
    """Puts two pairs into each split of the benchmark. The list has an entry for each time that it is loaded."""
    loaded = []
    monkeypatch.setattr(benchmark, "load_benchmark", lambda *args: loaded.append(args) or BUNDLED)
    return loaded


def config_of(**fields: str) -> ConfigDict:
    config = recipes.base()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    validate(config)
    validate_together(config)
    return config


def load(tmp_path: Path, **fields: str) -> Data:
    return assemble.load_data(config_of(**fields), BOOK, epath.Path(tmp_path / "run"))


def pairs_file(tmp_path: Path, queries: str, split: bool = True) -> str:
    """A pair for each letter: two to train on, one for validation, one to test on."""
    path = tmp_path / f"{queries}.csv"
    splits = ("train", "train", "validation", "test") if split else ("",) * len(queries)
    rows = [f"{query},t,4{f',{name}' if split else ''}" for query, name in zip(queries, splits, strict=True)]
    path.write_text("\n".join(["query,title,label" + ",split" * split, *rows]) + "\n")
    return str(path)


def queries(pairs: list[Pair]) -> list[str]:
    return [pair.query for pair in pairs]


SFT, TRAIN = ["sft 0", "sft 1"], ["train 0", "train 1"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("benchmark", SFT),
        ("train", TRAIN),
        ("both", SFT + TRAIN),
        ("benchmark_train", TRAIN),
        ("train+pairs", [*TRAIN, "x", "y"]),
        ("pairs+benchmark", ["x", "y", *SFT]),
        ("pairs", ["x", "y"]),
    ],
)
def test_the_warm_start_beside_the_benchmark(tmp_path: Path, source: str, expected: list[str]) -> None:
    extra = {"sft__path": pairs_file(tmp_path, "xyzw")} if "pairs" in source else {}
    data = load(tmp_path, sft__source=source, **extra)
    assert queries(data.sft) == expected
    assert data.splits == {name: pairs for name, pairs in BUNDLED.items() if name != "sft"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("benchmark", SFT), ("train", ["a", "b"]), ("both", [*SFT, "a", "b"]),
        ("benchmark_train+train", [*TRAIN, "a", "b"]), ("train+pairs", ["a", "b", "x", "y"]),
    ],
)  # fmt: skip
def test_the_warm_start_beside_a_file(tmp_path: Path, bundled: list, source: str, expected: list[str]) -> None:
    extra = {"sft__path": pairs_file(tmp_path, "xyzw")} if "+pairs" in source else {}
    data = load(tmp_path, data__source="pairs", data__path=pairs_file(tmp_path, "abcd"), sft__source=source, **extra)
    assert queries(data.sft) == expected
    assert {name: queries(pairs) for name, pairs in data.splits.items()} == {
        "train": ["a", "b"], "validation": ["c"], "test": ["d"],
    }  # fmt: skip
    assert len(bundled) == ("benchmark" in source or source == "both")  # not built if nothing of it is needed


def test_all_of_a_file_without_splits_warms_up(tmp_path: Path) -> None:
    data = load(tmp_path, sft__source="pairs", sft__path=pairs_file(tmp_path, "mnopqr", split=False))
    assert queries(data.sft) == list("mnopqr")


def test_columns_labels_and_bad_rows_are_those_of_the_config(tmp_path: Path) -> None:
    path, test = tmp_path / "mine.tsv", tmp_path / "test.tsv"
    path.write_text("q\ttitle\tlabel\n" + "".join(f"q{n}\tt\tE\n" for n in range(30)) + "odd\tt\t?\n")
    test.write_text("q\ttitle\tlabel\nnew\tt\tI\n")
    fields = dict(data__source="pairs", data__path=str(path), data__test_path=str(test), sft__source="train",
                  data__columns="{query: q}", data__labels="{E: 4, I: 1}")  # fmt: skip
    with pytest.raises(PairsError, match="mine.tsv: 1 of 31 rows"):
        load(tmp_path, **fields)
    data = load(tmp_path, **fields, data__on_bad_rows="skip")
    assert [(pair.query, pair.tier) for pair in data.splits["test"]] == [("new", 3)]
    assert len(data.splits["train"]) + len(data.splits["validation"]) == 30
    assert data.notes == (
        "rows left out since they cannot be used: 1\n  row 31 (line 32): label '?' is outside the tiers; it should be "
        "one of: E, I",
    )
    with pytest.raises(ConfigError, match="data.labels=E:4: should be written like {E: 4, S: 3}"):
        load(tmp_path, **(fields | {"data__labels": "E:4"}))


def test_a_release_is_a_source_and_warms_up(tmp_path: Path) -> None:
    (tmp_path / "query.csv").write_text("query_id\tquery\n" + "".join(f"{n}\tdesk {n}\n" for n in range(50)))
    columns = "product_id\tproduct_name\tproduct_class\tproduct_description"
    (tmp_path / "product.csv").write_text(f"{columns}\n8\toak desk\t\t\n")
    labels = "".join(f"{n}\t{n}\t8\tExact\n" for n in range(50))
    (tmp_path / "label.csv").write_text("id\tquery_id\tproduct_id\tlabel\n" + labels)
    data = load(tmp_path, data__source="wands", data__path=str(tmp_path), sft__source="train")
    assert set(data.splits) == {"train", "validation", "test"} and sum(map(len, data.splits.values())) == 50
    warm = load(tmp_path, sft__source="benchmark_train+wands", sft__path=str(tmp_path))
    assert queries(warm.sft) == TRAIN + queries(data.splits["train"])


def test_a_file_is_judged_beside_the_splits_of_the_benchmark(tmp_path: Path) -> None:
    data = load(tmp_path, data__test_path=pairs_file(tmp_path, "abcd"))
    assert data.eval_splits == ("b_eval", "w_eval", "test")
    assert queries(data.splits["test"]) == list("abcd")  # all pairs, whatever its column `split` says
    assert queries(data.splits["train"]) == TRAIN and queries(data.sft) == SFT
    (tmp_path / "bad.csv").write_text("query,title,label\nq,t,4\nq,t,?\n")
    with pytest.raises(PairsError, match="bad.csv: 1 of 2 rows"):
        load(tmp_path, data__test_path=str(tmp_path / "bad.csv"))


def with_steps(monkeypatch: pytest.MonkeyPatch, count: int = 40) -> list[Pair]:
    """Training pairs of the benchmark with known steps, in the best tier and the worst."""
    steps = {BOOK.tier_for(values): values for values in np.ndindex(*BOOK.num_values)}
    pairs = [Pair(id=str(n), query=f"q{n}", title="t", tier=tier, steps=steps[tier])
             for n in range(count) for tier in [(0, 3)[n % 2]]]  # fmt: skip
    monkeypatch.setattr(benchmark, "load_benchmark", lambda *args: BUNDLED | {"train": pairs, "validation": pairs})
    return pairs


@pytest.mark.parametrize("source", ["train", "benchmark_train"])
def test_few_training_pairs_keep_their_steps_and_the_others_what_their_tier_implies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    pairs = with_steps(monkeypatch)
    data = load(tmp_path, data__steps_known=10, sft__source="known")
    train = data.splits["train"]
    assert [(pair.id, pair.tier) for pair in train] == [(pair.id, pair.tier) for pair in pairs]
    assert data.splits["validation"] == pairs
    kept = [pair for pair, whole in zip(train, pairs, strict=True) if pair == whole]
    hidden = [pair for pair in train if pair not in kept]
    assert all(pair.steps == BOOK.implied(pair.tier) and UNKNOWN in pair.steps for pair in hidden)
    assert data.sft == kept and len(kept) == 10
    assert load(tmp_path, data__steps_known=10, sft__source=source).sft == train  # the same pairs in every source
    other = load(tmp_path, data__steps_known=10, data__seed=1, sft__source="known")
    assert len(other.sft) == 10 and other.sft != kept


def test_all_steps_are_known_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = with_steps(monkeypatch)
    assert load(tmp_path, sft__source="known").sft == load(tmp_path, data__steps_known=40).splits["train"] == pairs
    with pytest.raises(ConfigError, match="sft.source=known: no training pair has all its steps known"):
        load(tmp_path, data__steps_known=0, sft__source="known")
