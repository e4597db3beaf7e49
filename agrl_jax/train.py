"""Training, read from top to bottom: set up, warm start, reinforcement learning, scorecard.

`train` is the whole run. Each stage is the same loop (`_run_stage`) around a step that is compiled once.
Whatever stops a run, starting it again with the same workdir continues it: a row of the logs is written
before the checkpoint of its step, and rows past the checkpoint are cut on resuming.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from agrl_jax import assemble, scorecard
from agrl_jax.assemble import Data, Model
from agrl_jax.data import pipeline
from agrl_jax.data.pairs import PairsError
from agrl_jax.data.pipeline import EncodedSplit
from agrl_jax.judging import Evaluator
from agrl_jax.plots import learning_curves
from agrl_jax.policy.loading import LoadingError
from agrl_jax.policy.smollm2 import NotInstalledError
from agrl_jax.policy.tokenizer import TokenizerError
from agrl_jax.policy.transformer import build_expert_load, count_parameters
from agrl_jax.rl import guidance
from agrl_jax.rl import step as rl_step
from agrl_jax.rl.guidance import GuidanceConfig
from agrl_jax.rl.objective import ObjectiveConfig
from agrl_jax.rl.reward import RewardConfig
from agrl_jax.rl.step import StepConfig
from agrl_jax.rulebook.book import RuleBookError
from agrl_jax.runtime import optim, sharding
from agrl_jax.runtime.checkpoint import Checkpointer, CheckpointError
from agrl_jax.runtime.config import ConfigError, resolve, validate, validate_together
from agrl_jax.runtime.metrics import MetricsWriter, progress, say
from agrl_jax.runtime.sharding import ShardingError
from agrl_jax.samples import decode, render
from agrl_jax.supervised import sft
from agrl_jax.types import Batch, Params, TrainState

# What a user can put right: shown as one message. Anything else is a bug, and keeps its traceback.
USER_ERRORS = (
    ConfigError, RuleBookError, PairsError, CheckpointError, ShardingError, LoadingError, TokenizerError,
    NotInstalledError, OSError,
)  # fmt: skip


class Interrupted(Exception):
    """A signal asked the run to stop; its state has been saved."""

    def __init__(self, signum: int, where: str):
        super().__init__(f"stopped by {signal.Signals(signum).name} {where}; the same command continues from there")
        self.signum = signum


class Diverged(RuntimeError):
    """Too many updates in a row were not finite."""


@dataclass
class Run:
    """What the stages of one run share."""

    config: ConfigDict
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    model: Model
    data: Data
    writer: MetricsWriter
    checkpoints: Checkpointer
    evaluator: Evaluator
    say: Callable[..., None]
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, in this process
    signum: int = 0  # of the signal that asked to stop

    def put_batch(self, batch: Batch) -> Batch:
        return sharding.put(batch, sharding.batch_sharding(self.mesh))


def train(config: ConfigDict, workdir: str, say: Callable[..., None] = say) -> dict[str, Any]:
    """Runs a config to its scorecard, from the start or from where `workdir` stands.

    Returns the scorecard `{stage: {split: {metric: {value, low, high}}}}`. Raises ValueError (or a
    subclass) for a config, rule book or file that cannot be used, Interrupted where a signal stopped it,
    Diverged where updates stay non-finite.
    """
    # ------------------------------------------------------------------------------------------ set up
    began = time.monotonic()
    validate(config)
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    validate_together(config, sharding.data_shards(mesh))
    run = _set_up(config, epath.Path(workdir), mesh, say)
    run.seconds["set up"] = time.monotonic() - began

    with run.writer, run.checkpoints, _signals(run):
        # -------------------------------------------------------------------------------- warm start
        reference = _timed(run, "warm start", lambda: _warm_start(run))
        cards = {"sft": _timed(run, "evaluate sft", lambda: _scorecard(run, "sft", reference))}

        # -------------------------------------------------------------------- reinforcement learning
        if config.rl.steps:
            params = _timed(run, config.method, lambda: _reinforce(run, reference))
            del reference  # the RL stage owns the parameters now
            name = config.method if config.method != "sft" else "rl"
            cards[name] = _timed(run, f"evaluate {name}", lambda: _scorecard(run, name, params))

    # --------------------------------------------------------------------------------------- scorecard
    say(scorecard.table(cards))
    learning_curves(run.workdir)
    _say_where(run)
    return cards


# --------------------------------------------------------------------------------------------- set up


def _set_up(config: ConfigDict, workdir: epath.Path, mesh: jax.sharding.Mesh, say: Callable[..., None]) -> Run:
    """Builds everything that a run needs and finds out where it stands."""
    workdir.mkdir(parents=True, exist_ok=True)
    rules = assemble.load_rules(config)
    identity = {
        "config": resolve(config),
        "rulebook": rules.digest,
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
    }
    checkpoints = Checkpointer(workdir, config.checkpoint.keep, identity)
    (workdir / "config.json").write_text(assemble.dump_config(config))
    data = assemble.load_data(config, rules, workdir)
    for stage, pairs in (("sft", data.sft), ("rl", data.splits["train"])):
        if config[stage].steps and config[stage].batch_size > len(pairs):
            size = config[stage].batch_size
            raise ConfigError(f"{stage}.batch_size={size} is more than the {len(pairs)} pairs that it trains on")
    model = assemble.load_model(config, workdir, data)
    evaluator = assemble.make_evaluator(config, model, mesh)
    at = checkpoints.newest()
    writer = MetricsWriter(workdir, resume=at)
    sizes = ", ".join(f"{name} {len(pairs):,}" for name, pairs in {"sft": data.sft, **data.splits}.items())
    say(f"rule book {rules.name}: {len(rules.steps)} steps, {len(rules.tiers)} tiers, {rules.order}")
    say(f"pairs: {sizes}")
    if data.contradicting:
        say(f"labels that contradict the rule book: {len(data.contradicting)} pairs, whose steps are masked")
    say(f"devices: {mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
    if at is not None:
        say(f"resuming from {at[0]} step {at[1]} in {workdir}")
    return Run(config, workdir, mesh, model, data, writer, checkpoints, evaluator, say)


class _signals:
    """While active, SIGINT and SIGTERM ask the run to save and stop after its current step; a second one kills."""

    def __init__(self, run: Run):
        self._run = run

    def __enter__(self) -> None:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: Any) -> None:
        self._run.signum = signum
        for again, handler in self._before.items():
            signal.signal(again, handler)


# --------------------------------------------------------------------------------------------- stages


def _warm_start(run: Run) -> Params:
    """Supervised training; its end is kept for good as the reference policy."""
    config = run.config
    split = assemble.encode(config, run.model, run.data, run.data.sft)
    tx = optim.make(
        config.sft.learning_rate, config.sft.warmup, config.sft.steps,
        weight_decay=config.sft.weight_decay, decay=optim.decay_mask(run.model.axes),
        matrix_rate=config.sft.matrix_rate, axes=run.model.axes,
    )
    fresh, template = _fresh_state(run, tx, guided=False)
    ended = run.checkpoints.restore_sft(template.params)
    if ended is not None:
        return ended
    state = _restored(run, "sft", fresh, template)
    run.say(f"policy: {count_parameters(state.params):,} parameters; warm start on {len(split):,} pairs")
    step = sft.make_step(
        run.model.policy, _updater(tx), config.sft.prompt_weight, config.objective.logprob_chunk,
        assemble.blanks(config, run.model, split),
    )
    compiled = _jit(run, step, template)
    batches = pipeline.batches(split, config.sft.batch_size, config.seed, start=int(state.step))
    state = _run_stage(
        run, "sft", state, lambda state, batch: (*compiled(state, batch), None), compiled, batches, config.sft.steps,
        figures={"loss": "policy/loss", "gold probability": "policy/gold_probability", "tok/s": "time/tokens_per_s"},
    )
    run.checkpoints.save_sft(state.params)
    return state.params


def _reinforce(run: Run, reference: Params) -> Params:
    """Reinforcement learning from the end of the warm start."""
    config = run.config
    split = assemble.encode(config, run.model, run.data, run.data.splits["train"])
    validation = assemble.encode(config, run.model, run.data, run.data.splits["validation"])
    _say_encoding(run, split)
    updates = config.rl.steps * config.rl.epochs * config.rl.minibatches
    tx = optim.make(
        config.rl.learning_rate, config.rl.warmup, updates, config.rl.schedule,
        weight_decay=config.rl.weight_decay, decay=optim.decay_mask(run.model.axes),
        matrix_rate=config.rl.matrix_rate, axes=run.model.axes,
    )
    fresh, template = _fresh_state(run, tx, guided=config.guidance.enabled, rows=len(split), params=reference)
    state = _restored(run, "rl", fresh, template)
    if config.objective.kl == "none":
        reference = None
    names = tuple(step.name for step in run.model.book.steps)
    step = rl_step.make_step(run.model.policy, run.model.tables, names, _updater(tx), step_config(config, run.mesh))
    compiled = _jit(run, step, template, None if reference is None else template.params)
    rows = pipeline.stratified(validation, config.eval.validation_pairs, config.data.seed)

    def after(done: int, state: TrainState, seen: rl_step.Inspection, say: Callable[..., None]) -> dict[str, float]:
        if config.log.samples_every and (done % config.log.samples_every == 0 or done == 1):
            samples = decode(jax.device_get(seen), run.model.book, run.model.tokenizer, split.pairs)
            run.writer.write_samples("rl", done, samples)
            say(render(done, samples))
        if not (done == config.rl.steps or config.eval.every and done % config.eval.every == 0):
            return {}
        judged = run.evaluator.judge(state.params, validation, rows, sample=False)
        scores = scorecard.score(judged, run.model.book, bootstrap=0)
        shown = ("accuracy", "macro_f1", "step_accuracy", "adherence", "format")
        return {f"validation/{name}": scores[name]["value"] for name in shown if scores[name]["value"] is not None}

    batches = pipeline.batches(split, config.rl.batch_size, config.seed, start=int(state.step))
    state = _run_stage(
        run, "rl", state, lambda state, batch: compiled(state, batch, reference), compiled, batches, config.rl.steps,
        figures={
            "reward": "reward/total", "tier": "reward/tier_accuracy", "guided": "guide/share",
            "level": "guide/level", "tok/s": "time/tokens_per_s",
        },
        after=after,
    )
    return state.params


def _run_stage(
    run: Run, stage: str, state: TrainState, step: Callable[..., Any], compiled: Any, batches: Iterator[Batch],
    total: int, figures: Mapping[str, str], after: Callable[..., dict[str, float]] | None = None,
) -> TrainState:
    """The loop of a stage: step, log, validate, save; `figures` names the metrics beside the progress bar."""
    config = run.config
    with progress(stage, total, int(state.step)) as bar:
        for done in range(int(state.step) + 1, total + 1):
            began = time.monotonic()
            state, metrics, seen = step(state, run.put_batch(next(batches)))
            row = {name: float(value) for name, value in jax.device_get(metrics).items()}
            row |= _time_figures(row, time.monotonic() - began) | {"compiles": compiled._cache_size()}
            _check_divergence(config, stage, done, int(state.skipped), row, bar.print)
            extra = after(done, state, seen, bar.print) if after else {}
            if done % config.log.every == 0 or done == total or extra:
                run.writer.write(stage, done, row | extra)
            bar.update(done, {name: row[metric] for name, metric in figures.items() if metric in row})
            if done % config.checkpoint.every == 0 or done == total or run.signum or extra:
                quality = {"macro_f1": extra["validation/macro_f1"]} if "validation/macro_f1" in extra else None
                run.checkpoints.save(stage, done, state, data_position=done, metrics=quality)
            if run.signum:
                run.checkpoints.wait()
                raise Interrupted(run.signum, f"at {stage} step {done} of {total}")
    return state


# -------------------------------------------------------------------------------------------- helpers


def step_config(config: ConfigDict, mesh: jax.sharding.Mesh) -> StepConfig:
    """The static facts of the RL step, from a config."""
    guide = config.guidance.to_dict()
    enabled = guide.pop("enabled")
    loss = {name: guide.pop(name) for name in ("treatment", "gamma", "imitate_weight", "baseline")}
    objective = config.objective.to_dict()
    chunk = objective.pop("logprob_chunk")
    return StepConfig(
        group_size=config.rl.group_size,
        response_len=config.data.response_len,
        temperature=config.rl.temperature,
        epochs=config.rl.epochs,
        minibatches=config.rl.minibatches,
        micro_batches=config.rl.micro_batches,
        logprob_chunk=chunk,
        total_steps=config.rl.steps,
        shards=sharding.data_shards(mesh),
        inspect=max(config.log.samples, 1),
        reward=RewardConfig(**config.reward.to_dict()),
        objective=ObjectiveConfig(**objective, **loss, step_weight=config.reward.step_weight),
        guidance=GuidanceConfig(**guide) if enabled else None,
    )


def _fresh_state(
    run: Run, tx: Any, guided: bool, rows: int = 0, params: Params | None = None
) -> tuple[Callable[[], TrainState], TrainState]:
    """A function that makes the state at step 0 on the mesh, and the state's shapes, dtypes and shardings.

    Starts from a copy of `params`, since the step donates its state; without, from the weights of the
    pretrained model, or from a random draw.
    """
    config = run.config
    pretrained = params is None and bool(config.policy.get("pretrained"))

    def make(params: Params | None) -> TrainState:
        if params is None:
            params = run.model.init(jax.random.key(config.seed))
        elif not pretrained:
            params = jax.tree.map(jnp.copy, params)
        memory = None
        if guided:
            settings = step_config(config, run.mesh).guidance
            memory = guidance.initial_state(rows, len(run.data.families), settings)
        key = jax.random.key_data(jax.random.key(config.seed))
        return TrainState(params, tx.init(params), jnp.int32(0), key, memory, jnp.int32(0))

    shapes = jax.eval_shape(make, params)
    on_params = sharding.param_shardings(run.mesh, run.model.axes, shapes.params)
    shardings = sharding.state_shardings(run.mesh, shapes, on_params)
    compiled = jax.jit(make, out_shardings=shardings, donate_argnums=(0,) if pretrained else ())

    def fresh() -> TrainState:
        return compiled(assemble.load_pretrained(config, run.model, run.mesh) if pretrained else params)

    template = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )
    return fresh, template


def _restored(run: Run, stage: str, fresh: Callable[[], TrainState], template: TrainState) -> TrainState:
    """The newest state of a stage, or a fresh one."""
    found = run.checkpoints.restore(template, stage=stage)
    return fresh() if found is None else found.state


def _jit(run: Run, step: Callable[..., Any], state: TrainState, *more: Any) -> Any:
    """`step` jitted with shardings fixed at its borders and its state donated, so that it compiles once.

    `state` and `more` have the shardings of the step's arguments but for the batch.
    """
    state, more = jax.tree.map(lambda leaf: leaf.sharding, (state, more))
    batch, whole = sharding.batch_sharding(run.mesh), sharding.replicated(run.mesh)
    outputs = (state, whole) if not more else (state, whole, whole)
    step = _with_expert_load(run, step) if run.model.shape.experts else step
    return jax.jit(step, in_shardings=(state, batch, *more), out_shardings=outputs, donate_argnums=0)


def _with_expert_load(run: Run, step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, which also tells how the routers of a mixture spread the tokens of the batch's prompts."""
    expert_load = build_expert_load(run.model.shape)

    def observed(state: TrainState, batch: Batch, *more: Any) -> Any:
        inside = jnp.arange(batch.prompt.shape[1]) < batch.prompt_len[:, None]
        load = expert_load(state.params, batch.prompt, inside)
        state, metrics, *seen = step(state, batch, *more)
        return state, metrics | load.metrics(), *seen

    return observed


def _updater(tx: Any) -> rl_step.UpdateFn:
    def update(grads: Params, params: Params, opt_state: Any, skipped: jax.Array) -> Any:
        params, opt_state, skipped, stats = optim.guarded_update(tx, grads, params, opt_state, skipped)
        return params, opt_state, skipped, {f"optim/{name}": value for name, value in stats.items()}

    return update


def _time_figures(row: Mapping[str, float], seconds: float) -> dict[str, float]:
    tokens = row["tokens/trained"] + row.get("tokens/rolled", 0.0)
    return {"time/step_s": seconds, "time/tokens_per_s": tokens / seconds}


def _check_divergence(
    config: ConfigDict, stage: str, done: int, in_a_row: int, row: Mapping[str, float], say: Callable[..., None]
) -> None:
    """Says that an update was skipped; raises Diverged where too many were, one after the other."""
    if not in_a_row:
        return
    say(f"{stage} step {done}: loss or gradient not finite, update skipped ({in_a_row} in a row)")
    if in_a_row >= config.rl.max_skipped:
        rate = config[stage].learning_rate
        raise Diverged(
            f"{stage} step {done}: {in_a_row} updates in a row were not finite (loss {row['policy/loss']}, gradient "
            f"norm {row['optim/grad_norm']}). The parameters are those of the last finite update. Try a lower "
            f"{stage}.learning_rate (now {rate}), float32 in policy.compute_dtype, or a longer {stage}.warmup."
        )


def _scorecard(run: Run, stage: str, params: Params) -> dict[str, Any]:
    """Scores of a stage on each evaluation split, kept in scorecard.json; read from there if already made."""
    path = run.workdir / "scorecard.json"
    written = scorecard.read(path).get(stage) if path.exists() else None
    if written is not None and set(written) == set(run.data.eval_splits):
        return written
    config, cards = run.config, {}
    for name in run.data.eval_splits:
        split = assemble.encode(config, run.model, run.data, run.data.splits[name])
        rows = pipeline.stratified(split, config.eval.pairs or len(split), config.data.seed)
        judged = run.evaluator.judge(params, split, rows)
        cards[name] = scorecard.score(judged, run.model.book, bootstrap=config.eval.bootstrap, seed=config.seed)
    scorecard.write(path, {stage: cards})
    return cards


def _timed(run: Run, name: str, work: Callable[[], Any]) -> Any:
    began = time.monotonic()
    result = work()
    run.seconds[name] = time.monotonic() - began
    return result


def _say_encoding(run: Run, split: EncodedSplit) -> None:
    if split.shortened:
        run.say(f"item texts shortened to {run.config.data.prompt_len} tokens: {split.shortened:,} of {len(split):,}")
    unknown = int(np.sum(np.all(split.batch.steps < 0, axis=1)))
    if unknown:
        run.say(f"training pairs of which no step is known: {unknown:,} of {len(split):,}; their tier alone counts")


def _say_where(run: Run) -> None:
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run.seconds.items())
    run.say(f"time: {times}; {sum(run.seconds.values()):.0f} s in all")
    for name, what in (
        ("config.json", "every field of the run"),
        ("scorecard.json", "the scorecard"),
        ("metrics.jsonl", "one row per step; the same in tensorboard/"),
        ("samples.jsonl", "decoded rollouts"),
        ("curves.png", "learning curves"),
        ("checkpoints", "parameters and all that resuming needs"),
    ):
        if (run.workdir / name).exists():
            run.say(f"  {run.workdir / name}: {what}")
