"""Hugging Face folders, read and written.

    hf_config          config.json -> the shape
    open_safetensors   the tensors, each read when it is asked for
    save_pretrained    a folder that `transformers`, and so vLLM or SGLang, load as it is
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agrl_jax.policy.families import CLASSES, CONFIG, INDEX, WEIGHTS, Entry, Leaf, LoadingError, family_of, leaves_of
from agrl_jax.policy.layers import PolicyConfig, RopeScaling
from agrl_jax.policy.tokenizer import Tokenizer
from agrl_jax.runtime.files import read_json, write_json
from agrl_jax.types import Params

# Defaults of a family that differ from those of most families. A config.json may leave them out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "olmo2": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "gemma3_text": {
        "head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 6, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072,
    },
    "qwen3": {"head_dim": 128},
    "smollm3": {
        "num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4,
    },
}  # fmt: skip

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE = "a pickle, which can run any code when it is read; bring the model as safetensors or GGUF"


# ------------------------------------------------------------------------------------------------ read


def hf_config(file: Path, param_dtype: str, compute_dtype: str) -> PolicyConfig:
    """The shape that a config.json describes. Raises LoadingError for what this transformer does not compute."""
    raw = read_json(file, LoadingError)
    family = raw.get("model_type")
    if family not in CLASSES:
        raise LoadingError(f"{file}: model_type is {family!r}; known are: {', '.join(CLASSES)}")
    raw = _DEFAULTS.get(family, {}) | raw
    _refuse_unknown_layers(file, family, raw)
    mixture, gemma = family == "qwen3_moe", family == "gemma3_text"
    try:
        width, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        return PolicyConfig(
            vocab_size=int(raw["vocab_size"]),
            width=width,
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or width // heads),
            mlp=int(raw["moe_intermediate_size" if mixture else "intermediate_size"]),
            tied=bool(raw.get("tie_word_embeddings", False)),
            norms={"olmo2": "after", "gemma3_text": "both"}.get(family, "before"),
            qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
            qk_norm_whole=family == "olmo2",
            bias=family == "qwen2",
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            max_positions=int(raw["max_position_embeddings"]),
            experts=int(raw.get("num_local_experts") or raw["num_experts"]) if mixture else 0,
            experts_per_token=int(raw["num_experts_per_tok"]) if mixture else 0,
            renormalise_experts=bool(raw.get("norm_topk_prob", False)) if mixture else True,
            unrotated_every=_unrotated_every(raw) if family == "smollm3" else 0,
            **(_gemma3(raw) if gemma else hf_rope(raw)),
        )
    except KeyError as error:
        raise LoadingError(f"{file}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise LoadingError(f"{file}: {error}") from error


def _refuse_unknown_layers(file: Path, family: str, raw: Mapping[str, Any]) -> None:
    """Raises LoadingError for settings of the family's layers that this transformer does not compute."""
    gemma = family == "gemma3_text"
    fixed = {
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
        "final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False,
        "mlp_bias": False, "quantization_config": None, "partial_rotary_factor": 1.0,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    } | ({} if family == "qwen2" else {"attention_bias": False})  # fmt: skip
    for key, right in fixed.items():
        if raw.get(key) not in (None, right):
            raise LoadingError(f"{file}: {key}={raw[key]!r} is not supported, only {right!r}")
    if gemma:
        return
    window = raw.get("sliding_window") if family == "mistral" else None
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()) or (
        raw.get("use_sliding_window") and raw.get("max_window_layers", 0) < raw.get("num_hidden_layers", 0)
    ) or (window is not None and window < raw.get("max_position_embeddings", 0)):
        raise LoadingError(f"{file}: layers with a sliding window are not supported")


def _unrotated_every(raw: Mapping[str, Any]) -> int:
    """`unrotated_every` of a PolicyConfig, from `no_rope_layers` (1: rotated) or, without it, from the interval."""
    every, rotated = raw["no_rope_layer_interval"], raw.get("no_rope_layers")
    if rotated is None:
        return int(every)
    if all(rotated):
        return 0
    every = rotated.index(0) + 1
    if rotated != [int((layer + 1) % every != 0) for layer in range(len(rotated))]:
        raise ValueError(f"no_rope_layers={rotated!r} is not supported, only a 0 at regular intervals")
    return every


def _gemma3(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3's own fields of a PolicyConfig, from either generation of config.json."""
    layers = int(raw["num_hidden_layers"])
    every = int(raw["sliding_window_pattern"])
    kinds = raw.get("layer_types") or _layer_types(layers, every)
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    alone = set(kinds) == {"full_attention"}
    if not alone and kinds != _layer_types(layers, every):
        raise ValueError(f"layer_types={kinds!r} is not supported, only full_attention at regular intervals")
    ropes = raw.get("rope_parameters") or {}
    local = ropes.get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={local['rope_type']!r} of layers with a sliding window is not supported")
    return {
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "scaled_embedding": True,
        "query_dim": int(raw["query_pre_attn_scalar"]),
        "window": 0 if alone else int(raw["sliding_window"]),
        "global_every": 0 if alone else every,
        "local_rope_theta": float(local.get("rope_theta") or raw["rope_local_base_freq"]),
        **hf_rope({**raw, "rope_parameters": ropes.get("full_attention")}),
    }


def _layer_types(layers: int, every: int) -> list[str]:
    """The kind of each layer: every `every`-th layer sees all tokens; with 0, none does."""
    return ["full_attention" if every and (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]


def hf_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a PolicyConfig, from either generation of config.json."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ("linear", "llama3", "yarn"):
        # `dynamic` and `longrope` turn by the longest sequence at hand: a response's probability would
        # depend on its neighbours in the batch.
        raise ValueError(f"rope_type={kind!r} is not supported, only default, linear, llama3 and yarn")
    original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    scaling = RopeScaling(
        kind,
        factor=float(rope["factor"]),
        original=0 if kind == "linear" else int(original or raw["max_position_embeddings"]),
    )
    if kind == "llama3":
        scaling = dataclasses.replace(
            scaling, low_freq=float(rope["low_freq_factor"]), high_freq=float(rope["high_freq_factor"])
        )
    if kind == "yarn":
        scaling = dataclasses.replace(
            scaling,
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            attention=_yarn_attention(rope),
            truncate=rope.get("truncate", True),
        )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _yarn_attention(rope: Mapping[str, Any]) -> float:
    """The factor on queries and keys: as given, or a ratio of two scales, or the paper's 0.1 ln(factor) + 1."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def strength(weight: float) -> float:
        return 0.1 * weight * math.log(max(rope["factor"], 1.0)) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return strength(rope["mscale"]) / strength(rope["mscale_all_dim"])
    return strength(1.0)


def open_safetensors(folder: Path) -> dict[str, Entry]:
    """The tensors of a folder, in one file or in the shards that its index names."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, LoadingError).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise LoadingError(f"{folder / INDEX}: weight_map should name the file of each tensor")
        files = sorted(set(index.values()))
        if strays := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
            raise LoadingError(f"{folder / INDEX}: {strays[0]!r} is not the name of a safetensors file in its folder")
    elif (folder / WEIGHTS).exists():
        index, files = {}, [WEIGHTS]
    elif pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
        raise LoadingError(f"{folder / pickles[0]}: {PICKLE}")
    else:
        raise LoadingError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there")
    tensors = {}
    for file in files:
        tensors |= _open_shard(folder / file)
    if lost := [name for name, file in index.items() if name not in tensors or tensors[name].file.name != file]:
        raise LoadingError(f"{folder / index[lost[0]]}: tensor {lost[0]} is missing, which {INDEX} says it holds")
    return tensors


def _open_shard(file: Path) -> dict[str, Entry]:
    try:
        handle = safe_open(file, framework="np", backend="pread")  # reads: pages of a mapped file count as memory
        tensors = {}
        for name in handle.keys():
            view = handle.get_slice(name)
            if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise LoadingError(
                    f"{file}: tensor {name} is {view.get_dtype()}; quantised weights are read from GGUF files only"
                )
            tensors[name] = Entry(tuple(view.get_shape()), file, view.__getitem__)
        return tensors
    except (OSError, SafetensorError) as error:
        raise LoadingError(f"{file}: missing, truncated or corrupt: {error}") from error


# --------------------------------------------------------------------------------------------- written


def check_empty(folder: Path) -> None:
    """Raises LoadingError unless the folder is empty or does not exist."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoadingError(f"{folder}: should be an empty folder, so that no file of another model stays in it")


def save_pretrained(
    folder: str | Path,
    cfg: PolicyConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    generation_config: Mapping[str, Any] | None = None,
    card: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 4 * 10**9,
) -> None:
    """Writes a model as Hugging Face lays it out, one shard in memory at a time.

    Args:
      folder: made if need be; empty.
      params: as `transformer.build` takes them, on any devices of this process.
      generation_config: beside the end tokens; greedy decoding if None.
      card: the text of README.md.
      dtype: of the weights written; that of `params` if None.
      max_shard_bytes: weights beyond this are split over several files.

    Raises:
      LoadingError: the folder is not empty, no architecture of Hugging Face has this shape, or `transformers` would
        cut text into other words than the tokenizer does.
    """
    folder = Path(folder)
    description = _describe(cfg)
    if description["model_type"] == "qwen2" and not tokenizer.cuts_as_qwen2:
        raise LoadingError(
            "a policy with attention biases is a Qwen2 model to transformers, which cuts text into Qwen2's words "
            "whatever its tokenizer.json says; this tokenizer cuts it otherwise (train with policy.bias=False)"
        )
    check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or str(params["embedding"].dtype)
    first, *others = tokenizer.end_tokens
    special = {"eos_token_id": [first, *others] if others else first, "pad_token_id": tokenizer.pad_token}
    if tokenizer.bos_token is not None:
        special["bos_token_id"] = tokenizer.bos_token
    tokenizer.save(folder)
    write_json(folder / "generation_config.json", {"do_sample": False} | special | dict(generation_config or {}))
    _save_tensors(folder, cfg, params, jnp.dtype(dtype), max_shard_bytes)
    write_json(folder / CONFIG, description | special | {"torch_dtype": dtype})
    if card is not None:
        (folder / "README.md").write_text(card)


def _describe(cfg: PolicyConfig) -> dict[str, Any]:
    """The config.json of a shape, in the older spelling of rotary settings, which all readers know."""
    family = family_of(cfg)
    config: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.mlp * max(cfg.experts_per_token, 1),
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "attention_bias": False,  # Qwen2 has biases whatever this says
        "max_position_embeddings": cfg.max_positions,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "use_cache": True,
    }
    if family == "gemma3_text":
        every = cfg.global_every if cfg.window else 1
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": cfg.query_dim or cfg.head_dim,
            "sliding_window": cfg.window or cfg.max_positions,
            "layer_types": _layer_types(cfg.layers, every),
            "sliding_window_pattern": every or cfg.layers + 1,
            "rope_local_base_freq": cfg.local_rope_theta,
        }
        del config["hidden_act"]
    if every := cfg.unrotated_every:
        config |= {
            "no_rope_layer_interval": every,
            "no_rope_layers": [int((layer + 1) % every != 0) for layer in range(cfg.layers)],
            "use_sliding_window": False,
        }
    if cfg.experts:
        config |= {
            "num_experts": cfg.experts,
            "num_experts_per_tok": cfg.experts_per_token,
            "norm_topk_prob": cfg.renormalise_experts,
            "moe_intermediate_size": cfg.mlp,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if cfg.rope_scaling is not None:
        config["rope_scaling"] = _describe_rope(cfg.rope_scaling)
    return config


def _describe_rope(rope: RopeScaling) -> dict[str, Any]:
    """The `rope_scaling` of a config.json."""
    scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind != "linear":
        scaling["original_max_position_embeddings"] = rope.original
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq, "high_freq_factor": rope.high_freq}
    if rope.kind == "yarn":
        scaling |= {
            "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "attention_factor": rope.attention,
            "truncate": rope.truncate,
        }  # fmt: skip
    return scaling


def _save_tensors(folder: Path, cfg: PolicyConfig, params: Params, dtype: Any, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or shards and their index."""
    leaves = leaves_of(cfg)
    sizes = [
        (name, leaf, (layer, expert), dtype.itemsize * math.prod(leaf.tensor_shape))
        for leaf in leaves
        for layer, names in enumerate(leaf.names)
        for expert, name in enumerate(names)
    ]
    shards: list[list[Any]] = [[]]
    filled = 0
    for name, leaf, place, size in sizes:
        if filled and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, leaf, place))
        filled += size
    names = [WEIGHTS] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    for file, shard in zip(names, shards, strict=True):
        tensors = {name: _tensor(params, leaf, place, dtype) for name, leaf, place in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "generation_config.json", folder / file)  # `save_file` lets only the owner read it
    if len(shards) > 1:
        index = {name: file for file, shard in zip(names, shards, strict=True) for name, _, _ in shard}
        total = sum(size for *_, size in sizes)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _tensor(params: Params, leaf: Leaf, place: tuple[int, int], dtype: Any) -> np.ndarray:
    """One tensor in Hugging Face's layout, on the host."""
    ours = params
    for key in leaf.path:
        ours = ours[key]
    if leaf.path[0] == "blocks":
        ours = ours[place] if len(leaf.names[0]) > 1 else ours[place[0]]
    if leaf.inputs > 0:
        ours = ours.reshape(leaf.tensor_shape[::-1]).T
    return np.ascontiguousarray(np.asarray(ours.reshape(leaf.tensor_shape).astype(dtype)))
