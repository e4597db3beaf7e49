"""Trained policies, wherever they lie: the box, a workdir, an exported folder, a Hugging Face folder, a GGUF file."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from agrl_jax.data import chat, pipeline
from agrl_jax.data.pairs import Pair
from agrl_jax.evaluation import probabilities
from agrl_jax.evaluation.probabilities import CalibrationError
from agrl_jax.judging import STAGES
from agrl_jax.policy import adapters, gguf, loading, shipped, transformer
from agrl_jax.policy.families import LoadingError
from agrl_jax.policy.smollm2 import NotInstalledError
from agrl_jax.policy.tokenizer import Tokenizer, TokenizerError
from agrl_jax.rulebook import automaton, book
from agrl_jax.rulebook.book import RuleBook, RuleBookError
from agrl_jax.runtime import sharding
from agrl_jax.runtime.checkpoint import SFT_END, Checkpointer, CheckpointError
from agrl_jax.runtime.config import ConfigError
from agrl_jax.runtime.files import is_remote, read_json
from agrl_jax.runtime.sharding import ShardingError
from agrl_jax.training import assemble
from agrl_jax.types import Array, Params, Policy, RuleTables

RECORD_FILE = "agrl_jax.json"  # the record of training in an exported folder
CUTS_FILE = "cuts.json"
# Fields of the record: how prompts and responses were written in training.
RECORDED = ("rulebook", "order", "rulebook_digest", "style", "prompt_len", "response_len", "dtype", "compute_dtype")
_ITEM_TOKENS = 192  # room for query and item in a prompt of a model without a record
_FREE_TOKENS = 128  # room for free text in a response, likewise


class TrainedError(ValueError):
    """A checkpoint that is not there, or not what it should be; the message says what would be right."""


# Errors in a checkpoint that a user can put right.
LOAD_ERRORS = (
    TrainedError, ConfigError, RuleBookError, LoadingError, TokenizerError, CheckpointError, CalibrationError,
    NotInstalledError, ShardingError, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How prompts and responses are written. None: as in training, or a default for a model without a record."""

    rulebook: str | None = None  # a bundled rule book by name, or a YAML file
    order: str | None = None  # of the response
    style: str | None = None  # of the prompt
    prompt_len: int | None = None  # tokens; longer item texts are shortened
    response_len: int | None = None  # tokens
    dtype: str | None = None  # of parameters and computation


@dataclass(frozen=True)
class Trained:
    """A policy with all that judging needs."""

    book: RuleBook
    tokenizer: Tokenizer
    tables: RuleTables
    policy: Policy
    params: Params
    style: str
    instructions: np.ndarray  # [I] tokens before all prompts
    prompt_len: int
    response_len: int
    cuts_file: epath.Path  # where its cut points are kept
    calibration_file: epath.Path  # and the temperature of its probabilities
    checkpoint: str  # its name there: of a workdir, that of the checkpoint; else a fingerprint
    weights: str  # a name for the weights, equal on all machines and meshes

    def check_keeps(self) -> None:
        """Raises TrainedError where nothing can be kept beside the checkpoint."""
        folder = Path(self.calibration_file).parent
        if shipped.is_boxed(folder):
            raise TrainedError(
                f"{folder.name} is part of the package, where nothing is kept; export it first and use the export: "
                f"python -m agrl_jax.export --checkpoint={folder.name} --out=FOLDER"
            )


def load(
    path: str, stage: str = "best", settings: Settings | None = None, mesh: jax.sharding.Mesh | None = None
) -> Trained:
    """Loads a workdir, an exported or other Hugging Face folder, a GGUF file, or a model that a package brings.

    Args:
      path: the checkpoint's path, or its name (`shipped.named`).
      stage: of a workdir: see `load_stage`.
      settings: replace those of the checkpoint.
      mesh: holds the parameters; by default all devices, each with all parameters.

    Raises:
      TrainedError: there is no checkpoint, or its rule book is not the one it was trained with.
      LoadingError, CheckpointError, ...: its files cannot be used.
    """
    settings = settings or Settings()
    mesh = mesh or sharding.make_mesh()
    place = epath.Path(shipped.named(path) or path).expanduser()
    if not place.exists():
        raise TrainedError(f"{path}: there is no such checkpoint, nor one in the box: {', '.join(shipped.boxed())}")
    if (place / "checkpoints").exists():
        return _load_workdir(place, stage, settings, mesh)
    if place.is_dir() and not ((place / "config.json").exists() or loading.is_adapters(place)):
        raise TrainedError(
            f"{path}: should be a training run's workdir (config.json, checkpoints/), an exported or other Hugging "
            "Face folder (config.json, model.safetensors), exported adapters, or a GGUF file"
        )
    return _load_model(place, settings, mesh)


class Stage(NamedTuple):
    """A checkpoint of a workdir; as text, in words."""

    name: str  # rl or sft_end
    step: int

    def __str__(self) -> str:
        return assemble.checkpoint_name(self.name, self.step)


def stages_of(folder: epath.Path) -> list[str]:
    """Which of `sft_end` and `rl` a workdir has."""
    with Checkpointer(folder) as checkpoints:
        has_rl = checkpoints.latest_step("rl") is not None
        return [SFT_END] * bool(checkpoints.sft_ended) + ["rl"] * has_rl


def find_stage(folder: epath.Path, config: ConfigDict, rules: RuleBook, stage: str) -> Stage:
    """The checkpoint that a stage names in a workdir, which was trained with these rules.

    `best` is the best of RL by validation, or the end of the warm start if there was no RL; `rl` is the latest of RL;
    `sft_end` is the end of the warm start.
    """
    if stage not in STAGES:
        raise TrainedError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    with Checkpointer(folder) as checkpoints:
        step = checkpoints.best_step("rl") if stage == "best" else checkpoints.latest_step("rl")
        if stage == SFT_END or (stage == "best" and step is None):
            found = Stage(SFT_END, config.sft.steps)
        elif step is None:
            raise CheckpointError(f"{checkpoints.directory / 'rl'} holds no checkpoint")
        else:
            found = Stage("rl", step)
        if checkpoints.sft_ended:
            _check_digest(rules, _identity_of(checkpoints, found)["rulebook"], str(folder))
    return found


def _identity_of(checkpoints: Checkpointer, stage: Stage) -> dict[str, Any]:
    """The run that wrote the checkpoint of a stage."""
    return checkpoints.record(stage.name, stage.step if stage.name == "rl" else 0)["identity"]


def changed_pairs(folder: epath.Path, stage: Stage, digests: Mapping[str, str]) -> list[str]:
    """The splits whose pairs differ from those that a stage was trained with, given the digests of the pairs.

    Empty for checkpoints that do not record the digests.
    """
    with Checkpointer(folder) as checkpoints:
        before = _identity_of(checkpoints, stage).get("pairs", {})
    return [name for name, digest in before.items() if digests.get(name) != digest]


def load_stage(
    folder: epath.Path, config: ConfigDict, model: assemble.Model, mesh: jax.sharding.Mesh, stage: str
) -> tuple[Params, Stage]:
    """The parameters of a workdir at a stage, and the checkpoint that `find_stage` finds for it."""
    found = find_stage(folder, config, model.book, stage)
    return assemble.load_params(folder, config, model, mesh, *found), found


def weights_name(
    folder: epath.Path, config: ConfigDict, model: assemble.Model, mesh: jax.sharding.Mesh, found: Stage, params: Params
) -> str:
    """A name for a workdir's parameters, from those that are kept: adapters, merged on another mesh, round otherwise.
    """
    if assemble.adapters_of(config, found.name) is None:
        return fingerprint(params)
    kept = assemble.load_trained(folder, config, model, mesh, *found)
    return f"{fingerprint(kept)} in {config.policy.param_dtype}"


def identity(rules: RuleBook, weights: str) -> dict[str, str]:
    """All that judgements depend on, by name, given the name of the weights."""
    return {"rule book": rules.digest, "checkpoint": weights}


def fingerprint(params: Params) -> str:
    """A short name for parameters: equal values have equal names, on any devices. Not cryptographic."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = [(jax.tree_util.keystr(path), leaf.shape, int(_checksum(leaf))) for path, leaf in leaves]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


@jax.jit
def _checksum(leaf: Array) -> Array:
    kind = jnp.uint32 if leaf.dtype.itemsize == 4 else jnp.uint16
    return jnp.sum(jax.lax.bitcast_convert_type(leaf, kind), dtype=jnp.uint32)  # integers: exact in any order


# --------------------------------------------------------------------------------------------- the kinds


def _load_workdir(folder: epath.Path, stage: str, settings: Settings, mesh: jax.sharding.Mesh) -> Trained:
    config = assemble.read_config(folder)
    given = {
        "rulebook.order": settings.order,
        "policy.param_dtype": settings.dtype, "policy.compute_dtype": settings.dtype,
    }  # fmt: skip
    config.update_from_flattened_dict({name: value for name, value in given.items() if value is not None})
    rules = assemble.rules_in(settings.rulebook, config) if settings.rulebook else None
    model = assemble.load_model(config, folder, rules, mesh=mesh)
    params, found = load_stage(folder, config, model, mesh, stage)
    style = settings.style or config.data.style
    return Trained(
        model.book, model.tokenizer, model.tables, model.policy, params,
        style=style,
        instructions=pipeline.instructions(model.book, model.tokenizer, style),
        prompt_len=settings.prompt_len or config.data.prompt_len,
        response_len=settings.response_len or config.data.response_len,
        cuts_file=folder / CUTS_FILE,
        calibration_file=folder / probabilities.FILE,
        checkpoint=str(found),
        weights=weights_name(folder, config, model, mesh, found, params),
    )


def _load_model(path: epath.Path, settings: Settings, mesh: jax.sharding.Mesh) -> Trained:
    """A folder or file of a language model, with the record of its training where `export` left one."""
    record = _read_record(path / RECORD_FILE) if path.is_dir() and (path / RECORD_FILE).exists() else {}
    own_book = path / record["rulebook"] if record else "four_tier"
    rules = book.load(settings.rulebook or own_book, settings.order or record.get("order"), record.get("free_text"))
    _check_digest(rules, record.get("rulebook_digest"), str(path))
    dtype = settings.dtype or record.get("dtype", "float32")
    with _local(path) as local:
        shape, params, tokenizer = loading.load_pretrained(
            str(local),
            dtype,
            settings.dtype or record.get("compute_dtype", "float32"),
            partial(sharding.param_shardings, mesh),
        )
    style = settings.style or record.get("style") or ("full" if tokenizer.chat_template is None else "chat")
    if style == "chat" and not record:  # an export's tokenizer already ends answers as in training
        tokenizer = tokenizer.ending_with(chat.end_of_turn(tokenizer))
    shape = dataclasses.replace(shape, attention="auto").on(mesh.devices.flat[0].platform)
    policy, _, _ = transformer.build(shape, sharding.placing(mesh))
    padding = [None] * (shape.vocab_size - tokenizer.vocab_size)  # some models pad their vocabulary
    tables = automaton.compile_tables(
        rules, [*tokenizer.token_bytes(), *padding], tokenizer.end_token, tokenizer.marks,
        pipeline.thought(rules, tokenizer) if style == "chat" else None, tokenizer.end_tokens[1:],
    )  # fmt: skip
    lengths = _default_lengths(rules, tokenizer, style) | record
    merged = loading.is_adapters(path)
    name = adapters.digest(path) if merged else fingerprint(params)

    def beside(name: str) -> epath.Path:
        return path / name if path.is_dir() else path.with_suffix(f".{name}")

    return Trained(
        rules, tokenizer, jax.tree.map(np.asarray, tables), policy, params,
        style=style,
        instructions=pipeline.instructions(rules, tokenizer, style),
        prompt_len=settings.prompt_len or lengths["prompt_len"],
        response_len=settings.response_len or lengths["response_len"],
        cuts_file=beside(CUTS_FILE),
        calibration_file=beside(probabilities.FILE),
        checkpoint=name,
        weights=f"{name} in {dtype}" if merged else name,
    )


@contextmanager
def _local(path: epath.Path) -> Iterator[epath.Path]:
    """A model as a local folder or file while the block lasts; weights and tokenizers are read from local files."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in path.iterdir() if path.is_dir() else gguf.parts(path):
            if not file.is_dir():
                with file.open("rb") as there, (epath.Path(folder) / file.name).open("wb") as here:
                    shutil.copyfileobj(there, here)
        yield epath.Path(folder) if path.is_dir() else epath.Path(folder) / path.name


def _read_record(file: epath.Path) -> dict[str, Any]:
    record = read_json(file, TrainedError, "; export the workdir again")
    if missing := [name for name in RECORDED if name not in record]:
        raise TrainedError(f"{file}: not the record of an export: lacks {missing[0]!r}; export the workdir again")
    free_text = record.get("free_text")  # in an older export the rule book alone has it
    return {name: record[name] for name in RECORDED} | {"free_text": free_text}


def _check_digest(rules: RuleBook, trained_by: str | None, checkpoint: str) -> None:
    if trained_by not in (None, rules.digest):
        raise TrainedError(
            f"{checkpoint}: was trained with another rule book than {rules.name!r} in the order {rules.order}; "
            "its file has changed since, or --rulebook or --order names another"
        )


def _default_lengths(rules: RuleBook, tokenizer: Tokenizer, style: str) -> dict[str, int]:
    """Tokens of prompt and response for a model without a record."""
    (shortest,) = pipeline.prompts([Pair("", query="a", title="a")], rules, tokenizer, 1 << 20, style)
    free = _FREE_TOKENS * (rules.response.free_text != "none")
    return {
        "prompt_len": len(shortest.tokens) + _ITEM_TOKENS,
        "response_len": pipeline.part_texts(rules, tokenizer).longest_response + free,
    }
