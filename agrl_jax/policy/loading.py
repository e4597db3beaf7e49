"""Language models from files and back: Hugging Face folders in and out, GGUF files in.

    load_pretrained   config.json and safetensors, or a GGUF file -> shape, parameters, tokenizer
    read_config       the shape alone, of either
    save_pretrained   a folder that `transformers`, and so vLLM or SGLang, load as it is

Both formats are read as one: a table of tensors under Hugging Face's names, each with a function that
reads some of its rows. Parameters are filled piece by piece (a layer, or some rows of the vocabulary),
straight onto the devices that hold them, so that the host never holds more than the parameters
themselves and a few pieces. Files are read, not mapped, and nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agrl_jax.policy import tokenizer as tokenizers
from agrl_jax.policy.tokenizer import Tokenizer
from agrl_jax.policy.transformer import PolicyConfig, RopeScaling, build, rope_frequencies
from agrl_jax.types import Array, Params

# `model_type` in config.json (and, but for the mixture, `general.architecture` in GGUF) and the class that loads it.
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_GGUF_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLE = "a pickle, which can run any code when it is read; bring the model as safetensors or GGUF"
_PIECE_BYTES = 8 * 2**20  # of a vocabulary's rows read at once


class LoadingError(ValueError):
    """A model that cannot be loaded or saved; the message names the file and what in it is wrong."""


# -------------------------------------------------------------------------------------------- tensors


class _Tensor(NamedTuple):
    """A parameter of ours in Hugging Face's layout.

    `inputs`: how many of our leading axes (layer and expert aside) are inputs of the projection, which
    Hugging Face stores as a matrix [outputs, inputs]; 0 is a bias, -1 a tensor stored as ours is.
    """

    name: str
    inputs: int


_LAYER = "model.layers.{layer}."
_PLAIN = {
    ("embedding",): _Tensor("model.embed_tokens.weight", -1),
    ("final_norm",): _Tensor("model.norm.weight", -1),
    ("head",): _Tensor("lm_head.weight", 1),
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
_EXPERT = _LAYER + "mlp.experts.{expert}."
_MIXTURE = _PLAIN | {
    ("blocks", "mlp", "router"): _Tensor(_LAYER + "mlp.gate.weight", 1),
    ("blocks", "mlp", "gate"): _Tensor(_EXPERT + "gate_proj.weight", 1),
    ("blocks", "mlp", "up"): _Tensor(_EXPERT + "up_proj.weight", 1),
    ("blocks", "mlp", "down"): _Tensor(_EXPERT + "down_proj.weight", 1),
}

# Hugging Face's names of what GGUF calls blk.N.{key}; experts are stacked there.
_GGUF_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj", "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}  # fmt: skip
_GGUF_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
_GGUF_ROPE = "rope_freqs.weight"


class _Leaf(NamedTuple):
    """A parameter of ours: where it stands, its shape, and the tensors that fill it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    inputs: int
    names: list[list[str]]  # by layer (one, where not stacked), by expert (one, where there are none)
    tensor_shape: tuple[int, ...]  # of each of them


def _leaves(cfg: PolicyConfig) -> list[_Leaf]:
    """All parameters of a shape."""
    _, init, _ = build(cfg)
    table = _MIXTURE if cfg.experts else _PLAIN
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
        leaves.append(_Leaf(path, abstract.shape, inputs, names, shape))
    return leaves


class _Entry(NamedTuple):
    """A tensor in a file, in Hugging Face's layout."""

    shape: tuple[int, ...]
    file: Path
    read: Callable[[slice], np.ndarray]  # some of its rows


# ------------------------------------------------------------------------------------------------ in


def load_pretrained(
    path: str | Path,
    param_dtype: str = "float32",
    compute_dtype: str = "float32",
    shardings: Callable[[Any, Any], Any] | None = None,
) -> tuple[PolicyConfig, Params, Tokenizer]:
    """Reads a model of the Llama, Qwen2, Qwen3 or Qwen3-MoE family, tensor by tensor.

    Args:
      path: a Hugging Face folder (config.json, model.safetensors or its shards, tokenizer.json), or a GGUF
        file of any of the quantisations that the `gguf` package can undo.
      param_dtype: of the parameters, whatever the file holds.
      compute_dtype: noted in the shape that is returned.
      shardings: given the trees of the parameters' logical axes and of their shapes, a tree of shardings
        (`functools.partial(sharding.param_shardings, mesh)`). Without, all is on the default device.

    Returns:
      The shape, the parameters as `transformer.build` takes them, and the tokenizer. The vocabulary of the
      shape may be larger than that of the tokenizer: some models pad theirs.

    Raises:
      LoadingError: another architecture, a tensor that is missing, unexpected or of another shape, a
        truncated or corrupt file, a pickle.
    """
    path = Path(path)
    tokenizer = read_tokenizer(path)
    cfg, tensors = _open(path, param_dtype, compute_dtype)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise LoadingError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, but the embedding only {cfg.vocab_size} rows"
        )
    if cfg.layers * max(cfg.experts, 1) > len(tensors):  # before the names of a corrupt number of them are made
        raise LoadingError(f"{path}: {cfg.layers} layers cannot be in the {len(tensors)} tensors that are there")
    leaves = _leaves(cfg)
    _check(path, cfg, leaves, tensors)
    _, init, axes = build(cfg)
    shapes = jax.eval_shape(init, jax.random.key(0))
    places = jax.tree.map(lambda _: None, shapes) if shardings is None else shardings(axes, shapes)
    params: dict[str, Any] = {}
    for leaf in sorted(leaves, key=lambda leaf: -math.prod(leaf.shape)):  # the largest while there is most room
        *parents, last = leaf.path
        node, place = params, places
        for key in parents:
            node, place = node.setdefault(key, {}), place[key]
        node[last] = _fill(leaf, tensors, jnp.dtype(param_dtype), place[last])
    return cfg, params, tokenizer


def read_config(path: str | Path, param_dtype: str = "float32", compute_dtype: str = "float32") -> PolicyConfig:
    """The shape of a model in a Hugging Face folder or GGUF file, or that a config.json alone describes. Raises
    LoadingError as `load_pretrained` does."""
    path = Path(path)
    if path.suffix == ".json":
        return _hf_config(path, param_dtype, compute_dtype)
    if _is_folder(path):
        return _hf_config(path / _CONFIG, param_dtype, compute_dtype)
    return _open_gguf(path, param_dtype, compute_dtype)[0]


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model in a Hugging Face folder or GGUF file."""
    path = Path(path)
    return tokenizers.load(path) if _is_folder(path) else tokenizers.from_gguf(path)


def shape_of(fields: Mapping[str, Any]) -> PolicyConfig:
    """The shape of which `dataclasses.asdict` gave these fields."""
    rope = fields["rope_scaling"]
    return PolicyConfig(**{**fields, "rope_scaling": None if rope is None else RopeScaling(**rope)})


def _is_folder(path: Path) -> bool:
    """True for a folder, False for a file that may be GGUF."""
    if path.suffix in _PICKLES:
        raise LoadingError(f"{path}: {_PICKLE}")
    if not path.exists():
        raise LoadingError(f"{path}: not found; a Hugging Face folder or a .gguf file is wanted")
    return path.is_dir()


def _open(path: Path, param_dtype: str, compute_dtype: str) -> tuple[PolicyConfig, dict[str, _Entry]]:
    if not _is_folder(path):
        return _open_gguf(path, param_dtype, compute_dtype)
    return _hf_config(path / _CONFIG, param_dtype, compute_dtype), _open_safetensors(path)


def _check(path: Path, cfg: PolicyConfig, leaves: Sequence[_Leaf], tensors: Mapping[str, _Entry]) -> None:
    """Holds the tensors of the files against those that the shape asks for."""
    wanted = {
        name: leaf.tensor_shape for leaf in leaves for name in itertools.chain.from_iterable(leaf.names)
    }
    if missing := [name for name in wanted if name not in tensors]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LoadingError(f"{path}: tensor {missing[0]}{more} is missing")
    for name, (shape, file, _) in tensors.items():
        if name not in wanted:
            # A tied head may be stored all the same; old checkpoints hold the rotary frequencies.
            if (cfg.tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq"):
                continue
            raise LoadingError(f"{file}: tensor {name} is unexpected; its config.json or metadata has no place for it")
        if shape != wanted[name]:
            raise LoadingError(f"{file}: tensor {name} has shape {shape}, where {wanted[name]} is right")


def _fill(leaf: _Leaf, tensors: Mapping[str, _Entry], dtype: Any, sharding: NamedSharding | None) -> Array:
    """One parameter, from its tensors, in place. A piece is a layer, or some rows of a tensor without layers."""
    whole = jnp.zeros(leaf.shape, dtype, device=sharding)
    for start, piece in _pieces(leaf, tensors):
        piece = _replicate(piece, sharding)
        whole = _write(whole, piece, start, leaf.inputs, leaf.path[0] == "blocks", sharding)
        whole.block_until_ready()  # so that no more than one piece is alive
    return whole


@partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=0)
def _write(whole: Array, piece: Array, start: Array, inputs: int, stacked: bool, sharding: Any) -> Array:
    """Writes a piece in Hugging Face's layout into `whole`, in place: as layer `start`, or from row `start`."""
    piece = piece.swapaxes(-1, -2) if inputs > 0 else piece
    piece = piece.reshape((1, *whole.shape[1:]) if stacked else piece.shape).astype(whole.dtype)
    rows = 1 if inputs > 0 and not stacked else 0  # the axis on which the head has its vocabulary
    whole = jax.lax.dynamic_update_slice_in_dim(whole, piece, start, rows)
    return whole if sharding is None else jax.lax.with_sharding_constraint(whole, sharding)


def _pieces(leaf: _Leaf, tensors: Mapping[str, _Entry]) -> Iterator[tuple[int, np.ndarray]]:
    """Where each piece starts, and the piece in Hugging Face's layout; [experts, ...] in a mixture."""
    if leaf.path[0] == "blocks":
        for layer, names in enumerate(leaf.names):
            experts = [_read(name, tensors[name], slice(None)) for name in names]
            yield layer, experts[0] if len(experts) == 1 else np.stack(experts)
        return
    ((name,),) = leaf.names
    rows = leaf.tensor_shape[0]
    step = max(1, _PIECE_BYTES // (4 * math.prod(leaf.tensor_shape[1:])))
    for start in range(0, rows, step):
        yield start, _read(name, tensors[name], slice(start, min(start + step, rows)))


def _read(name: str, entry: _Entry, rows: slice) -> np.ndarray:
    try:
        return entry.read(rows)
    except (OSError, SafetensorError, ValueError, NotImplementedError) as error:
        raise LoadingError(f"{entry.file}: tensor {name} cannot be read: {error}") from error


def _replicate(piece: np.ndarray, sharding: NamedSharding | None) -> Array:
    """On every device of the sharding; each process passes the whole piece."""
    if sharding is None:
        return jnp.asarray(piece)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.make_array_from_callback(piece.shape, everywhere, lambda index: piece[index])


# ------------------------------------------------------------------------------ Hugging Face, in


def _open_safetensors(folder: Path) -> dict[str, _Entry]:
    """The tensors of a folder, in one file or in the shards that its index names."""
    if (folder / _INDEX).exists():
        index = _json(folder / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise LoadingError(f"{folder / _INDEX}: weight_map should name the file of each tensor")
        files = sorted(set(index.values()))
        if strays := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
            raise LoadingError(f"{folder / _INDEX}: {strays[0]!r} is not the name of a safetensors file in its folder")
    elif (folder / _WEIGHTS).exists():
        index, files = {}, [_WEIGHTS]
    elif pickles := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES):
        raise LoadingError(f"{folder / pickles[0]}: {_PICKLE}")
    else:
        raise LoadingError(f"{folder}: neither {_WEIGHTS} nor {_INDEX} is there")
    tensors = {}
    for file in files:
        tensors |= _open_shard(folder / file)
    if lost := [name for name, file in index.items() if name not in tensors or tensors[name].file.name != file]:
        raise LoadingError(f"{folder / index[lost[0]]}: tensor {lost[0]} is missing, which {_INDEX} says it holds")
    return tensors


def _open_shard(file: Path) -> dict[str, _Entry]:
    try:
        handle = safe_open(file, framework="np", backend="pread")  # reads; mapped pages would count as memory
        tensors = {}
        for name in handle.keys():
            view = handle.get_slice(name)
            if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise LoadingError(
                    f"{file}: tensor {name} is {view.get_dtype()}; quantised weights are read from GGUF files only"
                )
            tensors[name] = _Entry(tuple(view.get_shape()), file, view.__getitem__)
        return tensors
    except (OSError, SafetensorError) as error:
        raise LoadingError(f"{file}: missing, truncated or corrupt: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise LoadingError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise LoadingError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadingError(f"{file}: should be a JSON object")
    return content


def _hf_config(file: Path, param_dtype: str, compute_dtype: str) -> PolicyConfig:
    """The shape that a config.json describes; refuses what this transformer does not compute."""
    raw = _json(file)
    family = raw.get("model_type")
    if family not in _CLASSES:
        raise LoadingError(f"{file}: model_type is {family!r}; known are: {', '.join(_CLASSES)}")
    fixed = {
        "hidden_act": "silu", "mlp_bias": False, "quantization_config": None, "partial_rotary_factor": 1.0,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    } | ({} if family == "qwen2" else {"attention_bias": False})  # fmt: skip
    for key, right in fixed.items():
        if raw.get(key) not in (None, right):
            raise LoadingError(f"{file}: {key}={raw[key]!r} is not supported, only {right!r}")
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()) or (
        raw.get("use_sliding_window") and raw.get("max_window_layers", 0) < raw.get("num_hidden_layers", 0)
    ):
        raise LoadingError(f"{file}: layers with a sliding window are not supported")
    mixture = family == "qwen3_moe"
    try:
        width, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        return PolicyConfig(
            vocab_size=int(raw["vocab_size"]),
            width=width,
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or (128 if family == "qwen3" else width // heads)),
            mlp=int(raw["moe_intermediate_size" if mixture else "intermediate_size"]),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qk_norm=family in ("qwen3", "qwen3_moe"),
            bias=family == "qwen2",
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            max_positions=int(raw["max_position_embeddings"]),
            experts=int(raw.get("num_local_experts") or raw["num_experts"]) if mixture else 0,
            experts_per_token=int(raw["num_experts_per_tok"]) if mixture else 0,
            renormalise_experts=bool(raw.get("norm_topk_prob", False)) if mixture else True,
            **_hf_rope(raw),
        )
    except KeyError as error:
        raise LoadingError(f"{file}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise LoadingError(f"{file}: {error}") from error


def _hf_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
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
    """The factor on queries and keys: as given, or the paper's 0.1 ln(factor) + 1, or a ratio of two such."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def strength(weight: float) -> float:
        return 0.1 * weight * math.log(max(rope["factor"], 1.0)) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return strength(rope["mscale"]) / strength(rope["mscale_all_dim"])
    return strength(1.0)


# -------------------------------------------------------------------------------------- GGUF, in


def _open_gguf(path: Path, param_dtype: str, compute_dtype: str) -> tuple[PolicyConfig, dict[str, _Entry]]:
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
    family = _GGUF_FAMILIES.get(arch := fields.get("general.architecture"))
    if family is None:
        raise LoadingError(f"{path}: general.architecture is {arch!r}; known are: {', '.join(_GGUF_FAMILIES)}")

    tensors = {}
    for name, (shape, kind, offset, size) in found.items():
        read = _gguf_reader(path, kind, shape, offset, size)
        for alias, shape_, read_ in _gguf_aliases(path, name, tuple(shape), read):
            tensors[alias] = _Entry(shape_, path, read_)
    rope_freqs = tensors.pop(_GGUF_ROPE, None)
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
    fields: Mapping[str, Any], arch: str, family: str, tensors: Mapping[str, _Entry], param_dtype: str,
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
        scaling = _hf_rope({"rope_scaling": rope, "max_position_embeddings": get("context_length")})["rope_scaling"]
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
    if layer is None or layer[2] not in _GGUF_LAYER:
        yield _GGUF_GLOBAL.get(name, name), shape, read
        return
    alias = f"model.layers.{layer[1]}.{_GGUF_LAYER[layer[2]]}.{layer[3]}"
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
        raise ValueError(f"tensor {_GGUF_ROPE} holds divisors other than those of Llama 3, which are not supported")
    return scaling


# ----------------------------------------------------------------------------------------------- out


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
      generation_config: beside the end token; greedy decoding if None.
      card: the text of README.md.
      dtype: of the weights written; that of `params` if None.
      max_shard_bytes: weights beyond this are split over several files.

    Raises:
      LoadingError: the folder is not empty, or no architecture of Hugging Face's has this shape.
    """
    folder = Path(folder)
    description = _describe(cfg)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoadingError(f"{folder}: should be an empty folder, so that no file of another model stays in it")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or str(params["embedding"].dtype)
    special = {"eos_token_id": tokenizer.end_token, "pad_token_id": tokenizer.end_token}
    if tokenizer.bos_token is not None:
        special["bos_token_id"] = tokenizer.bos_token
    tokenizer.save(folder)
    _write_json(folder / "generation_config.json", {"do_sample": False} | special | dict(generation_config or {}))
    _save_tensors(folder, cfg, params, jnp.dtype(dtype), max_shard_bytes)
    _write_json(folder / _CONFIG, description | special | {"torch_dtype": dtype})
    if card is not None:
        (folder / "README.md").write_text(card)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _describe(cfg: PolicyConfig) -> dict[str, Any]:
    """The config.json of a shape, in the older spelling of rotary settings, which all readers know."""
    family = _family(cfg)
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
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
        "attention_bias": False,  # Qwen2 has its biases whatever this says
        "max_position_embeddings": cfg.max_positions,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "use_cache": True,
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
    if (rope := cfg.rope_scaling) is not None:
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
        config["rope_scaling"] = scaling
    return config


def _family(cfg: PolicyConfig) -> str:
    """The family whose layers these are."""
    if cfg.bias and cfg.qk_norm:
        raise LoadingError("no family that can be exported has both attention biases and query/key norms")
    if cfg.experts and not cfg.qk_norm:
        raise LoadingError("no family that can be exported has experts without query/key norms")
    if cfg.qk_norm:
        return "qwen3_moe" if cfg.experts else "qwen3"
    if not cfg.bias and cfg.width % cfg.heads:
        raise LoadingError(f"Llama, the family of this shape, wants heads={cfg.heads} to divide width={cfg.width}")
    return "qwen2" if cfg.bias else "llama"


def _save_tensors(folder: Path, cfg: PolicyConfig, params: Params, dtype: Any, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or shards and their index."""
    leaves = _leaves(cfg)
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
    names = [_WEIGHTS] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    for file, shard in zip(names, shards, strict=True):
        tensors = {name: _tensor(params, leaf, place, dtype) for name, leaf, place in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "generation_config.json", folder / file)  # `save_file` lets the owner alone read it
    if len(shards) > 1:
        index = {name: file for file, shard in zip(names, shards, strict=True) for name, _, _ in shard}
        total = sum(size for *_, size in sizes)
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _tensor(params: Params, leaf: _Leaf, place: tuple[int, int], dtype: Any) -> np.ndarray:
    """One tensor in Hugging Face's layout, on the host."""
    ours = params
    for key in leaf.path:
        ours = ours[key]
    if leaf.path[0] == "blocks":
        ours = ours[place] if len(leaf.names[0]) > 1 else ours[place[0]]
    if leaf.inputs > 0:
        ours = ours.reshape(leaf.tensor_shape[::-1]).T
    return np.ascontiguousarray(np.asarray(ours.reshape(leaf.tensor_shape).astype(dtype)))
