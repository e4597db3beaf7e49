"""Low-rank adapters: what they add to a policy, what is trained and kept, and what is exported."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from ml_collections import ConfigDict
from test_pretrained import make_config, run, save_model, small_benchmark  # noqa: F401 (a fixture for this module too)
from tiny import get_config

from agrl_jax.judging import cuts, export, trained
from agrl_jax.policy import decoding, loading, lora
from agrl_jax.policy.layers import PolicyConfig
from agrl_jax.policy.lora import LoraConfig
from agrl_jax.policy.transformer import build, count_parameters
from agrl_jax.runtime import optim, sharding
from agrl_jax.runtime.config import ConfigError, validate_together
from agrl_jax.runtime.logs import read_jsonl
from agrl_jax.training import assemble, programs

pytestmark = pytest.mark.usefixtures("scanned")

SHAPE = PolicyConfig(vocab_size=23, width=20, layers=3, heads=4, kv_heads=2, head_dim=6, mlp=28, bias=True)
ALL = LoraConfig(rank=3, alpha=6.0, modules=lora.MODULES)
KEY = jax.random.key(0)


def drawn(cfg: LoraConfig, zero: bool = False):
    """Policy, base and adapters. The adapters add something, unless `zero`."""
    policy, init, axes = build(SHAPE)
    base = init(KEY)
    adapters = lora.init(KEY, base, axes, cfg)
    return policy, base, adapters if zero else jax.tree.map(lambda x: x + 0.1, adapters)


def logits(policy, params):
    tokens = np.arange(8, dtype=np.int32).reshape(2, 1, 4)
    return policy.unembed(params, policy.apply(params, tokens)[0])


def test_fresh_adapters_change_nothing_bit_for_bit():
    policy, base, adapters = drawn(ALL, zero=True)
    np.testing.assert_array_equal(logits(policy, lora.attach(base, adapters, ALL)), logits(policy, base))
    assert lora.attach(base, {}, ALL) == base


@pytest.mark.parametrize("modules", [lora.MODULES, ("q", "v"), ("out", "down")])
def test_attached_merged_and_over_the_base_are_one_policy(modules):
    cfg = dataclasses.replace(ALL, modules=modules)
    policy, base, adapters = drawn(cfg)
    merged = lora.merge(base, adapters, cfg, "float32")
    assert np.abs(logits(policy, merged) - logits(policy, base)).max() > 0.05
    np.testing.assert_allclose(logits(policy, lora.attach(base, adapters, cfg)), logits(policy, merged), atol=1e-4)
    np.testing.assert_allclose(logits(lora.over(base, policy, cfg), adapters), logits(policy, merged), atol=1e-4)
    for name in lora.MODULES:
        group = "attention" if name in ("q", "k", "v", "out") else "mlp"
        same = np.array_equal(merged["blocks"][group][name], base["blocks"][group][name])
        assert same == (name not in modules)


def test_the_product_is_scaled_by_alpha_over_rank_by_hand():
    cfg = LoraConfig(rank=2, alpha=3.0, modules=("up",))
    base = {"up": jnp.ones((1, 2, 2), jnp.bfloat16), "norm": jnp.ones(2, jnp.bfloat16)}
    adapters = {"up": {"a": jnp.array([[[1.0, 0], [0, 2]]]), "b": jnp.array([[[1.0, 2], [3, 4]]])}}
    for dtype in ("bfloat16", "float32"):
        merged = lora.merge(base, adapters, cfg, dtype)
        assert {x.dtype for x in merged.values()} == {jnp.dtype(dtype)}
        # 1 + 3 / 2 * [[1, 2], [6, 8]]
        np.testing.assert_array_equal(merged["up"].astype(jnp.float32), [[[2.5, 4], [10, 13]]])


def test_products_too_small_for_the_base_s_dtype_are_kept_in_float32():
    cfg = LoraConfig(rank=1, alpha=1.0, modules=("up",))
    base = {"up": jnp.ones((1, 1, 1), jnp.bfloat16)}
    adapters = {"up": {"a": jnp.full((1, 1, 1), 2.0**-10), "b": jnp.ones((1, 1, 1))}}
    assert lora.merge(base, adapters, cfg, "float32")["up"].item() == 1 + 2.0**-10
    assert lora.merge(base, adapters, cfg, "bfloat16")["up"].item() == 1


def test_adapters_kept_in_bfloat16_are_multiplied_in_float32():
    cfg = LoraConfig(1, 1.0, ("up",))
    adapters = {"up": {name: jnp.full((1, 1, 1), 1 + 2.0**-7, jnp.bfloat16) for name in ("a", "b")}}
    merged = lora.merge({"up": jnp.zeros((1, 1, 1))}, adapters, cfg, "float32")
    assert merged["up"].item() == (1 + 2.0**-7) ** 2  # which bfloat16 cannot hold


def test_sizes_axes_and_decay_of_adapters():
    _, init, axes = build(SHAPE)
    shapes = jax.eval_shape(init, KEY)
    adapters = jax.eval_shape(lambda: lora.init(KEY, shapes, axes, ALL))
    names = lora.adapter_axes(axes, ALL)
    attention = (20 + 24) + 2 * (20 + 12) + (24 + 20)  # inputs and outputs of q, of k and v, of out
    assert count_parameters(adapters) == 3 * 3 * (attention + 3 * (20 + 28))
    assert adapters["blocks"]["attention"]["out"]["a"].shape == (3, 4, 6, 3)
    assert names["blocks"]["attention"]["out"] == {
        "a": ("layers", "heads", "head_dim", "rank"), "b": ("layers", "rank", "embed")
    }
    assert jax.tree.structure(adapters) == jax.tree.structure(names, is_leaf=lambda x: isinstance(x, tuple))
    sharding.param_shardings(sharding.make_mesh(), names, adapters)  # every axis has a rule
    assert all(jax.tree.leaves(optim.decay_mask(names)))


def test_modules_that_cannot_be_adapted_are_refused():
    with pytest.raises(ValueError, match="lora.modules: 'head' is not one of q, k"):
        LoraConfig(2, 2.0, ("q", "head"))


def test_each_expert_has_adapters_of_its_own():
    policy, init, axes = build(dataclasses.replace(SHAPE, layers=2, experts=3, experts_per_token=2))
    base = init(KEY)
    cfg = LoraConfig(2, 3.0, ("gate", "down"))
    adapters = jax.tree.map(lambda x: x + 0.1, lora.init(KEY, jax.eval_shape(init, KEY), axes, cfg))
    assert jax.tree.map(jnp.shape, adapters) == {"blocks": {"mlp": {
        "gate": {"a": (2, 3, 20, 2), "b": (2, 3, 2, 28)}, "down": {"a": (2, 3, 28, 2), "b": (2, 3, 2, 20)}
    }}}  # fmt: skip
    assert lora.adapter_axes(axes, cfg)["blocks"]["mlp"]["down"] == {
        "a": ("layers", "experts", "expert_mlp", "rank"), "b": ("layers", "experts", "rank", "embed")
    }
    merged = lora.merge(base, adapters, cfg, "float32")
    before, after = base["blocks"]["mlp"]["gate"][1, 2], merged["blocks"]["mlp"]["gate"][1, 2]
    pair = jax.tree.map(lambda x: np.asarray(x[1, 2]), adapters["blocks"]["mlp"]["gate"])
    np.testing.assert_allclose(after - before, 1.5 * pair["a"] @ pair["b"], atol=1e-6)
    run, attached = jax.jit(partial(logits, policy)), lora.attach(base, adapters, cfg)
    assert np.abs(run(merged) - run(base)).max() > 0.01
    for laid in (attached, decoding.for_decoding(attached, "cpu")):
        np.testing.assert_allclose(run(laid), run(merged), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "lora.stages=both without policy.pretrained"),
        ({"lora.stages": "rl"}, "rl.matrix_rate=0.004 with lora.rank=4: Muon is for whole matrices"),
        ({"policy.pretrained": "DIR", "rl.matrix_rate": 0.0}, "sft.matrix_rate=0.01 with lora.rank=4"),
        ({"lora.rank": 0, "lora.start": "DIR"}, "lora.start=DIR needs adapters in the warm start: set lora.rank"),
        ({"lora.rank": 0, "optim.kind": "adafactor"}, "sft.matrix_rate=0.01 with optim.kind=adafactor"),
        ({"lora.rank": 0, "optim.moments": "bfloat16", "optim.b2": 0.999}, "optim.b2=0.999 .* use at most 0.98"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields, said):
    config = get_config()
    config.lora.rank = 4
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=said):
        validate_together(config)


# ----------------------------------------------------------------------------------------------- whole runs



def params_of(config: ConfigDict, workdir: Path, stage: str):
    folder = epath.Path(workdir)
    return assemble.load_params(folder, config, assemble.load_model(config, folder), sharding.make_mesh(), stage)


@pytest.mark.slow
def test_adapters_alone_are_trained_kept_resumed_and_merged_on_export(tmp_path: Path) -> None:
    model, workdir = save_model(tmp_path / "model", "qwen3"), tmp_path / "run"
    config = make_config(model)
    config.lora.update(rank=2, modules="q, v,down")
    config.optim.update(moments="bfloat16", clip_norm=0.0)
    config.objective.update(kl="k3", kl_weight=0.01)
    config.sft.learning_rate = config.rl.learning_rate = 0.01
    config.rl.update(steps=1, matrix_rate=0.0)
    run(config, workdir)
    config.rl.steps = 2
    run(config, workdir)  # goes on after the first step
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2)]
    assert {row["compiles"] for row in rows} == {1}
    assert rows[2]["policy/kl"] < 1e-6 < rows[3]["policy/kl"]  # the reference is the start of RL

    kept = ocp.PyTreeCheckpointer().metadata(workdir.resolve() / "checkpoints" / "rl" / "2" / "state")
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(kept.item_metadata.tree)]
    weights = [path for path in paths if "blocks" in path or "embedding" in path]
    assert len(weights) == 3 * 6 and all(path.endswith(("['a']", "['b']")) for path in weights)  # and their moments

    _, base, _ = loading.load_pretrained(model)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), base)  # as below the adapters
    whole = params_of(config, workdir, "rl")
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), base["blocks"], whole["blocks"])
    assert [name for name, yes in changed["attention"].items() if yes] == ["q", "v"]
    assert [name for name, yes in changed["mlp"].items() if yes] == ["down"]

    export.export(str(workdir), str(tmp_path / "out"), "rl")
    assert "<|im_start|>user\nQuery: QUERY\nItem: TITLE" in (tmp_path / "out" / "README.md").read_text()
    _, exported, _ = loading.load_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, exported, whole)
    assert json.loads((tmp_path / "out" / trained.RECORD_FILE).read_text())["config"]["lora"]["rank"] == 2

    export.export(str(workdir), str(tmp_path / "small"), "rl", adapters_alone=True)
    assert (tmp_path / "small" / "adapters.safetensors").stat().st_size < 0.2 * (
        tmp_path / "out" / "model.safetensors"
    ).stat().st_size
    _, merged, _ = loading.load_pretrained(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, merged, whole)
    loaded, kept = trained.load(str(tmp_path / "small")), assemble.load_model(config, epath.Path(workdir)).tokenizer
    assert loaded.style == "chat" and loaded.tokenizer.end_tokens == kept.end_tokens
    assert kept.end_tokens != loading.read_tokenizer(model).end_tokens  # the base ends texts otherwise

    # Cut points belong to the adapters as they are kept, not as some machine merges them, and go along.
    judge, tiers = trained.load(str(workdir), "rl"), [tier.name for tier in loaded.book.tiers]
    kept_there = assemble.load_trained(epath.Path(workdir), config, assemble.load_model(config, epath.Path(workdir)),
                                       sharding.make_mesh(), "rl")  # fmt: skip
    assert judge.weights == f"{trained.fingerprint(kept_there)} in float32"
    cuts.save(judge.cuts_file, tiers, cuts.Fit((0.2, 0.4, 0.6), 0.9, 0.8), trained.identity(judge.book, judge.weights))
    export.export(str(workdir), str(tmp_path / "cut"), "rl")
    whole_judge = trained.load(str(tmp_path / "cut"))
    made_for = trained.identity(whole_judge.book, whole_judge.weights)
    assert cuts.load(whole_judge.cuts_file, tiers, made_for) == (0.2, 0.4, 0.6)

    config.lora.start = str(tmp_path / "small")  # another run goes on with them
    mesh, again = sharding.make_mesh(), assemble.load_model(config, epath.Path(workdir))
    program = programs.sft_program(config, mesh, again, assemble.load_base(config, again, mesh))
    trained_here = assemble.load_trained(epath.Path(workdir), config, again, mesh, "rl")
    jax.tree.map(np.testing.assert_array_equal, program.fresh().params, trained_here)
    config.lora.rank = 3
    with pytest.raises(ConfigError, match="lora.start=.*small: has lora.rank=2, the config 3"):
        assemble.first_adapters(config, again, mesh)


@pytest.mark.slow
def test_adapters_over_the_end_of_the_warm_start(tmp_path: Path) -> None:
    """The reference policy is then the base itself, and the checkpoint of the warm start holds all weights."""
    config = get_config()
    config.lora.update(rank=2, stages="rl")
    config.sft.update(steps=2)
    config.rl.update(steps=2, matrix_rate=0.0, learning_rate=0.01, minibatches=1)
    config.objective.update(kl="k3", kl_weight=0.01)
    config.eval.update(pairs=4, validation_pairs=4, pass_pairs=0, bootstrap=2)
    run(config, tmp_path)
    rl = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["stage"] == "rl"]
    assert rl[0]["policy/kl"] < 1e-6 < rl[1]["policy/kl"] and {row["compiles"] for row in rl} == {1}
    start, end = (params_of(config, tmp_path, stage) for stage in ("sft_end", "rl"))
    assert {x.dtype for x in jax.tree.leaves(end)} == {jnp.dtype("float32")}
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), start)
    assert jax.tree.structure(start) == jax.tree.structure(end)
    np.testing.assert_array_equal(start["embedding"], end["embedding"])
    assert not np.array_equal(start["blocks"]["mlp"]["up"], end["blocks"]["mlp"]["up"])
