"""Which tensor of a checkpoint is which parameter, for each family of models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from agrl_jax.policy.layers import PolicyConfig
from agrl_jax.policy.transformer import build

# `model_type` in config.json, and the class of `transformers` that loads it.
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class LoadingError(ValueError):
    """A model that cannot be loaded or saved; the message names the file and what in it is wrong."""


class _Tensor(NamedTuple):
    """A parameter of ours in Hugging Face's layout.

    `inputs` counts the leading axes of our weight (layer and expert aside) that are inputs of a projection. Hugging
    Face stores a projection as a matrix [outputs, inputs]. 0 stands for a vector over all heads, -1 for a tensor that
    is stored as ours is.
    """

    name: str
    inputs: int


_LAYER = "model.layers.{layer}."
_PLAIN = {
    ("embedding",): _Tensor(EMBEDDING, -1),
    ("final_norm",): _Tensor("model.norm.weight", -1),
    ("head",): _Tensor(HEAD, 1),
    ("blocks", "attention_norm"): _Tensor(_LAYER + "input_layernorm.weight", -1),
    ("blocks", "mlp_norm"): _Tensor(_LAYER + "post_attention_layernorm.weight", -1),
    ("blocks", "attention", "q"): _Tensor(_LAYER + "self_attn.q_proj.weight", 1),
    ("blocks", "attention", "k"): _Tensor(_LAYER + "self_attn.k_proj.weight", 1),
    ("blocks", "attention", "v"): _Tensor(_LAYER + "self_attn.v_proj.weight", 1),
    ("blocks", "attention", "out"): _Tensor(_LAYER + "self_attn.o_proj.weight", 2),
    ("blocks", "attention", "q_bias"): _Tensor(_LAYER + "self_attn.q_proj.bias", 0),
    ("blocks", "attention", "k_bias"): _Tensor(_LAYER + "self_attn.k_proj.bias", 0),
    ("blocks", "attention", "v_bias"): _Tensor(_LAYER + "self_attn.v_proj.bias", 0),
    ("blocks", "attention", "q_norm"): _Tensor(_LAYER + "self_attn.q_norm.weight", -1),
    ("blocks", "attention", "k_norm"): _Tensor(_LAYER + "self_attn.k_norm.weight", -1),
    ("blocks", "mlp", "gate"): _Tensor(_LAYER + "mlp.gate_proj.weight", 1),
    ("blocks", "mlp", "up"): _Tensor(_LAYER + "mlp.up_proj.weight", 1),
    ("blocks", "mlp", "down"): _Tensor(_LAYER + "mlp.down_proj.weight", 1),
}
_GEMMA3 = _PLAIN | {
    ("blocks", "attention_post_norm"): _Tensor(_LAYER + "post_attention_layernorm.weight", -1),
    ("blocks", "mlp_norm"): _Tensor(_LAYER + "pre_feedforward_layernorm.weight", -1),
    ("blocks", "mlp_post_norm"): _Tensor(_LAYER + "post_feedforward_layernorm.weight", -1),
}
_OLMO2 = _GEMMA3 | {
    ("blocks", "attention", "q_norm"): _Tensor(_LAYER + "self_attn.q_norm.weight", 0),
    ("blocks", "attention", "k_norm"): _Tensor(_LAYER + "self_attn.k_norm.weight", 0),
}
_EXPERT = _LAYER + "mlp.experts.{expert}."
_MIXTURE = _PLAIN | {
    ("blocks", "mlp", "router"): _Tensor(_LAYER + "mlp.gate.weight", 1),
    ("blocks", "mlp", "gate"): _Tensor(_EXPERT + "gate_proj.weight", 1),
    ("blocks", "mlp", "up"): _Tensor(_EXPERT + "up_proj.weight", 1),
    ("blocks", "mlp", "down"): _Tensor(_EXPERT + "down_proj.weight", 1),
}


# The fields that tell OLMo 2 and Gemma 3 from the others, which are Llama with biases, query/key norms, experts or
# unrotated layers.
_SWITCHES = ("norms", "qk_norm_whole", "norm_offset", "activation", "scaled_embedding")
_SWITCHED = {
    ("before", False, 0.0, "silu", False): None,
    ("after", True, 0.0, "silu", False): "olmo2",
    ("both", False, 1.0, "gelu_tanh", True): "gemma3_text",
}


class Leaf(NamedTuple):
    """A parameter of ours: where it stands, its shape, and the tensors that fill it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    inputs: int
    names: list[list[str]]  # [layer][expert]; one entry where the parameter has no such axis
    tensor_shape: tuple[int, ...]  # of each tensor


def leaves_of(cfg: PolicyConfig) -> list[Leaf]:
    """All parameters of a policy of this shape, with their tensors."""
    _, init, _ = build(cfg)
    by_norms = {"before": _PLAIN, "after": _OLMO2, "both": _GEMMA3}[cfg.norms]
    table = _MIXTURE if cfg.experts else by_norms
    leaves = []
    for keys, abstract in jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, jax.random.key(0))):
        path = tuple(key.key for key in keys)
        name, inputs = table[path]
        layers = cfg.layers if "{layer}" in name else 1
        experts = cfg.experts if "{expert}" in name else 1
        names = [[name.format(layer=i, expert=e) for e in range(experts)] for i in range(layers)]
        shape = abstract.shape[("{layer}" in name) + ("{expert}" in name) :]
        if inputs >= 0:
            sides = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
            shape = sides if inputs else sides[:1]
        leaves.append(Leaf(path, abstract.shape, inputs, names, shape))
    return leaves


class Entry(NamedTuple):
    """A tensor in a file, in Hugging Face's layout."""

    shape: tuple[int, ...]
    file: Path
    read: Callable[[slice], np.ndarray]  # reads some of its rows


def family_of(cfg: PolicyConfig) -> str:
    """The family that has layers of this shape ("llama" for Mistral's too). Raises LoadingError where none has."""
    if (switches := tuple(getattr(cfg, name) for name in _SWITCHES)) not in _SWITCHED:
        asked = ", ".join(f"{name}={value!r}" for name, value in zip(_SWITCHES, switches, strict=True))
        raise LoadingError(f"no family that can be exported has {asked} together")
    family = _SWITCHED[switches]
    if family != "gemma3_text" and (cfg.window or cfg.query_dim):
        raise LoadingError("no family that can be exported has a window or query_dim, other than Gemma 3")
    if family and (cfg.bias or cfg.experts or cfg.unrotated_every or cfg.qk_norm != (family == "gemma3_text")):
        raise LoadingError(
            f"{CLASSES[family]}, the family of this shape, has no biases, experts or unrotated layers, and norms of "
            f"each head's queries and keys only if Gemma 3"
        )
    if cfg.bias and cfg.qk_norm:
        raise LoadingError("no family that can be exported has both attention biases and query/key norms")
    if cfg.unrotated_every and (cfg.bias or cfg.qk_norm):
        raise LoadingError("no family that can be exported has unrotated layers with attention biases or norms")
    if cfg.experts and not cfg.qk_norm:
        raise LoadingError("no family that can be exported has experts without query/key norms")
    if cfg.qk_norm and not family:
        return "qwen3_moe" if cfg.experts else "qwen3"
    if not cfg.bias and cfg.width % cfg.heads:
        raise LoadingError(f"Llama or OLMo 2, whose shape this is, wants heads={cfg.heads} to divide width={cfg.width}")
    if family:
        return family
    if cfg.unrotated_every:
        return "smollm3"
    return "qwen2" if cfg.bias else "llama"
