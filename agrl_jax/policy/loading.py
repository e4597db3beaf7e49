"""Loads language models from Hugging Face folders, GGUF files, and folders of adapters for one of these.

    load_pretrained   config.json and safetensors, or a GGUF file -> shape, parameters, tokenizer
    read_config       the shape alone
    read_tokenizer    the tokenizer alone

Both formats (`huggingface`, `gguf`) give a table of tensors under Hugging Face's names, each with a function that reads
some of its rows. Parameters are filled piece by piece (a layer, or some rows of the vocabulary), directly on the
devices that hold them: the host never holds more than the parameters themselves and a few pieces. Files are read, not
mapped, and nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError

from agrl_jax.policy import adapters, gguf, lora, shipped
from agrl_jax.policy import tokenizer as tokenizers
from agrl_jax.policy.families import CONFIG, EMBEDDING, HEAD, Entry, Leaf, LoadingError, leaves_of
from agrl_jax.policy.huggingface import PICKLE, PICKLES, hf_config, open_safetensors
from agrl_jax.policy.layers import PolicyConfig, RopeScaling
from agrl_jax.policy.tokenizer import Tokenizer, TokenizerError
from agrl_jax.policy.transformer import build
from agrl_jax.types import Array, Params

_PIECE_BYTES = 8 * 2**20  # rows of a vocabulary read at once


def load_pretrained(
    path: str | Path,
    param_dtype: str = "float32",
    compute_dtype: str = "float32",
    shardings: Callable[[Any, Any], Any] | None = None,
) -> tuple[PolicyConfig, Params, Tokenizer]:
    """Reads a model of the Llama, Mistral, SmolLM3, OLMo 2, Gemma 3 (text), Qwen2, Qwen3 or Qwen3-MoE family.

    Args:
      path: a Hugging Face folder (config.json, model.safetensors or its shards, tokenizer.json), a GGUF file of any
        quantisation that the `gguf` package can undo, or a folder of adapters, which are merged into their base.
      param_dtype: of the parameters, whatever the file holds.
      compute_dtype: noted in the shape that is returned.
      shardings: from the trees of the parameters' logical axes and shapes to a tree of shardings
        (`functools.partial(sharding.param_shardings, mesh)`). Without it, all is on the default device.

    Returns:
      The shape, the parameters as `transformer.build` takes them, and the tokenizer. The vocabulary of the
      shape may be larger than that of the tokenizer: some models pad theirs.

    Raises:
      LoadingError: another architecture, a tensor that is missing, unexpected or of another shape, a
        truncated or corrupt file, a pickle.
    """
    path = Path(path)
    if is_adapters(path):
        return _load_adapted(path, param_dtype, compute_dtype, shardings)
    cfg, tensors = _open(path, param_dtype, compute_dtype)
    tokenizer = read_tokenizer(path, cfg.vocab_size)
    if cfg.layers * max(cfg.experts, 1) > len(tensors):  # before names are made for a corrupt number of layers
        raise LoadingError(f"{path}: {cfg.layers} layers cannot be in the {len(tensors)} tensors that are there")
    leaves = leaves_of(cfg)
    _check(path, cfg, leaves, tensors)
    return cfg, _read_parameters(cfg, leaves, tensors, shardings), tokenizer


def read_config(path: str | Path, param_dtype: str = "float32", compute_dtype: str = "float32") -> PolicyConfig:
    """The shape of a model in a Hugging Face folder, a GGUF file or a config.json. Raises LoadingError as
    `load_pretrained` does."""
    path = base_of(Path(path))
    if path.suffix == ".json":
        return hf_config(path, param_dtype, compute_dtype)
    if _is_folder(path):
        return hf_config(path / CONFIG, param_dtype, compute_dtype)
    return gguf.open_gguf(path, param_dtype, compute_dtype)[0]


def read_tokenizer(path: str | Path, rows: int | None = None) -> Tokenizer:
    """The tokenizer of a model in a Hugging Face folder or GGUF file.

    Adapters have that with which they were trained; those of an older version lack it, and have that of their base.
    Added tokens past the embedding are left out; `rows` is the number of the embedding's rows, if it is known. Raises
    LoadingError where such a token is needed.
    """
    path = Path(path)
    if is_adapters(path) and not _has_tokenizer(path):
        return read_tokenizer(_base(path), rows)
    if not _is_folder(path):
        tokenizer = gguf.read_tokenizer(path)  # in such a file, each token has a row of the embedding
        rows = rows or tokenizer.vocab_size
    else:
        tokenizer = tokenizers.load(path)
        rows = rows or read_config(path).vocab_size
    try:
        return tokenizer.within(rows)
    except TokenizerError as error:
        raise LoadingError(f"{path}: {error}") from error


def is_adapters(path: Path) -> bool:
    """Whether a path is a folder of adapters."""
    return (path / adapters.FILE).exists()


def base_of(path: Path) -> Path:
    """The path of the model that has the shape: for adapters, their base, which may be adapters itself. Raises
    NotInstalledError."""
    return base_of(_base(path)) if is_adapters(path) else path


def _base(path: Path) -> Path:
    return shipped.find(adapters.read(path, tensors=False).base)


def _has_tokenizer(path: Path) -> bool:
    return (path / tokenizers.FILE).exists()


def _load_adapted(
    path: Path, param_dtype: str, compute_dtype: str, shardings: Callable[[Any, Any], Any] | None
) -> tuple[PolicyConfig, Params, Tokenizer]:
    """The base of adapters with their products added to it."""
    found = adapters.read(path)
    shape, base, tokenizer = load_pretrained(shipped.find(found.base), found.base_dtype, compute_dtype, shardings)
    if _has_tokenizer(path):
        tokenizer = read_tokenizer(path, shape.vocab_size)
    adapters.check(path, found, base, build(shape)[2])
    merge = jax.jit(lora.merge, static_argnums=(2, 3), donate_argnums=0)
    params = merge(base, found.params, found.cfg, param_dtype)
    return dataclasses.replace(shape, param_dtype=param_dtype), params, tokenizer


def shape_of(fields: Mapping[str, Any]) -> PolicyConfig:
    """The shape with these fields, which `dataclasses.asdict` gave."""
    rope = fields["rope_scaling"]
    return PolicyConfig(**{**fields, "rope_scaling": None if rope is None else RopeScaling(**rope)})


def _is_folder(path: Path) -> bool:
    """True for a folder, False for a file that may be GGUF."""
    if path.suffix in PICKLES:
        raise LoadingError(f"{path}: {PICKLE}")
    if not path.exists():
        raise LoadingError(f"{path}: not found; a Hugging Face folder or a .gguf file is wanted")
    return path.is_dir()


def _open(path: Path, param_dtype: str, compute_dtype: str) -> tuple[PolicyConfig, dict[str, Entry]]:
    if not _is_folder(path):
        return gguf.open_gguf(path, param_dtype, compute_dtype)
    return hf_config(path / CONFIG, param_dtype, compute_dtype), open_safetensors(path)


def _check(path: Path, cfg: PolicyConfig, leaves: Sequence[Leaf], tensors: Mapping[str, Entry]) -> None:
    """Checks that the files hold the tensors of the shape, and no others."""
    wanted = {
        name: leaf.tensor_shape for leaf in leaves for name in itertools.chain.from_iterable(leaf.names)
    }
    if missing := [name for name in wanted if name not in tensors]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LoadingError(f"{path}: tensor {missing[0]}{more} is missing")
    for name, (shape, file, _) in tensors.items():
        if name not in wanted:
            if name.endswith("rotary_emb.inv_freq"):  # old checkpoints hold the rotary frequencies
                continue
            if cfg.tied and name == HEAD:
                _check_tied(tensors)
                continue
            raise LoadingError(f"{file}: tensor {name} is unexpected; its config.json or metadata has no place for it")
        if shape != wanted[name]:
            raise LoadingError(f"{file}: tensor {name} has shape {shape}, where {wanted[name]} is right")


def _check_tied(tensors: Mapping[str, Entry]) -> None:
    """A file may hold a tied head too; then it should equal the embedding."""
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    same = head.shape == embedding.shape and all(
        np.array_equal(_read(HEAD, head, rows), _read(EMBEDDING, embedding, rows)) for rows in _row_pieces(head.shape)
    )
    if not same:
        raise LoadingError(
            f"{head.file}: {HEAD} is another matrix than {EMBEDDING}, though config.json ties them; set "
            "tie_word_embeddings to false there to load both, or take the head out of the file"
        )


def _read_parameters(
    cfg: PolicyConfig, leaves: Sequence[Leaf], tensors: Mapping[str, Entry],
    shardings: Callable[[Any, Any], Any] | None,
) -> Params:
    """All parameters, each filled on its own devices."""
    _, init, axes = build(cfg)
    shapes = jax.eval_shape(init, jax.random.key(0))
    places = jax.tree.map(lambda _: None, shapes) if shardings is None else shardings(axes, shapes)
    params: dict[str, Any] = {}
    for leaf in sorted(leaves, key=lambda leaf: -math.prod(leaf.shape)):  # the largest while there is most room
        *parents, last = leaf.path
        node, place = params, places
        for key in parents:
            node, place = node.setdefault(key, {}), place[key]
        node[last] = _fill(leaf, tensors, jnp.dtype(cfg.param_dtype), place[last])
    return params


def _fill(leaf: Leaf, tensors: Mapping[str, Entry], dtype: Any, sharding: NamedSharding | None) -> Array:
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


def _pieces(leaf: Leaf, tensors: Mapping[str, Entry]) -> Iterator[tuple[int, np.ndarray]]:
    """Where each piece starts, and the piece in Hugging Face's layout; [experts, ...] in a mixture."""
    if leaf.path[0] == "blocks":
        for layer, names in enumerate(leaf.names):
            experts = [_read(name, tensors[name], slice(None)) for name in names]
            yield layer, experts[0] if len(experts) == 1 else np.stack(experts)
        return
    ((name,),) = leaf.names
    for rows in _row_pieces(leaf.tensor_shape):
        yield rows.start, _read(name, tensors[name], rows)


def _row_pieces(shape: Sequence[int]) -> Iterator[slice]:
    """The rows of a tensor of this shape, some at a time."""
    step = max(1, _PIECE_BYTES // (4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _read(name: str, entry: Entry, rows: slice) -> np.ndarray:
    try:
        return entry.read(rows)
    except (OSError, SafetensorError, ValueError, NotImplementedError) as error:
        raise LoadingError(f"{entry.file}: tensor {name} cannot be read: {error}") from error


def _replicate(piece: np.ndarray, sharding: NamedSharding | None) -> Array:
    """The piece on every device of the sharding; each process passes the whole piece."""
    if sharding is None:
        return jnp.asarray(piece)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.make_array_from_callback(piece.shape, everywhere, lambda index: piece[index])
