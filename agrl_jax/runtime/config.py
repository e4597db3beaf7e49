"""Configs: a string argument, the rules that every field obeys, and errors in one line.

A config is an ml-collections `ConfigDict` made by `get_config(arg)` of a config file. `recipes` holds
its defaults with their meanings; this module holds the types and ranges (`RULES`), the checks of several
fields together (`validate_together`), and turns a mistake on the command line into one clear message
(`parse_flags`). Fields are named by their dotted path, `rl.group_size`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict

from agrl_jax.hints import did_you_mean

flags.disclaim_key_flags()  # a caller's --help shows the flag of `define_distributed_flag` as its own


class ConfigError(ValueError):
    """A config that cannot be run; the message names every field that is wrong."""


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    otherwise = f"; known: {', '.join(known)}" if len(known) <= 12 else "; `python -m agrl_jax.fields` lists all"
    return did_you_mean(name, known, count=3) or otherwise


# ------------------------------------------------------------------------- the argument of a config file


def parse_arg(arg: str | None, **spec: Any) -> ConfigDict:
    """Parses the argument of a config file, as in `--config=configs/quickstart.py:grpo,batch=8`.

    `spec` maps each name to its default, which gives the type; a tuple lists the values allowed, the
    first being the default. The argument is a comma-separated list of `name=value`. A first word
    without `=` is the value of `variant`, where `spec` has one; any other bare word switches on the
    boolean of that name.

    Returns a locked ConfigDict with all names of `spec`. Raises ConfigError for a name that is not in
    `spec`, a name given twice, or a value of the wrong type.

    >>> parse_arg("grpo,batch=8", variant=("agrl", "grpo"), batch=4, local=False).to_dict()
    {'batch': 8, 'local': False, 'variant': 'grpo'}
    """
    values: dict[str, Any] = {name: default[0] if isinstance(default, tuple) else default
                              for name, default in spec.items()}
    given: set[str] = set()
    words = [word.strip() for word in (arg or "").split(",") if word.strip()]
    for position, word in enumerate(words):
        name, equals, text = word.partition("=")
        if not equals and position == 0 and "variant" in spec and not isinstance(spec.get(word), bool):
            name, text = "variant", word
        elif not equals and isinstance(spec.get(name), bool):
            text = "true"
        elif not equals and name in spec:
            raise ConfigError(f"config argument {arg!r}: {name} needs a value, as in {name}={values[name]}")
        if name not in spec:
            raise ConfigError(f"config argument {arg!r}: unknown name {name!r}{_hint(name, spec)}")
        if name in given:
            raise ConfigError(f"config argument {arg!r}: {name} is given twice")
        given.add(name)
        values[name] = _parse_value(name, text, spec[name])
    return ConfigDict(values).lock()


def _parse_value(name: str, text: str, default: Any) -> Any:
    """`text` as a value of the type of `default`, or as one of the values in a tuple."""
    if isinstance(default, tuple):
        value = _parse_value(name, text, default[0])
        if value not in default:
            hint = _hint(text, [str(choice) for choice in default])
            raise ConfigError(f"config argument {name}={text}: not one of {', '.join(map(str, default))}{hint}")
        return value
    if isinstance(default, bool):
        booleans = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in booleans:
            raise ConfigError(f"config argument {name}={text}: expected true or false")
        return booleans[text.lower()]
    try:
        return type(default)(text)
    except ValueError:
        raise ConfigError(f"config argument {name}={text}: expected {type(default).__name__}") from None


# ------------------------------------------------------------------------------- the rules of the fields


@dataclass(frozen=True)
class Rule:
    """What a field may hold. A string or boolean without choices may hold anything of its type.

    `low` and `high` are inclusive, `above` is exclusive; `also` lists values allowed beside the range.
    """

    type: type = float
    low: float | None = None
    above: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    also: tuple[Any, ...] = ()
    joined: str = ""  # the separator of several choices, if they can be joined

    def problem(self, value: Any) -> str:
        """The end of a sentence about what is wrong with `value`; empty if nothing is."""
        if type(value) is self.type and value in self.also:
            return ""
        if not _is_a(value, self.type):
            return f"is {value!r}, expected {self.expected()}"
        parts = value.split(self.joined) if self.joined else [value]
        if self.choices and (wrong := [part for part in parts if part not in self.choices]):
            return f"is {value!r}, expected {self.expected()}{did_you_mean(str(wrong[0]), self.choices, count=3)}"
        if self.joined and len(set(parts)) < len(parts):
            return f"is {value!r}, which names a part twice"
        if self.type not in (int, float):
            return ""
        inside = (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )
        return "" if inside else f"is {value!r}, expected {self.expected()}"

    def expected(self) -> str:
        """What the field may hold, such as `a whole number >= 1`."""
        if self.choices:
            text = "one of " + ", ".join(map(str, self.choices))
            text += f", or several joined by {self.joined}" if self.joined else ""
        elif self.type in (int, float):
            kind = "a whole number" if self.type is int else "a number"
            bounds = [
                f"{sign} {bound}"
                for sign, bound in ((">=", self.low), (">", self.above), ("<=", self.high))
                if bound is not None
            ]
            text = " ".join([kind, " and ".join(bounds)]).strip()
        else:
            text = {str: "a string", bool: "True or False"}.get(self.type, self.type.__name__)
        return " or ".join([text, *map(str, self.also)])


def _is_a(value: Any, kind: type) -> bool:
    """Whether `value` is of type `kind`: a whole number is a number, a boolean is neither."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _one_of(*choices: str) -> Rule:
    return Rule(str, choices=choices)


def _whole(low: int, high: int | None = None) -> Rule:
    return Rule(int, low=low, high=high)


_TEXT, _FLAG = Rule(str), Rule(bool)
_COUNT, _SIZE = _whole(0), _whole(1)
_WEIGHT, _POSITIVE, _SHARE = Rule(low=0), Rule(above=0), Rule(low=0, high=1)
_DECAY = Rule(low=0, high=0.9999)
_DTYPE = _one_of("float32", "bfloat16")
_AXIS = Rule(int, low=1, also=(-1,))  # -1: all devices that the other axes leave

FILES = frozenset(("pairs", "hf", "esci", "wands"))  # sources of pairs that lie at a path

RULES: Mapping[str, Rule] = {
    "seed": _whole(0, 2**32 - 1),
    "method": _TEXT,
    "rulebook.path": _TEXT,
    "rulebook.order": _one_of("think_then_respond", "respond_then_think"),
    "rulebook.free_text": _one_of("book", "none", "between"),
    "rulebook.variants": _COUNT,
    # Data.
    "data.source": _one_of("benchmark", *sorted(FILES)),
    "data.path": _TEXT,
    "data.test_path": _TEXT,
    "data.columns": _TEXT,
    "data.labels": _TEXT,
    "data.bins": _TEXT,
    "data.on_bad_rows": _one_of("refuse", "skip"),
    "data.dir": _TEXT,
    "data.seed": _COUNT,
    "data.steps_known": Rule(int, low=0, also=(-1,)),
    "data.prompt_len": _whole(8, 131_072),
    "data.response_len": _whole(4, 32_768),
    "data.style": _one_of("terse", "full", "chat"),
    # The policy.
    "policy.pretrained": _TEXT,
    "policy.thinking": _one_of("off", "on"),
    "policy.thought_len": _SIZE,
    "policy.vocab_size": _whole(300),  # 256 bytes, the end token, and some merges
    "policy.width": _SIZE,
    "policy.layers": _SIZE,
    "policy.heads": _SIZE,
    "policy.kv_heads": _SIZE,
    "policy.head_dim": _SIZE,
    "policy.mlp": _SIZE,
    "policy.tied": _FLAG,
    "policy.qk_norm": _FLAG,
    "policy.bias": _FLAG,
    "policy.rope_theta": _POSITIVE,
    "policy.norm_eps": _POSITIVE,
    "policy.param_dtype": _DTYPE,
    "policy.compute_dtype": _DTYPE,
    "policy.remat": _FLAG,
    "policy.attention": _one_of("auto", "dense", "blockwise", "kernel"),
    # Low-rank adapters.
    "lora.rank": _COUNT,
    "lora.alpha": _POSITIVE,
    "lora.modules": _TEXT,
    "lora.stages": _one_of("both", "rl"),
    "lora.start": _TEXT,
    "lora.base_dtype": _DTYPE,
    # The optimiser.
    "optim.kind": _one_of("adamw", "adafactor"),
    "optim.moments": _DTYPE,
    "optim.clip_norm": _WEIGHT,
    "optim.b1": _DECAY,
    "optim.b2": _DECAY,
    "optim.eps": _POSITIVE,
    # Supervised warm start.
    "sft.source": Rule(
        str, choices=("benchmark", "benchmark_train", "train", "known", "both", "mixture", *sorted(FILES)), joined="+"
    ),
    "sft.path": _TEXT,
    "sft.steps": _COUNT,
    "sft.batch_size": _SIZE,
    "sft.micro_batches": _SIZE,
    "sft.learning_rate": _POSITIVE,
    "sft.matrix_rate": _WEIGHT,
    "sft.warmup": _COUNT,
    "sft.weight_decay": _WEIGHT,
    "sft.prompt_weight": _WEIGHT,
    "sft.unknown_steps": _one_of("fill", "sum"),
    "sft.by_length": _FLAG,
    "mixture.rows": _SIZE,
    "mixture.real": _SHARE,
    "mixture.strangers": _SHARE,
    "mixture.disguised": _SHARE,
    # Reinforcement learning.
    "rl.source": _one_of("train", "sft"),
    "rl.steps": _COUNT,
    "rl.budget": _COUNT,
    "rl.batch_size": _SIZE,
    "rl.group_size": _whole(2),
    "rl.candidates": _SIZE,
    "rl.temperature": _POSITIVE,
    "rl.constrained": _FLAG,
    "rl.epochs": _SIZE,
    "rl.minibatches": _SIZE,
    "rl.micro_batches": _SIZE,
    "rl.sample_batches": _SIZE,
    "rl.learning_rate": _POSITIVE,
    "rl.matrix_rate": _WEIGHT,
    "rl.schedule": _one_of("cosine", "constant"),
    "rl.warmup": _COUNT,
    "rl.weight_decay": _WEIGHT,
    "rl.max_skipped": _SIZE,
    # Sampling by difficulty.
    "difficulty.pool": _SIZE,
    "difficulty.low": _SHARE,
    "difficulty.high": _SHARE,
    "difficulty.again": _SIZE,
    # Preferences.
    "dpo.samples": _whole(2),
    "dpo.mined": _COUNT,
    "dpo.pairs": _SIZE,
    "dpo.beta": _POSITIVE,
    "dpo.steps": _COUNT,
    "dpo.batch_size": _SIZE,
    "dpo.micro_batches": _SIZE,
    "dpo.learning_rate": _POSITIVE,
    "dpo.matrix_rate": _WEIGHT,
    "dpo.warmup": _COUNT,
    # Supervised training that goes on.
    "more.source": _one_of("sft", "train"),
    "more.steps": _COUNT,
    "more.batch_size": _SIZE,
    "more.micro_batches": _SIZE,
    "more.learning_rate": _POSITIVE,
    "more.matrix_rate": _WEIGHT,
    "more.warmup": _COUNT,
    # Distillation.
    "distill.path": _TEXT,
    "distill.columns": _TEXT,
    "distill.teacher": _TEXT,
    "distill.steps": _COUNT,
    "distill.batch_size": _SIZE,
    "distill.micro_batches": _SIZE,
    "distill.learning_rate": _POSITIVE,
    "distill.matrix_rate": _WEIGHT,
    "distill.warmup": _COUNT,
    "distill.step_weight": _POSITIVE,
    # Reward.
    "reward.composition": _one_of("terminal", "sum", "gated", "gated_tier"),
    "reward.tier_kind": _one_of("exact", "ordinal", "brier", "rps"),
    "reward.tier_weight": _WEIGHT,
    "reward.step_weight": _WEIGHT,
    "reward.consistent_weight": _WEIGHT,
    "reward.format_weight": _WEIGHT,
    "reward.overlong_weight": _WEIGHT,
    "reward.overlong_from": _COUNT,
    # Objective.
    "objective.loss": _one_of("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"),
    "objective.credit": _one_of("sequence", "step"),
    "objective.clip_low": Rule(above=0, high=10),
    "objective.clip_high": Rule(above=0, high=10),
    "objective.gspo_clip_low": Rule(above=0, high=10),
    "objective.gspo_clip_high": Rule(above=0, high=10),
    "objective.clamp": _WEIGHT,
    "objective.kl": _one_of("none", "k1", "k2", "k3"),
    "objective.kl_weight": _WEIGHT,
    "objective.entropy_weight": _WEIGHT,
    "objective.mask_truncated": _FLAG,
    "objective.logprob_chunk": _COUNT,
    # Guided replay.
    "guidance.enabled": _FLAG,
    "guidance.threshold": _SHARE,
    "guidance.capacity": _SHARE,
    "guidance.replace": _SIZE,
    "guidance.source": _one_of("gold", "own"),
    "guidance.treatment": _one_of("shaped", "imitate", "importance", "mask"),
    "guidance.gamma": _POSITIVE,
    "guidance.imitate_weight": _WEIGHT,
    "guidance.baseline": _one_of("pooled", "unguided_only"),
    "guidance.level": _one_of("adaptive", "fixed"),
    "guidance.initial_level": _WEIGHT,
    "guidance.eta": _WEIGHT,
    "guidance.per_family": _FLAG,
    "guidance.cap": _one_of("none", "linear", "cosine"),
    # Evaluation, checkpoints, logs, mesh.
    "eval.every": _COUNT,
    "eval.pairs": _COUNT,
    "eval.validation_pairs": _COUNT,
    "eval.pass_k": _SIZE,
    "eval.pass_pairs": _COUNT,
    "eval.constrained": _FLAG,
    "eval.batch_size": _SIZE,
    "eval.bootstrap": _COUNT,
    "checkpoint.every": _SIZE,
    "checkpoint.keep": _SIZE,
    "log.every": _SIZE,
    "log.samples_every": _COUNT,
    "log.samples": _COUNT,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.gather_decode": _FLAG,
}


# ------------------------------------------------------------------------------------------- the checks


def validate(config: ConfigDict) -> None:
    """Checks every field by itself: each field of RULES exists and obeys its rule, and there are no other fields.

    Raises ConfigError with all problems in one message; unknown fields come with the nearest valid ones.
    """
    fields = dict(_flatten(config))
    problems = [f"field {name} is missing" for name in RULES if name not in fields]
    for name, value in fields.items():
        if name not in RULES:
            problems.append(f"unknown field {name}{_hint(name, RULES)}")
        elif problem := RULES[name].problem(value):
            problems.append(f"{name} {problem}")
    raise_problems(problems)


def validate_together(config: ConfigDict, data_shards: int = 1) -> None:
    """Checks fields against each other, given the number of shards of the batch.

    The batch is split over the mesh axes `data` and `fsdp`, so `data_shards` is the product of their
    sizes. Raises ConfigError with all problems in one message.
    """
    checks = (_variants_problems(config), _policy_problems(config), _lora_problems(config), _optim_problems(config),
              _batch_problems(config, data_shards), _difficulty_problems(config),
              _objective_problems(config))  # fmt: skip
    raise_problems([problem for check in checks for problem in check])


def _variants_problems(config: ConfigDict) -> Iterator[str]:
    variants = f"rulebook.variants={config.rulebook.variants}"
    if config.rulebook.variants and config.data.style == "terse":
        yield f"{variants} with data.style=terse: such prompts hold no rules to follow; use data.style=full or chat"
    if config.rulebook.variants and config.method == "distill":
        yield (f"{variants} with method=distill: the tiers of a teacher are by its own rule book; use "
               "rulebook.variants=0")


def _policy_problems(config: ConfigDict) -> Iterator[str]:
    policy = config.policy
    if config.data.style == "chat" and not policy.pretrained:
        yield ("data.style=chat needs a pretrained model, which knows its chat template: "
               "--config.policy.pretrained=DIR, a Hugging Face folder (hf download OWNER/NAME --local-dir=DIR) or a "
               "GGUF file")
    if policy.thinking == "on" and config.data.style != "chat":
        yield f"policy.thinking=on asks through the model's chat template: data.style is {config.data.style}, not chat"
    if policy.thinking == "on" and policy.thought_len >= config.data.response_len:
        yield (f"policy.thought_len={policy.thought_len} leaves no room for an answer in data.response_len="
               f"{config.data.response_len}")
    if policy.heads % policy.kv_heads:
        yield f"policy.kv_heads={policy.kv_heads} must divide policy.heads={policy.heads}"
    if policy.head_dim % 2:
        yield f"policy.head_dim={policy.head_dim} must be even: rotary positions turn pairs"


def _lora_problems(config: ConfigDict) -> Iterator[str]:
    lora = config.lora
    if lora.start and not (lora.rank and lora.stages == "both"):
        yield f"lora.start={lora.start} needs adapters in the warm start: set lora.rank to theirs, and lora.stages=both"
    if not lora.rank:
        return
    if lora.stages == "both" and not config.policy.pretrained:
        yield ("lora.stages=both without policy.pretrained: a policy from scratch first has to learn all its weights; "
               "use lora.stages=rl")
    last = last_branch(config.method)
    for stage in ("sft", last) if lora.stages == "both" else (last,):
        if config[stage].matrix_rate:
            yield (f"{stage}.matrix_rate={config[stage].matrix_rate} with lora.rank={lora.rank}: Muon is for whole "
                   f"matrices; use {stage}.matrix_rate=0")


def _optim_problems(config: ConfigDict) -> Iterator[str]:
    optim = config.optim
    for stage in ("sft", last_branch(config.method)):
        if optim.kind == "adafactor" and config[stage].matrix_rate:
            yield (f"{stage}.matrix_rate={config[stage].matrix_rate} with optim.kind=adafactor: Muon keeps a momentum, "
                   f"and AdamW goes with it; use {stage}.matrix_rate=0")
    for name in ("b1", "b2"):
        if optim.moments == "bfloat16" and optim[name] > 0.98:
            yield (f"optim.{name}={optim[name]} with optim.moments=bfloat16: steps of {1 - optim[name]:.2g} of the way "
                   f"are lost in rounding to 8 bits; use at most 0.98")


def _batch_problems(config: ConfigDict, data_shards: int) -> Iterator[str]:
    last = last_branch(config.method)
    for branch in ("sft", "eval") if last == "rl" else ("sft", "eval", last):
        size, micro = config[branch].batch_size, config[branch].get("micro_batches", 1)
        if size % (data_shards * micro):
            pieces = f" x {branch}.micro_batches={micro} equal pieces" if micro > 1 else ""
            yield (f"{branch}.batch_size={size} cannot be split over {data_shards} data shards{pieces}; "
                   f"nearest: {_multiple(size, data_shards * micro)}")
    if last == "rl" and config.rl.steps:
        yield from _rl_batch_problems(config, data_shards)


def _rl_batch_problems(config: ConfigDict, data_shards: int) -> Iterator[str]:
    rl, guidance = config.rl, config.guidance
    pieces = data_shards * rl.minibatches * rl.micro_batches
    if rl.batch_size % pieces:
        yield (f"rl.batch_size={rl.batch_size} cannot be split into {data_shards} data shards x "
               f"rl.minibatches={rl.minibatches} x rl.micro_batches={rl.micro_batches} equal pieces; "
               f"nearest: {_multiple(rl.batch_size, pieces)}")
    if rl.sample_batches > 1 and rl.batch_size % (data_shards * rl.sample_batches):
        yield (f"rl.batch_size={rl.batch_size} cannot be split into {data_shards} data shards x "
               f"rl.sample_batches={rl.sample_batches} equal pieces; "
               f"nearest: {_multiple(rl.batch_size, data_shards * rl.sample_batches)}")
    if not guidance.enabled:
        return
    if rl.candidates > 1:
        yield (f"rl.candidates={rl.candidates} with guidance.enabled=True: groups are either refilled or guided; use "
               "rl.candidates=1 or guidance.enabled=False")
    if guidance.replace > rl.group_size:
        yield f"guidance.replace={guidance.replace} is more than rl.group_size={rl.group_size}"
    per_shard = rl.batch_size // data_shards
    if per_shard and guidance.capacity * per_shard < 1 - 1e-9:
        yield (f"guidance.capacity={guidance.capacity} of {per_shard} examples per data shard is less than one "
               f"group; use at least {_one_part_of(per_shard)}, or guidance.enabled=False")


def _difficulty_problems(config: ConfigDict) -> Iterator[str]:
    difficulty, candidates = config.difficulty, config.rl.candidates
    if difficulty.pool == 1:
        return
    if candidates > 1:
        yield (f"difficulty.pool={difficulty.pool} with rl.candidates={candidates}: examples are chosen either before "
               "they are rolled or after; use difficulty.pool=1 or rl.candidates=1")
    band = f"difficulty.low={difficulty.low} and difficulty.high={difficulty.high}"
    if difficulty.low > difficulty.high:
        yield f"{band}: no pass rate lies in this band; low should be at most high"
    if difficulty.low == 0 and difficulty.high == 1:
        yield f"{band}: every pass rate lies in this band; raise low or lower high, or use difficulty.pool=1"


def _objective_problems(config: ConfigDict) -> Iterator[str]:
    guidance, reward, rulebook = config.guidance, config.reward, config.rulebook
    if guidance.enabled and rulebook.order == "respond_then_think" and guidance.treatment == "mask":
        yield ("guidance.treatment=mask with rulebook.order=respond_then_think: the tier would be forced and never "
               "learnt; use shaped, imitate or importance")
    if reward.overlong_weight > 0 and reward.overlong_from >= config.data.response_len:
        yield (f"reward.overlong_from={reward.overlong_from} must be below "
               f"data.response_len={config.data.response_len}, or reward.overlong_weight 0")
    if reward.tier_kind in ("brier", "rps"):
        yield from _comparison_problems(config)
    yield from _source_problems(config)


def _comparison_problems(config: ConfigDict) -> Iterator[str]:
    """Of rewards that compare an answer with the others of its group."""
    kind, group, guidance = f"reward.tier_kind={config.reward.tier_kind}", config.rl.group_size, config.guidance
    if group < 3:
        yield f"{kind} with rl.group_size={group}: each answer is compared with at least two others; use at least 3"
    elif guidance.enabled and 1 in (guidance.replace, group - guidance.replace):
        yield (f"{kind} with guidance.replace={guidance.replace} of rl.group_size={group}: guided answers are compared "
               "with guided ones, and one alone with none; leave at least two of each")


_AT_PATH = {"pairs": "a CSV, TSV, JSON lines or Parquet file", "hf": "a dataset's folder or file"}


def _source_problems(config: ConfigDict) -> Iterator[str]:
    data, sft = config.data, config.sft
    parts = sft.source.split("+")
    asked = {"data": [data.source] if data.source in FILES else [], "sft": sorted(FILES.intersection(parts))}
    for group, kinds in asked.items():
        if kinds and not config[group].path:
            what = _AT_PATH.get(kinds[0], "the folder of the release")
            yield f"{group}.source={config[group].source} needs {group}.path, {what}: --config.{group}.path=PATH"
    if len(asked["sft"]) > 1:
        yield f"sft.source={sft.source}: sft.path is one of {' and '.join(asked['sft'])}, not both"
    if "both" in parts and len(parts) > 1:
        yield f"sft.source={sft.source}: both is benchmark+train; name what is meant, such as benchmark+train+pairs"
    if data.source == "benchmark" and {"train", "benchmark_train"} <= set(parts):
        yield f"sft.source={sft.source} with data.source=benchmark: train and benchmark_train are the same pairs"
    if "known" in parts and {"train", "both"} & set(parts):
        yield f"sft.source={sft.source}: the pairs of known are among those of train"
    if "mixture" in parts and data.source == "benchmark":
        yield f"sft.source={sft.source} with data.source=benchmark: a mixture takes real pairs, with data.source=pairs"
    if config.method == "distill" and not config.distill.path:
        yield ("method=distill needs distill.path, pairs as agrl_jax.judge writes them; python -m agrl_jax.distill "
               "judges them, and trains a student from its teacher's weights")
    mixture = config.mixture
    if mixture.real + mixture.strangers > 1:
        yield f"mixture.real={mixture.real} and mixture.strangers={mixture.strangers} are more than 1 together"


def check_constrained(config: ConfigDict, shortest: int) -> None:
    """Raises ConfigError where answers are sampled under the grammar, and `shortest` tokens, in which one can be whole,
    do not fit."""
    length = config.data.response_len
    under = [part for part in ("rl", "eval") if config[part].constrained]
    if under and length < shortest:
        raise_problems([f"data.response_len={length} with {under[0]}.constrained=True: an answer can be sure to be "
                        f"whole only in {shortest} tokens, the longest thought among them"])


def check_guidance(config: ConfigDict, pairs: int) -> None:
    """Raises ConfigError if guidance reveals the policy's own answers, and no failing group can have one: neither in
    the group, nor from an earlier meeting of one of the `pairs` training pairs."""
    rl, guidance = config.rl, config.guidance
    own = guidance.enabled and guidance.source == "own" and last_branch(config.method) == "rl" and rl.steps > 0
    pool = config.difficulty.pool
    met = rl.batch_size * pool  # of each step
    if own and guidance.threshold * rl.group_size < 1 - 1e-9 and rl.steps * met <= pairs:
        from_pool = f" x difficulty.pool={pool}" if pool > 1 else ""
        raise_problems([
            f"guidance.source=own can never act: in rl.steps={rl.steps} x rl.batch_size={rl.batch_size}{from_pool} "
            f"none of the {pairs} pairs is met twice, and with guidance.threshold={guidance.threshold} below "
            f"1/rl.group_size a failing group has no right answer; use guidance.threshold="
            f"{_one_part_of(rl.group_size)}, at least {pairs // met + 1} steps, or guidance.source=gold"
        ])


def _one_part_of(number: int) -> str:
    """One of `number`, rounded up to four digits, so that it is enough."""
    return f"{math.ceil(10_000 / number) / 10_000:g}"


def _multiple(size: int, of: int) -> str:
    """The multiples of `of` next to `size`, as text."""
    below, above = size // of * of, (size // of + 1) * of
    return f"{below} or {above}" if below else str(above)


def raise_problems(problems: Sequence[str]) -> None:
    """Raises ConfigError with all of them, if there are any."""
    if len(problems) == 1:
        raise ConfigError(f"config: {problems[0]}")
    if problems:
        raise ConfigError("\n  ".join([f"config: {len(problems)} problems", *problems]))


# ----------------------------------------------------------------------------------- the resolved config


def resolve(config: ConfigDict) -> dict[str, Any]:
    """The config as a nested dict that JSON can hold, references followed, keys sorted."""
    return json.loads(json.dumps(config.copy_and_resolve_references().to_dict(), sort_keys=True))


def last_branch(method: str) -> str:
    """The branch of the config that the stage after the warm start follows: `rl`, or what takes its place."""
    return {"dpo": "dpo", "sft_more": "more", "sft_all": "more", "distill": "distill"}.get(method, "rl")


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The config as one dict from dotted names to values."""
    return dict(_flatten(config))


def _flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; a branch without fields stands for itself."""
    for name, value in config.items():
        if isinstance(value, ConfigDict | Mapping) and len(value):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name is one of `patterns` or lies below one: `eval` covers `eval.every`."""
    return any(name == pattern or name.startswith(pattern + ".") for pattern in patterns)


def config_digest(config: ConfigDict) -> str:
    """SHA-256, in hex, of all fields."""
    return hashlib.sha256(json.dumps(flatten(resolve(config)), sort_keys=True).encode()).hexdigest()


def diff(old: ConfigDict | Mapping[str, Any], new: ConfigDict | Mapping[str, Any]) -> list[str]:
    """The fields that differ, sorted, as lines such as `rl.group_size: 8 -> 16`."""
    before, after = flatten(old), flatten(new)
    absent = "(absent)"
    return [
        f"{name}: {before.get(name, absent)} -> {after.get(name, absent)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, absent) != after.get(name, absent)
    ]


# -------------------------------------------------------------------------------------- the command line


def parse_flags(
    argv: Sequence[str], positional: bool = False, known: Mapping[str, Any] | None = None
) -> list[str]:
    """Parses the command line; a mistake ends the process with one clear message and exit code 2.

    absl alone would answer an unknown field of the config file flag `--config`, or an error inside the config
    file, with a traceback. Returns the arguments that are not flags, the program's name first; more than that is
    a mistake, unless `positional`. `known` are the fields by dotted names where they come from no file. Fits
    `absl.app.run(flags_parser=...)` too.
    """
    app.define_help_flags()
    if not {"--help", "-help", "--h", "-h", "-?"}.isdisjoint(argv[1:]):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)  # absl itself exits with 1, as for a mistake
    try:
        rest = flags.FLAGS(list(argv))
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            _ = flags.FLAGS["config"].value.is_locked  # an unreadable file raises only on first use
    except (flags.Error, AttributeError, KeyError, OSError) as error:
        exit_with(overrides_error(error, argv, known))
    if len(rest) > 1 and not positional:
        exit_with(ConfigError(f"unexpected argument {rest[1]!r}; flags start with --"))
    return rest


def define_distributed_flag() -> None:
    """The flag `--distributed` of the commands that may run as several processes; see `runtime/processes.py`."""
    flags.DEFINE_bool(
        "distributed", False,
        "This is one of several processes, all started with the same command. On TPU pods, under Slurm, Open MPI and "
        "Kubernetes they find each other; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT of the first, "
        "JAX_NUM_PROCESSES, and JAX_PROCESS_ID from 0.",
    )


def exit_with(error: Exception) -> NoReturn:
    """Prints the message of `error` to stderr and ends the process with exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def overrides_error(error: Exception, argv: Sequence[str], known: Mapping[str, Any] | None = None) -> ConfigError:
    """The ConfigError that explains a failure to parse `argv`, with field and value.

    Raises `error` itself where it comes from a bug in a config file, whose traceback is worth seeing.
    """
    inner = [cause for cause in _causes(error) if isinstance(cause, ConfigError)]
    if inner:
        return inner[-1]  # absl and ml-collections wrap what a config file raised
    example = "--config=configs/quickstart.py"
    if isinstance(error, OSError) and "Configuration is not available" in str(error):
        reason = str(error).strip().splitlines()[-1].strip()
        return ConfigError(f"the config file cannot be read: {reason}; name one, such as {example}")
    if isinstance(error, AttributeError) and "no attribute 'get_config'" in str(error):
        return ConfigError(f"--config names a file without a function get_config; name a config, such as {example}")
    if missing := re.search(r"Flag --(\w+) must have a value other than None", str(error)):
        flag = missing.group(1)
        return ConfigError(f"--{flag} is needed" + (f", such as {example}" if flag == "config" else ""))
    if not known and isinstance(error, flags.UnrecognizedFlagError) and str(error.flagname).startswith("config."):
        return ConfigError(f"--{error.flagname} needs --config=FILE before it")
    known = known or _load(argv)
    problems = [problem for word in argv if (problem := _override_problem(word, known))] if known else []
    if problems:
        return ConfigError("\n  ".join(problems))
    if isinstance(error, flags.Error):
        return ConfigError(str(error).strip())
    raise error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and its causes, outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _override_problem(word: str, known: Mapping[str, Any]) -> str:
    """What is wrong with one command-line word, if it is an override of the config; empty if nothing is."""
    match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", word, re.DOTALL)
    if match is None:
        return ""
    negated, field, text = match.groups()
    if field not in known:
        below = [k for k in known if k.startswith(field + ".")]
        if below:
            return f"{word}: {field} is a group of fields; set one of them, such as {below[0]}"
        return f"{word}: unknown field {field}{_hint(field, known)}"
    default = known[field]
    if text is None or negated or isinstance(default, str | None):
        return ""
    if isinstance(default, bool):
        wrong, expected = text.lower() not in ("true", "t", "1", "false", "f", "0"), "true or false"
    elif isinstance(default, int | float):
        wrong = not _parses(type(default), text)
        expected = f"a {'whole ' * isinstance(default, int)}number such as {default}"
    else:
        return ""
    return f"{word}: {field} is {text!r}, expected {expected}" if wrong else ""


def _parses(kind: type, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _load(argv: Sequence[str]) -> dict[str, Any]:
    """The fields of the config file named in `argv`, without its overrides; empty if it cannot be loaded."""
    for position, word in enumerate(argv):
        match = re.fullmatch(r"--?config(?:=(.*))?", word, re.DOTALL)
        if match:
            path = match.group(1) if match.group(1) is not None else "".join(argv[position + 1 : position + 2])
            try:
                return flatten(flags.FLAGS["config"].parser.parse(path))
            except Exception:  # a config file can raise anything; the first error is the one to report
                return {}
    return {}
