"""From a config to the parts of a run: rule book, data, tokenizer, policy, tables.

Training, evaluation and judging all start here, so that they read a workdir in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.data import chat, pipeline
from agrl_jax.data.bundled import benchmark
from agrl_jax.data.format import PairsFormat
from agrl_jax.data.judged import Taught, read_taught
from agrl_jax.data.mixture import MixtureConfig, mix
from agrl_jax.data.pairs import Pair, PairsError, digest, hide_steps, item_text, shared_queries
from agrl_jax.data.pipeline import EncodedSplit
from agrl_jax.data.relabel import spread
from agrl_jax.data.sources import read_source, read_tests, read_training
from agrl_jax.evaluation.evaluator import EvalConfig, Evaluator
from agrl_jax.policy import adapters as adapter_files
from agrl_jax.policy import decoding, loading, lora, shipped, transformer
from agrl_jax.policy import tokenizer as tokenizers
from agrl_jax.policy.layers import PolicyConfig
from agrl_jax.policy.lora import LoraConfig
from agrl_jax.policy.tokenizer import Tokenizer
from agrl_jax.rulebook import automaton, book, wording
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.rulebook.variants import training_variants
from agrl_jax.runtime import sharding
from agrl_jax.runtime.checkpoint import SFT_END, Checkpointer
from agrl_jax.runtime.config import FILES, ConfigError, resolve
from agrl_jax.runtime.files import is_remote, read_json, write_json, write_text
from agrl_jax.supervised.distill import Lessons, lessons
from agrl_jax.supervised.fill import Blanks
from agrl_jax.supervised.marginal import forks
from agrl_jax.types import UNKNOWN, Array, Params, Policy, RuleTables

CONFIG_FILE = "config.json"
RULEBOOK_FILE = "rulebook.yaml"  # the text of the run's rule book, wherever that came from
TOKENIZER_FILE = "tokenizer.json"
POLICY_FILE = "policy.json"  # of a pretrained policy: its name, how it is asked, and its shape
TAUGHT_FILE = "teacher.parquet"  # of a student: what its teacher said
_STAND_IN_VOCABULARY = 300  # the size of a tokenizer that preflight makes up: the bytes and a few merges
_TOKEN_CHARACTERS = 3.4  # characters of the instructions for each token, measured with SmolLM2
_BUNDLED = frozenset(("benchmark", "benchmark_train", "mixture"))  # values of `sft.source` that need the benchmark
SFT = "sft"  # in place of a split: the pairs of the warm start
TRAINED = (SFT, "train")  # may be trained on, under variants of the rule book; all others are judged by the book itself
_FORMERLY = {"lora": {"base_dtype": "float32"}}  # what workdirs without these fields were trained with
_NO_SHAPE = ("pretrained", "thinking", "thought_len")  # fields of `policy` that say how a pretrained one is used
_NO_SETTING = ("every", "batch_size")  # fields of `eval` that no scorecard depends on


@dataclass(frozen=True)
class Model:
    """A policy's pure functions with the rule book and tokenizer that they go with."""

    book: RuleBook
    tokenizer: Tokenizer
    tables: RuleTables
    shape: PolicyConfig
    policy: Policy
    init: Any  # key -> Params
    axes: Params  # logical axes of each parameter
    instructions: np.ndarray  # [I] tokens before all prompts
    variants: tuple[RuleBook, ...] = ()  # of the rule book, of a training under variants; see `under_variants`


@dataclass(frozen=True)
class Data:
    """Labelled pairs by split. `train` and `validation` are always there; the others are evaluated."""

    splits: Mapping[str, list[Pair]]
    sft: list[Pair]  # pairs of the warm start
    notes: tuple[str, ...] = ()  # what a user should know of the files

    def pairs(self, name: str) -> list[Pair]:
        """The pairs of a split, or of the warm start."""
        return self.sft if name == SFT else self.splits[name]

    @property
    def families(self) -> tuple[str, ...]:
        """Names of all query families, sorted."""
        return tuple(sorted({pair.family for pairs in (self.sft, *self.splits.values()) for pair in pairs}))

    @property
    def digests(self) -> dict[str, str]:
        """A short name for the pairs of each split and of the warm start: other pairs, another name."""
        return {SFT: digest(self.sft), **{name: digest(pairs) for name, pairs in self.splits.items()}}

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """Names of the splits that the scorecard is made on."""
        return tuple(name for name in self.splits if name not in ("train", "validation"))


# -------------------------------------------------------------------------- the rule book and the config


def load_rules(config: ConfigDict) -> RuleBook:
    """The rule book that a config names."""
    return rules_in(config.rulebook.path, config)


def keep_rules(config: ConfigDict, workdir: epath.Path) -> None:
    """Keeps the text of the rule book that a config names in the workdir: what reads a workdir reads it there."""
    write_text(workdir / RULEBOOK_FILE, book.file_of(config.rulebook.path).read_text())


def rules_file(config: ConfigDict, workdir: epath.Path) -> epath.Path:
    """Where the rule book of a workdir lies; workdirs of an older version name it in their config alone."""
    kept = workdir / RULEBOOK_FILE
    return kept if kept.exists() else book.file_of(config.rulebook.path)


def kept_rules(config: ConfigDict, workdir: epath.Path) -> RuleBook:
    """The rule book that a workdir was trained with."""
    return rules_in(rules_file(config, workdir), config)


def rules_in(file: epath.PathLike, config: ConfigDict) -> RuleBook:
    """The rule book in a file, with the order and the free text that a config asks for."""
    free_text = config.rulebook.free_text
    return book.load(file, config.rulebook.order, None if free_text == "book" else free_text)


def write_config(config: ConfigDict, workdir: epath.Path) -> None:
    """Keeps the resolved config in a workdir, all fields visible."""
    write_json(workdir / CONFIG_FILE, resolve(config))


def read_config(workdir: epath.Path) -> ConfigDict:
    """The config that a workdir was trained with, as of `whole_config`. Raises ConfigError if there is none."""
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise ConfigError(f"{path}: not found; is {workdir} the workdir of a training run?")
    return whole_config(read_json(path, ConfigError))


def whole_config(kept: Mapping[str, Any]) -> ConfigDict:
    """A config that was kept; fields that an older version lacked have their defaults."""
    return ConfigDict(_overlaid(_overlaid(resolve(recipes.base()), _FORMERLY), kept))


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above`, with what it lacks taken from `below`, branch by branch."""
    shared = {name for name, value in below.items() if isinstance(value, dict) and name in above}
    return {**below, **above, **{name: _overlaid(below[name], above[name]) for name in shared}}


# -------------------------------------------------------------------------------------------- parameters


def load_params(
    workdir: epath.Path, config: ConfigDict, model: Model, mesh: jax.sharding.Mesh, stage: str, step: int | None = None
) -> Params:
    """Parameters of a workdir's checkpoint: of `stage` "rl", "sft" or "sft_end", the latest or the given step.

    Adapters come merged into their base, in the dtype of parameters that are trained.
    """
    params, adapters = load_trained(workdir, config, model, mesh, stage, step), adapters_of(config, stage)
    if adapters is None:
        return params
    base = load_base(config, model, mesh)
    if base is None:
        base = as_base(config, load_trained(workdir, config, model, mesh, SFT_END))
    return jax.jit(lora.merge, static_argnums=(2, 3))(base, params, adapters, config.policy.param_dtype)


def load_trained(
    workdir: epath.Path, config: ConfigDict, model: Model, mesh: jax.sharding.Mesh, stage: str, step: int | None = None
) -> Params:
    """What a stage has trained, all parameters or adapters, of a workdir's checkpoint; see `load_params`."""
    template = param_shapes(*trained_part(config, model, stage), mesh)
    with Checkpointer(workdir) as checkpoints:
        if stage != SFT_END:
            return checkpoints.restore_params(template, stage, step)
        params = checkpoints.restore_sft(template)
    if params is None:
        raise ConfigError(f"{workdir}: the warm start has not ended; resume the run first")
    return params


def checkpoint_name(stage: str, step: int) -> str:
    """A checkpoint of a workdir in words."""
    return "the end of the warm start" if stage == SFT_END else f"step {step} of RL"


def adapters_of(config: ConfigDict, stage: str) -> LoraConfig | None:
    """The low-rank adapters that a stage trains; None where it trains all weights. Raises ConfigError."""
    settings = config.lora
    if not settings.rank or (settings.stages == "rl" and stage != "rl"):
        return None
    try:
        return LoraConfig(settings.rank, settings.alpha, tuple(settings.modules.replace(" ", "").split(",")))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def trained_part(config: ConfigDict, model: Model, stage: str) -> tuple[Callable[[Array], Params], Params]:
    """What a stage trains, as `init(key) -> Params` and logical axes: the policy, or adapters for it."""
    adapters = adapters_of(config, stage)
    if adapters is None:
        return model.init, model.axes
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return partial(lora.init, shapes=shapes, axes=model.axes, cfg=adapters), lora.adapter_axes(model.axes, adapters)


def param_shapes(init: Callable[[Array], Params], axes: Params, mesh: jax.sharding.Mesh) -> Params:
    """Shapes, dtypes and shardings of parameters, from the function that draws them and their logical axes."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    places = sharding.param_shardings(mesh, axes, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def for_decoding(
    config: ConfigDict, model: Model, mesh: jax.sharding.Mesh, stage: str = ""
) -> Callable[[Params, Params | None], Params]:
    """The function `(trained, base) -> params`: the weights to decode with, from what a stage trains and its base.

    Decoding uses the parameters once for each token. So they are cast to the dtype in which the policy computes with
    them, and gathered over `fsdp` (unless `mesh.gather_decode` is False), before the loop and not inside it, and then
    brought into the form that the platform reads fastest. Without a stage, `trained` are all parameters.
    """
    adapters = adapters_of(config, stage) if stage else None
    gather = partial(sharding.gathered, mesh) if config.mesh.gather_decode else lambda axes, params: params

    def prepare(trained: Params, base: Params | None = None) -> Params:
        whole = gather(model.axes, transformer.cast_weights(model.shape, trained if adapters is None else base))
        if adapters is not None:
            whole = lora.attach(whole, gather(lora.adapter_axes(model.axes, adapters), trained), adapters)
        return decoding.for_decoding(whole, mesh.devices.flat[0].platform)

    return jax.jit(prepare)


# -------------------------------------------------------------------------------------------------- data


def pairs_format(config: ConfigDict) -> PairsFormat:
    """How the files of pairs are written that a config names. Raises ConfigError."""
    data = config.data
    try:
        return PairsFormat.parse(data.columns, data.labels, data.bins, data.on_bad_rows)
    except PairsError as error:
        raise ConfigError(f"config: data.{error}") from None


def load_data(config: ConfigDict, rules: RuleBook, workdir: epath.Path) -> Data:
    """The bundled benchmark, where it is needed, and the pairs of the files that the config names."""
    form = pairs_format(config)
    parts = {"both": "benchmark+train"}.get(config.sft.source, config.sft.source).split("+")
    seed, warm, notes, splits, tests = config.data.seed, {}, [], {}, {}
    if config.data.source in FILES:  # files are read first: a bad one is refused at once
        mine = read_source(config.data.source, config.data.path, rules, seed, form, config.data.test_path)
        splits = dict(mine.splits)
        notes += mine.notes
    elif config.data.test_path:
        more = read_tests(config.data.test_path, rules, form)
        tests = more.splits
        notes += [f"{config.data.test_path}: {note}" for note in more.notes]
    for kind in FILES.intersection(parts):
        extra = read_training(kind, config.sft.path, rules, seed, form)
        warm[kind] = extra.splits["train"]
        notes += [f"{config.sft.path}: {note}" for note in extra.notes]
    if not splits or _BUNDLED.intersection(parts):
        kept = epath.Path("~/.cache/agrl_jax").expanduser() if is_remote(workdir) else workdir / "data"
        bundled = benchmark.load_benchmark(config.data.dir or str(kept), seed, rules)
        warm |= {"benchmark": bundled["sft"], "benchmark_train": bundled["train"]}
        splits = splits or {name: bundled[name] for name in ("train", "validation", "b_eval", "w_eval")} | tests
    if config.data.steps_known >= 0:
        splits["train"] = hide_steps(splits["train"], config.data.steps_known, rules, seed)
    if config.data.source == "benchmark":
        warm["benchmark_train"] = splits["train"]
    warm["train"] = splits["train"]
    warm["known"] = [pair for pair in splits["train"] if pair.steps and UNKNOWN not in pair.steps]
    if "known" in parts and not warm["known"]:
        raise ConfigError(f"sft.source={config.sft.source}: no training pair has all its steps known")
    if "mixture" in parts:
        warm["mixture"] = mix(bundled["train"], splits["train"], rules, MixtureConfig(**config.mixture.to_dict()), seed)
    sft = warm[parts[0]] if len(parts) == 1 else [pair for part in parts for pair in warm[part]]
    read = [pair for kind in FILES.intersection(parts) for pair in warm[kind]]
    for name in ("validation", "test"):
        if shared := shared_queries(read, splits.get(name, ())):
            notes.append(f"queries of the {name} pairs that the warm start is trained on too: {shared}; "
                         "sft.source=train trains it on the training pairs alone")  # fmt: skip
    return Data(splits, sft, tuple(notes))


def encode(config: ConfigDict, model: Model, data: Data, names: Sequence[str]) -> dict[str, EncodedSplit]:
    """Tokenised splits, by name, in the shapes of the config; `sft` are the pairs of the warm start.

    Those that are TRAINED on are spread over the rule book and the model's variants of it. Raises PairsError with what
    is wrong in any of them.
    """
    by_pairs: dict[int, EncodedSplit | None] = {}  # the warm start may have the pairs of a split
    problems = []
    for name in names:
        pairs = data.pairs(name)
        if id(pairs) in by_pairs:
            continue
        variants = model.variants if name in TRAINED else ()
        try:
            by_pairs[id(pairs)] = pipeline.encode(
                spread(pairs, variants, config.data.seed) if variants else pairs, model.book, model.tokenizer,
                config.data.prompt_len, config.data.response_len, config.data.style, families=data.families,
                variants=variants,
            )  # fmt: skip
        except PairsError as error:
            by_pairs[id(pairs)] = None
            path = {SFT: config.sft.path, "test": config.data.test_path}.get(name) or config.data.path
            file = path or "the bundled benchmark"
            problems.append(f"{file}, {'pairs of the warm start' if name == SFT else f'split {name}'}: {error}")
    if problems:
        raise PairsError("\n".join(problems))
    return {name: by_pairs[id(data.pairs(name))] for name in names}


def load_lessons(config: ConfigDict, model: Model) -> tuple[Lessons, Taught]:
    """What a student is to learn, and where that is from. Raises PairsError or ConfigError."""
    try:
        columns = PairsFormat.parse(config.distill.columns).columns
    except PairsError as error:
        raise ConfigError(f"config: distill.{error}") from None
    taught = read_taught(config.distill.path, model.book, columns)
    if config.distill.batch_size > len(taught.pairs):
        raise ConfigError(
            f"distill.batch_size={config.distill.batch_size} is more than the {len(taught.pairs)} pairs of "
            f"{config.distill.path}"
        )
    try:
        encoded = pipeline.encode(
            taught.pairs, model.book, model.tokenizer, config.data.prompt_len, config.data.response_len,
            config.data.style,
        )  # fmt: skip
    except PairsError as error:
        raise PairsError(f"{config.distill.path}: {error}") from None
    return lessons(encoded.batch, taught.probs), taught


def blanks(config: ConfigDict, model: Model, split: EncodedSplit) -> Blanks | None:
    """What the policy needs to fill in unknown steps of a split for supervised training; None if all are known."""
    if not np.any(split.batch.steps == UNKNOWN):
        return None
    texts = pipeline.part_texts(model.book, model.tokenizer)
    reasons = 0 if split.batch.reason_len is None else int(split.batch.reason_len.sum(axis=1).max())
    if texts.longest_response + reasons > config.data.response_len:
        raise ConfigError(
            f"data.response_len is {config.data.response_len}: some steps are unknown, so the policy fills them in, "
            f"and the longest response can have {texts.longest_response + reasons} tokens"
        )
    if config.sft.unknown_steps == "fill":
        return Blanks(model.tables, texts)
    apart = forks(texts)
    if apart is None or model.book.order != "think_then_respond":
        raise ConfigError(
            "sft.unknown_steps=sum needs the steps before the tier, and values whose texts one token tells apart; "
            f"with the rule book {model.book.name} and this tokenizer it should be fill"
        )
    return Blanks(model.tables, texts, apart)


# --------------------------------------------------------------------------------------------- the model


def load_model(
    config: ConfigDict, workdir: epath.Path, rules: RuleBook | None = None, data: Data | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """The policy of a config, without its weights; on a mesh, its activations are held to their places there.

    The workdir holds the tokenizer, the rule book, which `rules` replaces, and the shape of a pretrained model (see
    `keep_pretrained`). A run that begins passes its `data`: a policy from scratch trains its tokenizer on them, and
    keeps it in the workdir.
    """
    rules = rules or kept_rules(config, workdir)
    if config.policy.pretrained:
        tokenizer, shape = _kept_pretrained(config, workdir)
    else:
        tokenizer, shape = _from_scratch(config, rules, workdir, data)
    return _model(rules, tokenizer, shape, mesh, pipeline.instructions(rules, tokenizer, config.data.style))


def under_variants(config: ConfigDict, model: Model) -> Model:
    """The model as training takes it: with the tables of all rule books that pairs are spread over. Since these differ
    in their instructions, these stand within the prompts. The same model if the config asks for no variants."""
    if not config.rulebook.variants:
        return model
    variants = training_variants(model.book, config.rulebook.variants)
    tier_of = np.stack([rules.tier_table() for rules in (model.book, *variants)])
    return dataclasses.replace(
        model, variants=variants, tables=model.tables.replace(tier_of=tier_of), instructions=model.instructions[:0]
    )


def stand_in_model(config: ConfigDict, mesh: jax.sharding.Mesh, shape: str = "") -> Model:
    """The model of a config to compile with, where neither data nor weights are at hand.

    Its tokenizer is one of the rule book's own words, in a vocabulary of the right size; its instructions have about as
    many tokens as a language model's. `shape` names a file that holds a pretrained model's shape; by default it is read
    from the model.
    """
    rules = load_rules(config)
    tokenizer = tokenizers.train_bpe([phrase.text for phrase in rules.phrases], _STAND_IN_VOCABULARY)
    path = shape or config.policy.pretrained
    if path:
        found = loading.read_config(shape or shipped.find(path))
    else:
        found = PolicyConfig(**_own_shape(config))
    before, _, _ = wording.prompt_pieces(rules, config.data.style)
    shared = 0 if config.data.style == "terse" else round(len(before) / _TOKEN_CHARACTERS)
    return _model(rules, tokenizer, _computing(config, found), mesh, np.zeros(shared, np.int32))


def _model(
    rules: RuleBook, tokenizer: Tokenizer, shape: PolicyConfig, mesh: jax.sharding.Mesh | None, instructions: np.ndarray
) -> Model:
    if tokenizer.thinking and rules.response.free_text == "none":
        raise ConfigError(
            f"policy.thinking=on needs room for thoughts, and the rule book {rules.name} has no free text; set "
            "rulebook.free_text=between"
        )
    padding = [None] * (shape.vocab_size - tokenizer.vocab_size)  # some models pad their vocabulary
    tables = automaton.compile_tables(
        rules, [*tokenizer.token_bytes(), *padding], tokenizer.end_token, tokenizer.marks,
        pipeline.thought(rules, tokenizer), tokenizer.end_tokens[1:],
    )  # fmt: skip
    shape = shape.on(jax.default_backend() if mesh is None else mesh.devices.flat[0].platform)
    policy, init, axes = transformer.build(shape, *([] if mesh is None else [sharding.placing(mesh)]))
    return Model(rules, tokenizer, jax.tree.map(np.asarray, tables), shape, policy, init, axes, instructions)


def load_base(config: ConfigDict, model: Model, mesh: jax.sharding.Mesh) -> Params | None:
    """The weights below the adapters of the warm start; None where it has none."""
    if adapters_of(config, SFT) is None:
        return None
    return load_pretrained(config, model, mesh, config.lora.base_dtype)


def first_adapters(config: ConfigDict, model: Model, mesh: jax.sharding.Mesh) -> Params | None:
    """The adapters that the warm start goes on with, float32, on the mesh; None where it draws fresh ones.

    Raises:
      ConfigError: they have another base, rank or other modules than the config sets.
    """
    cfg = adapters_of(config, SFT)
    if cfg is None or not config.lora.start:
        return None
    path = shipped.find(config.lora.start)
    found = adapter_files.read(path)
    theirs = _adapter_fields(found.base, found.cfg)
    for name, wanted in _adapter_fields(config.policy.pretrained, cfg).items():
        if theirs[name] != wanted:
            raise ConfigError(f"lora.start={config.lora.start}: has {name}={theirs[name]}, the config {wanted}")
    adapter_files.check(path, found, jax.eval_shape(model.init, jax.random.key(0)), model.axes)
    params = jax.tree.map(lambda x: x.astype(np.float32), found.params)
    return sharding.put(params, sharding.param_shardings(mesh, lora.adapter_axes(model.axes, cfg), params))


def _adapter_fields(base: str, cfg: LoraConfig) -> dict[str, Any]:
    """What adapters must have in common with a run that goes on with them; of a path, the last part."""
    modules = ",".join(sorted(cfg.modules))
    numbers = {"lora.rank": cfg.rank, "lora.alpha": cfg.alpha}
    return {"policy.pretrained": Path(base).name, **numbers, "lora.modules": modules}


def as_base(config: ConfigDict, params: Params) -> Params:
    """Parameters, or their shapes, in the dtype of what lies below adapters."""
    dtype = jnp.dtype(config.lora.base_dtype)

    def cast(leaf: Any) -> Any:
        if leaf.dtype == dtype:
            return leaf
        return leaf.update(dtype=dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.astype(dtype)

    return jax.tree.map(cast, params)


def load_pretrained(config: ConfigDict, model: Model, mesh: jax.sharding.Mesh, dtype: str = "") -> Params:
    """The weights of the pretrained model that a config names, straight onto the mesh; in `policy.param_dtype`, or in
    `dtype` if it is given."""
    path = shipped.find(config.policy.pretrained)
    shape, params, _ = loading.load_pretrained(
        path, dtype or config.policy.param_dtype, config.policy.compute_dtype, partial(sharding.param_shardings, mesh)
    )
    how = {name: getattr(shape, name) for name in ("remat", "attention", "param_dtype")}
    if shape != dataclasses.replace(model.shape, **how):
        raise ConfigError(f"{path}: is another model than the one whose shape {POLICY_FILE} holds; use a new workdir")
    return params


def keep_pretrained(config: ConfigDict, workdir: epath.Path) -> None:
    """Keeps tokenizer and shape of the pretrained model in the workdir: what goes on there can do without the model."""
    asked = _asked(config)
    if not asked["pretrained"] or _read_kept(workdir, asked):
        return
    path = shipped.find(config.policy.pretrained)
    tokenizer = loading.read_tokenizer(path)
    if config.data.style == "chat":
        tokenizer = tokenizer.ending_with(chat.end_of_turn(tokenizer))
    thinks = config.policy.thinking == "on"
    tokenizer = tokenizer.with_thinking(config.policy.thought_len if thinks else 0)  # an export may have been on
    if thinks:
        pipeline.thought(load_rules(config), tokenizer)  # refuses a model that cannot
    tokenizer.save(workdir)
    kept = asked | {"shape": dataclasses.asdict(loading.read_config(path))}
    write_json(workdir / POLICY_FILE, kept)


def _kept_pretrained(config: ConfigDict, workdir: epath.Path) -> tuple[Tokenizer, PolicyConfig]:
    """Tokenizer and shape of the pretrained model that `keep_pretrained` has kept."""
    kept = _read_kept(workdir, _asked(config))
    if not kept:
        raise ConfigError(f"{workdir / POLICY_FILE}: not found; is {workdir} the workdir of a training run?")
    return tokenizers.load(workdir), _computing(config, loading.shape_of(kept["shape"]))


def _asked(config: ConfigDict) -> dict[str, Any]:
    """What the kept tokenizer and shape depend on. Without thinking it is what older versions kept."""
    thinking = config.policy.thought_len if config.policy.thinking == "on" else None
    return {"pretrained": config.policy.pretrained, "style": config.data.style, "thinking": thinking}


def _read_kept(workdir: epath.Path, asked: Mapping[str, str]) -> dict[str, Any]:
    """What the workdir keeps of the pretrained model asked for; empty if it keeps nothing, or another model."""
    file = workdir / POLICY_FILE
    kept = read_json(file, ConfigError) if file.exists() else {}
    return kept if {name: kept.get(name) for name in asked} == asked else {}


def _computing(config: ConfigDict, shape: PolicyConfig) -> PolicyConfig:
    """A shape with the dtypes, the rematerialisation and the attention that the config sets."""
    wanted = {name: config.policy[name] for name in ("param_dtype", "compute_dtype", "remat", "attention")}
    return dataclasses.replace(shape, **wanted)


def _from_scratch(
    config: ConfigDict, rules: RuleBook, workdir: epath.Path, data: Data | None
) -> tuple[Tokenizer, PolicyConfig]:
    """The tokenizer in the workdir, trained on `data` if there is none yet, and the shape that the config gives."""
    path, other = workdir / TOKENIZER_FILE, workdir / POLICY_FILE
    if path.exists() and not other.exists():
        tokenizer = tokenizers.load(path)
    elif data is None:
        raise ConfigError(f"{path}: not found; is {workdir} the workdir of a training run?")
    else:
        other.unlink(missing_ok=True)  # left by a run that began with a pretrained model
        tokenizer = tokenizers.train_bpe(_training_texts(config, rules, data), config.policy.vocab_size)
        tokenizer.save(path)
    return tokenizer, PolicyConfig(**_own_shape(config) | {"vocab_size": tokenizer.vocab_size})


def _own_shape(config: ConfigDict) -> dict[str, Any]:
    """The fields of `PolicyConfig` that a config gives to a policy from scratch."""
    return {name: value for name, value in config.policy.items() if name not in _NO_SHAPE}


def _training_texts(config: ConfigDict, rules: RuleBook, data: Data) -> Iterable[str]:
    """What the small tokenizer is trained on: training pairs alone, as prompts and gold responses."""
    before, between, after = wording.prompt_pieces(rules, config.data.style)
    for pair in [*data.sft, *data.splits["train"]]:
        yield before + pair.query + between + item_text(pair) + after
        yield "".join(wording.gold_segments(rules, pair.tier, pair.steps, pair.reasons))


# -------------------------------------------------------------------------------------------- evaluation


def make_evaluator(config: ConfigDict, model: Model, mesh: jax.sharding.Mesh) -> Evaluator:
    """The evaluator of a config, its batches placed on `mesh`."""
    settings = EvalConfig(
        batch_size=config.eval.batch_size,
        response_len=config.data.response_len,
        pass_k=config.eval.pass_k,
        pass_pairs=config.eval.pass_pairs,
        temperature=config.rl.temperature,
        seed=config.seed,
        constrained=config.eval.constrained,
    )
    place = partial(sharding.put, shardings=sharding.batch_sharding(mesh))
    return Evaluator(
        model.policy, model.tables, model.book, model.tokenizer, settings, place, sharding.replicated(mesh),
        model.instructions,
    )


def card_settings(config: ConfigDict, step: int, pairs: int | None = None) -> dict[str, Any]:
    """What a scorecard depends on besides the run: the step, and how it is evaluated, on `pairs` if given.

    The temperature of probabilities is fitted on the validation pairs.
    """
    how = {name: value for name, value in config.eval.items() if name not in _NO_SETTING}
    if how["pass_pairs"]:
        how["temperature"] = config.rl.temperature
    return {"step": step} | how | ({} if pairs is None else {"pairs": pairs})
