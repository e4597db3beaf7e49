"""Rule-aware reward shaping: what each response earns, part by part.

A response is read on the device (`reader.read`) and scored by components: the tier, each reasoning
step, `consistent` (the rule book applied to the stated steps gives the stated tier), `format`, and a
soft penalty for overlong answers. Components stay apart until the advantages are formed, because a
component completed inside a forced prefix counts for nothing and must enter no mean. A right answer is
a well-formed one: the tier of an answer that the grammar does not accept earns nothing, whatever the
composition, since the scorecard counts that answer as wrong.

The paper's exact weights and gate are not public; `composition` chooses among readings of it:

    terminal   the tier alone: plain GRPO
    sum        all components added up
    gated      step rewards count only in an answer that is rule-consistent (our reading)
    gated_tier step rewards count only in a well-formed answer whose tier is right
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import struct

from agrl_jax.types import UNKNOWN, Array, Batch, Reading, Rollout, RuleTables


@dataclass(frozen=True)
class RewardConfig:
    """Weights are non-negative; `step_weight` is that of each single step."""

    composition: str  # terminal, sum, gated, gated_tier
    tier_kind: str  # exact: 1 if right; ordinal: less by each tier off
    tier_weight: float
    step_weight: float
    consistent_weight: float
    format_weight: float
    overlong_weight: float
    overlong_from: int  # tokens from which the penalty rises, to its whole weight at T


@struct.dataclass
class Score:
    """Components in the order of `component_names`: Q = R + 4 of them."""

    raw: Array  # [B, G, Q] float32 in [0, 1], before weights and gates (overlong: 0 to -1)
    earned: Array  # [B, G, Q] float32 weighted and gated contribution to the reward
    counted: Array  # [B, G, Q] bool: known and not forced; all else enters no mean, spread or pass
    passed: Array  # [B, G] bool: see `score`
    tier_forced: Array  # [B, G] bool: the tier stood in the forced prefix

    @property
    def total(self) -> Array:
        """[B, G] float32: the reward."""
        return jnp.sum(self.earned * self.counted, axis=-1)


def component_names(step_names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the Q components, in the order of `Score`."""
    return ("tier", *step_names, "consistent", "format", "overlong")


def score(reading: Reading, rolled: Rollout, batch: Batch, tables: RuleTables, cfg: RewardConfig) -> Score:
    """Scores responses [B, G] against the truth of their pairs.

    `passed` means: the answer is well-formed, and its tier is right and was sampled. Where the tier itself was
    forced, it means that all sampled steps of known truth are right, and that there is at least one.
    """
    r = tables.num_steps
    steps, tier = reading.value[..., :r], reading.value[..., r]
    truth = batch.steps[:, None, :]
    forced_len = jnp.sum(rolled.forced, axis=-1)
    part_sampled = reading.position >= forced_len[..., None]  # parts never stated have position T: the policy's doing

    step_right = (steps == truth) & (truth != UNKNOWN)
    tier_right = (tier == batch.tier[:, None]) & reading.well_formed
    tier_score = _tier_score(tier, batch.tier[:, None], tables.num_tiers, cfg.tier_kind) * reading.well_formed
    consistent = is_consistent(steps, tier, tables)
    length = jnp.sum(rolled.valid, axis=-1)
    span = max(rolled.tokens.shape[-1] - cfg.overlong_from, 1)
    overlong = -jnp.clip((length - cfg.overlong_from) / span, 0.0, 1.0)

    raw = jnp.concatenate(
        [tier_score[..., None], step_right]
        + [x[..., None] for x in (consistent, reading.well_formed, overlong)],
        axis=-1,
        dtype=jnp.float32,
    )
    always = jnp.ones_like(consistent)
    counted = jnp.concatenate(
        [part_sampled[..., r:], part_sampled[..., :r] & (truth != UNKNOWN)]
        + [x[..., None] for x in (jnp.any(part_sampled, axis=-1), always, always)],
        axis=-1,
    )
    shaping = 0.0 if cfg.composition == "terminal" else 1.0
    gate = {"gated": consistent, "gated_tier": tier_right}.get(cfg.composition, always)
    weight = np.array(
        [cfg.tier_weight] + [shaping * cfg.step_weight] * r
        + [shaping * w for w in (cfg.consistent_weight, cfg.format_weight, cfg.overlong_weight)],
        np.float32,
    )
    is_step = np.isin(np.arange(len(weight)), np.arange(1, r + 1))
    earned = raw * weight * jnp.where(is_step, gate[..., None], True)

    known = counted[..., 1 : r + 1]
    steps_pass = jnp.all(step_right | ~known, axis=-1) & jnp.any(known, axis=-1) & reading.well_formed
    tier_forced = ~part_sampled[..., r]
    passed = jnp.where(tier_forced, steps_pass, tier_right)
    return Score(raw=raw, earned=earned, counted=counted, passed=passed, tier_forced=tier_forced)


def is_model_answer(score: Score, reading: Reading, batch: Batch, tables: RuleTables) -> Array:
    """[B, G] bool: answers worth showing to the policy later. Well-formed, of the right tier, which was sampled,
    consistent with the rule book, and right in every step whose truth is known."""
    r = tables.num_steps
    steps_right = (score.raw[..., 1 : r + 1] > 0) | (batch.steps[:, None] == UNKNOWN)
    consistent = is_consistent(reading.value[..., :r], reading.value[..., r], tables)
    return score.passed & ~score.tier_forced & consistent & jnp.all(steps_right, axis=-1)


def is_consistent(steps: Array, tier: Array, tables: RuleTables) -> Array:
    """[...] bool: all steps [..., R] and the tier [...] are stated, and the table gives that tier for them."""
    code = jnp.zeros(tier.shape, jnp.int32)
    for index, size in enumerate(tables.num_values):
        code = code * size + jnp.maximum(steps[..., index], 0)
    return (tier != UNKNOWN) & jnp.all(steps != UNKNOWN, axis=-1) & (jnp.asarray(tables.tier_of)[code] == tier)


def _tier_score(stated: Array, truth: Array, num_tiers: int, kind: str) -> Array:
    """[B, G] float32: 1 where right; `ordinal` gives 1 - distance / (tiers - 1); 0 where none is stated."""
    if kind == "exact":
        return (stated == truth).astype(jnp.float32)
    distance = jnp.abs(stated - truth) / (num_tiers - 1)
    return jnp.where(stated == UNKNOWN, 0.0, 1.0 - distance)
