"""The one jitted training step of AGRL.

    1. Roll G answers to each of B prompts with the current policy. If asked to, first choose the B from more examples
       by the pass rates of their earlier groups (`difficulty`).
    2. Read the answers on the device and score them by components (rule-aware reward shaping). If asked to, roll
       other examples in place of groups with equal rewards (dynamic sampling, `refill`).
    3. Find the groups that fail; roll `replace` of their answers again behind a forced prefix of the
       ground truth (adaptive guided replay). If no group fails on any device, `lax.cond` skips this.
    4. Turn scores into group-relative advantages, per answer or per reasoning step.
    5. Update the parameters, for each epoch and minibatch, by a clipped policy-gradient loss that is summed over
       micro-batches. Groups that can teach go first; micro-batches without such groups are not computed.
    6. Remember what guidance did, and pass rates.

Where this departs from "TaoSR-AGRL" (arXiv 2510.08048): we know its abstract alone. The reward weights and the hard
gate (`reward`), the trigger and the adaptive level (`guidance`) and the treatment of forced tokens (`objective`) are
our readings, and the config has alternatives to each. Where it departs from textbook GRPO: the prompt goes through the
network once per group, in sampling and in the loss; components are centred one by one; equal rewards give advantage 0
rather than 0 / epsilon; there is no KL term unless one is asked for.

`budget/tokens` counts the cost of a step in forward-equivalent tokens. A token that is sampled, forced or scored counts
one, a token trained on three. The prompt of a group counts once in each pass, and the instructions once each time they
run. Micro-batches that are not computed do not count.

The step is a pure function of (state, batch, reference) and is compiled once for a whole run. Profiles and `preflight`
tell its parts apart by named scopes (PHASES).
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
from agrl_jax.policy.scoring import prefill, run_groups
from agrl_jax.rl import difficulty, guidance, objective, reader, refill
from agrl_jax.rl.difficulty import DifficultyConfig
from agrl_jax.rl.guidance import GuidanceConfig, Revelation, Selection
from agrl_jax.rl.objective import ObjectiveConfig, TokenWeights
from agrl_jax.rl.refill import Groups
from agrl_jax.rl.reward import RewardConfig, Score, component_names, is_model_answer, score
from agrl_jax.rl.rollout import PURPOSE_REPLAY, PURPOSE_ROLLOUT, rollout, row_keys
from agrl_jax.types import Array, Batch, GuidanceState, Params, Policy, Prefix, Reading, Rollout, RuleTables, TrainState

PHASES = ("lay_out", "prefill", "decode", "replay", "reference", "loss", "update")

Metrics = dict[str, Array]
SamplerFn = Callable[[Params], tuple[Policy, Params]]  # the policy that samples, and its parameters
# (grads, params, opt_state, skipped) -> params, opt_state, skipped, figures
UpdateFn = Callable[[Params, Params, Any, Array], tuple[Params, Any, Array, Metrics]]


@dataclass(frozen=True)
class StepConfig:
    """The static facts of a step. B must be a multiple of shards * minibatches * micro_batches."""

    group_size: int  # G
    response_len: int  # T
    temperature: float
    epochs: int  # passes over each rollout
    minibatches: int  # updates per pass
    micro_batches: int  # pieces of a minibatch: saves memory, and the work of pieces without a group that teaches
    logprob_chunk: int  # positions whose logits are held at once, over all devices; 0: all are held, and kept
    total_steps: int  # of the run; the cap of guidance falls over these
    shards: int  # data shards of the mesh
    inspect: int  # examples whose rollouts are returned, to be decoded and shown
    reward: RewardConfig
    objective: ObjectiveConfig
    guidance: GuidanceConfig | None  # None: no replay
    sample_batches: int = 1  # pieces of the batch, sampled one after the other: needs memory for one piece's answers
    candidates: int = 1  # the step is given this many times B examples, to replace groups of equal rewards
    constrained: bool = False  # sample well-formed answers alone; log-probabilities are among the allowed tokens
    difficulty: DifficultyConfig | None = None  # the step is given `pool` times B examples, to choose B from


@struct.dataclass
class _Example:
    """What the loss needs of each example. All arrays have B in front, so that they can be split."""

    prompt: Array  # [B, S]
    prompt_len: Array  # [B]
    rolled: Rollout  # [B, G, T]
    advantage: Array  # [B, G, T]
    reference_logp: Array | None  # [B, G, T]
    weights: TokenWeights | None = None  # [B, G, T]; 0 in groups that are not learnt from
    learnt: Array | None = None  # [B] bool


@struct.dataclass
class Inspection:
    """The first `inspect` examples of a batch, as learnt from."""

    row: Array  # [n] row of each example in its split
    rolled: Rollout  # [n, G, T]
    reading: Reading  # [n, G, P]
    score: Score  # [n, G, Q]
    advantage: Array  # [n, G] mean over the answer's tokens


@dataclass(frozen=True)
class _Parts:
    """What a step is made of: the same for a whole run."""

    policy: Policy  # takes the parameters that `instruct` makes of the trained ones
    tables: RuleTables
    step_names: tuple[str, ...]
    update: UpdateFn
    cfg: StepConfig
    sampler: SamplerFn
    instruct: Callable[[Params], Params]  # runs the instructions; see `scoring.instructed`
    instructions: Array | None  # [I]


def make_step(
    policy: Policy, tables: RuleTables, step_names: tuple[str, ...], update: UpdateFn, cfg: StepConfig,
    sampler: SamplerFn | None = None, instructions: Array | None = None,
) -> Callable[[TrainState, Batch, Params | None], tuple[TrainState, Metrics, Inspection]]:
    """Returns the pure function `step(state, batch, reference) -> (state, metrics, inspection)`; jit it once.

    `sampler` lays the parameters out for decoding, once per step, and returns the policy that takes this layout; it
    must compute the same. By default the policy samples with the parameters as they are. `reference` holds the
    parameters of the reference policy, and is None where `objective.kl` is "none". `instructions` [I] are the tokens
    before all prompts: they are run once to sample, once for the reference, and once for each update. `metrics` are
    float32 scalars; a mean over nothing is NaN.
    """
    sampler = sampler or (lambda params: (policy, params))
    after, instruct = scoring.instructed(policy, instructions)
    return partial(_step, _Parts(after, tables, step_names, update, cfg, sampler, instruct, instructions))


def _step(
    parts: _Parts, state: TrainState, batch: Batch, reference: Params | None
) -> tuple[TrainState, Metrics, Inspection]:
    """The algorithm of the module's docstring."""
    cfg = parts.cfg
    # ------------------------------------------------------------------------------------- roll
    with jax.named_scope("lay_out"):
        decoding = parts.sampler(state.params)
    with jax.named_scope("prefill"):
        sampling, instruct = scoring.instructed(decoding[0], parts.instructions)
        decoding = sampling, instruct(decoding[1])
    if cfg.difficulty is not None:
        batch, outside = difficulty.choose(state.difficulty, batch, state.step, cfg.difficulty, cfg.shards)
    rounds = split(batch, cfg.candidates)
    batch = jax.tree.map(lambda x: x[0], rounds)
    prefix, rolled = _roll(parts, decoding, state, batch)
    reading, scored = _read_and_score(parts, rolled, batch)
    metrics = _rollout_metrics(batch, rolled, scored, _teaches(parts, rolled, reading, scored), parts.step_names)
    rates = state.difficulty
    if cfg.difficulty is not None:
        rates = difficulty.remember(rates, batch, jnp.mean(scored.passed, axis=1), state.step)
        metrics |= difficulty.count(rates, cfg.difficulty) | {"difficulty/outside": jnp.mean(outside)}

    # ----------------------------------------------------------------------------------- refill
    if cfg.candidates > 1:
        batch, rolled, figures = _refill(parts, decoding, state, rounds, rolled)
        reading, scored = _read_and_score(parts, rolled, batch)
        metrics |= figures

    # ----------------------------------------------------------------------------------- replay
    remembered = state.guidance
    if cfg.guidance is not None:
        with jax.named_scope("replay"):
            rolled, remembered, figures = _replay(parts, decoding, state, batch, prefix, rolled, reading, scored)
        reading, scored = _read_and_score(parts, rolled, batch)
        metrics |= figures

    # ------------------------------------------------------------------------------- advantages
    reference_logp = None
    if cfg.objective.kl != "none":
        with jax.named_scope("reference"):
            reference_logp = _reference_logp(parts, reference, batch, rolled)
    advantage, figures = _advantages(parts, rolled, reading, scored, reference_logp)
    metrics |= figures

    # ----------------------------------------------------------------------------------- update
    examples = _Example(batch.prompt, batch.prompt_len, rolled, advantage, reference_logp)
    params, opt_state, skipped, figures = _updates(parts, state, examples)
    shared = 0 if parts.instructions is None else len(parts.instructions)
    metrics |= figures | _token_counts(batch, rolled, metrics | figures, cfg, shared)
    state = TrainState(params, opt_state, state.step + 1, state.key, remembered, skipped, rates)
    seen = Inspection(batch.row, rolled, reading, scored, jnp.mean(advantage, axis=-1, where=rolled.valid))
    return (
        state,
        {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()},
        jax.tree.map(lambda x: x[: cfg.inspect], seen),
    )


# --------------------------------------------------------------------------------------------- roll


def _roll(parts: _Parts, decoding: tuple[Policy, Params], state: TrainState, batch: Batch) -> tuple[Prefix, Rollout]:
    """The prefixes of the prompts, and G answers to each."""
    with jax.named_scope("prefill"):
        prefix = prefill(*decoding, batch.prompt, batch.prompt_len)
    with jax.named_scope("decode"):
        keys = row_keys(state.key, PURPOSE_ROLLOUT, state.step, batch.row, parts.cfg.group_size)
        number = parts.cfg.sample_batches
        if number == 1:
            return prefix, _sample(parts, decoding, prefix, keys)
        of_layers = split((prefix.k, prefix.v), number, axis=-4)
        pieces = Prefix(*of_layers, *split((prefix.length, prefix.last_hidden), number)), split(keys, number)
        return prefix, _joined(jax.lax.map(lambda piece: _sample(parts, decoding, *piece), pieces))


def _sample(
    parts: _Parts, decoding: tuple[Policy, Params], prefix: Prefix, keys: Array, **forced: Array
) -> Rollout:
    cfg = parts.cfg
    return rollout(
        *decoding, prefix, keys, length=cfg.response_len, temperature=cfg.temperature,
        end_token=parts.tables.end_token, other_ends=parts.tables.other_ends, thought=parts.tables.thought,
        grammar=parts.tables if cfg.constrained else None, **forced,
    )


def _read_and_score(parts: _Parts, rolled: Rollout, batch: Batch) -> tuple[Reading, Score]:
    reading = reader.read(parts.tables, rolled.tokens, rolled.valid)
    return reading, score(reading, rolled, batch, parts.tables, parts.cfg.reward)


def _teaches(parts: _Parts, rolled: Rollout, reading: Reading, scored: Score) -> Array:
    """[B] bool: some sampled token of the group has an advantage."""
    cfg = parts.cfg
    guided = jnp.any(rolled.forced, axis=-1)
    return objective.teaches(objective.advantages(scored, reading, guided, cfg.response_len, cfg.objective), rolled)


def _refill(
    parts: _Parts, decoding: tuple[Policy, Params], state: TrainState, rounds: Batch, rolled: Rollout
) -> tuple[Batch, Rollout, Metrics]:
    """Dynamic sampling: the examples and answers after groups that teach nothing are replaced from the `rounds`."""

    def groups(batch: Batch, rolled: Rollout) -> Groups:
        return Groups(batch, rolled, _teaches(parts, rolled, *_read_and_score(parts, rolled, batch)))

    def roll(batch: Batch) -> Groups:
        return groups(batch, _roll(parts, decoding, state, batch)[1])

    first = groups(jax.tree.map(lambda x: x[0], rounds), rolled)
    found, figures = refill.refill(first, rounds, roll, parts.cfg.shards)
    return found.batch, found.rolled, figures


# ------------------------------------------------------------------------------------------- replay


@struct.dataclass
class _Replayed:
    """The answers after some were replaced by guided ones, and figures of the guided ones."""

    rolled: Rollout  # [B, G, T]
    guided_pass: Array  # [B] pass rate of the guided answers, where guided
    tokens: Array  # [] number of tokens, sampled or forced
    by_steps: Array  # [2] number of guided answers whose tier was given: those that pass, and all


def _replay(
    parts: _Parts, decoding: tuple[Policy, Params], state: TrainState, batch: Batch, prefix: Prefix, rolled: Rollout,
    reading: Reading, scored: Score,
) -> tuple[Rollout, GuidanceState, Metrics]:
    """Guided replay: the answers after some were replaced, what is remembered, and figures."""
    cfg, tables = parts.cfg, parts.tables
    plain_pass = jnp.mean(scored.passed, axis=1)
    asked = guidance.levels(state.guidance, batch, state.step / cfg.total_steps, cfg.guidance)
    own = state.guidance.own
    if own is not None:
        right = is_model_answer(scored, reading, batch, tables)
        own = guidance.remember(own, batch, rolled, reading, right, tables.order)
    seen = guidance.reveal(batch, asked, own, tables.order)
    selection = guidance.select(plain_pass, seen.most > 0, cfg.guidance, cfg.shards)

    def replayed() -> _Replayed:
        again = _roll_guided(parts, decoding, state, batch, prefix, seen, selection)
        _, scored_again = _read_and_score(parts, again, guidance.gather(batch, selection))
        passed = scored_again.passed
        by_steps = scored_again.tier_forced & selection.chosen.reshape(-1, 1)
        return _Replayed(
            rolled=guidance.replace_answers(rolled, again, scored.passed, selection),
            guided_pass=guidance.scatter(jnp.zeros_like(plain_pass), jnp.mean(passed, axis=1), selection),
            tokens=jnp.sum(again.valid & selection.chosen.reshape(-1, 1, 1)),
            by_steps=jnp.stack([jnp.sum(by_steps & passed), jnp.sum(by_steps)]),
        )

    def untouched() -> _Replayed:
        return _Replayed(rolled, jnp.zeros_like(plain_pass), jnp.int32(0), jnp.zeros(2, jnp.int32))

    guided = guidance.scatter(jnp.zeros(plain_pass.shape, bool), selection.chosen.reshape(-1), selection)
    found = jax.lax.cond(jnp.any(selection.chosen), replayed, untouched)
    after = guidance.update(state.guidance, batch, plain_pass, guided, found.guided_pass, seen, cfg.guidance)
    gap, met = guidance.transfer_gap(state.guidance, batch, plain_pass)
    figures = {
        "guide/share": jnp.mean(guided),
        "guide/level": jnp.mean(seen.shown, where=guided),
        "guide/global_level": jnp.mean(after.level),
        "guide/pass_before": jnp.mean(plain_pass, where=guided),
        "guide/pass_after": jnp.mean(found.guided_pass, where=guided),
        "guide/pass_steps": found.by_steps[0] / found.by_steps[1],
        "guide/failing": jnp.mean(plain_pass <= cfg.guidance.threshold),
        "guide/unguidable": jnp.mean(selection.unguidable),
        "guide/transfer_gap": gap,
        "guide/met_again": met,
        "tokens/replayed": found.tokens,
    }
    return found.rolled, after.replace(own=own), figures


def _roll_guided(
    parts: _Parts, decoding: tuple[Policy, Params], state: TrainState, batch: Batch, prefix: Prefix,
    seen: Revelation, selection: Selection,
) -> Rollout:
    """`replace` answers for each slot of the selection, behind their forced prefixes."""
    cfg = parts.cfg
    used = selection.chosen.reshape(-1)
    tokens, lengths, row = guidance.gather((seen.tokens, seen.length, batch.row), selection)
    # All tokens of an unused slot are forced, so that it does not lengthen the loop.
    tokens = jnp.where(used[:, None], tokens, parts.tables.end_token)
    lengths = jnp.where(used, lengths, cfg.response_len)
    shared = Prefix(
        *guidance.gather((prefix.k, prefix.v), selection, axis=-4),
        *guidance.gather((prefix.length, prefix.last_hidden), selection),
    )
    return _sample(
        parts, decoding, shared, row_keys(state.key, PURPOSE_REPLAY, state.step, row, cfg.guidance.replace),
        forced=tokens, forced_len=lengths,
    )


# ------------------------------------------------------------------------------ advantages and update


def _advantages(
    parts: _Parts, rolled: Rollout, reading: Reading, scored: Score, reference_logp: Array | None
) -> tuple[Array, Metrics]:
    """Advantages [B, G, T] of the answers that are learnt from (after refill and replay), and figures."""
    cfg = parts.cfg
    figures, divergence = {}, None
    if cfg.objective.kl == "k1":
        k1 = jnp.where(rolled.sampled, objective.kl_estimate(rolled.logp, reference_logp, "k1"), 0.0)
        divergence = jnp.sum(k1, axis=-1)
        figures["policy/kl"] = jnp.sum(k1) / jnp.sum(rolled.sampled)
    guided = jnp.any(rolled.forced, axis=-1)
    advantage = objective.advantages(scored, reading, guided, cfg.response_len, cfg.objective, divergence)
    figures |= {
        "reward/learnt_from": jnp.mean(scored.total),
        "reward/equal_groups_after": 1 - jnp.mean(objective.teaches(advantage, rolled)),
    }
    return advantage, figures


def _logprobs(parts: _Parts, params: Params, prompt: Array, prompt_len: Array, tokens: Array) -> tuple[Array, Array]:
    """Log-probabilities and entropies [B, G, T] of the tokens, under the distribution that answers are sampled from."""
    _, hidden = run_groups(parts.policy, params, prompt, prompt_len, tokens)
    unembed, cfg = partial(parts.policy.unembed, params), parts.cfg
    grammar = (partial(reader.choices, parts.tables), reader.places(parts.tables, tokens)) if cfg.constrained else ()
    return scoring.token_logprobs(unembed, hidden, tokens, cfg.temperature, cfg.logprob_chunk, *grammar)


def _reference_logp(parts: _Parts, reference: Params, batch: Batch, rolled: Rollout) -> Array:
    """Log-probabilities [B, G, T] of the answers under the reference policy, in as many pieces as those of the loss."""
    arrays = (batch.prompt, batch.prompt_len, rolled.tokens)
    pieces, reference = split(arrays, parts.cfg.minibatches * parts.cfg.micro_batches), parts.instruct(reference)
    return _joined(jax.lax.map(lambda piece: _logprobs(parts, reference, *piece)[0], pieces))


def _updates(parts: _Parts, state: TrainState, examples: _Example) -> tuple[Params, Any, Array, Metrics]:
    """One update for each epoch and minibatch, by the gradient of a sum over micro-batches."""
    cfg = parts.cfg

    def minibatch(carry: tuple[Params, Any, Array], examples: _Example) -> tuple[Any, Metrics]:
        params, opt_state, skipped = carry
        weights = objective.token_weights(examples.rolled, cfg.objective)
        learnt = objective.learnt_from(examples.advantage, weights, cfg.objective)
        weights = jax.tree.map(lambda w: jnp.where(learnt[:, None, None], w, 0.0), weights)
        pieces, number = _learnt_first(examples.replace(weights=weights, learnt=learnt), cfg)
        with jax.named_scope("loss"):
            whole, pull = jax.vjp(parts.instruct, params)  # all micro-batches share one run of the instructions
            grads, sums = _accumulate(
                partial(jax.value_and_grad(partial(_loss, parts), has_aux=True), whole), pieces, number
            )
            (grads,) = pull(grads)
        with jax.named_scope("update"):
            params, opt_state, skipped, figures = parts.update(grads, params, opt_state, skipped)
        return (params, opt_state, skipped), _loss_metrics(sums) | figures

    def epoch(carry: tuple[Params, Any, Array], _: None) -> tuple[Any, Metrics]:
        return jax.lax.scan(minibatch, carry, split(examples, cfg.minibatches))

    carry = (state.params, state.opt_state, state.skipped)
    (params, opt_state, skipped), metrics = jax.lax.scan(epoch, carry, None, length=cfg.epochs)
    first = ("policy/sampler_gap", "guide/forced_probability")  # of the policy that sampled, before any update
    trained = jnp.sum(metrics.pop("tokens/trained"))
    return params, opt_state, skipped, {"tokens/trained": trained} | {
        name: value[0, 0] if name in first else jnp.mean(value) for name, value in metrics.items()
    }


def _learnt_first(examples: _Example, cfg: StepConfig) -> tuple[_Example, Array]:
    """Micro-batches of the examples [micro_batches, B / micro_batches, ...], and how many of them to compute.

    Groups to learn from go first, within each data shard, so that no example crosses devices.
    """
    learnt = examples.learnt.reshape(cfg.shards, -1)
    order = jnp.argsort(~learnt, axis=1, stable=True)
    size = learnt.shape[1] // cfg.micro_batches  # groups of a shard in each micro-batch
    number = -(-jnp.max(jnp.sum(learnt, axis=1)) // size)

    def pieces(x: Array) -> Array:
        x = x.reshape(cfg.shards, cfg.micro_batches, size, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(cfg.micro_batches, cfg.shards * size, *x.shape[3:])

    return jax.tree.map(pieces, guidance.gather(examples, Selection(order, learnt))), number


def _loss(parts: _Parts, params: Params, example: _Example) -> tuple[Array, Metrics]:
    """The summed loss of some examples, and sums for the metrics."""
    rolled, learnt = example.rolled, example.learnt[:, None, None]
    logp, entropy = _logprobs(parts, params, example.prompt, example.prompt_len, rolled.tokens)
    loss, sums = objective.loss_terms(
        logp, entropy, rolled.logp, example.reference_logp, example.advantage, rolled.sampled, example.weights,
        parts.cfg.objective,
    )
    sums |= {
        "forced_logp": jnp.sum(jnp.where(rolled.forced & learnt, logp, 0.0)),
        "forced": jnp.sum(rolled.forced & learnt),
        "sampler_gap": jnp.max(jnp.abs(jnp.where(rolled.sampled & learnt, logp - rolled.logp, 0.0))),
        "tokens": jnp.sum(example.prompt_len) + jnp.sum(rolled.valid),
    }
    return loss, sums


# ------------------------------------------------------------------------------------------- helpers


def split(tree: Any, number: int, axis: int = 0) -> Any:
    """Arrays [B, ...], with B on `axis`, as [number, B / number, ...]: piece i has examples i, i + number, and so on.

    So each piece is spread over the data shards as evenly as the batch is.
    """

    def pieces(x: Array) -> Array:
        at = axis % x.ndim
        return jnp.moveaxis(x.reshape(*x.shape[:at], -1, number, *x.shape[at + 1 :]), at + 1, 0)

    return jax.tree.map(pieces, tree)


def _joined(tree: Any) -> Any:
    """The inverse of `split`: from [number, B / number, ...] to [B, ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def _accumulate(value_and_grad: Callable[..., Any], pieces: _Example, number: Array) -> tuple[Params, Metrics]:
    """Sums gradients and figures over the first `number` micro-batches, but takes the largest `sampler_gap`."""
    count = pieces.prompt.shape[0]

    def one(piece: _Example) -> tuple[Params, Metrics]:
        (loss, sums), grads = value_and_grad(piece)
        return grads, sums | {"loss": loss}

    def add(carry: tuple[Array, tuple[Params, Metrics]]) -> tuple[Array, tuple[Params, Metrics]]:
        done, total = carry
        grads, sums = one(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, done, keepdims=False), pieces))
        gap = jnp.maximum(total[1]["sampler_gap"], sums["sampler_gap"])
        grads, sums = jax.tree.map(jnp.add, total, (grads, sums))
        return done + 1, (grads, sums | {"sampler_gap": gap})

    first = jax.tree.map(lambda x: x[0], pieces)
    if count == 1:
        return one(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    # `bounds` takes the number of passes from the constant in this comparison.
    return jax.lax.while_loop(lambda carry: (carry[0] < count) & (carry[0] < number), add, (jnp.int32(0), zeros))[1]


# ------------------------------------------------------------------------------------------- metrics


def _rollout_metrics(
    batch: Batch, rolled: Rollout, scored: Score, teaches: Array, step_names: tuple[str, ...]
) -> Metrics:
    """Figures of the first rollout, before refill and guidance. `teaches` [B] is that of `_teaches`."""
    total, steps = scored.total, slice(1, 1 + len(step_names))
    gated = (scored.raw > 0) & (scored.earned == 0) & scored.counted
    metrics = {
        "reward/total": jnp.mean(total),
        "reward/total_spread": jnp.mean(jnp.std(total, axis=1)),
        "reward/tier_accuracy": jnp.mean(scored.passed),
        "reward/equal_groups": 1 - jnp.mean(teaches),
        "reward/gated": jnp.mean(jnp.any(gated[..., steps], axis=-1)),  # a right step earned nothing
        "policy/length": jnp.mean(jnp.sum(rolled.valid, axis=-1)),
        "policy/truncated": 1 - jnp.mean(rolled.finished),
        "policy/entropy": -jnp.mean(rolled.logp, where=rolled.sampled),  # an estimate from the sampled tokens
        "tokens/prompt": jnp.sum(batch.prompt_len),  # once for each group
        "tokens/rolled": jnp.sum(rolled.valid),
    }
    if rolled.closing is not None:
        metrics["policy/closed_by_force"] = jnp.mean(jnp.any(rolled.closing, axis=-1))
    for index, name in enumerate(component_names(step_names)):
        raw, counted = scored.raw[..., index], scored.counted[..., index]
        metrics[f"reward/{name}"] = jnp.mean(raw, where=counted)
        spread = objective.masked_std(raw, counted)
        metrics[f"reward/{name}_spread"] = jnp.mean(spread, where=jnp.any(counted, axis=1))
    return metrics


def _loss_metrics(sums: Metrics) -> Metrics:
    """Figures of the groups that are learnt from; those of tokens are means over their sampled tokens."""
    metrics = {
        "policy/loss": sums["loss"],
        "policy/clipped": sums["clipped"] / sums["learnt"],
        "policy/ratio_change": sums["ratio_change"] / sums["learnt"],
        "policy/sampler_gap": sums["sampler_gap"],
        "guide/forced_probability": jnp.exp(sums["forced_logp"] / sums["forced"]),
        "tokens/trained": sums["tokens"],
    }
    return metrics | ({"policy/kl": sums["kl"] / sums["learnt"]} if "kl" in sums else {})


def _token_counts(batch: Batch, rolled: Rollout, counts: Metrics, cfg: StepConfig, shared: int) -> Metrics:
    """Tokens trained on, with instructions, and forward-equivalent tokens of the step, from the `counts` so far."""
    sampled = shared + sum(counts.get(f"tokens/{name}", 0) for name in ("prompt", "rolled", "refilled", "replayed"))
    scored = 0 if cfg.objective.kl == "none" else shared + jnp.sum(batch.prompt_len) + jnp.sum(rolled.valid)
    trained = counts["tokens/trained"] + shared * cfg.minibatches * cfg.epochs
    return {"tokens/trained": trained, "budget/tokens": sampled + scored + 3 * trained}
