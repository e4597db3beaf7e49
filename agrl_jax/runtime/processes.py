"""Several processes as one run: how they find each other, what they agree on, and how they end.

All of them run the same program on the same config, and every jitted function is run by all. Only the first one
writes logs (`runtime/logs`) and scorecards and prints (`runtime/console`); all write checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import filelock
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from agrl_jax.runtime.config import ConfigError
from agrl_jax.runtime.files import is_remote

DIVERGED = 3  # exit code of a run whose updates stayed non-finite
LOCK_FILE = "train.lock"
HEARTBEAT_S = 30  # a process that is silent for longer counts as dead, and the others end
_PATIENCE_S = 3600  # how long the others wait while the first process prepares data or reads a model
_GOODBYE_S = 30  # how long a process that has finished waits for the others


def connect(distributed: bool) -> None:
    """Joins the other processes of the run, if `distributed`; call it before anything is computed.

    Raises ConfigError if the others are not named or cannot be reached, or if there are others without `distributed`.
    """
    if not distributed:
        if jax.process_count() > 1:
            raise ConfigError(f"this is one of {jax.process_count()} processes: start all of them with --distributed")
        return
    number, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM until training listens
    try:
        jax.distributed.initialize(
            num_processes=None if number is None else int(number),
            process_id=None if index is None else int(index),
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=_GOODBYE_S,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(
            f"--distributed: the other processes of this run were not found ({reason}). On TPU pods, under Slurm, Open "
            "MPI and Kubernetes JAX finds them by itself; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT of the first "
            "one, JAX_NUM_PROCESSES, and JAX_PROCESS_ID from 0"
        ) from error


@contextmanager
def the_only_run(workdir: epath.Path) -> Iterator[None]:
    """Keeps a workdir to this run while the block lasts.

    Raises ConfigError where another run has it. Without locks, as in buckets, it does nothing.
    """
    lock = None
    if jax.process_index() == 0 and not is_remote(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / LOCK_FILE, blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise ConfigError(
                f"{workdir}: another run trains there now; let it end or stop it, or use another workdir"
            ) from None
        except NotImplementedError:  # by the file system
            lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def require_one(what: str) -> None:
    """Raises ConfigError among several processes, as on every worker of a TPU pod slice."""
    if jax.process_count() > 1:
        raise ConfigError(f"{what} in one process; this is one of {jax.process_count()}: use a machine of its own")


@contextmanager
def first_alone(what: str) -> Iterator[None]:
    """The first process runs the block before the others do, which find the files that it leaves; all go on together.
    `what` names the block; do not use a name twice."""
    # A collective of the devices would give up on a process that is half a minute late.
    everyone = set(range(jax.process_count()))
    wait = partial(multihost.sync_global_processes, timeout=_PATIENCE_S, processes=everyone)
    others = jax.process_index() > 0
    if others:
        wait(what)
    try:
        yield
    finally:
        if not others:
            wait(what)
    wait(f"{what}: done")


def greatest(value: int) -> int:
    """The greatest of the processes' values, on each of them."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def agree(text: str) -> bool:
    """Whether all processes have the same text."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
    every = np.asarray(multihost_utils.process_allgather(digest))
    return bool(np.all(every == every[0]))


def leave(error: Exception) -> NoReturn:
    """Ends this process on an error that only it may have met, at once and with exit code 1, so that the others notice.

    Where another process is gone, JAX raises one of many errors; the first process to stop has the cause. With one
    process, the error is raised.
    """
    if jax.process_count() == 1:
        raise error
    traceback.print_exception(error)
    reason = (str(error) or repr(error)).splitlines()[0]
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} stops: {reason}\n"
        "Where this comes from another process that is gone, that one says why. Start all of them again with the same "
        "command: they go on from the last checkpoint.",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)
