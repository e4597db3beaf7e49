"""Checkpoints with Orbax: whole or not there, bounded in number, tied to the run that they belong to.

Three Orbax managers write below `checkpoints/`: `sft` and `rl`, one per stage, each with its own count of
steps, and `sft_end`, the end of the supervised stage, which is the reference policy and is kept for
good. A manager keeps the last few checkpoints and the best one. Orbax writes into a temporary directory
and renames it when it is complete, so a killed save leaves nothing that could be loaded.

A checkpoint holds the state and a small record: stage, step, position in the data, and the identity of
the run (config, rule book, pairs, versions). Resuming under another identity is refused.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from agrl_jax.runtime.config import diff, flatten, matches
from agrl_jax.runtime.files import is_remote
from agrl_jax.types import TrainState

STAGES = ("sft", "rl")  # in the order in which a run goes through them
SFT_END = "sft_end"

# Fields of the identity that may differ on resuming: evaluation, logs, checkpoints; and the mesh, how a batch is cut
# up to save memory, and the versions of libraries (the continuation is then exact up to rounding only).
MAY_CHANGE = (
    "config.eval", "config.log", "config.checkpoint", "config.mesh", "versions",
    *(f"config.{stage}.micro_batches" for stage in ("sft", "rl", "dpo", "more", "distill")),
    "config.rl.sample_batches", "config.objective.logprob_chunk", "config.policy.remat", "config.policy.attention",
    "config.distill.path", "config.distill.teacher",  # the digest of what is learnt is in the identity
)  # fmt: skip
# A stage that is not over may grow longer; the learning rate then follows the new length.
MAY_GROW = {
    "sft": ("config.sft.steps",),
    "rl": ("config.rl.steps", "config.rl.budget", "config.dpo.steps", "config.more.steps", "config.distill.steps"),
}

# Until a later stage begins, fields that the warm start does not depend on may differ: several runs can share one.
AHEAD = (
    "config.method", "config.rl", "config.dpo", "config.more", "config.distill", "config.reward", "config.objective",
    "config.guidance", "config.difficulty",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that could not be written or read."""


class CheckpointMismatch(CheckpointError):
    """The working directory belongs to a run with another config or rule book."""


class Restored(NamedTuple):
    """What comes back from a checkpoint."""

    stage: str
    step: int
    state: Any
    data_position: Any
    spent: int  # tokens of the stage's budget


class Checkpointer:
    """Saves and restores the state of a run in `workdir`/checkpoints; usable as a context manager.

    `keep` bounds the last checkpoints of each stage; the one with the highest `metrics[best]` is kept
    beside them. `identity` is a JSON-able dict such as `{"config": ..., "rulebook": digest, "versions":
    ...}`; if the newest checkpoint was written under another one, CheckpointMismatch is raised at once
    and names the fields. A field that the checkpoint's identity lacks has its value in `defaults`. With
    `identity=None` the checkpoints are opened for reading: nothing is created, deleted or checked.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        keep: int = 2,
        identity: Mapping[str, Any] | None = None,
        best: str = "macro_f1",
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        folder = epath.Path(workdir)
        self.directory = (folder if is_remote(folder) else folder.resolve()) / "checkpoints"
        self._identity = None if identity is None else _plain(identity)
        self._defaults = flatten(_plain(defaults or {}))
        self._best = best
        self._writing: tuple[str, int] | None = None
        logging.getLogger("absl").addFilter(_quiet)
        if identity is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._managers = {name: self._manager(name, keep) for name in (*STAGES, SFT_END)}
        if identity is not None:
            self._check_identity()

    def identify(self, more: Mapping[str, Any]) -> None:
        """Adds fields to the identity that are known later. Raises CheckpointMismatch as the constructor does."""
        self._identity |= _plain(more)
        self._check_identity()

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is, as checkpoints record it; empty for a reader."""
        return self._identity or {}

    def _manager(self, name: str, keep: int) -> ocp.CheckpointManager:
        def score(metrics: Mapping[str, float | None]) -> float:
            value = metrics[self._best]
            return -math.inf if value is None else value

        writing = self._identity is not None
        latest = checkpoint_managers.LatestN(keep)
        best = checkpoint_managers.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            create=writing,
            cleanup_tmp_directories=writing,
            save_root_metadata=False,
            best_fn=score,  # makes Orbax store the metrics; the policy decides what is kept
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, best]),
        )
        return ocp.CheckpointManager(self.directory / name, options=options)

    # ---------------------------------------------------------------------------------------- saving

    def save(
        self,
        stage: str,
        step: int,
        state: Any,
        data_position: Any = 0,
        metrics: Mapping[str, float] | None = None,
        spent: int = 0,
    ) -> None:
        """Starts saving; returns once the state is copied, so that its buffers may be donated.

        `data_position` is anything JSON can hold, `spent` the tokens that the stage has used of its budget. A step
        that is there already is left as it is. Raises CheckpointError if this save, or the one before it, failed;
        earlier checkpoints are untouched.
        """
        manager = self._managers[stage]
        step = int(step)
        if step == manager.latest_step():
            return
        record = {"stage": stage, "step": step, "data_position": data_position, "spent": spent}
        record["identity"] = self._identity
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(_kept(state)), record=ocp.args.JsonSave(_plain(record)))
        score = float((metrics or {}).get(self._best, math.nan))
        self.wait()
        self._writing = (stage, step)
        with self._clear_errors():
            if not manager.save(step, args=items, metrics={self._best: score if math.isfinite(score) else None}):
                raise CheckpointError(f"{self.directory / stage} already holds steps past {step}; use a new workdir")

    def save_sft(self, tree: Any) -> None:
        """Saves the end of the supervised stage, its parameters or its state, for good, and waits until it is there.

        Call it after the last checkpoint of stage "sft", if any, has been saved.
        """
        self.save(SFT_END, 0, tree)
        self.wait()

    def wait(self) -> None:
        """Waits until all that was saved is on disk. Raises CheckpointError if it could not be written."""
        with self._clear_errors():
            for manager in self._managers.values():
                manager.wait_until_finished()
        self._writing = None

    def close(self) -> None:
        """Waits, then releases threads and files."""
        try:
            self.wait()
        finally:
            for manager in self._managers.values():
                manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            logging.error("%s", error)  # the exception that is being raised matters more

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turns whatever Orbax or TensorStore raise into one CheckpointError."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, OSError):
                raise  # another process may be gone: no fault of the disk
            stage, step = self._writing or ("?", "?")
            for manager in self._managers.values():
                manager.reload()  # counts what is on disk; the manager also counts saves that have begun
            last = self.newest()
            raise CheckpointError(
                f"checkpoint of {stage} step {step} could not be written to {self.directory}: {_reason(error)}; "
                + (f"the last complete one, {last[0]} step {last[1]}, is intact" if last else "there is none before it")
            ) from error

    # ------------------------------------------------------------------------------------- restoring

    def newest(self) -> tuple[str, int] | None:
        """Stage and step of the newest checkpoint: where the run stands. None if there is none."""
        for stage in reversed(STAGES):
            step = self._managers[stage].latest_step()
            if step is not None:
                return stage, step
        return ("sft", 0) if self.sft_ended else None  # a supervised stage of no steps

    @property
    def sft_ended(self) -> bool:
        """Whether the end of the supervised stage has been saved."""
        return self._managers[SFT_END].latest_step() is not None

    def latest_step(self, stage: str) -> int | None:
        """The step of the latest checkpoint of a stage; None if none is there."""
        return self._managers[stage].latest_step()

    def best_step(self, stage: str) -> int | None:
        """The step of the best checkpoint of a stage; the latest if none has a score, None if none is there."""
        return self._managers[stage].best_step()

    def record(self, stage: str, step: int) -> dict[str, Any]:
        """The record of a checkpoint: `stage`, `step`, `data_position`, `spent`, `identity`."""
        restored = self._restore(stage, step, record=ocp.args.JsonRestore())
        return restored.record

    def restore(self, template: Any, stage: str | None = None, step: int | None = None) -> Restored | None:
        """The newest checkpoint of the run, or of a stage, or the one of a step of that stage.

        `template` is a state, or its shapes and dtypes with shardings (`jax.ShapeDtypeStruct`): the
        state comes back in its structure, on its shardings. Returns None if there is nothing to restore;
        raises CheckpointError if the step asked for is not there or the template does not fit.
        """
        stage = stage or (self.newest() or STAGES)[0]
        step = self._managers[stage].latest_step() if step is None else step
        if step is None:
            return None
        state, record = self._state(stage, step, template), self.record(stage, step)
        return Restored(stage, step, state, record["data_position"], record.get("spent", 0))

    def restore_sft(self, template: Any) -> Any | None:
        """What `save_sft` saved; None if the supervised stage has not ended."""
        return self._state(SFT_END, 0, template) if self.sft_ended else None

    def restore_params(self, template: Any, stage: str, step: int | None = None) -> Any:
        """The parameters alone, of the latest or the given step of a stage, without the optimiser's state.

        `template` is a tree of parameters. Raises CheckpointError if there is no such checkpoint.
        """
        step = self._managers[stage].latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.directory / stage} holds no checkpoint")
        return self._state(stage, step, {"params": template}, partial=True)["params"]

    def _state(self, name: str, step: int, template: Any, partial: bool = False) -> Any:
        kept = _kept(template)
        restore_args = ocp.checkpoint_utils.construct_restore_args(kept)
        args = ocp.args.PyTreeRestore(item=kept, restore_args=restore_args, partial_restore=partial)
        restored = self._restore(name, step, state=args).state
        return restored if kept is template else template.replace(**restored)

    def _restore(self, name: str, step: int, **args: Any) -> Any:
        self.wait()
        steps = self._managers[name].all_steps()
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{self.directory / name} has no checkpoint of step {step}; there: {there}")
        try:
            return self._managers[name].restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # TensorStore raises plain Exception for damaged files
            raise CheckpointError(self._not_restored(name, step, error)) from error

    def _not_restored(self, name: str, step: int, error: BaseException) -> str:
        """Why a checkpoint could not be restored, and what to do, in one line."""
        folder = self.directory / name / str(step)
        if "tree structures do not match" in str(error):
            return f"{folder} cannot be restored: {_misfit(error)}"
        while error.__cause__ is not None:  # TensorStore's message would hold its whole configuration
            error = error.__cause__
        before = max((other for other in self._managers[name].all_steps() if other < step), default=None)
        go_on = "there is none before it" if before is None else f"remove it to go on from step {before}"
        return f"{folder} cannot be restored: {_reason(error)}. If a file in it is damaged: {go_on}"

    def _check_identity(self) -> None:
        """Refuses to go on under another identity than that of the newest checkpoint.

        It compares the parts (config, rule book, pairs) that both have.
        """
        if self.newest() is None:
            return
        stage, step = self.newest()
        ahead = AHEAD if self.sft_ended and stage == "sft" else ()
        if self._managers[stage].latest_step() is None:
            stage = SFT_END
        saved = self.record(stage, step)["identity"] or {}
        both = saved.keys() & self._identity.keys()
        now = flatten({part: self._identity[part] for part in both})
        absent = {field: value for field, value in self._defaults.items() if field in now}
        before = absent | flatten({part: saved[part] for part in both})
        open_stages = STAGES[1:] if self.sft_ended else STAGES
        growing = {field for stage in open_stages for field in MAY_GROW[stage]}

        def size(field: str, value: float) -> float:
            return value if value or field != "config.rl.budget" else math.inf  # a budget of 0 has no end

        def may_differ(field: str) -> bool:
            both_have = field in growing and field in before and field in now
            grows = both_have and size(field, before[field]) <= size(field, now[field])
            return grows or matches(field, (*MAY_CHANGE, *ahead))

        differences = diff(
            {field: value for field, value in before.items() if not may_differ(field)},
            {field: value for field, value in now.items() if not may_differ(field)},
        )
        if differences:
            belongs = f"the checkpoints in {self.directory} belong to another run; use a new workdir, or undo:"
            raise CheckpointMismatch("\n  ".join([belongs, *(line.removeprefix("config.") for line in differences)]))


def _kept(state: Any) -> Any:
    """The state as checkpoints hold it: without memory of difficulty where a run has none, as in versions before it."""
    if not isinstance(state, TrainState) or state.difficulty is not None:
        return state
    return {field: value for field, value in vars(state).items() if field != "difficulty"}


def _quiet(record: logging.LogRecord) -> bool:
    """Keeps Orbax's warnings; drops its progress, and its errors, which are raised as CheckpointError."""
    return "orbax" not in record.pathname or record.levelno == logging.WARNING


def _plain(value: Any) -> Any:
    """`value` as it comes back from JSON; NumPy scalars become numbers."""
    return json.loads(json.dumps(value, default=lambda scalar: scalar.item()))


def _misfit(error: BaseException) -> str:
    """The message where a checkpoint's state has other fields than the template."""
    fields = ", ".join(re.findall(r"^(\S+):$", str(error), re.MULTILINE))
    return (f"it was written by another version, whose state has other fields ({fields}); use a new workdir, or go on "
            "with that version")


def _reason(error: BaseException) -> str:
    """Why a checkpoint was not saved or restored, in a few words."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "no space left on device"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
