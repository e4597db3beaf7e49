"""The one jitted training step of AGRL.

    1. Roll G answers to each of B prompts with the current policy.
    2. Read them on the device and score them by components (rule-aware reward shaping). If asked to, roll
       other examples in place of groups with equal rewards (dynamic sampling, `refill`).
    3. Find the groups that fail; roll `replace` of their answers again behind a forced prefix of the
       ground truth (adaptive guided replay). Where no group fails anywhere, `lax.cond` skips this.
    4. Turn scores into group-relative advantages, per answer or per reasoning step.
    5. Epochs x minibatches of a clipped policy-gradient loss, each a sum over micro-batches; update.
    6. Remember what guidance did.

How this departs from "TaoSR-AGRL" (arXiv 2510.08048), whose abstract alone is known to us: the reward
weights and the hard gate (`reward`), the trigger, level and its adaptation (`guidance`) and the
treatment of forced tokens (`objective`) are our readings, each with its alternatives in the config.
How it departs from textbook GRPO: the prompt goes through the network once per group, in sampling and
in the loss; components are centred one by one; equal rewards give advantage 0 rather than 0 / epsilon;
there is no KL term unless one is asked for.

What a step costs is counted in forward-equivalent tokens, `budget/tokens`: a token sampled, forced or scored is one, a
token trained on is three, and the prompt of a group counts once in each pass.

The step is a pure function of (state, batch, reference) and is compiled once for a whole run. Its parts stand in named
scopes (PHASES), by which profiles and `preflight` tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from agrl_jax.policy import scoring
from agrl_jax.policy.scoring import predicting_hidden, prefill
from agrl_jax.rl import guidance, objective, reader, refill
from agrl_jax.rl.guidance import GuidanceConfig, Selection
from agrl_jax.rl.objective import ObjectiveConfig, TokenWeights
from agrl_jax.rl.refill import Groups
from agrl_jax.rl.reward import RewardConfig, Score, component_names, is_consistent, score
from agrl_jax.rl.rollout import PURPOSE_REPLAY, PURPOSE_ROLLOUT, rollout, row_keys
from agrl_jax.types import Array, Batch, Params, Policy, Prefix, Reading, Rollout, RuleTables, TrainState

PHASES = ("lay_out", "prefill", "decode", "replay", "reference", "loss", "update")

Metrics = dict[str, Array]
SamplerFn = Callable[[Params], tuple[Policy, Params]]  # the policy that samples, and its parameters
# (grads, params, opt_state, skipped) -> params, opt_state, skipped, figures
UpdateFn = Callable[[Params, Params, Any, Array], tuple[Params, Any, Array, Metrics]]


@dataclass(frozen=True)
class StepConfig:
    """The static facts of a step; B must divide by shards * minibatches * micro_batches."""

    group_size: int  # G
    response_len: int  # T
    temperature: float
    epochs: int  # passes over each rollout
    minibatches: int  # updates per pass
    micro_batches: int  # pieces of a minibatch, to save memory
    logprob_chunk: int  # positions whose logits are held at once, over all devices; 0: all, and kept
    total_steps: int  # of the run: what a guidance cap is measured against
    shards: int  # data shards of the mesh
    inspect: int  # examples whose rollouts are returned, to be decoded and shown
    reward: RewardConfig
    objective: ObjectiveConfig
    guidance: GuidanceConfig | None  # None: no replay
    candidates: int = 1  # the step is given this many times B examples, to refill groups of equal rewards from


@struct.dataclass
class _Example:
    """What the loss needs of each example: arrays with B in front, so that they can be split."""

    prompt: Array  # [B, S]
    prompt_len: Array  # [B]
    rolled: Rollout  # [B, G, T]
    advantage: Array  # [B, G, T]
    reference_logp: Array | None  # [B, G, T]


@struct.dataclass
class Inspection:
    """The first `inspect` examples of a batch, as learnt from."""

    row: Array  # [n] row of each example in its split
    rolled: Rollout  # [n, G, T]
    reading: Reading  # [n, G, P]
    score: Score  # [n, G, Q]
    advantage: Array  # [n, G] mean over the answer's tokens


def make_step(
    policy: Policy, tables: RuleTables, step_names: tuple[str, ...], update: UpdateFn, cfg: StepConfig,
    sampler: SamplerFn | None = None,
) -> Callable[[TrainState, Batch, Params | None], tuple[TrainState, Metrics, Inspection]]:
    """Returns the pure function `step(state, batch, reference) -> (state, metrics, inspection)`; jit it once.

    `sampler` lays the parameters out for decoding, once per step, and says which policy takes them so; it must
    compute the same. By default the policy samples with the parameters as they are. `reference` holds the
    parameters of the reference policy, and is None where `objective.kl` is "none". `metrics` are float32 scalars.
    """

    def judge(rolled: Rollout, batch: Batch) -> tuple[Reading, Score]:
        reading = reader.read(tables, rolled.tokens, rolled.valid)
        return reading, score(reading, rolled, batch, tables, cfg.reward)

    def step(
        state: TrainState, batch: Batch, reference: Params | None
    ) -> tuple[TrainState, Metrics, Inspection]:
        # ------------------------------------------------------------------------------------- roll
        with jax.named_scope("lay_out"):
            decoding = (policy, state.params) if sampler is None else sampler(state.params)
        sample = partial(
            rollout, *decoding, length=cfg.response_len, temperature=cfg.temperature, end_token=tables.end_token
        )

        def roll(batch: Batch) -> tuple[Prefix, Rollout, Reading, Score]:
            with jax.named_scope("prefill"):
                prefix = prefill(*decoding, batch.prompt, batch.prompt_len)
            with jax.named_scope("decode"):
                rolled = sample(prefix, row_keys(state.key, PURPOSE_ROLLOUT, state.step, batch.row, cfg.group_size))
            return prefix, rolled, *judge(rolled, batch)

        rounds = _split(batch, cfg.candidates)
        batch = jax.tree.map(lambda x: x[0], rounds)
        prefix, rolled, reading, scored = roll(batch)
        metrics = _rollout_metrics(batch, rolled, scored, step_names)

        # ----------------------------------------------------------------------------------- refill
        if cfg.candidates > 1:

            def roll_again(batch: Batch) -> Groups:
                _, rolled, _, scored = roll(batch)
                return Groups(batch, rolled, ~_equal(scored))

            groups, figures = refill.refill(Groups(batch, rolled, ~_equal(scored)), rounds, roll_again, cfg.shards)
            batch, rolled = groups.batch, groups.rolled
            reading, scored = judge(rolled, batch)
            metrics |= figures

        # ----------------------------------------------------------------------------------- replay
        guided, memory = jnp.zeros((batch.row.shape[0], cfg.group_size), bool), state.guidance
        if cfg.guidance is not None:
            with jax.named_scope("replay"):
                rolled, guided, memory, figures = _replay(state, batch, prefix, rolled, reading, scored, sample, judge)
            reading, scored = judge(rolled, batch)
            metrics |= figures

        # ------------------------------------------------------------------------------- advantages
        advantage = objective.advantages(scored, reading, guided, cfg.response_len, cfg.objective)
        metrics |= _reward_metrics(scored)

        # ----------------------------------------------------------------------------------- update
        examples = _Example(batch.prompt, batch.prompt_len, rolled, advantage, None)
        if cfg.objective.kl != "none":
            with jax.named_scope("reference"):
                examples = examples.replace(reference_logp=_reference_logp(reference, examples))
        params, opt_state, skipped, figures = _updates(state, examples)
        metrics |= figures | _token_counts(batch, rolled, metrics, cfg)
        state = TrainState(params, opt_state, state.step + 1, state.key, memory, skipped)
        mean_advantage = jnp.mean(advantage, axis=-1, where=rolled.valid)
        seen = Inspection(batch.row, rolled, reading, scored, mean_advantage)
        return (
            state,
            {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()},
            jax.tree.map(lambda x: x[: cfg.inspect], seen),
        )

    def _replay(
        state: TrainState, batch: Batch, prefix: Prefix, rolled: Rollout, reading: Reading, scored: Score,
        sample: Callable[..., Rollout], judge: Callable[..., tuple[Reading, Score]],
    ) -> tuple[Rollout, Array, Any, Metrics]:
        """Guided replay: the merged rollout, which answers are guided [B, G], the new memory, and figures."""
        plain_pass = jnp.mean(scored.passed, axis=1)
        steps, tier = reading.value[..., :-1], reading.value[..., -1]
        right = scored.passed & is_consistent(steps, tier, tables) & reading.well_formed
        level = guidance.levels(state.guidance, batch, state.step / cfg.total_steps, cfg.guidance)
        forced, forced_len, guidable = guidance.reveal(
            batch, level, rolled, reading, right, tables.order, cfg.guidance
        )
        selection = guidance.select(plain_pass, guidable, cfg.guidance, cfg.shards)

        def replayed() -> tuple[Rollout, Array, Array, Array, Array]:
            again = _roll_guided(batch, prefix, forced, forced_len, selection, sample, state)
            _, scored = judge(again, guidance.gather(batch, selection))
            merged = guidance.replace_answers(rolled, again, passed_before, selection)
            guided_pass = guidance.scatter(jnp.zeros_like(plain_pass), jnp.mean(scored.passed, axis=1), selection)
            tokens = jnp.sum(again.valid & selection.chosen.reshape(-1, 1, 1))
            return merged, guided_pass, tokens, *_pass_steps(scored, selection)

        def untouched() -> tuple[Rollout, Array, Array, Array, Array]:
            return rolled, jnp.zeros_like(plain_pass), jnp.int32(0), jnp.float32(0), jnp.float32(0)

        passed_before = scored.passed
        chosen = guidance.scatter(jnp.zeros(plain_pass.shape, bool), selection.chosen.reshape(-1), selection)
        merged, guided_pass, tokens, step_passes, step_number = jax.lax.cond(
            jnp.any(selection.chosen), replayed, untouched
        )
        # A level of 0 reveals nothing: the answers are new, but they are the policy's own.
        guided = jnp.any(merged.forced, axis=-1)
        gap, met = guidance.transfer_gap(state.guidance, batch, plain_pass)
        memory = guidance.update(state.guidance, batch, plain_pass, chosen, guided_pass, cfg.guidance)
        number = jnp.maximum(jnp.sum(chosen), 1)
        figures = {
            "guide/share": jnp.mean(chosen),
            "guide/level": jnp.sum(jnp.where(chosen, level, 0)) / number,
            "guide/global_level": jnp.mean(memory.level),
            "guide/pass_before": jnp.sum(jnp.where(chosen, plain_pass, 0)) / number,
            "guide/pass_after": jnp.sum(guided_pass) / number,
            "guide/pass_steps": step_passes / jnp.maximum(step_number, 1),
            "guide/failing": jnp.mean(plain_pass <= cfg.guidance.threshold),
            "guide/unguidable": jnp.mean(selection.unguidable),
            "guide/transfer_gap": gap / jnp.maximum(met, 1),
            "guide/met_again": met,
            "tokens/replayed": tokens,
        }
        return merged, guided, memory, figures

    def _roll_guided(
        batch: Batch, prefix: Prefix, forced: Array, forced_len: Array, selection: Selection,
        sample: Callable[..., Rollout], state: TrainState,
    ) -> Rollout:
        """`replace` answers for each slot of the selection, behind their forced prefixes."""
        number, used = cfg.guidance.replace, selection.chosen.reshape(-1)
        tokens, lengths, row = guidance.gather((forced, forced_len, batch.row), selection)
        # A slot not in use is given the end token at once, so that it neither lengthens nor delays the loop.
        tokens = jnp.where(used[:, None], tokens, tables.end_token)
        lengths = jnp.where(used, lengths, cfg.response_len)
        shape = (row.shape[0], number)
        shared = Prefix(
            *guidance.gather((prefix.k, prefix.v), selection, axis=-4),
            *guidance.gather((prefix.length, prefix.last_hidden), selection),
        )
        return sample(
            shared,
            row_keys(state.key, PURPOSE_REPLAY, state.step, row, number),
            forced=jnp.broadcast_to(tokens[:, None], (*shape, cfg.response_len)),
            forced_len=jnp.broadcast_to(lengths[:, None], shape),
        )

    def _logprobs(params: Params, prompt: Array, prompt_len: Array, tokens: Array) -> tuple[Array, Array]:
        """Log-probabilities and entropies [B, G, T], prompts shared by their groups."""
        prefix = prefill(policy, params, prompt, prompt_len)
        hidden = predicting_hidden(policy, params, prefix, tokens)
        unembed = partial(policy.unembed, params)
        return scoring.token_logprobs(unembed, hidden, tokens, cfg.temperature, cfg.logprob_chunk)

    def _reference_logp(reference: Params, examples: _Example) -> Array:
        pieces = _split(examples, cfg.minibatches * cfg.micro_batches)
        logp = jax.lax.map(lambda e: _logprobs(reference, e.prompt, e.prompt_len, e.rolled.tokens)[0], pieces)
        return logp.swapaxes(0, 1).reshape(examples.advantage.shape)

    def _loss(params: Params, example: _Example, weights: TokenWeights) -> tuple[Array, Metrics]:
        rolled = example.rolled
        logp, entropy = _logprobs(params, example.prompt, example.prompt_len, rolled.tokens)
        loss, sums = objective.loss_terms(
            logp, entropy, rolled.logp, example.reference_logp, example.advantage, rolled.sampled, weights,
            cfg.objective,
        )
        change = jnp.abs(jnp.where(rolled.sampled, logp - rolled.logp, 0.0))
        sums |= {
            "entropy": jnp.sum(jnp.where(rolled.sampled, entropy, 0.0)),
            "forced_logp": jnp.sum(jnp.where(rolled.forced, logp, 0.0)),
            "sampler_gap": jnp.max(change),
        }
        return loss, sums

    def _updates(state: TrainState, examples: _Example) -> tuple[Params, Any, Array, Metrics]:
        """Epochs x minibatches, each the gradient of a sum over micro-batches and one update."""

        def minibatch(carry: tuple[Params, Any, Array], examples: _Example) -> tuple[Any, Metrics]:
            params, opt_state, skipped = carry
            weights = objective.token_weights(examples.rolled, cfg.objective)
            with jax.named_scope("loss"):
                grads, sums = _accumulate(
                    partial(jax.value_and_grad(_loss, has_aux=True), params),
                    (_split(examples, cfg.micro_batches), _split(weights, cfg.micro_batches)),
                )
            with jax.named_scope("update"):
                params, opt_state, skipped, figures = update(grads, params, opt_state, skipped)
            return (params, opt_state, skipped), _loss_metrics(sums, examples.rolled) | figures

        def epoch(carry: tuple[Params, Any, Array], _: None) -> tuple[Any, Metrics]:
            return jax.lax.scan(minibatch, carry, _split(examples, cfg.minibatches))

        carry = (state.params, state.opt_state, state.skipped)
        (params, opt_state, skipped), metrics = jax.lax.scan(epoch, carry, None, length=cfg.epochs)
        first = ("policy/sampler_gap", "guide/forced_probability")  # of the policy that sampled, before any update
        return params, opt_state, skipped, {
            name: value[0, 0] if name in first else jnp.mean(value) for name, value in metrics.items()
        }

    return step


# ------------------------------------------------------------------------------------------- helpers


def _split(tree: Any, number: int) -> Any:
    """Arrays [B, ...] as [number, B / number, ...]: piece i takes every number-th example from i.

    Strided, so that each piece is spread over the data shards as evenly as the batch is.
    """
    return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), tree)


def _accumulate(value_and_grad: Callable[..., Any], pieces: tuple[Any, Any]) -> tuple[Params, Metrics]:
    """Sums gradients and figures over micro-batches; of `sampler_gap`, the greatest."""

    def one(piece: tuple[Any, Any]) -> tuple[Params, Metrics]:
        (loss, sums), grads = value_and_grad(*piece)
        return grads, sums | {"loss": loss}

    def add(total: tuple[Params, Metrics], piece: tuple[Any, Any]) -> tuple[tuple[Params, Metrics], None]:
        grads, sums = one(piece)
        gap = jnp.maximum(total[1]["sampler_gap"], sums["sampler_gap"])
        grads, sums = jax.tree.map(jnp.add, total, (grads, sums))
        return (grads, sums | {"sampler_gap": gap}), None

    first = jax.tree.map(lambda x: x[0], pieces)
    if jax.tree.leaves(pieces)[0].shape[0] == 1:
        return one(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    return jax.lax.scan(add, zeros, pieces)[0]


def _pass_steps(scored: Score, selection: Selection) -> tuple[Array, Array]:
    """Passes and number of the guided answers whose tier was forced: they pass by their steps."""
    counts = scored.tier_forced & selection.chosen.reshape(-1)[:, None]
    return jnp.sum(counts & scored.passed).astype(jnp.float32), jnp.sum(counts).astype(jnp.float32)


# ------------------------------------------------------------------------------------------- metrics


def _equal(scored: Score) -> Array:
    """[B] bool: the rewards of the group are alike."""
    return jnp.std(scored.total, axis=1) < objective.MIN_SPREAD


def _rollout_metrics(batch: Batch, rolled: Rollout, scored: Score, step_names: tuple[str, ...]) -> Metrics:
    """Figures of the first rollout, before refill and guidance: the policy as it is."""
    total, steps = scored.total, slice(1, 1 + len(step_names))
    gated = (scored.raw > 0) & (scored.earned == 0) & scored.counted
    metrics = {
        "reward/total": jnp.mean(total),
        "reward/total_spread": jnp.mean(jnp.std(total, axis=1)),
        "reward/tier_accuracy": jnp.mean(scored.passed),
        "reward/equal_groups": jnp.mean(_equal(scored)),
        "reward/gated": jnp.mean(jnp.any(gated[..., steps], axis=-1)),  # answers of which a right step earned nothing
        "policy/length": jnp.mean(jnp.sum(rolled.valid, axis=-1)),
        "policy/truncated": 1 - jnp.mean(rolled.finished),
        "tokens/prompt": jnp.sum(batch.prompt_len),  # once for its group
        "tokens/rolled": jnp.sum(rolled.valid),
    }
    for index, name in enumerate(component_names(step_names)):
        raw, counted = scored.raw[..., index], scored.counted[..., index]
        metrics[f"reward/{name}"] = jnp.sum(raw * counted) / jnp.maximum(jnp.sum(counted), 1)
        metrics[f"reward/{name}_spread"] = jnp.mean(jnp.std(raw, axis=1, where=counted.any(1, keepdims=True)))
    return metrics


def _reward_metrics(scored: Score) -> Metrics:
    """Figures of what is learnt from: the rollout after others have replaced some."""
    return {
        "reward/learnt_from": jnp.mean(scored.total),
        "reward/equal_groups_after": jnp.mean(_equal(scored)),
    }


def _loss_metrics(sums: Metrics, rolled: Rollout) -> Metrics:
    sampled, forced = jnp.sum(rolled.sampled), jnp.sum(rolled.forced)
    metrics = {
        "policy/loss": sums["loss"],
        "policy/clipped": sums["clipped"],
        "policy/ratio_change": sums["ratio_change"],
        "policy/entropy": sums["entropy"] / jnp.maximum(sampled, 1),
        "policy/sampler_gap": sums["sampler_gap"],
        "guide/forced_probability": jnp.exp(sums["forced_logp"] / jnp.maximum(forced, 1)) * (forced > 0),
    }
    return metrics | ({"policy/kl": sums["kl"]} if "kl" in sums else {})


def _token_counts(batch: Batch, rolled: Rollout, counts: Metrics, cfg: StepConfig) -> Metrics:
    """Tokens trained on, and the forward-equivalent tokens of the step, given what else was counted."""
    once = jnp.sum(batch.prompt_len) + jnp.sum(rolled.valid)  # a pass over what is learnt from, as the reference makes
    sampled = sum(counts.get(f"tokens/{name}", 0) for name in ("prompt", "rolled", "refilled", "replayed"))
    scored = 0 if cfg.objective.kl == "none" else once
    return {"tokens/trained": once * cfg.epochs, "budget/tokens": sampled + scored + 3 * once * cfg.epochs}
