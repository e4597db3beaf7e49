"""The jitted step of each stage, from a config: what `run` loops over and `preflight` compiles.

First what a program is, then one function for each stage, then what they share: the state at step 0, and the jit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from agrl_jax.data import pipeline
from agrl_jax.policy import lora
from agrl_jax.policy.scoring import run_instructions
from agrl_jax.policy.transformer import build_expert_load
from agrl_jax.rl import difficulty, guidance
from agrl_jax.rl import step as rl_step
from agrl_jax.rl.difficulty import DifficultyConfig
from agrl_jax.rl.guidance import GuidanceConfig
from agrl_jax.rl.objective import ObjectiveConfig
from agrl_jax.rl.reward import RewardConfig
from agrl_jax.rl.step import StepConfig
from agrl_jax.runtime import optim, sharding
from agrl_jax.runtime.config import last_branch
from agrl_jax.supervised import distill, dpo, sft
from agrl_jax.supervised.step import LossFn, make_step
from agrl_jax.training import assemble
from agrl_jax.training.assemble import Model
from agrl_jax.types import Batch, DifficultyState, GuidanceState, Params, Policy, TrainState


class Weights(NamedTuple):
    """A policy's parameters: all that are trained, or low-rank adapters over a base that is not."""

    trained: Params
    base: Params | None = None


class Program(NamedTuple):
    """A stage's step, compiled by its first call, and what it takes: `step(state, batch, *fixed)`."""

    step: Any  # a jitted function: shardings fixed at its borders, its state donated
    template: TrainState  # shapes, dtypes and shardings
    fixed: tuple[Params | None, ...]  # what stays as it is: the base of adapters, and in RL the reference policy
    fresh: Callable[[], TrainState]  # makes the state at step 0


def branch_of(config: ConfigDict, stage: str) -> str:
    """The branch of the config that a stage follows."""
    return last_branch(config.method) if stage == "rl" else stage


# --------------------------------------------------------------------------------------------- the stages


def step_config(config: ConfigDict, mesh: jax.sharding.Mesh) -> StepConfig:
    """The static facts of the RL step, from a config."""
    guide = config.guidance.to_dict()
    enabled = guide.pop("enabled")
    loss = {name: guide.pop(name) for name in ("treatment", "gamma", "imitate_weight", "baseline")}
    objective = config.objective.to_dict()
    del objective["logprob_chunk"]
    clip = objective.pop("gspo_clip_low"), objective.pop("gspo_clip_high")
    if config.objective.loss == "gspo":
        objective["clip_low"], objective["clip_high"] = clip
    return StepConfig(
        group_size=config.rl.group_size,
        response_len=config.data.response_len,
        temperature=config.rl.temperature,
        epochs=config.rl.epochs,
        minibatches=config.rl.minibatches,
        micro_batches=config.rl.micro_batches,
        logprob_chunk=_chunk(config, mesh),
        total_steps=config.rl.steps,
        shards=sharding.data_shards(mesh),
        inspect=max(config.log.samples, 1),
        reward=RewardConfig(**config.reward.to_dict()),
        objective=ObjectiveConfig(**objective, **loss, step_weight=config.reward.step_weight),
        guidance=GuidanceConfig(**guide) if enabled else None,
        sample_batches=config.rl.sample_batches,
        candidates=config.rl.candidates,
        constrained=config.rl.constrained,
        difficulty=DifficultyConfig(**config.difficulty.to_dict()) if config.difficulty.pool > 1 else None,
    )


def examples_of_step(config: ConfigDict) -> int:
    """Examples that a step of RL is given; it learns from rl.batch_size of them."""
    return config.rl.batch_size * config.rl.candidates * config.difficulty.pool


def _chunk(config: ConfigDict, mesh: jax.sharding.Mesh) -> int:
    """Positions of a batch whose logits are held at once: the config counts those of one device."""
    return config.objective.logprob_chunk * sharding.data_shards(mesh)


def sft_program(
    config: ConfigDict, mesh: jax.sharding.Mesh, model: Model, base: Params | None, blanks: Any = None
) -> Program:
    """The program of the warm start, over `base` where it trains adapters; `blanks` as in `sft.make_step`.

    Here and in `rl_program` arrays may be abstract, shapes with shardings: the step can then be compiled, not called.
    """
    start = assemble.first_adapters(config, model, mesh)
    return _supervised_program(config, mesh, model, "sft", base, start, blanks)


def continued_sft_program(
    config: ConfigDict, mesh: jax.sharding.Mesh, model: Model, reference: Weights, blanks: Any = None
) -> Program:
    """The program of supervised training that goes on from the end of the warm start."""
    return _supervised_program(config, mesh, model, "rl", *_from_reference(config, reference), blanks)


def _supervised_program(
    config: ConfigDict, mesh: jax.sharding.Mesh, model: Model, stage: str, base: Params | None, start: Params | None,
    blanks: Any,
) -> Program:
    """Over `base` where the stage trains adapters, from `start` if it is given."""
    loss = partial(
        sft.gold_loss, prompt_weight=config.sft.prompt_weight, chunk=_chunk(config, mesh), blanks=blanks
    )
    return _descent(config, mesh, model, stage, base, start, loss, weight_decay=config.sft.weight_decay)


def rl_program(
    config: ConfigDict, mesh: jax.sharding.Mesh, model: Model, reference: Weights, rows: int, families: int
) -> Program:
    """The program of reinforcement learning from the end of the warm start; guidance and sampling by difficulty
    remember `rows` training pairs, and guidance has levels for the `families` of queries."""
    base, start = _from_reference(config, reference)
    # The reference of adapters that begin here is the base alone, which has none.
    kl_reference = None if config.objective.kl == "none" else {} if start is None else start
    tx = _optimiser(
        config, model, "rl", config.rl.epochs * config.rl.minibatches,
        schedule=config.rl.schedule, weight_decay=config.rl.weight_decay,
    )
    cfg, names = step_config(config, mesh), tuple(step.name for step in model.book.steps)

    def make(policy: Policy, sampler: rl_step.SamplerFn) -> Callable[..., Any]:
        return rl_step.make_step(policy, model.tables, names, _updater(tx), cfg, sampler, model.instructions)

    guided = None if cfg.guidance is None else partial(
        guidance.initial_state, rows, families, cfg.guidance, cfg.response_len, len(model.book.parts)
    )
    rated = None if cfg.difficulty is None else partial(difficulty.initial_state, rows)
    fresh, template = _fresh_state(config, mesh, model, "rl", tx, start, guided, rated)
    step = _jit(config, mesh, model, "rl", make, template, base, kl_reference)
    return Program(step, template, (base, kl_reference), fresh)


def dpo_program(config: ConfigDict, mesh: jax.sharding.Mesh, model: Model, reference: Weights) -> Program:
    """The program of preference optimisation from the end of the warm start."""
    loss = partial(
        dpo.preference_loss, beta=config.dpo.beta, temperature=config.rl.temperature, chunk=_chunk(config, mesh)
    )
    return _descent(config, mesh, model, "rl", *_from_reference(config, reference), loss)


def distill_program(config: ConfigDict, mesh: jax.sharding.Mesh, model: Model, reference: Weights) -> Program:
    """The program of distillation from the end of the warm start."""
    texts = pipeline.part_texts(model.book, model.tokenizer)
    loss = partial(
        distill.distill_loss, texts=texts, step_weight=config.distill.step_weight, chunk=_chunk(config, mesh)
    )
    return _descent(config, mesh, model, "rl", *_from_reference(config, reference), loss)


def _descent(
    config: ConfigDict, mesh: jax.sharding.Mesh, model: Model, stage: str, base: Params | None, start: Params | None,
    loss: LossFn, **decay: Any,
) -> Program:
    """The program of gradient descent on a loss, over `base` where the stage trains adapters, from `start` if given."""
    tx, pieces = _optimiser(config, model, stage, **decay), config[branch_of(config, stage)].micro_batches

    def make(policy: Policy, sampler: Any) -> Callable[..., Any]:
        return make_step(loss, policy, _updater(tx), model.instructions, pieces)

    fresh, template = _fresh_state(config, mesh, model, stage, tx, start)
    return Program(_jit(config, mesh, model, stage, make, template, base), template, (base,), fresh)


def _optimiser(config: ConfigDict, model: Model, stage: str, updates: int = 1, **more: Any) -> Any:
    """The optimiser of a stage that makes so many updates in each step; `more` as `optim.make` takes it."""
    _, axes = assemble.trained_part(config, model, stage)
    rates = config[branch_of(config, stage)]
    return optim.make(
        rates.learning_rate, rates.warmup * updates, rates.steps * updates, matrix_rate=rates.matrix_rate, axes=axes,
        decay=optim.decay_mask(axes), **config.optim.to_dict(), **more,
    )


def left_to(config: ConfigDict, reference: Weights) -> Weights:
    """The end of the warm start, as the stage after it takes it: in the dtype of a base if that stage begins adapters.
    """
    if reference.base is None and assemble.adapters_of(config, "rl") is not None:
        return Weights(assemble.as_base(config, reference.trained))
    return reference


def _from_reference(config: ConfigDict, reference: Weights) -> tuple[Params | None, Params | None]:
    """What the stage after the warm start gets: the base (None if it trains all weights), and the parameters to start
    from (None for fresh adapters)."""
    if reference.base is None and assemble.adapters_of(config, "rl") is not None:
        return reference.trained, None
    return reference.base, reference.trained


# ------------------------------------------------------------------------------------- the state at step 0


def _fresh_state(
    config: ConfigDict, mesh: jax.sharding.Mesh, model: Model, stage: str, tx: Any, start: Params | None = None,
    guided: Callable[[], GuidanceState] | None = None, rated: Callable[[], DifficultyState] | None = None,
) -> tuple[Callable[[], TrainState], TrainState]:
    """A function that makes the state at step 0 on the mesh, and the state's shapes, dtypes and shardings.

    The state has a copy of `start`, since the step donates its state. Without `start`, it has the weights of the
    pretrained model, or random ones. `guided` makes the memory of guidance, `rated` that of sampling by difficulty.
    """
    init, axes = assemble.trained_part(config, model, stage)
    adapters = assemble.adapters_of(config, stage)
    pretrained = start is None and adapters is None and bool(config.policy.pretrained)

    def make(params: Params | None) -> TrainState:
        if params is None:
            params = init(jax.random.key(config.seed))
        elif not pretrained:
            params = jax.tree.map(jnp.copy, params)
        key = jax.random.key_data(jax.random.key(config.seed))
        return TrainState(
            params, tx.init(params), jnp.int32(0), key, guided and guided(), jnp.int32(0), rated and rated()
        )

    shapes = jax.eval_shape(make, start)
    shardings = sharding.state_shardings(mesh, shapes, sharding.param_shardings(mesh, axes, shapes.params))
    compiled = jax.jit(make, out_shardings=shardings, donate_argnums=(0,) if pretrained else ())

    def fresh() -> TrainState:
        return compiled(assemble.load_pretrained(config, model, mesh) if pretrained else start)

    template = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )
    return fresh, template


# ------------------------------------------------------------------------------------------------ the jit


def _jit(
    config: ConfigDict, mesh: jax.sharding.Mesh, model: Model, stage: str,
    make: Callable[[Policy, rl_step.SamplerFn], Callable[..., Any]], state: TrainState, base: Params | None,
    *fixed: Any,
) -> Any:
    """`step(state, batch, base, *fixed)`, jitted with shardings fixed at its borders and its state donated, so that it
    compiles once. It returns state, metrics, and in RL the inspection, else None.

    `make` gives the step of a policy and its sampler, here those of the whole policy or of adapters over `base`.
    `state`, `base` and `fixed` have the shardings of the step's arguments.
    """
    adapters = assemble.adapters_of(config, stage)
    load = build_expert_load(model.shape, sharding.placing(mesh)) if model.shape.experts else None
    prepare = assemble.for_decoding(config, model, mesh, stage)

    def step(state: TrainState, batch: Batch, base: Params | None, *fixed: Any) -> Any:
        policy = model.policy if adapters is None else lora.over(base, model.policy, adapters)
        after, metrics, *seen = make(policy, lambda params: (model.policy, prepare(params, base)))(state, batch, *fixed)
        if load is not None:
            params = state.params if adapters is None else lora.attach(base, state.params, adapters)
            inside = jnp.arange(batch.prompt.shape[1]) < batch.prompt_len[:, None]
            shared = run_instructions(model.policy, params, model.instructions) if len(model.instructions) else None
            metrics |= load(params, batch.prompt, inside, shared).metrics()
        return after, metrics, seen[0] if seen else None

    state, base, fixed = jax.tree.map(lambda leaf: leaf.sharding, (state, base, fixed))
    batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    shardings = {"in_shardings": (state, batch, base, *fixed), "out_shardings": (state, whole, whole)}
    return jax.jit(step, **shardings, donate_argnums=0)


def _updater(tx: Any) -> rl_step.UpdateFn:
    def update(grads: Params, params: Params, opt_state: Any, skipped: jax.Array) -> Any:
        params, opt_state, skipped, stats = optim.guarded_update(tx, grads, params, opt_state, skipped)
        return params, opt_state, skipped, {f"optim/{name}": value for name, value in stats.items()}

    return update
