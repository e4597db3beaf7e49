"""Distillation of a judge that reasons before it answers into a student that states the tier first.

Once a judge has written its steps, it is almost sure of the tier. Its doubt is in the steps, so its tier probabilities
come from the decision table (`evaluation.probabilities`). The student states the tier before any step. It learns these
probabilities q as soft targets (Hinton et al., arXiv 1503.02531), and after the tier the steps that the judge stated:

    loss = - sum over tiers of q(tier) log p(text of the tier)  -  step_weight * log p(steps, end | tier)

A tier's text may have several tokens, and each text is scored whole. So this is the cross-entropy over the trie of the
texts: where texts part, at whatever token, the soft target of a branch is the probability of the tiers on it. Pairs
need no labels.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from agrl_jax.data.pipeline import PartTexts
from agrl_jax.policy.scoring import predicting_hidden, run_prompt, token_logprobs
from agrl_jax.types import Array, Batch, Params, Policy

_LEAST_PROB = 1e-9  # keeps logarithms finite


@struct.dataclass
class Lessons:
    """What a judge says of M pairs, or of a batch of them."""

    prompt: Array  # [M, S] int32
    prompt_len: Array  # [M] int32
    probs: Array  # [M, tiers] float32 the judge's probabilities
    tokens: Array  # [M, T] int32 the judge's tier and then its steps, as the student states them
    tier_len: Array  # [M] int32 tokens of the tier
    length: Array  # [M] int32 tokens of tier and steps, end token included

    def __len__(self) -> int:
        return len(self.prompt_len)

    def take(self, indices: np.ndarray) -> Lessons:
        """The pairs at `indices`, in that order."""
        return jax.tree.map(lambda rows: rows[indices], self)


def lessons(batch: Batch, probs: np.ndarray) -> Lessons:
    """The lessons of pairs whose gold responses state the judge's tier first, then its steps."""
    return Lessons(batch.prompt, batch.prompt_len, probs, batch.gold, batch.part_end[:, 0], batch.gold_len)


def distill_loss(
    policy: Policy, params: Params, batch: Lessons, texts: PartTexts, step_weight: float, chunk: int = 0,
    of: Lessons | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss [nats], a mean over pairs, and figures. If `batch` is a piece of the batch `of`, means are over `of`.

    `texts` are those of the student's parts, the tier first. `distill/kl` is KL(judge || student) of the tier
    probabilities, `distill/agreement` how often both find the same tier likeliest.
    """
    of, unembed = batch if of is None else of, partial(policy.unembed, params)
    prefix, _ = run_prompt(policy, params, batch.prompt, batch.prompt_len)

    def logprobs(tokens: Array) -> Array:
        """Log-probabilities [B, G, n] of tokens after the prompts."""
        return token_logprobs(unembed, predicting_hidden(policy, params, prefix, tokens), tokens, 1.0, chunk)[0]

    sizes = texts.length[0][texts.length[0] > 0]
    names = texts.tokens[0, : len(sizes), : sizes.max()]  # [tiers, W]
    each = logprobs(jnp.broadcast_to(names, (len(batch), *names.shape)))
    tier_logp = jnp.sum(jnp.where(np.arange(names.shape[1]) < sizes[:, None], each, 0.0), axis=-1)  # [B, tiers]
    place = jnp.arange(batch.tokens.shape[1])
    after = (place >= batch.tier_len[:, None]) & (place < batch.length[:, None])
    steps_logp = jnp.sum(jnp.where(after, logprobs(batch.tokens[:, None])[:, 0], 0.0), axis=-1)  # [B]
    tier_loss, step_loss = -jnp.sum(batch.probs * tier_logp) / len(of), -jnp.sum(steps_logp) / len(of)
    loss = tier_loss + step_weight * step_loss
    gap = jnp.log(jnp.maximum(batch.probs, _LEAST_PROB)) - jax.nn.log_softmax(tier_logp)
    same = jnp.argmax(batch.probs, axis=1) == jnp.argmax(tier_logp, axis=1)
    tokens = jnp.sum(batch.prompt_len) + jnp.sum(batch.length) + len(batch) * int(sizes.sum())
    return loss, {
        "policy/loss": loss,
        "policy/step_loss": step_loss,
        "distill/kl": jnp.sum(batch.probs * gap) / len(of),
        "distill/agreement": jnp.sum(same) / len(of),
        "tokens/trained": tokens,
        "budget/tokens": 3 * tokens,  # forward-equivalent, as in `rl.step`
    }
