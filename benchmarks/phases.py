"""The phases of a step as programs of their own, each with the arithmetic and the traffic that it cannot do without.

A step is one program, whose parts cannot be timed from outside; so each phase is compiled by itself, from the functions
that the step is made of. Where the step works in micro-batches, a phase runs one of them and says how many `times`.

Counted are products of matrices, two operations to each multiply and add, attention over the positions that are seen;
and for traffic, weights, caches and logits, each read or written once. What is recomputed counts once: lower bounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from agrl_jax.policy.transformer import PolicyConfig
from agrl_jax.rl import objective, reader
from agrl_jax.rl.reward import score
from agrl_jax.rl.rollout import PURPOSE_ROLLOUT, predicting_hidden, prefill, rollout, row_keys
from agrl_jax.types import Array, Batch, Params, Rollout
from benchmarks.workload import NEVER, Workload


@dataclass(frozen=True)
class Phase:
    """One phase, compiled, on arguments of its own."""

    run: Callable[[], Any]
    flops: float  # of one run
    bytes: float
    times: int = 1  # in a step
    memory: int = 0  # temporary bytes, by the compiler


def of(load: Workload) -> dict[str, Phase]:
    """The phases of a workload's step, in their order."""
    policy, work, config = load.policy, load.work, load.config
    pieces = config.micro_batches * config.minibatches
    params, batch, count = load.state.params, load.batch, _Count(load.shape)
    sequences = work.prompts * work.group_size
    keys = row_keys(load.state.key, PURPOSE_ROLLOUT, 0, batch.row, work.group_size)
    found: dict[str, Phase] = {}

    def add(name: str, function: Callable[..., Any], *args: Any, flops: float, bytes: float, times: int = 1) -> Any:
        compiled = jax.jit(function).lower(*args).compile()
        memory = compiled.memory_analysis()
        found[name] = Phase(
            partial(compiled, *args), flops, bytes, times, memory.temp_size_in_bytes if memory is not None else 0
        )
        return compiled(*args)

    prefix = add(
        "prefill", partial(prefill, policy), params, batch.prompt, batch.prompt_len,
        flops=count.prompts(work.prompts, work.prompt_len), bytes=count.weights,
    )  # fmt: skip
    sample = partial(rollout, policy, length=work.response_len, temperature=config.temperature, end_token=NEVER)
    rolled = add(
        "decode", sample, params, prefix, keys,
        flops=count.answers(sequences, work.response_len, work.prompt_len),
        bytes=work.response_len
        * (count.weights + count.cache(work.prompts, work.prompt_len) + count.logits(sequences))
        + count.cache(sequences, work.response_len) * (work.response_len + 1) / 2,
    )  # fmt: skip
    add("read and score", partial(_scored, load), batch, rolled, flops=0.0, bytes=0.0)
    piece = jax.tree.map(lambda x: x[: work.prompts // pieces], (batch, rolled))
    forward = (
        count.prompts(work.prompts, work.prompt_len)
        + count.answers(sequences, work.response_len, work.prompt_len)
    ) / pieces  # fmt: skip
    logits = count.logits(sequences * work.response_len) / pieces
    if load.reference is not None:
        add(
            "reference", lambda *args: _logprobs(load, *args)[0], load.reference, *piece,
            flops=forward, bytes=count.weights + logits, times=pieces,
        )  # fmt: skip
    grads = add(
        "gradient", jax.grad(partial(_loss, load)), params, *piece,
        flops=3 * forward, bytes=3 * count.weights + 2 * logits, times=pieces,
    )  # fmt: skip
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    # Read: gradients twice (for their norm first), parameters, two moments; written: parameters and moments.
    add("update", load.update, grads, params, load.state.opt_state, load.state.skipped, flops=0.0, bytes=8 * size)
    return found


class _Count:
    """Operations and bytes of a policy's shape, for numbers of sequences and tokens."""

    def __init__(self, shape: PolicyConfig) -> None:
        heads = shape.heads * shape.head_dim
        kv = 2 * shape.kv_heads * shape.head_dim
        experts = shape.experts_per_token or 1
        layer = shape.width * (2 * heads + kv) + 3 * shape.width * shape.mlp * experts
        self._layers = shape.layers * layer  # weights that each token meets
        self._head = shape.vocab_size * shape.width
        self._attention = 4 * shape.layers * heads  # operations for each position that a token sees
        self._itemsize = jnp.dtype(shape.compute_dtype).itemsize
        self._kv = shape.layers * kv * self._itemsize
        self._logit = 4 * shape.vocab_size  # float32
        self.weights = (self._layers + self._head) * self._itemsize

    def prompts(self, number: int, length: int) -> float:
        """Operations of running whole prompts, without logits."""
        return number * length * (2 * self._layers + self._attention * (length + 1) / 2)

    def answers(self, number: int, length: int, prompt_len: int) -> float:
        """Operations of running answers behind their prompts, with the logits of every token."""
        seen = prompt_len + (length + 1) / 2
        return number * length * (2 * (self._layers + self._head) + self._attention * seen)

    def cache(self, number: int, length: int) -> float:
        """Bytes of the keys and values of `number` sequences."""
        return number * length * self._kv

    def logits(self, number: int) -> float:
        """Bytes of logits, written and read."""
        return 2 * number * self._logit


def _scored(load: Workload, batch: Batch, rolled: Rollout) -> Any:
    """Reading, score and advantages: what rule-aware reward costs."""
    reading = reader.read(load.tables, rolled.tokens, rolled.valid)
    scored = score(reading, rolled, batch, load.tables, load.config.reward)
    guided = jnp.zeros(rolled.finished.shape, bool)
    return objective.advantages(scored, reading, guided, load.work.response_len, load.config.objective)


def _logprobs(load: Workload, params: Params, batch: Batch, rolled: Rollout) -> tuple[Array, Array]:
    prefix = prefill(load.policy, params, batch.prompt, batch.prompt_len)
    hidden = predicting_hidden(load.policy, params, prefix, rolled.tokens)
    unembed = partial(load.policy.unembed, params)
    config = load.config
    return objective.token_logprobs(unembed, hidden, rolled.tokens, config.temperature, config.logprob_chunk)


def _loss(load: Workload, params: Params, batch: Batch, rolled: Rollout) -> Array:
    """The loss, with advantages of 1 and the sampler's own log-probabilities as the reference's."""
    logp, entropy = _logprobs(load, params, batch, rolled)
    weights = objective.token_weights(rolled, load.config.objective)
    advantage = jnp.ones_like(logp)
    return objective.loss_terms(
        logp, entropy, rolled.logp, rolled.logp, advantage, rolled.sampled, weights, load.config.objective
    )[0]


def shares(seconds: float, phase: Phase, ceilings: dict[str, float]) -> dict[str, float]:
    """Achieved rates of a phase whose one run took `seconds`, as shares of the ceilings.

    `roofline` is the share of the least time that arithmetic and traffic allow together.
    """
    least = max(phase.flops / ceilings["flops"], phase.bytes / ceilings["bytes"])
    return {
        "flops_per_s": phase.flops / seconds,
        "bytes_per_s": phase.bytes / seconds,
        "of_matrix_product": phase.flops / seconds / ceilings["flops"],
        "of_copy": phase.bytes / seconds / ceilings["bytes"],
        "roofline": least / seconds,
    }
