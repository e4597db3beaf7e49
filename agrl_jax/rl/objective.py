"""Advantages and losses, with every denominator written out.

Advantages compare each answer with the others of its group (GRPO, arXiv 2402.03300). Here each reward
component is centred by itself, over the answers in which it counts, before the components are added.
Without forced tokens this is the textbook's `(reward - mean) / std`. With forced tokens, a part that was
given to some answers of a group does not change the advantages of the others, and an answer in which
nothing counts does not enter the spread. Standard deviations are those of the population (ddof 0), without
an epsilon. A group whose rewards spread less than `MIN_SPREAD` gets advantage 0.

    loss      per token (r: ratio new/old, A: advantage)     weight of a token                 advantage
    grpo      -min(r A, clip(r) A)                           1 / (its answer's tokens * answers)   / std
    dr_grpo   the same                                       1 / (T * answers)                     centred
    dapo      the same, clip_high > clip_low                 1 / (all sampled tokens)              / std
    gspo      the same with r = the answer's geometric mean  as grpo                               / std
    cispo     -stop_gradient(clip(r)) A log p                as dapo                               / std
    rloo      -r A                                           1 / answers                           leave-one-out

(dr_grpo arXiv 2503.20783, dapo 2503.14476, gspo 2507.18071, cispo 2506.13585, rloo 2402.14740.) The tokens of an
answer include its forced ones, so a sampled token behind a forced prefix weighs what it weighs elsewhere.

Forced tokens have behaviour probability 1 and stay out of ratios, KL and entropy. They have a term of their own:

    shaped      -max(A, 0) p / (p + gamma)      that of a sampled token of the answer (LUFFY, arXiv 2504.14945)
    importance  -max(A, 0) p, unclipped         the same
    imitate     -log p                          imitate_weight / (T * answers), however many are forced
    mask        none                            0

A forced token is true. If the answer goes wrong after it, that is no reason to make it less likely: hence max(A, 0).

A group from which nothing can be learnt (no sampled token has an advantage, no forced token counts) has no part in
the loss: entropy bonus and KL are over the other groups alone. Denominators count all answers.

KL to the reference is a term of the loss as `k2` or `k3`. As a term of the loss, `k1` would have gradient 0 in
expectation. So `k1`, summed over the sampled tokens of an answer, is subtracted from its reward instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from agrl_jax.rl.reward import Score
from agrl_jax.types import Array, Reading, Rollout

MIN_SPREAD = 1e-4
UNSCALED = ("rloo", "dr_grpo")  # losses whose advantages are not divided by the spread of their group


@dataclass(frozen=True)
class ObjectiveConfig:
    """See the module's docstring. The ratio is clipped to [1 - clip_low, 1 + clip_high]."""

    loss: str  # grpo, dr_grpo, dapo, gspo, cispo, rloo
    credit: str  # sequence: one advantage per answer; step: the reward of a step goes to the tokens of that step
    clip_low: float
    clip_high: float
    kl: str  # none; k1: in the reward; k2, k3: in the loss
    kl_weight: float
    entropy_weight: float
    mask_truncated: bool  # answers that did not end give no gradient
    treatment: str  # of forced tokens: shaped, imitate, importance, mask
    gamma: float
    imitate_weight: float  # of a forced token; 1: that of a sampled token with advantage 1 in an answer of T tokens
    baseline: str  # pooled: mean over the group; unguided_only: mean over its unguided answers
    step_weight: float  # of each step's advantage, where credit is by step and advantages are divided by their spread
    clamp: float = 0.0  # advantages of tokens are clipped to [-clamp, clamp]; 0: they are not


# ---------------------------------------------------------------------------------------- advantages


def advantages(
    score: Score, reading: Reading, guided: Array, length: int, cfg: ObjectiveConfig, divergence: Array | None = None
) -> Array:
    """Advantages [B, G, T] float32 of each token. `guided` [B, G] marks answers with a forced prefix.

    `divergence` [B, G], the k1 estimate summed over each answer, is subtracted from the rewards, times `kl_weight`.
    The total of a token is clipped by `clamp`.
    """
    per_token = _unclamped(score, reading, guided, length, cfg, divergence)
    return jnp.clip(per_token, -cfg.clamp, cfg.clamp) if cfg.clamp else per_token


def _unclamped(
    score: Score, reading: Reading, guided: Array, length: int, cfg: ObjectiveConfig, divergence: Array | None
) -> Array:
    num_steps = reading.value.shape[-1] - 1
    earned, counted = score.earned, score.counted
    if divergence is not None:
        earned = jnp.concatenate([earned, -cfg.kl_weight * divergence[..., None]], axis=-1)
        counted = jnp.pad(counted, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    baseline = ~guided if cfg.baseline == "unguided_only" else jnp.ones_like(guided)
    if cfg.credit == "sequence":
        whole = _normalise(earned, counted, baseline, cfg.loss)
        return jnp.broadcast_to(whole[..., None], (*whole.shape, length))
    rest = counted.at[..., 1 : num_steps + 1].set(False)
    per_token = jnp.broadcast_to(_normalise(earned, rest, baseline, cfg.loss)[..., None], (*guided.shape, length))
    # What is earned includes the weight of a step. Dividing by the spread takes it out, so it is multiplied in again.
    weight = 1.0 if cfg.loss in UNSCALED else cfg.step_weight
    part = part_of_token(reading, length)
    for r in range(num_steps):
        own = jnp.arange(earned.shape[-1]) == r + 1
        advantage = _normalise(earned, counted & own, baseline, cfg.loss)
        per_token += weight * jnp.where(part == r, advantage[..., None], 0.0)
    return per_token


def teaches(advantage: Array, rolled: Rollout) -> Array:
    """[B] bool: some sampled token of the group has an advantage [B, G, T], so the policy gradient is not 0."""
    return jnp.any((advantage != 0) & rolled.sampled, axis=(1, 2))


def part_of_token(reading: Reading, length: int) -> Array:
    """[B, G, T] int32: the part whose statement a token helps to complete, or P after the last of them."""
    t = jnp.arange(length)[:, None]
    position = reading.position[..., None, :]  # [B, G, 1, P]
    ahead = jnp.where((position >= t) & (position < length), position, length)
    return jnp.where(jnp.min(ahead, axis=-1) < length, jnp.argmin(ahead, axis=-1), position.shape[-1])


def _normalise(earned: Array, counted: Array, baseline: Array, loss: str) -> Array:
    """Group-relative advantage [B, G] of components [B, G, Q], each centred over the answers where it counts."""
    member = counted & baseline[..., None]
    member = jnp.where(jnp.any(member, axis=1, keepdims=True), member, counted)  # no baseline: all
    number = jnp.sum(member, axis=1, keepdims=True)
    mean = jnp.sum(earned * member, axis=1, keepdims=True) / jnp.maximum(number, 1)
    centred = jnp.where(counted, earned - mean, 0.0)
    if loss == "rloo":  # x - mean of the others = n / (n - 1) (x - mean of all n)
        centred = centred * jnp.where(member, number / jnp.maximum(number - 1, 1), 1.0)
    total = jnp.sum(centred, axis=-1)
    # A component in which all answers are equal tells none apart. Answers in which no other counts are not compared.
    tells = counted & jnp.any(jnp.abs(centred) > MIN_SPREAD, axis=1, keepdims=True)
    spread = masked_std(total, jnp.any(tells, axis=-1))[:, None]
    scaled = total if loss in UNSCALED else total / jnp.where(spread < MIN_SPREAD, 1.0, spread)
    return jnp.where(spread < MIN_SPREAD, 0.0, scaled)


def masked_std(values: Array, where: Array) -> Array:
    """[B] standard deviation (ddof 0) of `values` [B, G] over the answers `where`; 0 where there are none."""
    number = jnp.maximum(jnp.sum(where, axis=1), 1)
    mean = jnp.sum(values * where, axis=1) / number
    return jnp.sqrt(jnp.sum(where * (values - mean[:, None]) ** 2, axis=1) / number)


# -------------------------------------------------------------------------------------------- losses


@struct.dataclass
class TokenWeights:
    """The weight of each token in the loss, computed over the whole (mini-)batch, so that micro-batches add up."""

    sampled: Array  # [B, G, T] float32, 0 where not sampled
    forced: Array  # [B, G, T] float32, 0 where not forced


def token_weights(rolled: Rollout, cfg: ObjectiveConfig) -> TokenWeights:
    """The denominators of the module's table as one weight per token."""
    kept = rolled.finished if cfg.mask_truncated else jnp.ones_like(rolled.finished)
    kept &= jnp.any(rolled.sampled, axis=-1)
    sampled = (rolled.sampled & kept[..., None]).astype(jnp.float32)
    forced = (rolled.forced & kept[..., None]).astype(jnp.float32)
    answers = jnp.maximum(jnp.sum(kept), 1)
    per_token = _per_token(cfg.loss, sampled, sampled + forced, answers)
    given = {"mask": 0.0, "imitate": cfg.imitate_weight / (forced.shape[-1] * answers)}.get(cfg.treatment, per_token)
    return TokenWeights(sampled=sampled * per_token, forced=forced * given)


def learnt_from(advantage: Array, weights: TokenWeights, cfg: ObjectiveConfig) -> Array:
    """[B] bool: groups of which some token [B, G, T] has a gradient, apart from entropy and KL."""
    true = True if cfg.treatment == "imitate" else advantage > 0
    tokens = ((weights.sampled > 0) & (advantage != 0)) | ((weights.forced > 0) & true)
    return jnp.any(tokens, axis=(1, 2))


def _per_token(loss: str, sampled: Array, whole: Array, answers: Array) -> Array:
    """The weight of one token, [B, G, 1] or scalar, from the 0/1 masks of sampled tokens and of all that count."""
    if loss in ("grpo", "gspo"):
        return 1.0 / (jnp.maximum(jnp.sum(whole, axis=-1, keepdims=True), 1) * answers)
    if loss in ("dapo", "cispo"):
        return 1.0 / jnp.maximum(jnp.sum(sampled), 1)
    return 1.0 / answers if loss == "rloo" else 1.0 / (whole.shape[-1] * answers)


def loss_terms(
    logp: Array, entropy: Array, old_logp: Array, reference_logp: Array | None, advantage: Array,
    sampled: Array, weights: TokenWeights, cfg: ObjectiveConfig,
) -> tuple[Array, dict[str, Array]]:
    """The loss of these answers, a sum over their weighted tokens, and sums for the metrics: plain ones over the
    sampled tokens that have a weight, whose number is `learnt`.

    All arguments [B, G, T]: `logp` and `entropy` of the policy being trained, `old_logp` of the sampler,
    `reference_logp` of the reference (needed where `cfg.kl` is k2 or k3).
    """
    # Tokens without weight are set to 0 first: 0 times the gradient of an exponential that overflows would be NaN.
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
    learnt = weights.sampled > 0
    sums = {
        "learnt": jnp.sum(learnt), "clipped": jnp.sum(learnt & (clipped != ratio)),
        "ratio_change": _dot(learnt, jnp.abs(change)),
    }  # fmt: skip
    if cfg.kl in ("k2", "k3"):
        divergence = kl_estimate(own, reference_logp, cfg.kl)
        sums["kl"] = _dot(learnt, divergence)
        loss += cfg.kl_weight * _dot(weights.sampled, divergence)
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
    worth = probability / (probability + cfg.gamma) if cfg.treatment == "shaped" else probability
    return -jnp.maximum(advantage, 0.0) * worth


def _dot(weights: Array, values: Array) -> Array:
    """Sum of weights * values; values with weight 0 do not count, even NaN or infinity."""
    return jnp.sum(weights * jnp.where(weights > 0, values, 0.0))
