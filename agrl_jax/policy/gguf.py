"""Reads GGUF files: a model's shape, its tensors under Hugging Face's names and in their layout, and its tokenizer.

    open_gguf        shape and tensors
    read_tokenizer   the tokenizer

A file holds metadata (keys such as `llama.block_count` with their values) and tensors, most of them quantised. A model
may be split over several files; the first one has the metadata.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import models, normalizers

from agrl_jax.policy.attention import rope_frequencies
from agrl_jax.policy.families import EMBEDDING, HEAD, Entry, LoadingError
from agrl_jax.policy.huggingface import hf_rope
from agrl_jax.policy.layers import PolicyConfig, RopeScaling
from agrl_jax.policy.tokenizer import QWEN2_WORDS, SENTENCEPIECE, Tokenizer, TokenizerError, byte_level, with_date

# From `general.architecture` to Hugging Face's name of the family.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}

# From GGUF's names blk.N.{key} to Hugging Face's; GGUF stacks experts.
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj", "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}  # fmt: skip
_GLOBAL = {
    "token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}  # fmt: skip
_ROPE_DIVISORS = "rope_freqs.weight"
_PART = r"(.+)-\d{5}-of-(\d{5})\.gguf"  # a file of a split model

_MISSING = object()  # stands for "no default"


# ------------------------------------------------------------------------------------- shape and tensors


def open_gguf(path: Path, param_dtype: str, compute_dtype: str) -> tuple[PolicyConfig, dict[str, Entry]]:
    """The shape in a model's metadata, and its tensors, each of which is read and dequantised when it is used.

    Raises:
      LoadingError: the file, or another file of a split model, is missing or cannot be read, or the policy cannot
        compute the model.
    """
    fields, stored = _open_file(path)
    for part in _other_parts(path, fields):
        stored |= _open_file(part)[1]
    metadata = _Metadata(fields, fields.get("general.architecture"))
    family = _FAMILIES.get(metadata.arch)
    if family is None:
        raise LoadingError(f"{path}: general.architecture is {metadata.arch!r}; known are: {', '.join(_FAMILIES)}")
    tensors = {alias: entry for name in stored for alias, entry in _under_hf_names(name, stored[name])}
    divisors = tensors.pop(_ROPE_DIVISORS, None)
    try:
        cfg = _shape(metadata, family, tensors, param_dtype, compute_dtype)
        if divisors is not None:
            cfg = dataclasses.replace(cfg, rope_scaling=_llama3_of(cfg, divisors.read(slice(None))))
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


def _open_file(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The metadata of one file, without the tokenizer's, and its tensors under GGUF's names."""
    try:
        reader = _open(path)
        fields = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("tokenizer.")}
        found = {t.name: (t.tensor_type, t.shape.tolist()[::-1], t.data_offset, t.n_bytes) for t in reader.tensors}
        swapped = reader.byte_order == "S"
        del reader  # it holds a Python object for each token of the vocabulary
    except Exception as error:  # on a bad file the reader can raise anything
        raise LoadingError(f"{path}: missing, truncated or corrupt, or not a GGUF file: {error}") from error
    if swapped:
        raise LoadingError(f"{path}: stored for machines of the other byte order")
    return fields, {name: Entry(tuple(place[1]), path, _dequantised(path, *place)) for name, place in found.items()}


def _open(path: Path) -> Any:
    """A `gguf.GGUFReader` that cuts the file's tens of thousands of texts from an array, not from a memory map, whose
    slices take four times as long."""
    import gguf  # slow to import, and only needed here

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._data = np.asarray(mapped)

    return Reader(str(path))


def parts(path: epath.Path) -> list[epath.Path]:
    """The files of a model of which `path` is the first, by their names."""
    stem = re.fullmatch(_PART, path.name)
    return [path] if stem is None else sorted(path.parent.glob(f"{stem[1]}-*-of-{stem[2]}.gguf"))


def _other_parts(path: Path, fields: Mapping[str, Any]) -> list[Path]:
    """The other files of a split model, as llama.cpp names them; none if the model is whole."""
    count, number = fields.get("split.count", 1), fields.get("split.no", 0)
    if count <= 1:
        return []
    stem = re.fullmatch(_PART, path.name)
    if stem is None:
        raise LoadingError(f"{path}: the first of {count} files should be called NAME-00001-of-{count:05d}.gguf")
    parts = [path.with_name(f"{stem[1]}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    if number != 0:
        raise LoadingError(f"{path}: file {number + 1} of {count} of a split model; name the first, {parts[0].name}")
    if lost := [part.name for part in parts[1:] if not part.exists()]:
        raise LoadingError(f"{path}: the first of {count} files of a split model; {lost[0]} is not beside it")
    return parts[1:]


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """The keys and values of a file; most keys begin with the name of the architecture."""

    fields: Mapping[str, Any]
    arch: str

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """Raises KeyError where the key is missing and there is no default."""
        name = f"{self.arch}.{key}"
        return self.fields[name] if default is _MISSING else self.fields.get(name, default)

    def decimal(self, key: str, default: float) -> float:
        """The shortest decimal that rounds to the 32 bits that are stored: the value that was meant."""
        return float(str(np.float32(self.get(key, default))))


def _shape(
    metadata: _Metadata, family: str, tensors: Mapping[str, Entry], param_dtype: str, compute_dtype: str
) -> PolicyConfig:
    """The shape in the metadata. Raises KeyError for a key that is missing."""
    if EMBEDDING not in tensors:
        raise KeyError("tensor token_embd.weight")
    get = metadata.get
    width, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", width // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{metadata.arch}.rope.dimension_count should be the whole head, {head_dim}")
    mixture = family == "qwen3_moe"
    return PolicyConfig(
        vocab_size=tensors[EMBEDDING].shape[0],
        width=width,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp=get("expert_feed_forward_length" if mixture else "feed_forward_length"),
        tied=HEAD not in tensors,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        bias=family == "qwen2",
        rope_theta=metadata.decimal("rope.freq_base", 10_000.0),
        norm_eps=metadata.decimal("attention.layer_norm_rms_epsilon", 1e-6),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        max_positions=get("context_length"),
        rope_scaling=_rope_scaling(metadata),
        experts=get("expert_count") if mixture else 0,
        experts_per_token=get("expert_used_count") if mixture else 0,
    )


def _rope_scaling(metadata: _Metadata) -> RopeScaling | None:
    """The scaling of rotary frequencies in the keys; Llama 3 has it in a tensor instead."""
    kind = metadata.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    rope = {
        "rope_type": kind,
        "factor": metadata.get("rope.scaling.factor"),
        "original_max_position_embeddings": metadata.get("rope.scaling.original_context_length", None),
        "beta_fast": metadata.get("rope.scaling.yarn_beta_fast", None),
        "beta_slow": metadata.get("rope.scaling.yarn_beta_slow", None),
    }
    scaling = hf_rope({"rope_scaling": rope, "max_position_embeddings": metadata.get("context_length")})["rope_scaling"]
    # llama.cpp multiplies the paper's factor by this one.
    extra = metadata.get("rope.scaling.yarn_attn_factor", metadata.get("rope.scaling.attn_factor", 1.0))
    return dataclasses.replace(scaling, attention=scaling.attention * extra)


def _llama3_of(cfg: PolicyConfig, divisors: np.ndarray) -> RopeScaling:
    """The `llama3` scaling with these divisors of the frequencies; a file holds only those of Llama's settings."""
    plain, _ = rope_frequencies(dataclasses.replace(cfg, rope_scaling=None))
    scaling = RopeScaling("llama3", factor=float(divisors.max()), original=8192)
    scaled, _ = rope_frequencies(dataclasses.replace(cfg, rope_scaling=scaling))
    if divisors.shape != plain.shape or not np.allclose(plain / scaled, divisors, rtol=1e-3):
        raise ValueError(f"tensor {_ROPE_DIVISORS} holds divisors other than those of Llama 3, which are not supported")
    return scaling


def _dequantised(path: Path, kind: Any, shape: Sequence[int], offset: int, size: int) -> Callable[[slice], np.ndarray]:
    """The function that reads some rows of a tensor, along its first axis, in float32."""
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


def _under_hf_names(name: str, entry: Entry) -> Iterator[tuple[str, Entry]]:
    """Hugging Face's tensors that a tensor of a GGUF file holds, with their names: one, or one for each expert."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer is None or layer[2] not in _LAYER:
        yield _GLOBAL.get(name, name), entry
        return
    alias = f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"
    if "{expert}" not in alias:
        yield alias, entry
        return
    for expert in range(entry.shape[0]):
        one = slice(expert, expert + 1)
        yield alias.format(expert=expert), Entry(
            entry.shape[1:], entry.file, lambda rows, one=one: entry.read(one)[0][rows]
        )


def _halves_paired(read: Callable[[slice], np.ndarray], heads: int) -> Callable[[slice], np.ndarray]:
    """Undoes the order of rows in llama GGUF files, where the two rows of a rotated pair are neighbours."""

    def read_all(rows: slice) -> np.ndarray:
        weight = read(slice(None))
        return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)[rows]

    return read_all


# --------------------------------------------------------------------------------------------- tokenizer

# By `tokenizer.ggml.pre`, the patterns that cut text into words before merging, one after the other.
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = {
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "qwen2": (QWEN2_WORDS,),
    "llama-bpe": (QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_SAME_WORDS = {"deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}

_NORMAL = 1  # token types: the others are unknown, control, user-defined, unused and byte
_NAMED_TOKENS = {"bos_token": "bos", "pad_token": "padding", "unk_token": "unknown"}  # `transformers`' names and GGUF's


def read_tokenizer(path: Path) -> Tokenizer:
    """Rebuilds the tokenizer inside a GGUF file, special tokens and chat template included. Reads metadata only.

    A vocabulary may lack bytes (SmolLM2's lacks 21, such as control characters and bytes that UTF-8 never has):
    `encode` leaves them out.

    Raises:
      TokenizerError: the file cannot be read, or its tokenizer is not a byte-level BPE with known word patterns.
    """
    get = _tokenizer_fields(path)
    if (model := get("ggml.model")) != "gpt2":
        kind = f", {SENTENCEPIECE}" if model == "llama" else ""
        raise TokenizerError(
            f"{path}: tokenizer.ggml.model is {model!r}{kind}; only 'gpt2' (byte-level BPE) can be read"
        )
    pre = get("ggml.pre", "default")
    words = _SAME_WORDS.get(pre, pre)
    if words not in _WORDS:
        raise TokenizerError(f"{path}: tokenizer.ggml.pre is {pre!r}; known are: {', '.join([*_WORDS, *_SAME_WORDS])}")
    tokens, types = get("ggml.tokens", []), get("ggml.token_type", [])
    if (end := get("ggml.eos_token_id")) is None or len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise TokenizerError(f"{path}: needs tokenizer.ggml.eos_token_id, and distinct tokens with a type for each")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges(path, get("ggml.merges", []), vocabulary)
    core = byte_level(models.BPE(vocabulary, merges, ignore_merges=words == "llama-bpe"), _WORDS[words])
    if words == "qwen2":
        core.normalizer = normalizers.NFC()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind != _NORMAL]
    core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in control])
    named = {name: get(f"ggml.{key}_token_id") for name, key in _NAMED_TOKENS.items()}
    settings = {name: tokens[token] for name, token in named.items() if token is not None and token < len(tokens)}
    bos = get("ggml.bos_token_id") if get("ggml.add_bos_token", words == "llama-bpe") else None
    return Tokenizer(core, end, bos, with_date(get("chat_template")), settings)


def _tokenizer_fields(path: Path) -> Callable[..., Any]:
    """`get(key, default=None)` of the metadata under `tokenizer.`; it reads a value when called."""
    try:
        fields = dict(_open(path).fields)
    except (OSError, ValueError, IndexError) as error:
        raise TokenizerError(f"{path}: not a readable GGUF file: {error}") from error

    def get(key: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.{key}")
        return default if field is None else field.contents()

    if not any(key.startswith("tokenizer.") for key in fields):
        _other_parts(path, {key: fields[key].contents() for key in ("split.count", "split.no") if key in fields})
    return get


def _merges(path: Path, merges: Sequence[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of tokens that merge into one, in order of merging."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or not vocabulary.keys() >= {*pair, "".join(pair)}:
            raise TokenizerError(
                f"{path}: tokenizer.ggml.merges holds {merge!r}, where there should be two tokens of the vocabulary "
                "that make a third, with a space between them"
            )
    return pairs
