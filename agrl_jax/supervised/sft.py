"""Supervised fine-tuning on canonical responses: the warm start, and the reference policy of RL."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from agrl_jax.policy.scoring import predicting_hidden, run_groups, run_prompt, token_logprobs
from agrl_jax.supervised.fill import Blanks, filled_responses, possible_steps, tokens_learnt, tokens_scored
from agrl_jax.supervised.marginal import label_logprob
from agrl_jax.types import UNKNOWN, Array, Batch, Params, Policy


def gold_loss(
    policy: Policy, params: Params, batch: Batch, prompt_weight: float = 0.0, chunk: int = 0,
    blanks: Blanks | None = None, of: Batch | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the gold responses, mean over their tokens (end token included) [nats].

    If `batch` is a piece of the batch `of`, means are over `of`, so that losses and figures of the pieces add up.

    If steps of a pair are unknown, its gold response ends before the first of them, and so does the loss. With
    `blanks`, the policy fills unknown steps in, and the loss is over all tokens that are known (`fill`). If `blanks`
    has `forks`, the loss leaves out the steps of such pairs. It adds minus the log-probability of their labels through
    the rule book (`marginal`).

    `prompt_weight` times the mean cross-entropy of the prompts' own tokens is added. A policy trained from scratch has
    to learn its language here too, and predicting the item from the query makes it compare the two. Leave it at 0 for
    a pretrained policy. The instructions that all prompts share are not learnt.
    """
    tokens, known, starts, hidden, prompt_hidden = _run(policy, params, batch, blanks)
    tokens, weight, unembed = tokens[:, None], known[:, None].astype(jnp.float32), partial(policy.unembed, params)
    logp, entropy = token_logprobs(unembed, hidden, tokens, 1.0, chunk)
    of = batch if of is None else of
    number = jnp.maximum(jnp.sum(of.gold_len) if blanks is None else tokens_learnt(blanks, of), 1)
    response_loss = -jnp.sum(logp * weight) / number
    loss, figures = response_loss, {}
    if blanks is not None and blanks.forks is not None:
        unknown = jnp.any(batch.steps == UNKNOWN, axis=1)
        label_logp = label_logprob(
            policy, params, blanks.tables, blanks.forks, hidden[:, 0], starts, possible_steps(blanks.tables, batch)
        )
        label_loss = -jnp.sum(label_logp * unknown)
        loss += label_loss / number
        figures["policy/label_loss"] = label_loss / jnp.maximum(jnp.sum(jnp.any(of.steps == UNKNOWN, axis=1)), 1)
    if prompt_weight:
        following, inside = batch.prompt[:, 1:], jnp.arange(1, batch.prompt.shape[1]) < batch.prompt_len[:, None]
        prompt_logp, _ = token_logprobs(unembed, prompt_hidden[:, :-1], following, 1.0, chunk)
        loss += prompt_weight * -jnp.sum(prompt_logp * inside) / jnp.sum(of.prompt_len - 1)
    whole = jnp.sum(logp * weight, axis=-1)  # log-probability of each whole response
    trained = jnp.sum(batch.prompt_len)
    trained += jnp.sum(jnp.max(known * jnp.arange(1, known.shape[1] + 1), axis=-1))
    scored = 0 if blanks is None else tokens_scored(blanks.tables, blanks.texts, batch)
    return loss, figures | {
        "policy/loss": response_loss,
        "policy/entropy": jnp.sum(entropy * weight) / number,
        "policy/gold_probability": jnp.sum(jnp.exp(whole)) / len(of.gold_len),
        "tokens/trained": trained,
        "budget/tokens": scored + 3 * trained,  # forward-equivalent, as in `rl.step`
    }


class _Run(NamedTuple):
    """The responses that are taught, and the policy's hidden states."""

    tokens: Array  # [B, T] int32
    known: Array  # [B, T] bool tokens that are learnt
    starts: Array | None  # [B, P] as in `fill.Filled`, if steps are filled in
    hidden: Array  # [B, 1, T, D] that predict the tokens
    prompt_hidden: Array  # [B, S, D]


def _run(policy: Policy, params: Params, batch: Batch, blanks: Blanks | None) -> _Run:
    place = jnp.arange(batch.gold.shape[1])
    if blanks is None:
        prompt_hidden, hidden = run_groups(policy, params, batch.prompt, batch.prompt_len, batch.gold[:, None])
        return _Run(batch.gold, place < batch.gold_len[:, None], None, hidden, prompt_hidden)
    prefix, prompt_hidden = run_prompt(policy, params, batch.prompt, batch.prompt_len)
    fixed = jax.lax.stop_gradient((params, prefix))
    filled = filled_responses(policy, fixed[0], blanks.tables, blanks.texts, fixed[1], batch)
    known = filled.known
    if blanks.forks is not None:
        whole = jnp.all(batch.steps != UNKNOWN, axis=1)[:, None]
        known &= whole | (place >= filled.starts[:, -1:]) | filled.reasons
    hidden = predicting_hidden(policy, params, prefix, filled.tokens[:, None])
    return _Run(filled.tokens, known, filled.starts, hidden, prompt_hidden)
