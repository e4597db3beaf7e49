"""Models are loaded from files and written, without PyTorch; and bad files are refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import hf_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from agrl_jax.judging import trained
from agrl_jax.policy import families, huggingface, loading
from agrl_jax.policy import tokenizer as tokenizers
from agrl_jax.policy.families import LoadingError
from agrl_jax.policy.layers import PolicyConfig, RopeScaling
from agrl_jax.policy.transformer import build

Q = gguf.GGMLQuantizationType


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def edit(folder: Path, **changes) -> None:
    """Changes a config.json; None removes a key."""
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# ----------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("case", hf_models.CASES)
def test_what_was_loaded_is_written_back_tensor_by_tensor(case, tmp_path):
    original = hf_models.write(tmp_path / "in", case)
    cfg, params, tokenizer = loading.load_pretrained(tmp_path / "in")
    assert loading.read_config(tmp_path / "in") == cfg
    huggingface.save_pretrained(tmp_path / "out", cfg, params, tokenizer)
    equal(load_file(tmp_path / "out" / "model.safetensors"), original)
    again, reloaded, _ = loading.load_pretrained(tmp_path / "out")
    assert again == cfg
    equal(reloaded, params)


def test_the_shape_is_that_of_the_config(tmp_path):
    hf_models.write(tmp_path, "qwen3_yarn")
    assert loading.read_config(tmp_path, "bfloat16", "bfloat16") == PolicyConfig(
        vocab_size=280, width=32, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=48, tied=False, qk_norm=True,
        rope_theta=1e4, norm_eps=1e-5, param_dtype="bfloat16", compute_dtype="bfloat16", max_positions=4096,
        rope_scaling=RopeScaling(
            "yarn", factor=4.0, original=128, beta_fast=16.0, beta_slow=2.0, attention=1.25, truncate=False
        ),
    )  # fmt: skip


def test_yarn_scales_attention_as_its_paper_says_unless_told(tmp_path):
    hf_models.write(tmp_path, "qwen2_yarn")
    scaling = loading.read_config(tmp_path).rope_scaling
    assert (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32, 1, True)
    assert scaling.attention == pytest.approx(0.1 * np.log(4) + 1)
    edit(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0})
    scaling = loading.read_config(tmp_path).rope_scaling
    assert scaling.original == 4096
    assert scaling.attention == pytest.approx((0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1))


def test_what_a_config_leaves_out_is_the_familys_default(tmp_path):
    hf_models.write(tmp_path, "llama")
    edit(tmp_path, num_attention_heads=8, num_key_value_heads=None, tie_word_embeddings=None, rope_theta=None)
    plain = loading.read_config(tmp_path)
    assert (plain.kv_heads, plain.tied, plain.rope_theta, plain.unrotated_every) == (8, False, 1e4, 0)
    edit(tmp_path, model_type="smollm3")
    smollm3 = loading.read_config(tmp_path)
    assert (smollm3.kv_heads, smollm3.tied, smollm3.rope_theta, smollm3.unrotated_every) == (4, True, 2e6, 4)
    edit(tmp_path, no_rope_layers=[1, 1])
    assert loading.read_config(tmp_path).unrotated_every == 0
    edit(tmp_path, model_type="mistral", sliding_window=4096)  # as long as the longest sequence
    assert loading.read_config(tmp_path).kv_heads == 8


def test_shards_are_written_and_read(tmp_path):
    hf_models.write(tmp_path / "in", "qwen3_moe")
    cfg, params, tokenizer = loading.load_pretrained(tmp_path / "in")
    huggingface.save_pretrained(tmp_path / "out", cfg, params, tokenizer, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert all((tmp_path / "out" / file).stat().st_size < 70_000 for file in files)
    equal(loading.load_pretrained(tmp_path / "out")[1], params)


@pytest.mark.parametrize("stored_wanted", ["bfloat16 float32", "float32 bfloat16", "float16 float32"])
def test_parameters_take_the_dtype_asked_for(stored_wanted, tmp_path):
    stored, wanted = stored_wanted.split()
    tensors = hf_models.write(tmp_path, "qwen2")
    rounded = {name: x.astype(jnp.dtype(stored)) for name, x in tensors.items()}
    save_file(rounded, tmp_path / "model.safetensors")
    cfg, params, tokenizer = loading.load_pretrained(tmp_path, param_dtype=wanted, compute_dtype="bfloat16")
    assert (cfg.param_dtype, cfg.compute_dtype) == (wanted, "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    huggingface.save_pretrained(tmp_path / "out", cfg, params, tokenizer)
    equal(
        load_file(tmp_path / "out" / "model.safetensors"),
        {name: x.astype(jnp.dtype(wanted)) for name, x in rounded.items()},
    )


def test_a_policy_from_scratch_is_exported_as_qwen3(tmp_path):
    tokenizer = hf_models.tokenizer()
    cfg = PolicyConfig(tokenizer.vocab_size, width=24, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=40, qk_norm=True)
    params = build(cfg)[1](jax.random.key(0))
    huggingface.save_pretrained(
        tmp_path, cfg, params, tokenizer, card="# A judge\n", dtype="bfloat16",
        generation_config={"max_new_tokens": 24},
    )  # fmt: skip
    config, generation = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["torch_dtype"] == "bfloat16"
    assert generation == {"do_sample": False, "eos_token_id": 0, "pad_token_id": 0, "max_new_tokens": 24}
    assert (tmp_path / "README.md").read_text() == "# A judge\n"
    again, reloaded, words = loading.load_pretrained(tmp_path)
    assert again == cfg and words.encode("red shoes") == tokenizer.encode("red shoes")
    equal(reloaded, jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params))
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_an_export_keeps_all_end_tokens(tmp_path):
    hf_models.write(tmp_path / "in", "llama")
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": [7, 0, 9]}')
    huggingface.save_pretrained(tmp_path / "out", *loading.load_pretrained(tmp_path / "in"))
    for name in ("config", "generation_config"):
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["eos_token_id"] == [0, 7, 9]
    assert loading.read_tokenizer(tmp_path / "out").end_tokens == (0, 7, 9)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"bias": True, "qk_norm": True}, "both attention biases and query/key norms"),
        ({"norms": "after"}, "norms='after', qk_norm_whole=False, .* together"),
        ({"norms": "after", "qk_norm_whole": True, "bias": True}, "Olmo2ForCausalLM, .* has no biases"),
        ({"window": 4}, "window or query_dim, other than Gemma 3"),
        ({"unrotated_every": 2, "qk_norm": True}, "unrotated layers with attention biases or norms"),
        ({"experts": 4, "experts_per_token": 2}, "experts without query/key norms"),
        ({"width": 30}, "heads=4 to divide width=30"),
    ],
)
def test_shapes_of_no_family_are_not_exported(shape, message, tmp_path):
    cfg = PolicyConfig(**{"vocab_size": 280, "width": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8,
                          "mlp": 8, **shape})  # fmt: skip
    with pytest.raises(LoadingError, match=message):
        huggingface.save_pretrained(tmp_path / "out", cfg, {}, hf_models.tokenizer())
    assert not (tmp_path / "out").exists()


def test_an_export_never_mixes_with_files_that_are_there(tmp_path):
    hf_models.write(tmp_path, "llama")
    with pytest.raises(LoadingError, match="should be an empty folder"):
        huggingface.save_pretrained(tmp_path, *loading.load_pretrained(tmp_path))


# ------------------------------------------------------------------------------------------ refused


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path, **weight_map: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
BAD_FOLDERS = {
    "another family": (lambda f: edit(f, model_type="gpt2"), r"config.json: model_type is 'gpt2'; known are: llama, "),
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json: cannot be read"),
    "broken config": (lambda f: cut(f / "config.json", 30), r"config.json: not valid JSON"),
    "no width": (lambda f: edit(f, hidden_size=None), r"config.json: hidden_size is missing"),
    "width in words": (lambda f: edit(f, hidden_size="wide"), r"config.json: .*'wide'"),
    "heads that do not divide": (lambda f: edit(f, num_key_value_heads=3), r"config.json: .*kv_heads=3 must divide"),
    "another activation": (lambda f: edit(f, hidden_act="gelu"), r"hidden_act='gelu' is not supported, only 'silu'"),
    "biases": (lambda f: edit(f, attention_bias=True), r"attention_bias=True is not supported"),
    "quantised": (lambda f: edit(f, quantization_config={"bits": 4}), r"quantization_config=.* is not supported"),
    "a sliding window": (lambda f: edit(f, layer_types=["sliding_attention"] * 2), r"sliding window"),
    "Mistral's own sliding window": (
        lambda f: edit(f, model_type="mistral", max_position_embeddings=4097), r"sliding window"),
    "unrotated layers here and there": (
        lambda f: edit(f, model_type="smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 0, 1]),
        r"config.json: no_rope_layers=\[1, 0, 0, 1\] is not supported"),
    "a sliding window by flag": (lambda f: edit(f, use_sliding_window=True, max_window_layers=1), r"sliding window"),
    "rotary frequencies by length": (
        lambda f: edit(f, rope_scaling={"type": "dynamic", "factor": 2.0}), r"rope_type='dynamic' is not supported"),
    "a million layers": (
        lambda f: edit(f, num_hidden_layers=10**6), r"1000000 layers cannot be in the 21 tensors that are there"),
    "one more layer": (
        lambda f: edit(f, num_hidden_layers=3), r"tensor model\.layers\.2\.\S+ and 8 more is missing"),
    "a missing tensor": (lambda f: rewrite(f, lambda t: t.pop(K_PROJ)), rf"tensor {K_PROJ} is missing"),
    "an unexpected tensor": (
        lambda f: rewrite(f, lambda t: t.update({"model.extra": np.zeros(2, np.float32)})),
        r"model.safetensors: tensor model.extra is unexpected"),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({K_PROJ: t[K_PROJ][:-1]})),
        rf"model.safetensors: tensor {K_PROJ} has shape \(15, 32\), where \(16, 32\) is right"),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({K_PROJ: t[K_PROJ].astype(np.int8)})),
        rf"model.safetensors: tensor {K_PROJ} is I8; quantised weights"),
    "truncated": (lambda f: cut(f / "model.safetensors", 50_000), r"model.safetensors: missing, truncated or corrupt"),
    "empty": (lambda f: cut(f / "model.safetensors", 0), r"model.safetensors: missing, truncated or corrupt"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"neither model.safetensors nor"),
    "a pickle": (pickled, r"pytorch_model.bin: a pickle"),
    "a lost shard": (
        lambda f: shard(f, a="model-00001-of-00002.safetensors"), r"model-00001-of-00002.safetensors: missing, trunc"),
    "a shard elsewhere": (lambda f: shard(f, a="../model.safetensors"), r"'../model.safetensors' is not the name"),
    "a shard without its tensor": (
        lambda f: shard(f, ghost="model.safetensors"), r"model.safetensors: tensor ghost is missing, which .*index"),
    "a broken index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'), r"weight_map should name"),
    "fewer rows than tokens": (
        lambda f: (edit(f, vocab_size=270), None), r"the tokenizer has 280 tokens, but the embedding only 270 rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_message(name, tmp_path):
    spoil, message = BAD_FOLDERS[name]
    hf_models.write(tmp_path, "llama")
    spoil(tmp_path)
    with pytest.raises(LoadingError, match=message) as caught:
        loading.load_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_refused_by_name_before_they_are_opened(name, tmp_path):
    with pytest.raises(LoadingError, match=f"{name}: a pickle"):
        loading.load_pretrained(tmp_path / name)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LoadingError, match="nothing: not found"):
        loading.load_pretrained(tmp_path / "nothing")


def test_a_tied_head_and_old_rotary_buffers_may_be_stored(tmp_path):
    tensors = hf_models.write(tmp_path, "qwen2")
    expected = loading.load_pretrained(tmp_path)[1]
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    rewrite(tmp_path, lambda t: t.update(extra))
    equal(loading.load_pretrained(tmp_path)[1], expected)


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path):
    tensors = hf_models.write(tmp_path, "qwen2")
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": head}))
    with pytest.raises(LoadingError, match="lm_head.weight is another matrix .* set tie_word_embeddings to false"):
        loading.load_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=False)
    cfg, params, _ = loading.load_pretrained(tmp_path)
    assert not cfg.tied
    np.testing.assert_array_equal(params["head"], head.T)


def test_a_padding_token_past_the_embedding_does_no_harm(tmp_path):
    hf_models.write(tmp_path / "in", "qwen2")
    file = tmp_path / "in" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 280, "content": "[PAD]"})
    file.write_text(json.dumps(content))
    assert loading.read_tokenizer(tmp_path / "in").vocab_size == 280
    huggingface.save_pretrained(tmp_path / "out", *loading.load_pretrained(tmp_path / "in"))
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert max(exported(["red shoes", "red"], padding=True).input_ids[1]) < 280
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == exported.pad_token_id


def test_a_tokenizer_is_not_exported_where_transformers_would_cut_other_words(tmp_path):
    """For a Qwen2 model, version 5 of `transformers` takes only the vocabulary from tokenizer.json."""
    cfg, params, qwen2 = loading_of("qwen2", tmp_path / "in")
    text = "Item: shoe 12\n\n don't"
    other = tokenizers.train_bpe([text] * 3, 280)
    assert not other.cuts_as_qwen2 and qwen2.cuts_as_qwen2
    with pytest.raises(LoadingError, match="Qwen2's words .*policy.bias=False"):
        huggingface.save_pretrained(tmp_path / "out", cfg, params, other)
    assert not (tmp_path / "out").exists()
    for case, words in (("qwen2", qwen2), ("qwen3", other), ("llama", other)):
        cfg, params, _ = loading_of(case, tmp_path / f"{case}_in")
        huggingface.save_pretrained(tmp_path / case, cfg, params, words)
        assert AutoTokenizer.from_pretrained(tmp_path / case)(text).input_ids == words.encode(text)


def loading_of(case: str, folder: Path):
    hf_models.write(folder, case)
    return loading.load_pretrained(folder)


def test_spoilt_bytes_never_end_in_another_error(tmp_path):
    """Each byte of a header is changed in turn: the file is refused in one message, or loaded."""
    hf_models.write(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in [*range(8), *rng.integers(8, 1500, 60)]:
        spoilt = bytearray(whole)
        spoilt[position] ^= int(rng.integers(1, 256))
        file.write_bytes(spoilt)
        try:
            loading._check(tmp_path, *loading_parts(tmp_path))
        except LoadingError:
            refused += 1
    assert refused > 50


def loading_parts(folder: Path):
    cfg, tensors = loading._open(folder, "float32", "float32")
    return cfg, families.leaves_of(cfg), tensors


# --------------------------------------------------------------------------------------------- GGUF

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """The name of a tensor in llama.cpp; the experts of a layer share a name."""
    *layer, stem, kind = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
    expert = re.fullmatch(r"mlp\.experts\.\d+\.(\w+)_proj", stem)
    short = f"ffn_{expert[1]}_exps" if expert else GGUF_NAMES[stem]
    return f"blk.{layer[0]}.{short}.{kind}" if layer[0] else f"{short}.{kind}"


def gguf_tensors(config: dict) -> dict[str, np.ndarray]:
    """The weights of a case, as llama.cpp's converter names, stacks and (for Llama) reorders them."""
    grouped: dict[str, list[np.ndarray]] = {}
    for name, weight in hf_models.weights(config).items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if config["model_type"] == "llama" and heads:
            h = config[heads]
            weight = weight.reshape(h, 2, len(weight) // h // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        grouped.setdefault(gguf_name(name), []).append(weight)
    return {name: np.stack(parts) if "_exps" in name else parts[0] for name, parts in grouped.items()}


def write_gguf(path: Path, config: dict, tensors: dict, kinds: dict | None = None, extra=lambda writer: None) -> None:
    """Writes tensors (uint8: blocks of the kind given) with the metadata that llama.cpp's converter writes."""
    arch = config["model_type"].replace("_", "")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 1e4))
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    extra(writer)
    core = json.loads(hf_models.tokenizer()._parsing.to_str())
    vocabulary = sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token == tokenizers.END else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    writer.add_eos_token_id(0)
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_gguf_files_load_as_the_folders_they_were_made_from(case, tmp_path):
    hf_models.write(tmp_path, case)
    config = hf_models.config(case, 280)
    write_gguf(tmp_path / "model.gguf", config, gguf_tensors(config))
    cfg, params, tokenizer = loading.load_pretrained(tmp_path / "model.gguf")
    expected_cfg, expected, _ = loading.load_pretrained(tmp_path)
    assert cfg == expected_cfg
    assert loading.read_config(tmp_path / "model.gguf") == cfg
    equal(params, expected)
    assert tokenizer.vocab_size == 280


def test_a_split_gguf_file_is_read_whole_and_fetched_whole_from_a_bucket(tmp_path, bucket):
    """Files as of `llama-gguf-split`: all metadata is in the first file, and each has some of the tensors."""
    config = hf_models.config("llama", 280)
    tensors = list(gguf_tensors(config).items())
    write_gguf(tmp_path / "whole.gguf", config, dict(tensors))
    names = [f"model-{part:05d}-of-00003.gguf" for part in (1, 2, 3)]

    def part(number: int):
        def keys(writer: gguf.GGUFWriter) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 3)

        return keys

    write_gguf(tmp_path / names[0], config, dict(tensors[:5]), extra=part(0))
    with pytest.raises(LoadingError, match=rf"the first of 3 files of a split model; {names[1]} is not beside it"):
        loading.load_pretrained(tmp_path / names[0])
    for number in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / names[number], "llama")
        part(number)(writer)
        for name, data in tensors[5 * number : 5 * number + 5 if number == 1 else None]:
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    equal(loading.load_pretrained(tmp_path / names[0])[1], loading.load_pretrained(tmp_path / "whole.gguf")[1])
    there = epath.Path(f"{bucket}/models")
    there.mkdir()
    for name in names:
        (there / name).write_bytes((tmp_path / name).read_bytes())
    with trained._local(there / names[0]) as local:
        equal(loading.load_pretrained(local)[1], loading.load_pretrained(tmp_path / "whole.gguf")[1])
    for read in (loading.load_pretrained, loading.read_tokenizer):
        with pytest.raises(LoadingError, match=rf"{names[1]}: file 2 of 3 .* name the first, {names[0]}"):
            read(tmp_path / names[1])


def random_blocks(kind: Q, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random blocks of bytes below 0x3c: wherever their scales are in a block, these are finite and below 1."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 0x3C, gguf.quant_shape_to_byte_shape(shape, kind), dtype=np.uint8)


KINDS = [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_quantised_tensors_are_dequantised_exactly(kind, tmp_path):
    """Bit for bit as by the `gguf` package; the rows of q and k are in their own order again."""
    config = hf_models.config("llama", 280) | {
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    tensors, kinds = gguf_tensors(config), {}
    for i, (name, weight) in enumerate(tensors.items()):
        if weight.ndim > 1:
            tensors[name], kinds[name] = random_blocks(kind, weight.shape, i), kind
    write_gguf(tmp_path / "model.gguf", config, tensors, kinds)
    cfg, params, tokenizer = loading.load_pretrained(tmp_path / "model.gguf")
    huggingface.save_pretrained(tmp_path / "out", cfg, params, tokenizer)

    names = {gguf_name: name for name, gguf_name in GGUF_NAMES.items()}
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as exported:
        for name, kind in kinds.items():
            stem = names[name.removesuffix(".weight").split(".")[-1]]
            weight = gguf.quants.dequantize(tensors[name], kind)
            if stem.endswith(("q_proj", "k_proj")):  # heads of 64 rows: evens, then odds
                heads = range(0, len(weight), 64)
                weight = np.concatenate([weight[head + half : head + 64 : 2] for head in heads for half in (0, 1)])
            full = f"model.layers.0.{stem}.weight" if name.startswith("blk") else f"{stem}.weight"
            np.testing.assert_array_equal(exported.get_tensor(full), weight, err_msg=name)


def test_llama3_frequencies_are_recognised_in_gguf(tmp_path):
    """llama.cpp stores only the divisors; these are Llama 3.2's, computed for this head."""
    config = hf_models.config("llama_llama3", 280)
    frequency = 500_000.0 ** (-np.arange(8) / 8)
    wavelength = 2 * np.pi / frequency
    smooth = (8192 / wavelength - 1) / 3
    divisors = np.where(wavelength < 2048, 1, np.where(wavelength > 8192, 32, 1 / ((1 - smooth) / 32 + smooth)))
    tensors = gguf_tensors(config) | {"rope_freqs.weight": divisors.astype(np.float32)}
    write_gguf(tmp_path / "model.gguf", config, tensors)
    scaling = loading.read_config(tmp_path / "model.gguf").rope_scaling
    assert scaling == RopeScaling("llama3", factor=32.0, original=8192, low_freq=1.0, high_freq=4.0)
    write_gguf(tmp_path / "odd.gguf", config, tensors | {"rope_freqs.weight": np.linspace(1, 5, 8, dtype=np.float32)})
    with pytest.raises(LoadingError, match="odd.gguf: tensor rope_freqs.weight holds divisors other than"):
        loading.read_config(tmp_path / "odd.gguf")


def test_yarn_is_read_from_gguf(tmp_path):
    config = hf_models.config("qwen2", 280)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    write_gguf(tmp_path / "model.gguf", config, gguf_tensors(config), extra=yarn)
    assert loading.read_config(tmp_path / "model.gguf").rope_scaling == RopeScaling(
        "yarn", factor=4.0, original=128, attention=pytest.approx(0.1 * np.log(4) + 1)
    )


def test_bad_gguf_files_are_refused_in_one_message(tmp_path):
    config = hf_models.config("llama", 280)
    tensors = gguf_tensors(config)
    path = tmp_path / "model.gguf"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            loading.load_pretrained(path)
        assert str(path) in str(caught.value)

    write_gguf(path, config | {"model_type": "gemma"}, tensors)
    refused("general.architecture is 'gemma'; known are: llama, qwen2, qwen3, qwen3moe")
    write_gguf(path, config, {k: v for k, v in tensors.items() if k != "blk.1.attn_k.weight"})
    refused(rf"tensor {K_PROJ} is missing")
    write_gguf(path, config, {k: v for k, v in tensors.items() if k != "token_embd.weight"})
    refused("tensor token_embd.weight is missing")
    write_gguf(path, config, tensors | {"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    refused("tensor model.layers.0.self_attn.q_proj.bias is unexpected")
    write_gguf(path, config, tensors)
    whole = path.read_bytes()
    for size in (0, 3, 20, 500, 5_000, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        refused("truncated|GGUF")


# -------------------------------------------------------------------------------- where it all lands

SHARDED = """
import sys
from functools import partial
import jax, numpy as np
from jax.sharding import PartitionSpec as P
import hf_models, tempfile
from pathlib import Path
from agrl_jax.policy import huggingface, loading
from agrl_jax.policy.transformer import build
from agrl_jax.runtime import sharding

assert jax.device_count() == 8
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
for case in ("llama", "qwen3_moe"):
    with tempfile.TemporaryDirectory() as folder:
        hf_models.write(Path(folder), case)
        cfg, whole, _ = loading.load_pretrained(folder)
        _, params, tokenizer = loading.load_pretrained(folder, shardings=partial(sharding.param_shardings, mesh))
        huggingface.save_pretrained(Path(folder) / "out", cfg, params, tokenizer)
        jax.tree.map(np.testing.assert_array_equal, loading.load_pretrained(Path(folder) / "out")[1], whole)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert params["embedding"].sharding.spec == P("tensor", "fsdp")
    expected = P(None, "tensor", "fsdp", None) if cfg.experts else P(None, "fsdp", "tensor")
    assert params["blocks"]["mlp"]["gate"].sharding.spec == expected
    policy, _, _ = build(cfg)
    tokens = hf_models.tokens(case, 4, 20, cfg.vocab_size)[:, None]
    loss = lambda params, tokens: policy.unembed(params, policy.apply(params, tokens)[0]).var()
    run = jax.jit(jax.value_and_grad(loss))
    one, eight = run(whole, tokens), run(params, jax.device_put(tokens, sharding.batch_sharding(mesh)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a), (a.shape, a, b)
"""


def run_python(source: str, *args: str, **environment: str) -> str:
    """Runs a program in a process of its own, on the CPU, and returns its output."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths} | environment
    done = subprocess.run([sys.executable, "-c", source, *args], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_sharded_parameters_are_the_same_and_give_the_same_loss_and_gradients():
    run_python(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=8")


MEMORY = """
import sys
from agrl_jax.policy import loading
from agrl_jax.policy.transformer import count_parameters

def memory(what):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

small, large, dtype = sys.argv[1:]
loading.load_pretrained(small, param_dtype=dtype)  # so that libraries and compilers are not counted
before = memory("VmRSS")
_, params, _ = loading.load_pretrained(large, param_dtype=dtype)
print((memory("VmHWM") - before) / (count_parameters(params) * params["embedding"].dtype.itemsize))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("stored", ["safetensors", "gguf"])
def test_loading_takes_little_more_memory_than_the_parameters(stored, tmp_path):
    """With 100 million parameters on the CPU, where host memory holds them too: at most 1.3 times their size."""
    config = hf_models.config("llama", 32_000) | {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8,
    }  # fmt: skip
    folder = tmp_path / "large"
    hf_models.write(tmp_path / "small", "llama")
    hf_models.tokenizer().save(folder)
    shapes = hf_models.shapes(config)
    if stored == "gguf":
        kinds = {gguf_name(name): Q.Q8_0 if len(shape) > 1 else Q.F32 for name, shape in shapes.items()}
        tensors = {
            gguf_name(name): np.zeros(gguf.quant_shape_to_byte_shape(shape, kinds[gguf_name(name)]), np.uint8)
            for name, shape in shapes.items()
        }
        path = tmp_path / "large.gguf"
        write_gguf(path, config, tensors, kinds)
    else:
        (folder / "config.json").write_text(json.dumps(config))
        zeros = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
        save_file(zeros, folder / "model.safetensors")
        path = folder
    ratio = float(run_python(MEMORY, str(tmp_path / "small"), str(path), "float32"))
    assert 0.95 < ratio < 1.3
