"""Judges pairs with a policy: greedy judgements, the probability of each tier, samples for pass@k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agrl_jax.data import pipeline
from agrl_jax.data.pipeline import EncodedSplit
from agrl_jax.evaluation.metrics import Judgements
from agrl_jax.evaluation.probabilities import (
    Calibration,
    Statements,
    fit,
    stated_logprobs,
    statements,
    tier_probabilities,
)
from agrl_jax.policy.scoring import instructed, prefill
from agrl_jax.policy.tokenizer import Tokenizer
from agrl_jax.rl import reader
from agrl_jax.rl.reward import is_consistent
from agrl_jax.rl.rollout import PURPOSE_EVALUATE, rollout, row_keys
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN, Array, Batch, Params, Policy, Rollout, RuleTables

Put = Callable[[Any], Any]  # places a host batch on the mesh


@dataclass(frozen=True)
class EvalConfig:
    """How to evaluate; sizes in pairs."""

    batch_size: int
    response_len: int
    pass_k: int  # samples of each pair
    pass_pairs: int  # pairs sampled; 0: none
    temperature: float  # of those samples
    seed: int
    constrained: bool = False  # judge and sample under the rule book's grammar: no answer is malformed


class Evaluator:
    """Judges pairs with a policy. Compiled once per evaluator, whatever the parameters."""

    def __init__(
        self, policy: Policy, tables: RuleTables, book: RuleBook, tokenizer: Tokenizer, cfg: EvalConfig, put: Put,
        whole: jax.sharding.Sharding, instructions: Array | None = None,
    ):
        """`whole` is the sharding of results that every process can read; `instructions` [I] are the tokens before all
        prompts."""
        self._cfg, self._put, self._tables = cfg, put, tables
        self._book = book
        policy, instruct = instructed(policy, instructions)
        self._instruct = jax.jit(instruct)
        texts = statements(book, tokenizer, len(tables.token_class))
        judge = partial(judge_batch, policy, tables, texts, cfg.response_len, constrained=cfg.constrained)
        self._greedy = jax.jit(judge, out_shardings=whole)
        self._sample = jax.jit(partial(sample_tiers, policy, tables, cfg), out_shardings=whole)

    def sampled(self, pairs: int) -> int:
        """How many of `pairs` pairs are sampled for pass@k."""
        return min(self._cfg.pass_pairs, pairs)

    def judge(
        self, params: Params, split: EncodedSplit, rows: np.ndarray | None = None, sample: bool = True,
        temperature: float = 1.0, advance: Callable[[int], None] = lambda pairs: None,
    ) -> Judgements:
        """Judges the pairs of a split, or those at `rows`, greedily; samples some of them for pass@k.

        `temperature` is that of the tier probabilities, as `probabilities.fit` gives it. `advance` is told after each
        batch how many more pairs are judged or sampled.
        """
        rows, params = np.arange(len(split)) if rows is None else rows, self._instruct(params)
        greedy = self._run(lambda batch: self._greedy(params, batch), split, rows, advance)
        count = self.sampled(len(rows)) if sample else 0
        chosen = np.linspace(0, len(rows), count, endpoint=False).astype(int)  # spread over the split's order
        tiers, sampled_rows = None, rows[chosen]
        if count:
            sampling = self._run(lambda batch: {"tier": self._sample(params, batch)}, split, sampled_rows, advance)
            tiers = sampling["tier"]
        pairs = [split.pairs[i] for i in rows]
        return Judgements(
            query=[pair.query for pair in pairs],
            family=[pair.family for pair in pairs],
            seen=np.array([pair.seen for pair in pairs]),
            tier=split.batch.tier[rows],
            steps=split.batch.steps[rows],
            sample_index=None if tiers is None else chosen,
            sample_tier=tiers,
            probs=tier_probabilities(greedy["part_logprobs"], self._book, temperature, greedy["well_formed"]),
            **greedy,
        )

    def calibrate(
        self, params: Params, split: EncodedSplit, rows: np.ndarray, advance: Callable[[int], None]
    ) -> Calibration:
        """Judges the pairs at `rows` of a validation split, and fits the temperature of the tier probabilities."""
        return fit(self.judge(params, split, rows, sample=False, advance=advance), self._book)

    def _run(
        self, function: Callable[[Batch], dict[str, Array]], split: EncodedSplit, rows: np.ndarray,
        advance: Callable[[int], None],
    ) -> dict[str, np.ndarray]:
        """Applies `function` batch by batch, and joins the results without padding."""
        results = []
        for batch, mask in pipeline.eval_batches(split, self._cfg.batch_size, rows):
            output = jax.device_get(function(self._put(batch)))
            results.append({name: value[mask] for name, value in output.items()})
            advance(int(mask.sum()))
        return {name: np.concatenate([r[name] for r in results]) for name in results[0]}


def judge_batch(
    policy: Policy, tables: RuleTables, texts: Statements, length: int, params: Params, batch: Batch,
    constrained: bool = False,
) -> dict[str, Array]:
    """Greedy judgements of a batch: the fields of `Judgements` that come from the policy, [B, ...] each."""
    return judge_prompts(policy, tables, texts, length, params, batch.prompt, batch.prompt_len, constrained)[0]


def judge_prompts(
    policy: Policy, tables: RuleTables, texts: Statements, length: int, params: Params, prompt: Array,
    prompt_len: Array, constrained: bool = False,
) -> tuple[dict[str, Array], Rollout]:
    """Greedy judgements of the prompts [B, S], and the responses that they were read from, one each.

    `part_logprobs` are those of `stated_logprobs`, without meaning where the answer is malformed. A malformed answer
    predicts no tier. With `constrained` no answer is malformed: only tokens that lead to a well-formed one are taken.
    """
    prefix = prefill(policy, params, prompt, prompt_len)
    # Greedy decoding draws nothing from these keys.
    keys = row_keys(jnp.zeros((2,), jnp.uint32), PURPOSE_EVALUATE, 0, jnp.zeros_like(prompt_len), 1)
    rolled = rollout(
        policy, params, prefix, keys,
        length=length, temperature=0.0, end_token=tables.end_token, other_ends=tables.other_ends,
        grammar=tables if constrained else None,
        thought=tables.thought,
    )
    reading = reader.read(tables, rolled.tokens, rolled.valid)
    value, formed = reading.value[:, 0], reading.well_formed[:, 0]
    steps, tier = value[:, :-1], value[:, -1]
    judged = {
        "predicted": jnp.where(formed, tier, UNKNOWN),
        "predicted_steps": steps,
        "part_logprobs": stated_logprobs(policy, params, prefix, rolled.tokens[:, 0], reading, texts),
        "well_formed": formed,
        "truncated": ~rolled.finished[:, 0],
        "consistent": is_consistent(steps, tier, tables),
        "response_tokens": jnp.sum(rolled.valid[:, 0], axis=-1),
    }
    return judged, rolled


def sample_tiers(policy: Policy, tables: RuleTables, cfg: EvalConfig, params: Params, batch: Batch) -> Array:
    """Tiers [B, pass_k] of sampled answers, UNKNOWN where malformed."""
    prefix = prefill(policy, params, batch.prompt, batch.prompt_len)
    key = jax.random.key_data(jax.random.key(cfg.seed))
    keys = row_keys(key, PURPOSE_EVALUATE, 0, batch.row, cfg.pass_k)
    rolled = rollout(
        policy, params, prefix, keys,
        length=cfg.response_len, temperature=cfg.temperature, end_token=tables.end_token, other_ends=tables.other_ends,
        grammar=tables if cfg.constrained else None,
        thought=tables.thought,
    )
    reading = reader.read(tables, rolled.tokens, rolled.valid)
    return jnp.where(reading.well_formed, reading.value[..., -1], UNKNOWN)
