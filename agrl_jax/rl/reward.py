"""Rule-aware reward shaping: what each response earns, part by part.

A response is read on the device (`reader.read`) and scored by components: the tier, each reasoning
step, `consistent` (the rule book applied to the stated steps gives the stated tier), `format`, and a
soft penalty for overlong answers. Components stay apart until the advantages are computed, because a
component completed inside a forced prefix does not count and must enter no mean. If the grammar does not
accept an answer, its tier earns nothing, whatever the composition: the scorecard counts that answer as wrong.

The paper's exact weights and gate are not public; `composition` chooses among readings of it:

    terminal   the tier alone: plain GRPO
    sum        all components added up
    gated      step rewards count only in an answer that is rule-consistent (our reading)
    gated_tier step rewards count only in a well-formed answer whose tier is right

`tier_kind` says what a stated tier y earns where t is true. The distance d of two tiers is 1 if they differ; in
`ordinal` and `rps` it is the number of places between them, divided by the largest such number:

    exact, ordinal  1 - d(y, t)
    brier, rps      (1 - d(y, t) + c m) / (1 + c)      m: mean of d(y, y') over the other answers y' of the group
                                                       c = (G - 1) / (G - 2)

`exact` rewards the likeliest tier most and `ordinal` the median, however unsure the policy should be. `brier` and `rps`
reward honest probabilities. Let the policy state tiers with probabilities P, and let Y and Y' be two independent
answers. Then (Gneiting & Raftery 2007, section 5: energy scores)

    2 E d(Y, t) - E d(Y, Y')  =  sum over k of (P(k) - [k = t])^2                             the Brier score, or
                              =  sum over k of (P(tier <= k) - [t <= k])^2 2 / (tiers - 1)    ranked probability's

The expected policy gradient of `dr_grpo` and `rloo` is that of minus this score, times a constant. The factor c
corrects for the mean of the group, which depends on this answer through the m of the others. Losses that divide by the
spread of a group change the length of its gradient, so with two outcomes `brier` then teaches no more than `exact`.

P is over whole sampled answers, steps and tier. The scorecard's tier probabilities come from the steps of one answer
through the decision table, as if steps were independent. Their score could not reward that answer: the probabilities of
a step's values do not depend on which of them was sampled. Answers behind a forced prefix come from another
distribution, so they are compared with one another only, as the other answers are. An answer that is not well-formed
has distance 1 to every tier, and earns nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import struct

from agrl_jax.types import UNKNOWN, Array, Batch, Reading, Rollout, RuleTables

PROPER = ("brier", "rps")  # kinds of tier reward that compare the answers of a group


@dataclass(frozen=True)
class RewardConfig:
    """Weights are non-negative; `step_weight` is that of each single step."""

    composition: str  # terminal, sum, gated, gated_tier
    tier_kind: str  # exact, ordinal, brier, rps
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
    counted: Array  # [B, G, Q] bool: known and not forced; no other enters a mean, a spread or `passed`
    passed: Array  # [B, G] bool: see `score`
    tier_forced: Array  # [B, G] bool: the tier stood in the forced prefix

    @property
    def total(self) -> Array:
        """[B, G] float32: the reward."""
        return jnp.sum(self.earned * self.counted, axis=-1)


_OTHERS = ("consistent", "format", "overlong")
# The reward's other figures. A step with the name of one of them, or of another component, is called `step NAME`.
_FIGURES = ("total", "tier_accuracy", "equal_groups", "equal_groups_after", "gated", "learnt_from")


def component_names(step_names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the Q components, in the order of `Score`. Metrics and samples use them, so no two are equal."""
    steps = (f"step {name}" if name in (*_OTHERS, *_FIGURES) else name for name in step_names)
    return ("tier", *steps, *_OTHERS)


def score(reading: Reading, rolled: Rollout, batch: Batch, tables: RuleTables, cfg: RewardConfig) -> Score:
    """Scores responses [B, G] against the truth of their pairs.

    `passed` means: the answer is well-formed, and its tier is right and was sampled. Where the tier itself was
    forced, it means that all sampled steps of known truth are right, and that there is at least one.
    """
    r = tables.num_steps
    steps, tier = reading.value[..., :r], reading.value[..., r]
    truth = batch.steps[:, None, :]
    forced_len = jnp.sum(rolled.forced, axis=-1)
    part_sampled = reading.position >= forced_len[..., None]  # parts never stated (position T) too

    step_right = (steps == truth) & (truth != UNKNOWN)
    tier_right = (tier == batch.tier[:, None]) & reading.well_formed
    stated = jnp.where(reading.well_formed, tier, UNKNOWN)
    tier_score = _tier_score(stated, batch.tier, forced_len > 0, tables.num_tiers, cfg.tier_kind)
    consistent = is_consistent(steps, tier, tables, batch.book)
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
    """[B, G] bool: answers worth showing to the policy later. They are well-formed, their tier is right and was
    sampled, they are consistent with the rule book, and every step whose truth is known is right."""
    r = tables.num_steps
    steps_right = (score.raw[..., 1 : r + 1] > 0) | (batch.steps[:, None] == UNKNOWN)
    consistent = is_consistent(reading.value[..., :r], reading.value[..., r], tables, batch.book)
    return score.passed & ~score.tier_forced & consistent & jnp.all(steps_right, axis=-1)


def is_consistent(steps: Array, tier: Array, tables: RuleTables, book: Array | None = None) -> Array:
    """[...] bool: all steps [..., R] and the tier [...] are stated, and the table gives this tier for these steps.

    With `book` [B] the arrays begin with [B, G], and each example has the table of its own rule book.
    """
    code = jnp.zeros(tier.shape, jnp.int32)
    for index, size in enumerate(tables.num_values):
        code = code * size + jnp.maximum(steps[..., index], 0)
    tier_of = jnp.asarray(tables.tier_of)
    implied = tier_of[0][code] if book is None else tier_of[book[:, None], code]
    return (tier != UNKNOWN) & jnp.all(steps != UNKNOWN, axis=-1) & (implied == tier)


def _tier_score(stated: Array, truth: Array, guided: Array, num_tiers: int, kind: str) -> Array:
    """[B, G] float32 in [0, 1]: what the tiers `stated` [B, G] earn where `truth` [B] is; see the module's docstring.

    A tier that is UNKNOWN earns 0. `guided` [B, G] marks the answers with a forced prefix.
    """
    by_place = kind in ("ordinal", "rps")
    there = stated != UNKNOWN
    earned = 1.0 - _distance(stated, truth[:, None], num_tiers, by_place)
    if kind in PROPER:
        apart = _distance(stated[:, :, None], stated[:, None, :], num_tiers, by_place)  # [B, G, G]
        apart = jnp.where(there[:, None, :], apart, 1.0)
        others = (guided[:, :, None] == guided[:, None, :]) & ~np.eye(stated.shape[1], dtype=bool)
        mean = jnp.sum(apart * others, axis=-1) / jnp.maximum(jnp.sum(others, axis=-1), 1)
        group = stated.shape[1]
        share = (group - 1) / (group - 2) if group > 2 else 0.0  # m is the same for two answers
        earned = (earned + share * mean) / (1 + share)
    return jnp.where(there, earned, 0.0)


def _distance(a: Array, b: Array, num_tiers: int, by_place: bool) -> Array:
    """[...] float32 in [0, 1]: 1 where tiers differ; with `by_place`, the places between them as a share of the most.
    """
    return jnp.abs(a - b) / (num_tiers - 1) if by_place else (a != b).astype(jnp.float32)
