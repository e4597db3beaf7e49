"""Training, read from top to bottom: set up, warm start, reinforcement learning or what takes its place, scorecard.

`train` is the whole run. Each stage is the same loop (`_run_stage`) around a step that is compiled once.
Whatever stops a run, starting it again with the same workdir continues it: a row of the logs is written
before the checkpoint of its step, and rows past the checkpoint are cut on resuming.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.data import pipeline
from agrl_jax.data.pairs import PairsError
from agrl_jax.data.pipeline import EncodedSplit
from agrl_jax.evaluation import intervals, judgements, probabilities, tables
from agrl_jax.evaluation.evaluator import Evaluator
from agrl_jax.evaluation.plots import learning_curves
from agrl_jax.evaluation.probabilities import Calibration
from agrl_jax.evaluation.samples import decode, render
from agrl_jax.policy.families import LoadingError
from agrl_jax.policy.scoring import instructed
from agrl_jax.policy.smollm2 import NotInstalledError
from agrl_jax.policy.tokenizer import TokenizerError
from agrl_jax.policy.transformer import count_parameters
from agrl_jax.rl import step as rl_step
from agrl_jax.rulebook.book import RuleBook, RuleBookError
from agrl_jax.runtime import processes, sharding
from agrl_jax.runtime.checkpoint import SFT_END, Checkpointer, CheckpointError
from agrl_jax.runtime.config import (
    ConfigError,
    check_constrained,
    check_guidance,
    exit_with,
    flatten,
    resolve,
    validate,
    validate_together,
)
from agrl_jax.runtime.console import Progress, progress, say
from agrl_jax.runtime.files import OutputError, check_bucket
from agrl_jax.runtime.logs import MetricsWriter
from agrl_jax.runtime.sharding import ShardingError
from agrl_jax.supervised import dpo
from agrl_jax.supervised.distill import Lessons
from agrl_jax.supervised.dpo import Preferences
from agrl_jax.training import assemble
from agrl_jax.training.assemble import Data, Model
from agrl_jax.training.programs import (
    Program,
    Weights,
    branch_of,
    continued_sft_program,
    distill_program,
    dpo_program,
    examples_of_step,
    left_to,
    rl_program,
    sft_program,
)
from agrl_jax.types import UNKNOWN, Params, TrainState

# What is called after each step, `(step, whether it is the last, state, inspection, progress bar)`: further metrics.
After = Callable[[int, bool, TrainState, Any, Progress], dict[str, float]]

# Metrics beside the progress bar, by what they are called there.
SUPERVISED_FIGURES = {
    "loss": "policy/loss", "gold probability": "policy/gold_probability", "tok/s": "time/tokens_per_s"
}  # fmt: skip
DPO_FIGURES = {
    "loss": "policy/loss", "preferred": "dpo/accuracy", "margin": "dpo/margin", "tok/s": "time/tokens_per_s"
}  # fmt: skip
DISTILL_FIGURES = {
    "loss": "policy/loss", "KL": "distill/kl", "agreement": "distill/agreement", "tok/s": "time/tokens_per_s"
}  # fmt: skip
RL_FIGURES = {
    "reward": "reward/total", "tier": "reward/tier_accuracy", "guided": "guide/share", "level": "guide/level",
    "tok/s": "time/tokens_per_s",
}  # fmt: skip

TEACHER = "teacher"  # in a scorecard, the judge that a student learns from

# What a user can put right: shown as one message. Anything else is a bug, and keeps its traceback.
USER_ERRORS = (
    ConfigError, RuleBookError, PairsError, CheckpointError, ShardingError, LoadingError, TokenizerError,
    NotInstalledError, OutputError, OSError,
)  # fmt: skip


class Interrupted(Exception):
    """A signal asked the run to stop; its state has been saved."""

    def __init__(self, signum: int, where: str):
        super().__init__(f"stopped by {signal.Signals(signum).name} {where}; the same command continues from there")
        self.signum = signum


class Diverged(RuntimeError):
    """Too many updates in a row were not finite."""


@contextlib.contextmanager
def exit_codes(errors: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """Ends the process with one message where a run ends early.

    Its exit code is 2 for one of the `errors`, 3 for a run that diverged, 128 + signal for one that was stopped.
    """
    try:
        yield
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(128 + stop.signum) from None
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(processes.DIVERGED) from None
    except errors as error:
        exit_with(error)


@dataclass
class Run:
    """What the stages of one run share."""

    config: ConfigDict
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    model: Model
    data: Data
    splits: Mapping[str, EncodedSplit]  # all that the stages and the scorecard need
    writer: MetricsWriter
    checkpoints: Checkpointer
    evaluator: Evaluator
    say: Callable[..., None]
    lessons: Lessons | None = None  # of a student
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, in this process
    signum: int = 0  # of the signal that asked to stop

    def put_batch(self, batch: Any) -> Any:
        return sharding.put(batch, sharding.batch_sharding(self.mesh))


def train(config: ConfigDict, workdir: str, say: Callable[..., None] = say) -> dict[str, Any]:
    """Runs a config to its scorecard, from the start or from where `workdir` stands.

    Returns the scorecard `{stage: {split: {metric: {value, low, high}}}}`. Raises ValueError (or a
    subclass) for a config, rule book or file that cannot be used, Interrupted where a signal stopped it,
    Diverged where updates stay non-finite.
    """
    validate(config)
    recipes.check(config)
    mesh = sharding.make_mesh(*(config.mesh[axis] for axis in sharding.AXES))
    validate_together(config, sharding.data_shards(mesh))
    check_bucket(workdir)
    with processes.the_only_run(epath.Path(workdir)):
        return _train(config, epath.Path(workdir), mesh, say)


def _train(
    config: ConfigDict, workdir: epath.Path, mesh: jax.sharding.Mesh, say: Callable[..., None]
) -> dict[str, Any]:
    # ------------------------------------------------------------------------------------------ set up
    began = time.monotonic()
    run = _set_up(config, workdir, mesh, say)
    run.seconds["set up"] = time.monotonic() - began

    with run.writer, run.checkpoints, _signals(run):
        # -------------------------------------------------------------------------------- warm start
        reference = _timed(run, "warm start", lambda: _warm_start(run))
        if config.distill.teacher:  # whose weights have not learnt yet to state the tier first
            kept = tables.kept(workdir / "scorecard.json")
            cards = {TEACHER: kept[TEACHER]} if TEACHER in kept else {}
        else:
            cards = {"sft": _timed(run, "evaluate sft", lambda: _scorecard(run, "sft", "sft", reference))}

        # ------------------- reinforcement learning, or preferences or more supervised training in its place
        branch = branch_of(config, "rl")
        if config[branch].steps:
            learn = {"rl": _reinforce, "dpo": _prefer, "more": _continue_sft, "distill": _distill}[branch]
            reference = left_to(config, reference)
            weights = _timed(run, config.method, lambda: learn(run, reference))
            del reference  # this stage owns the parameters now
            name = config.method
            cards[name] = _timed(run, f"evaluate {name}", lambda: _scorecard(run, name, "rl", weights))

    # --------------------------------------------------------------------------------------- scorecard
    say(tables.table(cards))
    with processes.first_alone("curves"):  # the others leave after it
        if jax.process_index() == 0:
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
    defaults = {"config": resolve(recipes.base())}
    checkpoints = Checkpointer(workdir, config.checkpoint.keep, identity, defaults=defaults)
    with processes.first_alone("set up"):
        assemble.keep_pretrained(config, workdir)  # before the data: a mistake here shows sooner
        data = assemble.load_data(config, rules, workdir)
        judging = assemble.load_model(config, workdir, rules, data, mesh)
        model = assemble.under_variants(config, judging)
    checkpoints.identify({"pairs": data.digests})
    if model.variants:
        checkpoints.identify({"variants": [variant.digest for variant in model.variants]})
    lessons = None
    if config.method == "distill":
        lessons, taught = assemble.load_lessons(config, model)
        checkpoints.identify({"taught": taught.digest})
        unjudged = f"; {taught.unjudged:,} rows without a judgement are left out" if taught.unjudged else ""
        say(f"judged pairs to learn from: {len(lessons):,}{unjudged}")
    _check_processes(checkpoints)
    _check_batches(config, data)
    check_guidance(config, len(data.pairs(_trained_on(config, "rl"))))
    check_constrained(config, model.tables.shortest)
    splits = assemble.encode(config, model, data, _needed(config, data))
    _check_variants(say, model, splits)
    if jax.process_index() == 0:
        assemble.write_config(config, workdir)
        assemble.keep_rules(config, workdir)
    at = checkpoints.newest()
    writer = MetricsWriter(workdir, resume=at)
    _say_set_up(say, mesh, rules, data)
    if at is not None:
        say(f"resuming from {at[0]} step {at[1]} in {workdir}")
    evaluator = assemble.make_evaluator(config, judging, mesh)
    return Run(config, workdir, mesh, model, data, splits, writer, checkpoints, evaluator, say, lessons)


def _check_processes(checkpoints: Checkpointer) -> None:
    """Raises ConfigError where processes do not train the same run. Paths may differ: each has its own disks."""
    paths = ("path", "dir", "pretrained", "start", "teacher")
    told = {name: value for name, value in flatten(checkpoints.identity).items() if not name.endswith(paths)}
    if not processes.agree(repr(sorted(told.items()))):
        raise ConfigError("the processes have different configs, rule books, pairs or libraries; start all with the "
                          "same command and files")


def _check_batches(config: ConfigDict, data: Data) -> None:
    """Raises ConfigError where a stage's batch is larger than what it trains on."""
    for stage in ("sft", "rl"):
        branch, pairs = branch_of(config, stage), data.pairs(_trained_on(config, stage))
        size = config[branch].batch_size
        if branch != "distill" and config[branch].steps and size > len(pairs):
            raise ConfigError(f"{branch}.batch_size={size} is more than the {len(pairs)} pairs that it trains on")
        if branch == "rl" and config.rl.steps and examples_of_step(config) > len(pairs):
            candidates, pool = config.rl.candidates, config.difficulty.pool
            factor = f"rl.candidates={candidates}" if candidates > 1 else f"difficulty.pool={pool}"
            raise ConfigError(f"rl.batch_size={size} x {factor} is more than the {len(pairs)} pairs that it trains on")


def _check_variants(say: Callable[..., None], model: Model, splits: Mapping[str, EncodedSplit]) -> None:
    """Says how many training pairs have which rule book. Raises ConfigError where all have the book itself."""
    if not model.variants:
        return
    varied = 0
    for name in assemble.TRAINED:
        if name not in splits:
            continue
        batch = splits[name].batch
        under = int(np.sum(batch.book > 0))
        unknown = int(np.sum(np.any(batch.steps == UNKNOWN, axis=1)))
        say(f"{name}: {under:,} of {len(batch.book):,} pairs under {len(model.variants)} variants of the rule book, "
            f"the others under the book itself; of these, {unknown:,} because some of their steps are unknown")
        varied += under
    if not varied:
        raise ConfigError(f"rulebook.variants={len(model.variants)}: no training pair has all its steps known, so no "
                          "other table gives it a tier; use pairs with steps, or rulebook.variants=0")


def _trained_on(config: ConfigDict, stage: str) -> str:
    """The split that a stage trains on."""
    continues = branch_of(config, stage) == "more" and config.more.source == "sft"
    return assemble.SFT if stage == "sft" or continues or config.rl.source == "sft" else "train"


def _needed(config: ConfigDict, data: Data) -> list[str]:
    """All splits that the run will come to."""
    branch = branch_of(config, "rl")
    after = [_trained_on(config, "rl")] if branch != "distill" and config[branch].steps else []
    return list(dict.fromkeys([*after, "validation", *data.eval_splits, assemble.SFT]))


def _say_set_up(say: Callable[..., None], mesh: jax.sharding.Mesh, rules: RuleBook, data: Data) -> None:
    sizes = ", ".join(f"{name} {len(pairs):,}" for name, pairs in {assemble.SFT: data.sft, **data.splits}.items())
    say(f"rule book {rules.name}: {len(rules.steps)} steps, {len(rules.tiers)} tiers, {rules.order}")
    say(f"pairs: {sizes}")
    for note in data.notes:
        say(note)
    say(f"devices: {mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")


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


# ----------------------------------------------------------------------------------------- warm start


def _warm_start(run: Run) -> Weights:
    """Supervised training; its end is kept for good as the reference policy."""
    config, split = run.config, run.splits[assemble.SFT]
    base = assemble.load_base(config, run.model, run.mesh)
    program = sft_program(config, run.mesh, run.model, base, assemble.blanks(config, run.model, split))
    ended = run.checkpoints.restore_sft(program.template.params)
    if ended is not None:
        return Weights(ended, base)
    state, spent = _restored(run, "sft", program)
    run.say(f"policy: {_sizes(state.params, base)}; warm start on {len(split):,} pairs")
    if config.sft.steps:  # else its batch may be larger than the split
        batches = pipeline.batches(
            split, config.sft.batch_size, config.seed, start=int(state.step), by_length=config.sft.by_length
        )
        state = _run_stage(run, "sft", program, state, spent, batches, SUPERVISED_FIGURES)
    run.checkpoints.save_sft(state.params)
    return Weights(state.params, base)


# ---------------------------------------------------------------------- after it: RL, or what takes its place


def _reinforce(run: Run, reference: Weights) -> Weights:
    """Reinforcement learning from the end of the warm start."""
    config, split = run.config, run.splits[_trained_on(run.config, "rl")]
    _say_encoding(run, split)
    program = rl_program(config, run.mesh, run.model, reference, len(split), len(run.data.families))
    state, spent = _restored(run, "rl", program)
    _free(reference, program)
    base, _ = program.fixed
    validation = _validation(run, base)

    def after(
        done: int, last: bool, state: TrainState, seen: rl_step.Inspection, bar: Progress
    ) -> dict[str, float]:
        if config.log.samples_every and (done % config.log.samples_every == 0 or done == 1):
            samples = decode(jax.device_get(seen), run.model.book, run.model.tokenizer, split.pairs)
            run.writer.write_samples("rl", done, samples)
            bar.print(render(done, samples))
        return validation(done, last, state, seen, bar)

    batches = pipeline.batches(split, examples_of_step(config), config.seed, start=int(state.step))
    state = _run_stage(run, "rl", program, state, spent, batches, RL_FIGURES, after)
    return Weights(state.params, base)


def _prefer(run: Run, reference: Weights) -> Weights:
    """Preferences in place of reinforcement learning: mined with the end of the warm start, then DPO from there."""
    config, split = run.config, run.splits[_trained_on(run.config, "rl")]
    _say_encoding(run, split)
    pairs, mined = _mine(run, split, reference)
    program = dpo_program(config, run.mesh, run.model, reference)
    return _descend(run, reference, program, pairs, config.dpo.batch_size, DPO_FIGURES, paid=mined)


def _mine(run: Run, split: EncodedSplit, reference: Weights) -> tuple[Preferences, int]:
    """Preference pairs of the host, and the tokens sampled to find them. The same again in a run that is resumed."""
    config, found, spent = run.config, [], len(run.model.instructions)
    policy, instruct = instructed(run.model.policy, run.model.instructions)
    params = jax.jit(instruct)(assemble.for_decoding(config, run.model, run.mesh, "sft")(*reference))
    sample = jax.jit(
        partial(
            dpo.sample_answers, policy, run.model.tables, number=config.dpo.samples,
            length=config.data.response_len, temperature=config.rl.temperature,
        ),
        out_shardings=sharding.replicated(run.mesh),
    )
    key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
    rows = pipeline.stratified(split, config.dpo.mined, config.seed)
    with progress("mining", len(rows)) as bar:
        for batch, mask in pipeline.eval_batches(split, config.eval.batch_size, rows):
            answers = jax.device_get(sample(params, key, run.put_batch(batch)))
            batch, answers = jax.tree.map(lambda x, mask=mask: x[mask], (batch, answers))
            spent += int(np.sum(batch.prompt_len) + np.sum(answers.valid))
            found.append(dpo.preferences(batch, answers, config.dpo.pairs))
            bar.advance(int(np.sum(mask)))
            if signum := processes.greatest(run.signum):
                raise Interrupted(signum, "before DPO, whose preferences are mined again")
    pairs = jax.tree.map(lambda *pieces: np.concatenate(pieces), *found)
    run.say(f"preferences: {len(pairs):,} from {len(rows):,} pairs x {config.dpo.samples} answers, {spent:,} tokens")
    _check_mined(config, len(pairs), spent)
    return pairs, spent


def _check_mined(config: ConfigDict, pairs: int, spent: int) -> None:
    """Raises ConfigError where too few preferences were mined, or the budget is spent by mining."""
    if pairs < config.dpo.batch_size:
        raise ConfigError(f"dpo.batch_size={config.dpo.batch_size} is more than the {pairs} preferences mined; "
                          "raise dpo.mined, dpo.samples or dpo.pairs")
    if 0 < config.rl.budget <= spent:
        raise ConfigError(f"rl.budget={config.rl.budget} is spent by mining alone, which took {spent}; "
                          "lower dpo.mined or dpo.samples")


def _continue_sft(run: Run, reference: Weights) -> Weights:
    """More supervised training in place of reinforcement learning, from the end of the warm start."""
    config, split = run.config, run.splits[_trained_on(run.config, "rl")]
    blanks = assemble.blanks(config, run.model, split)
    program = continued_sft_program(config, run.mesh, run.model, reference, blanks)
    first = first_batch(config)
    return _descend(run, reference, program, split, config.more.batch_size, SUPERVISED_FIGURES, first)


def _distill(run: Run, reference: Weights) -> Weights:
    """Distillation of a judge in place of reinforcement learning, from the end of the warm start."""
    program = distill_program(run.config, run.mesh, run.model, reference)
    return _descend(run, reference, program, run.lessons, run.config.distill.batch_size, DISTILL_FIGURES)


def _descend(
    run: Run, reference: Weights, program: Program, data: Any, size: int, figures: Mapping[str, str], first: int = 0,
    paid: int = 0,
) -> Weights:
    """The stage of a program that takes batches of `size` of the data from batch `first` on. `paid` tokens count as
    spent before it begins."""
    state, spent = _restored(run, "rl", program)
    _free(reference, program)
    (base,) = program.fixed
    batches = pipeline.batches(data, size, run.config.seed, start=first + int(state.step))
    state = _run_stage(run, "rl", program, state, max(spent, paid), batches, figures, _validation(run, base))
    return Weights(state.params, base)


def _free(reference: Weights, program: Program) -> None:
    """Deletes the end of the warm start, of which the state holds a copy, unless it is fixed in the program."""
    if all(fixed is None for fixed in program.fixed):
        jax.tree.map(lambda x: x.delete(), reference.trained)


def first_batch(config: ConfigDict) -> int:
    """The batch with which more supervised training begins: on the pairs of the warm start, where that ended."""
    met = config.sft.steps * config.sft.batch_size if config.more.source == "sft" else 0
    return met // config.more.batch_size


def _validation(run: Run, base: Params | None) -> After:
    """The function that scores a state on the validation split where it is time: every so often, and at the end."""
    config, split = run.config, run.splits["validation"]
    rows = pipeline.stratified(split, config.eval.validation_pairs, config.data.seed)
    for_decoding = assemble.for_decoding(config, run.model, run.mesh, "rl")

    def score(done: int, last: bool, state: TrainState, seen: Any, bar: Progress) -> dict[str, float]:
        if not (last or config.eval.every and done % config.eval.every == 0):
            return {}
        counted = itertools.count()  # batches
        size = config.eval.batch_size

        def advance(pairs: int) -> None:
            bar.note(f"validation {next(counted) * size + pairs}/{len(rows)}")

        judged = run.evaluator.judge(for_decoding(state.params, base), split, rows, sample=False, advance=advance)
        _keep_calibration(run, "rl", done, probabilities.fit(judged, run.model.book))
        scores = intervals.score(judged, run.model.book, bootstrap=0)
        shown = ("accuracy", "macro_f1", "step_accuracy", "adherence", "format")
        return {f"validation/{name}": scores[name]["value"] for name in shown if scores[name]["value"] is not None}

    return score


# ------------------------------------------------------------------------------------ the loop of all stages


def _restored(run: Run, stage: str, program: Program) -> tuple[TrainState, int]:
    """The newest state of a stage and the tokens spent on it, or a fresh one and none."""
    found = run.checkpoints.restore(program.template, stage=stage)
    return (program.fresh(), 0) if found is None else (found.state, found.spent)


def _keep_calibration(run: Run, stage: str, step: int, fitted: Calibration) -> None:
    """Keeps what was fitted for a checkpoint beside the checkpoints."""
    if jax.process_index() == 0:
        name = assemble.checkpoint_name(stage, step)
        probabilities.keep(run.workdir / probabilities.FILE, name, fitted, run.model.book)


def _run_stage(
    run: Run, stage: str, program: Program, state: TrainState, spent: int, batches: Iterator[Any],
    figures: Mapping[str, str], after: After | None = None,
) -> TrainState:
    """The loop of a stage: step, log, validate, save; `figures` names the metrics beside the progress bar.

    Ends after the stage's steps, or with the one that brings the tokens `spent` to its budget, if it has one.
    """
    config, total = run.config, run.config[branch_of(run.config, stage)].steps
    budget = (stage == "rl" and config.rl.budget) or math.inf
    batch = run.put_batch(next(batches))
    with progress(stage, total, int(state.step)) as bar:
        for done in range(int(state.step) + 1, total + 1):
            if spent >= budget:
                break
            programs = program.step._cache_size()
            if not programs:
                bar.print(f"{stage}: compiling the step, about a minute")
            began = time.monotonic()
            state, metrics, seen = program.step(state, batch, *program.fixed)
            batch = run.put_batch(next(batches))  # made while the device is busy with this one
            row = {name: float(value) for name, value in jax.device_get(metrics).items()}
            spent += round(row["budget/tokens"])
            last = done == total or spent >= budget
            row |= _time_figures(row, time.monotonic() - began)
            row |= {"budget/spent": spent, "compiles": program.step._cache_size()}
            _check_divergence(config, stage, done, int(state.skipped), row, bar.print)
            if done == 1 and branch_of(config, stage) == "rl":  # of answers sampled before any update
                bar.print("\n".join(first_look(config, row)))
            extra = after(done, last, state, seen, bar) if after else {}
            if done % config.log.every == 0 or last or extra:
                run.writer.write(stage, done, row | extra)
            shown = {name: row[metric] for name, metric in figures.items() if metric in row}
            bar.update(done, shown, compiled=row["compiles"] > programs)
            signum = processes.greatest(run.signum)  # a signal to one process stops all at the same step
            if done % config.checkpoint.every == 0 or last or signum or extra:
                quality = {"macro_f1": extra["validation/macro_f1"]} if "validation/macro_f1" in extra else None
                run.writer.sync()
                run.checkpoints.save(stage, done, state, data_position=done, metrics=quality, spent=spent)
            if signum:
                run.checkpoints.wait()
                raise Interrupted(signum, f"at {stage} step {done} of {total}")
    return state


def first_look(config: ConfigDict, figures: Mapping[str, float]) -> list[str]:
    """What the first rollout, before any update, says of a run of RL: its figures, and warnings of what to change."""
    truncated, equal = figures["policy/truncated"], figures["reward/equal_groups"]
    failing, guided = figures.get("guide/failing"), figures.get("guide/share")
    guidance = "" if failing is None else f"; groups that fail {failing:.0%}, guided {guided:.0%}"
    lines = [f"before the first update: answers cut off {truncated:.0%}; groups of equal rewards {equal:.0%}{guidance}"]
    if truncated > 0.2:
        lines.append(
            f"warning: {truncated:.0%} of the answers do not end within data.response_len={config.data.response_len}; "
            "raise it, or train the warm start for longer (sft.steps)"
        )
    if equal > 0.8:
        lines.append(
            f"warning: in {equal:.0%} of the groups all answers earn the same, and teach nothing; raise rl.group_size="
            f"{config.rl.group_size} or rl.temperature={config.rl.temperature}"
            + (", or set guidance.enabled=True" if failing is None else "")
        )
    if failing == 0:
        lines.append(
            f"warning: no group fails, so guidance is idle; raise guidance.threshold={config.guidance.threshold}, or "
            "do without (guidance.enabled=False)"
        )
    return lines


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
        branch = branch_of(config, stage)
        rate = config[branch].learning_rate
        raise Diverged(
            f"{stage} step {done}: {in_a_row} updates in a row were not finite (loss {row['policy/loss']}, gradient "
            f"norm {row['optim/grad_norm']}). The parameters are those of the last finite update. Try a lower "
            f"{branch}.learning_rate (now {rate}), float32 in policy.compute_dtype, or a longer {branch}.warmup."
        )


# ------------------------------------------------------------------------------------------- scorecard


def _scorecard(run: Run, name: str, stage: str, weights: Weights) -> dict[str, Any]:
    """Scores of a stage on each evaluation split, kept by `name` in scorecard.json.

    Read from there where they are of the same step and settings.
    """
    path, names = run.workdir / "scorecard.json", run.data.eval_splits
    step = run.config.sft.steps if stage == "sft" else run.checkpoints.latest_step(stage)
    settings = assemble.card_settings(run.config, step)
    written = tables.kept(path).get(name, {})
    there = {part: scores.get("settings") for part, scores in written.items()}
    if not processes.greatest(there != dict.fromkeys(names, settings)):
        return written
    config, cards, kept = run.config, {}, {}
    params = assemble.for_decoding(config, run.model, run.mesh, stage)(*weights)
    rows = {part: pipeline.stratified(run.splits[part], config.eval.pairs, config.data.seed) for part in names}
    known = pipeline.stratified(run.splits["validation"], config.eval.validation_pairs, config.data.seed)
    pairs = len(known) + sum(len(r) + run.evaluator.sampled(len(r)) for r in rows.values())
    with progress(f"evaluate {name}", pairs) as bar:
        calibration = run.evaluator.calibrate(params, run.splits["validation"], known, bar.advance)
        if stage == "sft":  # the other stage has kept it as it was validated
            _keep_calibration(run, SFT_END, 0, calibration)
        for part in names:
            judged = run.evaluator.judge(
                params, run.splits[part], rows[part], temperature=calibration.temperature, advance=bar.advance
            )
            scores = intervals.score(judged, run.model.book, bootstrap=config.eval.bootstrap, seed=config.seed)
            kept[part], cards[part] = judged, scores | {"settings": settings}
    if jax.process_index() == 0:
        judgements.write(run.workdir / judgements.FILE, name, kept, run.model.book)
        tables.write(path, {name: cards})  # last: it says that the stage is done
    return cards


# ------------------------------------------------------------------------------------------- what is said


def _sizes(trained: Params, base: Params | None) -> str:
    if base is None:
        return f"{count_parameters(trained):,} parameters"
    return f"{count_parameters(base):,} parameters, and {count_parameters(trained):,} in adapters, which are trained"


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
        (assemble.CONFIG_FILE, "every field of the run"),
        (assemble.RULEBOOK_FILE, "the rule book"),
        ("scorecard.json", "the scorecard"),
        (judgements.FILE, "what the policy said of every pair of the scorecard"),
        (assemble.TAUGHT_FILE, "what the teacher said of the pairs that were learnt from"),
        ("metrics.jsonl", "one row per step; the same in tensorboard/"),
        ("samples.jsonl", "decoded rollouts"),
        ("curves.png", "learning curves"),
        (probabilities.FILE, "the temperature of the tier probabilities, for each checkpoint that was validated"),
        ("checkpoints", "parameters and all that resuming needs"),
    ):
        if (run.workdir / name).exists():
            run.say(f"  {run.workdir / name}: {what}")
