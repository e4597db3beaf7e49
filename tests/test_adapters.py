"""Adapters in a folder of their own, and the judge in the box, which is such a folder."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pretrained import save_model

from agrl_jax.judging import trained
from agrl_jax.judging.trained import TrainedError
from agrl_jax.policy import adapters, loading, lora
from agrl_jax.policy.adapters import Adapters
from agrl_jax.policy.families import LoadingError
from agrl_jax.policy.lora import LoraConfig
from agrl_jax.policy.transformer import build

CFG = LoraConfig(rank=2, alpha=4.0, modules=("q", "down"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def drawn(model: Path):
    """Adapters that add something, rounded to what bfloat16 holds."""
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


def test_a_name_that_nothing_has_lists_those_in_the_box() -> None:
    with pytest.raises(TrainedError, match="runs/none: there is no such checkpoint, nor one in the box"):
        trained.load("runs/none")
