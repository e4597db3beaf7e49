"""The phases of a step as programs of their own, each with the least arithmetic and traffic that it needs.

A step is one program, so its parts cannot be timed from outside. Each phase is therefore compiled by itself, from the
functions of the step. Where the step works in micro-batches, a phase runs one of them, and `times` is their number.
`prefill`, `reference` and `gradient` each run the tokens that all prompts begin with.

The arithmetic counts matrix products, two operations for each multiply-add, and attention over visible positions. The
traffic counts weights, caches and logits, each read or written once. Recomputation is not counted. So both are lower
bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from agrl_jax.policy import scoring
from agrl_jax.policy.layers import PolicyConfig
from agrl_jax.policy.scoring import prefill, run_groups
from agrl_jax.rl import objective, reader
from agrl_jax.rl.reward import score
from agrl_jax.rl.rollout import PURPOSE_ROLLOUT, rollout, row_keys
from agrl_jax.types import Array, Batch, Params, Prefix, Rollout
from benchmarks.workload import NEVER, Workload


class Program:
    """A function that is compiled for its arguments, and then called without any."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._program, self._args = jax.jit(function).lower(*args).compile(), args

    def __call__(self) -> Any:
        return self._program(*self._args)

    @property
    def memory(self) -> int | None:
        """Temporary bytes, as the compiler counts them."""
        analysis = self._program.memory_analysis()
        return None if analysis is None else analysis.temp_size_in_bytes


@dataclass(frozen=True)
class Phase:
    """One phase, compiled, on arguments of its own."""

    run: Program
    flops: float  # of one run
    bytes: float
    times: int = 1  # in a step


def of(load: Workload) -> Iterator[tuple[str, Phase]]:
    """The phases of a workload's step with their names, in order. Each is compiled when the iterator reaches it."""
    work, config, count = load.work, load.config, _Count(load.shape)
    batch, params = load.batch, load.state.params
    pieces, answers = config.micro_batches * config.minibatches, work.prompts * work.group_size
    shared, own = work.shared_len, work.prompt_len - work.shared_len
    shared_flops = count.flops(shared, seen=(shared + 1) / 2)
    prompt_flops = count.flops(work.prompts * own, seen=shared + (own + 1) / 2)
    seen = work.prompt_len + (work.response_len + 1) / 2

    policy, instruct = scoring.instructed(load.policy, load.instructions)

    def prefilled(params: Params, *prompts: Array) -> tuple[Params, Prefix]:
        params = instruct(params)
        return params, prefill(policy, params, *prompts)

    run = Program(prefilled, jax.jit(load.for_decoding)(params), batch.prompt, batch.prompt_len)
    yield "prefill", Phase(run, shared_flops + prompt_flops, count.weights)
    decoding, prefix = run()

    tokens = answers * work.response_len
    sample = partial(
        rollout, policy, length=work.response_len, temperature=config.temperature, end_token=NEVER
    )  # fmt: skip
    run = Program(sample, decoding, prefix, row_keys(load.state.key, PURPOSE_ROLLOUT, 0, batch.row, work.group_size))
    read_each = count.weights + count.cache(shared + work.prompts * own) + count.logits(answers)
    read = work.response_len * read_each + count.cache(tokens) * (work.response_len + 1) / 2
    yield "decode", Phase(run, count.flops(tokens, seen, logits=tokens), read)
    rolled = run()

    yield "read and score", Phase(Program(partial(_scored, load), batch, rolled), 0.0, 0.0)

    piece = jax.tree.map(lambda x: x[: work.prompts // pieces], (batch, rolled))
    flops = shared_flops + (prompt_flops + count.flops(tokens - answers, seen, logits=tokens)) / pieces
    logits = count.logits(tokens) / pieces
    run = Program(lambda *args: _logprobs(load, *args)[0], load.reference, *piece)
    yield "reference", Phase(run, flops, count.weights + logits, pieces)

    run = Program(jax.grad(partial(_loss, load)), params, *piece)
    yield "gradient", Phase(run, 3 * flops, 3 * count.weights + 2 * logits, pieces)

    # It reads gradients twice (first for their norm), parameters and two moments, and writes parameters and moments.
    traffic = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    run = Program(load.update, run(), params, load.state.opt_state, load.state.skipped)
    yield "update", Phase(run, 0.0, traffic)


class _Count:
    """Operations and bytes of a policy's shape, for numbers of sequences and tokens."""

    def __init__(self, shape: PolicyConfig) -> None:
        heads = shape.heads * shape.head_dim
        kv = 2 * shape.kv_heads * shape.head_dim
        experts = shape.experts_per_token or 1
        layer = shape.width * (2 * heads + kv) + 3 * shape.width * shape.mlp * experts
        self._layers = shape.layers * layer  # weights that each token is multiplied by
        self._head = shape.vocab_size * shape.width
        self._attention = 4 * shape.layers * heads  # operations for each position that a token sees
        self._itemsize = jnp.dtype(shape.compute_dtype).itemsize
        self._kv = shape.layers * kv * self._itemsize
        self._logit = 4 * shape.vocab_size  # float32
        self.weights = (self._layers + self._head) * self._itemsize

    def flops(self, tokens: int, seen: float, logits: int = 0) -> float:
        """Operations for `tokens` that see `seen` positions on average, with logits for `logits` of them."""
        return tokens * (2 * self._layers + self._attention * seen) + logits * 2 * self._head

    def cache(self, tokens: int) -> float:
        """Bytes of the tokens' keys and values."""
        return tokens * self._kv

    def logits(self, tokens: int) -> float:
        """Bytes of logits, written and read."""
        return 2 * tokens * self._logit


def _scored(load: Workload, batch: Batch, rolled: Rollout) -> Any:
    """The work of rule-aware reward: reading, scores and advantages."""
    reading = reader.read(load.tables, rolled.tokens, rolled.valid)
    scored = score(reading, rolled, batch, load.tables, load.config.reward)
    guided = jnp.zeros(rolled.finished.shape, bool)
    return objective.advantages(scored, reading, guided, load.work.response_len, load.config.objective)


def _logprobs(load: Workload, params: Params, batch: Batch, rolled: Rollout) -> tuple[Array, Array]:
    policy, instruct = scoring.instructed(load.policy, load.instructions)
    params = instruct(params)
    _, hidden = run_groups(policy, params, batch.prompt, batch.prompt_len, rolled.tokens)
    unembed = partial(policy.unembed, params)
    config = load.config
    return scoring.token_logprobs(unembed, hidden, rolled.tokens, config.temperature, config.logprob_chunk)


def _loss(load: Workload, params: Params, batch: Batch, rolled: Rollout) -> Array:
    """The loss, with advantages of 1 and the sampler's own log-probabilities as the reference's."""
    logp, entropy = _logprobs(load, params, batch, rolled)
    weights = objective.token_weights(rolled, load.config.objective)
    advantage = jnp.ones_like(logp)
    return objective.loss_terms(
        logp, entropy, rolled.logp, rolled.logp, advantage, rolled.sampled, weights, load.config.objective
    )[0]


def shares(seconds: float, phase: Phase, ceilings: dict[str, float]) -> dict[str, float]:
    """The rates of a phase of which one run took `seconds`, and their shares of the ceilings.

    `roofline` is the larger of the least times for arithmetic and for traffic, divided by `seconds`.
    """
    least = max(phase.flops / ceilings["flops"], phase.bytes / ceilings["bytes"])
    return {
        "flops_per_s": phase.flops / seconds,
        "bytes_per_s": phase.bytes / seconds,
        "of_matrix_product": phase.flops / seconds / ceilings["flops"],
        "of_copy": phase.bytes / seconds / ceilings["bytes"],
        "roofline": least / seconds,
    }
