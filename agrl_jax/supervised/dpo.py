"""Direct preference optimisation (DPO, arXiv 2305.18290), on pairs of right and wrong answers mined once.

Mining samples N answers to each training pair with the policy after the warm start, and pairs right answers with wrong
ones to the same prompt. A right answer states the true tier and is well-formed; a wrong one does not state the true
tier. The same policy is the reference, so the sampler's log-probabilities are the reference's, and no other pass is
needed. The loss of a preference pair is

    -log sigmoid(margin),   margin = beta * ((chosen - its reference) - (rejected - its reference))

where `chosen`, `rejected` and `its reference` are log-probabilities of whole answers, at the temperature of sampling.
The prompt goes through the network once for both answers.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from agrl_jax.policy.scoring import prefill, run_groups, token_logprobs
from agrl_jax.rl import reader
from agrl_jax.rl.rollout import PURPOSE_MINE, rollout, row_keys
from agrl_jax.types import Array, Batch, Params, Policy, RuleTables


@struct.dataclass
class Answers:
    """N answers to each of B pairs, from which preferences are mined."""

    tokens: Array  # [B, N, T] int32
    valid: Array  # [B, N, T] bool: the policy's own tokens, not those that close a thought by force
    logp: Array  # [B, N] float32 log-probability of each whole answer
    right: Array  # [B, N] bool
    wrong: Array  # [B, N] bool


@struct.dataclass
class Preferences:
    """M preference pairs, or a batch of them: a chosen and a rejected answer to the same prompt, in this order."""

    prompt: Array  # [M, S] int32
    prompt_len: Array  # [M] int32
    tokens: Array  # [M, 2, T] int32
    valid: Array  # [M, 2, T] bool, as in Answers
    reference: Array  # [M, 2] float32 log-probability of each answer under the reference policy

    def __len__(self) -> int:
        return len(self.prompt_len)

    def take(self, indices: np.ndarray) -> Preferences:
        """The pairs at `indices`, in that order."""
        return jax.tree.map(lambda rows: rows[indices], self)


def sample_answers(
    policy: Policy, tables: RuleTables, params: Params, key: Array, batch: Batch, *, number: int, length: int,
    temperature: float,
) -> Answers:
    """`number` answers to each pair. The draws depend only on `key` [2] uint32 and on the row of the pair."""
    prefix = prefill(policy, params, batch.prompt, batch.prompt_len)
    rolled = rollout(
        policy, params, prefix, row_keys(key, PURPOSE_MINE, 0, batch.row, number),
        length=length, temperature=temperature, end_token=tables.end_token, other_ends=tables.other_ends,
        thought=tables.thought,
    )
    reading = reader.read(tables, rolled.tokens, rolled.valid)
    true = reading.value[..., -1] == batch.tier[:, None]
    return Answers(rolled.tokens, rolled.sampled, jnp.sum(rolled.logp, axis=-1), true & reading.well_formed, ~true)


def preferences(batch: Batch, answers: Answers, most: int) -> Preferences:
    """Up to `most` preference pairs from each example: its k-th right answer with its k-th wrong one. On the host."""
    rows, chosen, rejected = [], [], []
    for row, (right, wrong) in enumerate(zip(answers.right, answers.wrong, strict=True)):
        for better, worse in list(zip(np.flatnonzero(right), np.flatnonzero(wrong), strict=False))[:most]:
            rows.append(row)
            chosen.append(better)
            rejected.append(worse)
    at = np.array(rows, int)[:, None], np.array([chosen, rejected], int).T
    return Preferences(
        batch.prompt[at[0][:, 0]], batch.prompt_len[at[0][:, 0]], answers.tokens[at], answers.valid[at],
        answers.logp[at],
    )


def preference_loss(
    policy: Policy, params: Params, batch: Preferences, beta: float, temperature: float = 1.0, chunk: int = 0,
    of: Preferences | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The mean loss of preference pairs, and figures. If `batch` is a piece of the batch `of`, means are over `of`."""
    of = batch if of is None else of
    _, hidden = run_groups(policy, params, batch.prompt, batch.prompt_len, batch.tokens)
    logp, entropy = token_logprobs(partial(policy.unembed, params), hidden, batch.tokens, temperature, chunk)
    change = jnp.sum(jnp.where(batch.valid, logp, 0.0), axis=-1) - batch.reference  # [B, 2]
    margin = beta * (change[:, 0] - change[:, 1])
    loss = jnp.sum(jax.nn.softplus(-margin)) / len(of)
    tokens = jnp.sum(batch.prompt_len) + jnp.sum(batch.valid)
    return loss, {
        "policy/loss": loss,
        "policy/entropy": jnp.sum(jnp.where(batch.valid, entropy, 0.0)) / jnp.maximum(jnp.sum(of.valid), 1),
        "dpo/accuracy": jnp.sum(margin > 0) / len(of),
        "dpo/margin": jnp.sum(margin) / len(of),
        "dpo/chosen": beta * jnp.sum(change[:, 0]) / len(of),  # these rewards may both fall while the margin grows
        "dpo/rejected": beta * jnp.sum(change[:, 1]) / len(of),
        "tokens/trained": tokens,
        "budget/tokens": 3 * tokens,  # forward-equivalent, as in `rl.step`
    }
