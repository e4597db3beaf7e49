"""GGUF files, read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agrl_jax.policy.attention import rope_frequencies
from agrl_jax.policy.families import GGUF_FAMILIES, GGUF_GLOBAL, GGUF_LAYER, GGUF_ROPE, Entry, LoadingError
from agrl_jax.policy.huggingface import hf_rope
from agrl_jax.policy.layers import PolicyConfig, RopeScaling


def open_gguf(path: Path, param_dtype: str, compute_dtype: str) -> tuple[PolicyConfig, dict[str, Entry]]:
    """The shape in a GGUF file's metadata, and its tensors under Hugging Face's names and in their layout."""
    import gguf  # slow to import, and only needed here

    try:
        reader = gguf.GGUFReader(str(path))
        fields = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("tokenizer.")}
        found = {t.name: (t.shape.tolist()[::-1], t.tensor_type, t.data_offset, t.n_bytes) for t in reader.tensors}
        swapped = reader.byte_order == "S"
        del reader  # it holds a Python object for each token of the vocabulary
    except Exception as error:  # on a bad file the reader fails in many ways
        raise LoadingError(f"{path}: missing, truncated or corrupt, or not a GGUF file: {error}") from error
    if swapped:
        raise LoadingError(f"{path}: stored for machines of the other byte order")
    family = GGUF_FAMILIES.get(arch := fields.get("general.architecture"))
    if family is None:
        raise LoadingError(f"{path}: general.architecture is {arch!r}; known are: {', '.join(GGUF_FAMILIES)}")

    tensors = {}
    for name, (shape, kind, offset, size) in found.items():
        read = _gguf_reader(path, kind, shape, offset, size)
        for alias, shape_, read_ in _gguf_aliases(path, name, tuple(shape), read):
            tensors[alias] = Entry(shape_, path, read_)
    rope_freqs = tensors.pop(GGUF_ROPE, None)
    try:
        cfg = _gguf_config(fields, arch, family, tensors, param_dtype, compute_dtype)
        if rope_freqs is not None:
            cfg = dataclasses.replace(cfg, rope_scaling=_llama3_of(cfg, rope_freqs.read(slice(None))))
    except KeyError as error:
        raise LoadingError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise LoadingError(f"{path}: {error}") from error
    if family == "llama":
        for name, entry in tensors.items():
            for projection, heads in (("q_proj.weight", cfg.heads), ("k_proj.weight", cfg.kv_heads)):
                if name.endswith(projection):
                    tensors[name] = entry._replace(read=_halves_paired(entry.read, heads))
    return cfg, tensors


def _gguf_config(
    fields: Mapping[str, Any], arch: str, family: str, tensors: Mapping[str, Entry], param_dtype: str,
    compute_dtype: str,
) -> PolicyConfig:
    """The shape in the metadata. Raises KeyError for a key that is missing."""

    def get(key: str) -> Any:
        return fields[f"{arch}.{key}"]

    def decimal(key: str, default: float) -> float:
        """Stored in 32 bits: the shortest decimal that rounds to it is what was meant."""
        return float(str(np.float32(fields.get(f"{arch}.{key}", default))))

    if "model.embed_tokens.weight" not in tensors:
        raise KeyError("tensor token_embd.weight")
    width, heads = get("embedding_length"), get("attention.head_count")
    mixture = family == "qwen3_moe"
    scaling = None
    if (kind := fields.get(f"{arch}.rope.scaling.type", "none")) != "none":
        rope = {
            "rope_type": kind,
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": fields.get(f"{arch}.rope.scaling.original_context_length"),
            "beta_fast": fields.get(f"{arch}.rope.scaling.yarn_beta_fast"),
            "beta_slow": fields.get(f"{arch}.rope.scaling.yarn_beta_slow"),
        }
        scaling = hf_rope({"rope_scaling": rope, "max_position_embeddings": get("context_length")})["rope_scaling"]
        # llama.cpp multiplies the paper's factor by this one.
        extra = fields.get(f"{arch}.rope.scaling.yarn_attn_factor", fields.get(f"{arch}.rope.scaling.attn_factor", 1.0))
        scaling = dataclasses.replace(scaling, attention=scaling.attention * extra)
    head_dim = fields.get(f"{arch}.attention.key_length", width // heads)
    if fields.get(f"{arch}.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{arch}.rope.dimension_count should be the whole head, {head_dim}")
    return PolicyConfig(
        vocab_size=tensors["model.embed_tokens.weight"].shape[0],
        width=width,
        layers=get("block_count"),
        heads=heads,
        kv_heads=fields.get(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp=get("expert_feed_forward_length" if mixture else "feed_forward_length"),
        tied="lm_head.weight" not in tensors,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        bias=family == "qwen2",
        rope_theta=decimal("rope.freq_base", 10_000.0),
        norm_eps=decimal("attention.layer_norm_rms_epsilon", 1e-6),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        max_positions=get("context_length"),
        rope_scaling=scaling,
        experts=get("expert_count") if mixture else 0,
        experts_per_token=get("expert_used_count") if mixture else 0,
    )


def _gguf_reader(path: Path, kind: Any, shape: Sequence[int], offset: int, size: int) -> Callable[[slice], np.ndarray]:
    """Reads and dequantises some rows along the first axis, in float32."""
    import gguf

    def read(rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(shape[0])
        row = size // shape[0]
        data = np.fromfile(path, np.uint8, (stop - start) * row, offset=offset + start * row)
        if data.size < (stop - start) * row:
            raise ValueError("the file ends before it")
        data = data.reshape(stop - start, *shape[1:-1], -1) if len(shape) > 1 else data
        return gguf.quants.dequantize(data, kind).reshape(stop - start, *shape[1:])

    return read


def _gguf_aliases(
    path: Path, name: str, shape: tuple[int, ...], read: Callable[[slice], np.ndarray]
) -> Iterator[tuple[str, tuple[int, ...], Callable[[slice], np.ndarray]]]:
    """The tensors in Hugging Face's layout that a tensor of a GGUF file holds: one, or one for each expert."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer is None or layer[2] not in GGUF_LAYER:
        yield GGUF_GLOBAL.get(name, name), shape, read
        return
    alias = f"model.layers.{layer[1]}.{GGUF_LAYER[layer[2]]}.{layer[3]}"
    if "{expert}" not in alias:
        yield alias, shape, read
        return
    for expert in range(shape[0]):
        one = slice(expert, expert + 1)
        yield alias.format(expert=expert), shape[1:], lambda rows, one=one: read(one)[0][rows]


def _halves_paired(read: Callable[[slice], np.ndarray], heads: int) -> Callable[[slice], np.ndarray]:
    """Undoes the order of rows in llama GGUF files, where the two of a rotated pair are neighbours."""

    def read_all(rows: slice) -> np.ndarray:
        weight = read(slice(None))
        return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)[rows]

    return read_all


def _llama3_of(cfg: PolicyConfig, divisors: np.ndarray) -> RopeScaling:
    """The `llama3` scaling that divides the frequencies so. Files hold the divisors alone, of Llama's own settings."""
    plain, _ = rope_frequencies(dataclasses.replace(cfg, rope_scaling=None))
    scaling = RopeScaling("llama3", factor=float(divisors.max()), original=8192)
    scaled, _ = rope_frequencies(dataclasses.replace(cfg, rope_scaling=scaling))
    if divisors.shape != plain.shape or not np.allclose(plain / scaled, divisors, rtol=1e-3):
        raise ValueError(f"tensor {GGUF_ROPE} holds divisors other than those of Llama 3, which are not supported")
    return scaling
