"""Advantages and losses, with every denominator written out.

Advantages compare each answer with the others of its group (GRPO, arXiv 2402.03300). Here each reward
component is centred on its own, over the answers in which it counts, before the components are added:
without forced tokens that is the textbook's `(reward - mean) / std`; with them, a part that was given
to some answers of a group neither lifts nor lowers the others. Standard deviations are those of the
population (ddof 0), without an epsilon; a group whose rewards spread less than `MIN_SPREAD` gets
advantage 0.

    loss      per token (r: ratio new/old, A: advantage)     weight of a sampled token         advantage
    grpo      -min(r A, clip(r) A)                           1 / (its answer's tokens * answers)   / std
    dr_grpo   the same                                       1 / (T * answers)                     centred
    dapo      the same, clip_high > clip_low                 1 / (all sampled tokens)              / std
    gspo      the same with r = the answer's geometric mean  as grpo                               / std
    cispo     -stop_gradient(clip(r)) A log p                as dapo                               / std
    rloo      -r A                                           1 / answers                           leave-one-out

(dr_grpo arXiv 2503.20783, dapo 2503.14476, gspo 2507.18071, cispo 2506.13585, rloo 2402.14740.)

Forced tokens have behaviour probability 1 and stay out of ratios, KL, entropy and lengths. Their term:

    shaped      -A p / (p + gamma)          (LUFFY, arXiv 2504.14945)
    imitate     -log p, times `imitate_weight`, averaged over all forced tokens
    importance  -A p, unclipped
    mask        none

`shaped` and `importance` weigh a forced token as a sampled one of an answer of its whole length.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from agrl_jax.rl.reward import Score
from agrl_jax.types import Array, Reading, Rollout

MIN_SPREAD = 1e-4


@dataclass(frozen=True)
class ObjectiveConfig:
    """See the module's docstring; `clip_low` and `clip_high` bound the ratio to [1 - low, 1 + high]."""

    loss: str  # grpo, dr_grpo, dapo, gspo, cispo, rloo
    credit: str  # sequence: one advantage per answer; step: each step's reward to the tokens of that step
    clip_low: float
    clip_high: float
    kl: str  # none, k1, k2, k3
    kl_weight: float
    entropy_weight: float
    mask_truncated: bool  # answers that did not end give no gradient
    treatment: str  # of forced tokens: shaped, imitate, importance, mask
    gamma: float
    imitate_weight: float
    baseline: str  # pooled: mean over the group; unguided_only: mean over its unguided answers
    step_weight: float  # of each step's advantage where credit is by step


# ---------------------------------------------------------------------------------------- advantages


def advantages(score: Score, reading: Reading, guided: Array, length: int, cfg: ObjectiveConfig) -> Array:
    """Advantages [B, G, T] float32 of each token. `guided` [B, G] marks answers with a forced prefix."""
    num_steps = reading.value.shape[-1] - 1
    baseline = ~guided if cfg.baseline == "unguided_only" else jnp.ones_like(guided)
    if cfg.credit == "sequence":
        whole = _normalise(score.earned, score.counted, baseline, cfg.loss)
        return jnp.broadcast_to(whole[..., None], (*whole.shape, length))
    step = slice(1, num_steps + 1)
    rest = score.counted.at[..., step].set(False)
    per_token = jnp.broadcast_to(
        _normalise(score.earned, rest, baseline, cfg.loss)[..., None], (*guided.shape, length)
    )
    part = part_of_token(reading, length)
    for r in range(num_steps):
        own = jnp.arange(score.earned.shape[-1]) == r + 1
        advantage = _normalise(score.earned, score.counted & own, baseline, cfg.loss)
        per_token += cfg.step_weight * jnp.where(part == r, advantage[..., None], 0.0)
    return per_token


def part_of_token(reading: Reading, length: int) -> Array:
    """[B, G, T] int32: the part whose statement a token helps to complete, or P after the last of them."""
    t = jnp.arange(length)[:, None]
    position = reading.position[..., None, :]  # [B, G, 1, P]
    ahead = jnp.where((position >= t) & (position < length), position, length)
    return jnp.where(jnp.min(ahead, axis=-1) < length, jnp.argmin(ahead, axis=-1), position.shape[-1])


def _normalise(earned: Array, counted: Array, baseline: Array, loss: str) -> Array:
    """Group-relative advantage [B, G] of components [B, G, Q], each centred over the answers where it counts."""
    member = counted & baseline[..., None]
    member = jnp.where(jnp.any(member, axis=1, keepdims=True), member, counted)  # nobody to compare with: all
    number = jnp.sum(member, axis=1, keepdims=True)
    mean = jnp.sum(earned * member, axis=1, keepdims=True) / jnp.maximum(number, 1)
    centred = jnp.where(counted, earned - mean, 0.0)
    if loss == "rloo":  # x - mean of the others = n / (n - 1) (x - mean of all n)
        centred = centred * jnp.where(member, number / jnp.maximum(number - 1, 1), 1.0)
    total = jnp.sum(centred, axis=-1)
    spread = jnp.std(total, axis=1, keepdims=True)
    scaled = total if loss in ("rloo", "dr_grpo") else total / jnp.where(spread < MIN_SPREAD, 1.0, spread)
    return jnp.where(spread < MIN_SPREAD, 0.0, scaled)


# -------------------------------------------------------------------------------------------- losses


@struct.dataclass
class TokenWeights:
    """What each token counts in the loss, worked out over the whole (mini-)batch so that micro-batches add up."""

    sampled: Array  # [B, G, T] float32, 0 where not sampled
    forced: Array  # [B, G, T] float32, 0 where not forced


def token_weights(rolled: Rollout, cfg: ObjectiveConfig) -> TokenWeights:
    """The denominators of the module's table as one weight per token."""
    kept = rolled.finished if cfg.mask_truncated else jnp.ones_like(rolled.finished)
    kept &= jnp.any(rolled.sampled, axis=-1)
    sampled = (rolled.sampled & kept[..., None]).astype(jnp.float32)
    forced = (rolled.forced & kept[..., None]).astype(jnp.float32)
    answers = jnp.maximum(jnp.sum(kept), 1)
    if cfg.treatment == "mask":
        given = jnp.zeros_like(forced)
    elif cfg.treatment == "imitate":
        given = cfg.imitate_weight * forced / jnp.maximum(jnp.sum(forced), 1)
    else:
        given = forced * _per_token(cfg.loss, sampled + forced, answers)
    return TokenWeights(sampled=sampled * _per_token(cfg.loss, sampled, answers), forced=given)


def _per_token(loss: str, mask: Array, answers: Array) -> Array:
    """The weight of one token of each answer, [B, G, 1] or scalar, from the 0/1 mask of those that count."""
    if loss in ("grpo", "gspo"):
        return 1.0 / (jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1) * answers)
    if loss in ("dapo", "cispo"):
        return 1.0 / jnp.maximum(jnp.sum(mask), 1)
    return 1.0 / answers if loss == "rloo" else 1.0 / (mask.shape[-1] * answers)


def loss_terms(
    logp: Array, entropy: Array, old_logp: Array, reference_logp: Array | None, advantage: Array,
    sampled: Array, weights: TokenWeights, cfg: ObjectiveConfig,
) -> tuple[Array, dict[str, Array]]:
    """The loss of these answers, a sum over their weighted tokens, and sums for the metrics.

    All arguments [B, G, T]: `logp` and `entropy` of the policy being trained, `old_logp` of the sampler,
    `reference_logp` of the reference (needed where `cfg.kl` is not "none").
    """
    # Silenced before any arithmetic: past an exponential, a weight of 0 would still leave a NaN in the gradient.
    own, given = (jnp.where(weight > 0, logp, 0.0) for weight in (weights.sampled, weights.forced))
    change = jnp.where(sampled, own - old_logp, 0.0)
    if cfg.loss == "gspo":
        length = jnp.maximum(jnp.sum(sampled, axis=-1, keepdims=True), 1)
        change = jnp.broadcast_to(jnp.sum(change, axis=-1, keepdims=True) / length, change.shape)
    ratio = jnp.exp(change)
    clipped = jnp.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high)
    if cfg.loss == "cispo":
        policy_term = -jax.lax.stop_gradient(clipped) * advantage * own
    elif cfg.loss == "rloo":
        policy_term = -ratio * advantage
    else:
        policy_term = -jnp.minimum(ratio * advantage, clipped * advantage)
    forced_term = _forced_term(given, advantage, cfg)
    loss = _dot(weights.sampled, policy_term) + _dot(weights.forced, forced_term)
    sums = {"clipped": _dot(weights.sampled, clipped != ratio), "ratio_change": _dot(weights.sampled, jnp.abs(change))}
    if cfg.kl != "none":
        divergence = kl_estimate(own, reference_logp, cfg.kl)
        sums["kl"] = _dot(weights.sampled, divergence)
        loss += cfg.kl_weight * sums["kl"]
    if cfg.entropy_weight:
        loss -= cfg.entropy_weight * _dot(weights.sampled, entropy)
    return loss, sums


def kl_estimate(logp: Array, reference_logp: Array, kind: str) -> Array:
    """Per-token estimates of KL(policy || reference) from tokens of the policy (Schulman's k1, k2, k3)."""
    difference = logp - reference_logp
    if kind == "k1":
        return difference
    return 0.5 * difference**2 if kind == "k2" else jnp.expm1(-difference) + difference


def _forced_term(logp: Array, advantage: Array, cfg: ObjectiveConfig) -> Array:
    """Per-token loss of forced tokens, before their weights."""
    if cfg.treatment == "imitate":
        return -logp
    probability = jnp.exp(logp)
    return -advantage * (probability / (probability + cfg.gamma) if cfg.treatment == "shaped" else probability)


def _dot(weights: Array, values: Array) -> Array:
    """Sum of weights * values, where a weight of 0 silences any value, NaN and infinity included."""
    return jnp.sum(weights * jnp.where(weights > 0, values, 0.0))
