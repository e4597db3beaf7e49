"""Adapters in a folder of their own, and the judge in the box, which is such a folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pretrained import save_model

from agrl_jax.evaluation import probabilities
from agrl_jax.evaluation.probabilities import Calibration
from agrl_jax.judging import trained
from agrl_jax.judging.engine import Judge
from agrl_jax.judging.export import export_model
from agrl_jax.judging.trained import TrainedError
from agrl_jax.policy import adapters, loading, lora, shipped
from agrl_jax.policy.adapters import Adapters
from agrl_jax.policy.families import LoadingError
from agrl_jax.policy.lora import LoraConfig
from agrl_jax.policy.smollm2 import NotInstalledError, find_smollm2
from agrl_jax.policy.transformer import build
from agrl_jax.rulebook import book
from agrl_jax.runtime.files import read_json, write_json

EXAMPLE = Path(__file__).parent.parent / "examples" / "pairs.csv"
CFG = LoraConfig(rank=2, alpha=4.0, modules=("q", "down"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def drawn(model: Path):
    """Adapters that add something, with values that bfloat16 holds exactly."""
    shape, base, _ = loading.load_pretrained(model)
    fresh = lora.init(jax.random.key(0), base, build(shape)[2], CFG)
    return jax.tree.map(lambda x: np.asarray((x + 0.1).astype(jnp.bfloat16)), fresh)


@pytest.fixture
def folder(model: Path, drawn, tmp_path: Path) -> Path:
    adapters.save(tmp_path, Adapters(str(model), "float32", CFG, drawn), "bfloat16")
    return tmp_path


def test_adapters_are_loaded_as_the_model_that_they_make_of_their_base(model: Path, drawn, folder: Path) -> None:
    shape, base, tokenizer = loading.load_pretrained(model)
    found, merged, words = loading.load_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, merged, jax.jit(lora.merge, static_argnums=(2, 3))(
        base, drawn, CFG, "float32"))  # fmt: skip
    assert not np.array_equal(merged["blocks"]["mlp"]["down"], base["blocks"]["mlp"]["down"])
    assert (found, loading.read_config(folder)) == (shape, shape)
    assert words.encode("red shoes") == loading.read_tokenizer(folder).encode("red shoes")
    assert words.vocab_size == tokenizer.vocab_size


def test_adapters_may_lie_over_adapters_and_have_a_tokenizer_of_their_own(
    model: Path, drawn, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    second = tmp_path_factory.mktemp("second")
    adapters.save(second, Adapters(str(folder), "float32", CFG, drawn), "bfloat16")
    shape, _, words = loading.load_pretrained(model)
    assert loading.read_config(second) == shape and loading.load_pretrained(second)[0] == shape
    assert loading.read_tokenizer(second).end_token == words.end_token
    other = words.ending_with(words.encode("a")[0])
    other.save(folder)
    assert loading.read_tokenizer(second).end_token == loading.load_pretrained(second)[2].end_token == other.end_token


def test_the_base_lies_below_them_in_the_dtype_of_training(model: Path, drawn, folder: Path) -> None:
    adapters.save(folder, Adapters(str(model), "bfloat16", CFG, drawn), "bfloat16")
    _, merged, _ = loading.load_pretrained(folder)
    _, base, _ = loading.load_pretrained(model)
    assert merged["embedding"].dtype == "float32"
    np.testing.assert_array_equal(merged["embedding"], base["embedding"].astype(jnp.bfloat16).astype(jnp.float32))


def test_what_is_wrong_with_adapters_is_said(model: Path, drawn, folder: Path) -> None:
    adapters.save(folder, Adapters(str(model), "float32", LoraConfig(3, 4.0, CFG.modules), drawn), "float32")
    with pytest.raises(LoadingError, match=r"attention/q/a has shape .* where .* has .*: .* of another model"):
        loading.load_pretrained(folder)
    adapters.save(folder, Adapters(str(folder / "gone"), "float32", CFG, drawn), "float32")
    with pytest.raises(LoadingError, match="gone: not found"):
        loading.load_pretrained(folder)
    (folder / adapters.FILE).write_bytes(b"{}")
    with pytest.raises(LoadingError, match="no adapters that agrl_jax.export wrote"):
        loading.load_pretrained(folder)


def test_a_folder_of_adapters_becomes_one_of_weights_with_its_record_and_temperature(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Their temperature has another name there: the fingerprint of the weights as they are written."""
    dtype, out, rules = "bfloat16", tmp_path_factory.mktemp("out") / "whole", book.load()
    (folder / "rulebook.yaml").write_bytes(book.file_of("four_tier").read_bytes())
    record = {"rulebook": "rulebook.yaml", "rulebook_digest": rules.digest, "order": rules.order, "style": "terse",
              "prompt_len": 48, "response_len": 48, "dtype": "float32", "compute_dtype": "float32"}  # fmt: skip
    write_json(folder / trained.RECORD_FILE, record)
    fitted = Calibration(2.5, "probabilities", 256, 0.9, 5.0, 0.58, 0.6)
    probabilities.keep(folder / probabilities.FILE, adapters.digest(folder), fitted, rules)
    assert export_model(str(folder), str(out), dtype).endswith("parameters in bfloat16")
    assert read_json(out / trained.RECORD_FILE, ValueError) == record | {"dtype": dtype}
    loaded = trained.load(str(out))
    assert loaded.params["embedding"].dtype == dtype
    assert probabilities.load(loaded.calibration_file, loaded.checkpoint, rules) == fitted


def test_what_is_no_export_of_ours_is_not_exported_again(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainedError, match="has no agrl_jax.json, so it is no export; a run goes by --workdir"):
        export_model(str(model), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_name_that_nothing_has_lists_those_in_the_box() -> None:
    with pytest.raises(TrainedError, match="runs/none: there is no such checkpoint, nor one in the box"):
        trained.load("runs/none")


# ------------------------------------------------------------------------------------------ the judge in the box


@pytest.mark.slow
def test_the_judge_in_the_box_judges_the_examples(tmp_path: Path) -> None:
    try:
        find_smollm2()
    except NotInstalledError as error:
        pytest.skip(str(error))
    with open(EXAMPLE, newline="") as file:
        rows = list(csv.DictReader(file))
    (name,) = shipped.boxed()
    judge = Judge.from_checkpoint(name, batch_size=8)
    judged = judge.judge(rows)
    assert not any(one.error for one in judged) and judge.calibration is not None
    grades = {tier.name: tier.grade for tier in judge.book.tiers}
    truth = [int(row["label"][0]) for row in rows]
    assert sum(grades[one.tier] == grade for one, grade in zip(judged, truth, strict=True)) >= len(rows) / 2
    for one, grade in zip(judged, truth, strict=True):  # the judge may be wrong, but not sure of the opposite
        assert abs(grades[one.tier] - grade) < 3 or max(one.probs.values()) < 0.9
    boots = {row["title"]: one for row, one in zip(rows, judged, strict=True) if "hiking boots" in row["query"]}
    assert boots["Stainless Steel Garlic Press"].tier == "1-Irrelevant"

    with pytest.raises(TrainedError, match="part of the package, where nothing is kept; export it first"):
        judge.fit_temperature(str(EXAMPLE))
    export_model(name, str(tmp_path / "mine"))
    theirs = Judge.from_checkpoint(str(tmp_path / "mine"), batch_size=8)
    assert theirs.calibration == judge.calibration
    assert [one.tier for one in theirs.judge(rows[:8])] == [one.tier for one in judged[:8]]


def test_the_package_holds_no_more_than_12_megabytes_of_adapters() -> None:
    for name in shipped.boxed():
        folder = shipped.find(name)
        assert (folder / adapters.FILE).stat().st_size <= 12e6
        assert json.loads((folder / trained.RECORD_FILE).read_text())["rulebook"] == "rulebook.yaml"
