"""Tiny models of each family in Hugging Face's layout, the same on every machine, without PyTorch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from agrl_jax.policy.tokenizer import QWEN2_WORDS, Tokenizer, byte_level, train_bpe

_SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
_MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# Each family, tied and untied, and each rotary scaling, by the parts of a config.json that differ.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "rope_theta": 10_000.0},
    "llama_linear": {
        "model_type": "llama", "tie_word_embeddings": True, "head_dim": 16, "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "llama_llama3": {
        "model_type": "llama", "tie_word_embeddings": True, "head_dim": 16, "rope_theta": 500_000.0,
        "rope_scaling": {"rope_type": "llama3", **_LLAMA3},
    },
    "mistral": {
        "model_type": "mistral", "tie_word_embeddings": False, "head_dim": 16, "rope_theta": 1e6,
        "sliding_window": None,
    },
    "smollm3": {
        "model_type": "smollm3", "tie_word_embeddings": True, "rope_theta": 1e4, "no_rope_layer_interval": 2,
        "no_rope_layers": [1, 0], "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0,
    },
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False, "rope_theta": 5e5, "eos_token_id": 0},
    "gemma3": {
        "model_type": "gemma3_text", "tie_word_embeddings": True, "head_dim": 16, "query_pre_attn_scalar": 12,
        "sliding_window": 5, "sliding_window_pattern": 2, "rope_theta": 1e5, "rope_local_base_freq": 100.0,
        "hidden_activation": "gelu_pytorch_tanh", "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen2_yarn": {
        "model_type": "qwen2", "tie_word_embeddings": False, "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "yarn", **_YARN},
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16, "rope_theta": 1e6},
    "qwen3_yarn": {
        "model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
            "attention_factor": 1.25, **_YARN,
        },
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "tie_word_embeddings": False, "head_dim": 16, "norm_topk_prob": True, **_MIXTURE,
    },
    "qwen3_moe_tied": {
        "model_type": "qwen3_moe", "tie_word_embeddings": True, "head_dim": 8, "norm_topk_prob": False, **_MIXTURE,
    },
}  # fmt: skip


def tokenizer() -> Tokenizer:
    """A small vocabulary that cuts words as Qwen2's does, so that a model of any family can be exported with it."""
    small = train_bpe(["red shoes", "blue shoes, not leather", "Tier: 4-Excellent"], 280)
    core = tokenizers.Tokenizer.from_str(small._core.to_str())
    core.normalizer = tokenizers.normalizers.NFC()
    core.pre_tokenizer = byte_level(core.model, (QWEN2_WORDS,)).pre_tokenizer
    return Tokenizer(core, small.end_token)


def config(case: str, vocab_size: int) -> dict[str, Any]:
    """The config.json of a case."""
    return _SHAPE | {"vocab_size": vocab_size} | CASES[case]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that `transformers` asks for, written out by hand."""
    d, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    f, family = config.get("head_dim", d // heads), config["model_type"]
    tensors = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        inner = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (heads * f, d),
            "self_attn.k_proj.weight": (kv * f, d),
            "self_attn.v_proj.weight": (kv * f, d),
            "self_attn.o_proj.weight": (d, heads * f),
        }
        if family == "qwen2":
            inner |= {f"self_attn.{p}_proj.bias": (n * f,) for p, n in (("q", heads), ("k", kv), ("v", kv))}
        if family == "olmo2":
            del inner["input_layernorm.weight"]
            inner |= {"post_feedforward_layernorm.weight": (d,)}
            inner |= {"self_attn.q_norm.weight": (heads * f,), "self_attn.k_norm.weight": (kv * f,)}
        if family == "gemma3_text":
            inner |= {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
        if family.startswith(("qwen3", "gemma3")):
            inner |= {"self_attn.q_norm.weight": (f,), "self_attn.k_norm.weight": (f,)}
        experts = [f"experts.{e}." for e in range(config["num_experts"])] if family == "qwen3_moe" else [""]
        m = config["moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"]
        for expert in experts:
            inner |= {f"mlp.{expert}{p}_proj.weight": (m, d) for p in ("gate", "up")}
            inner[f"mlp.{expert}down_proj.weight"] = (d, m)
        if family == "qwen3_moe":
            inner["mlp.gate.weight"] = (config["num_experts"], d)
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in inner.items()}
    return tensors


def weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arbitrary weights, large enough that attention and routing are far from uniform."""
    tensors = {}
    for index, (name, shape) in enumerate(sorted(shapes(config).items())):
        noise = _uniform(index, int(np.prod(shape))).reshape(shape)
        if name.endswith("norm.weight"):
            tensors[name] = (1 + 0.3 * noise).astype(np.float32)
        else:
            scale = 1.0 if len(shape) == 1 or "embed" in name else 2.0 * shape[-1] ** -0.5
            tensors[name] = (scale * noise).astype(np.float32)
    return tensors


def chat_tokenizer(texts: Sequence[str], vocab_size: int, template: str) -> Tokenizer:
    """A vocabulary with a chat template and tokens that begin and end turns. As in base models, `<|end|>` ends texts
    and responses."""
    with tempfile.TemporaryDirectory() as folder:
        train_bpe(texts, vocab_size).save(folder)
        core = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(core, core.token_to_id("<|end|>"), chat_template=template)


def write(folder: Path, case: str, words: Tokenizer | None = None, padding: int = 0) -> dict[str, np.ndarray]:
    """Writes a case as a Hugging Face folder, with `padding` unused rows in its embedding; returns its tensors."""
    words = words or tokenizer()
    words.save(folder)
    content = config(case, words.vocab_size + padding)
    (folder / "config.json").write_text(json.dumps(content))
    tensors = weights(content)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def tokens(case: str, rows: int, length: int, vocab_size: int) -> np.ndarray:
    """[rows, length] int32, arbitrary."""
    noise = _uniform(1000 + len(case), rows * length).reshape(rows, length)
    return ((noise + 1) / 2 * vocab_size).astype(np.int32)


def _uniform(seed: int, size: int) -> np.ndarray:
    """float64 in [-1, 1): the splitmix64 generator (doi 10.1145/2714064.2660195), exact on every machine."""
    with np.errstate(over="ignore"):
        x = (np.arange(1, size + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x.astype(np.float64) / 2.0**63 - 1.0
