"""Makes the runs of a sweep that are missing.

    python -m experiments.run --sweep=experiments/main_table.py --workers=2

Each run is `python -m agrl_jax.main` in a workdir of its own, so a run that was stopped goes on where it was. Runs that
differ only after the warm start share it. The workers share the cores, or the GPUs named in CUDA_VISIBLE_DEVICES. The
result of a run is `experiments/results/SWEEP/RUN-SEED.json`; a run that diverged is a result too. Arguments such as
`--config.data.path=FILE` go to every run.
"""

from __future__ import annotations

import itertools
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from agrl_jax.runtime.checkpoint import STAGES
from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags
from agrl_jax.runtime.console import progress, say
from agrl_jax.runtime.processes import DIVERGED
from experiments import results, study
from experiments.study import Sweep

# What a run needs of its warm start, beside the checkpoint.
KEPT = (
    "tokenizer.json", "tokenizer_config.json", "policy.json", "scorecard.json", "judgements.parquet",
    "calibration.json",
)  # fmt: skip


@dataclass
class Runner:
    """Makes runs in child processes. Each uses the cores or the device of a slot."""

    file: str  # of the sweep
    folder: Path
    overrides: Sequence[str]
    results: Path
    slots: queue.Queue[dict[str, str]] = field(default_factory=queue.Queue)  # environment of each free worker
    children: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)

    def main(self, run: str, seed: int, workdir: Path, *more: str) -> int:
        """Runs `agrl_jax.main` to its end and returns its exit code. Its output goes to WORKDIR/log.txt."""
        if self.stopping.is_set():
            return -signal.SIGTERM
        slot = self.slots.get()
        workdir.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "agrl_jax.main", f"--config={self.file}:{run},seed={seed}", f"--workdir={workdir}",
            f"--config.data.dir={self.folder / 'data'}", *self.overrides, *more,
        ]  # fmt: skip
        cores = [int(core) for core in slot["cores"].split(",")] if "cores" in slot else None
        environment = {
            **os.environ, "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            study.RESULTS_VARIABLE: str(self.results), **slot,
        }  # fmt: skip
        try:
            with (workdir / "log.txt").open("ab") as log:
                # In a session of its own, so that Ctrl-C reaches only this process, which then tells its children once.
                child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
                if cores is not None:
                    os.sched_setaffinity(child.pid, cores)
                self.children.add(child)
                code = child.wait()
                self.children.discard(child)
        finally:
            self.slots.put(slot)
        return code

    def start(self, run: str, seed: int, workdir: Path) -> int:
        """The warm start alone."""
        return self.main(run, seed, workdir, "--config.method=sft", "--config.rl.steps=0", "--config.rl.budget=0")

    def stop(self) -> None:
        """Asks all children to save and stop."""
        self.stopping.set()
        for child in list(self.children):
            child.terminate()


def select(sweep: Sweep, only: Sequence[str], seeds: Sequence[str]) -> list[tuple[str, int]]:
    """The runs of a sweep with these names and seeds; an empty list means all. Raises ConfigError for unknown ones."""
    for flag, words, there in (("only", only, sweep.runs), ("seeds", seeds, map(str, sweep.seeds))):
        names = list(there)
        if unknown := [word for word in words if word not in names]:
            raise ConfigError(f"--{flag}={unknown[0]}: not in {sweep.name}; there are {', '.join(names)}")
    return [job for job in sweep.jobs() if (not only or job[0] in only) and (not seeds or str(job[1]) in seeds)]


def define_flags() -> None:
    """The flags of the commands that make runs."""
    flags.DEFINE_string("results", str(study.RESULTS), "Where results are kept.")
    flags.DEFINE_string("dir", "runs/experiments", "Where workdirs, benchmark and compilation cache are.")
    flags.DEFINE_integer("workers", 1, "Runs made at the same time.", lower_bound=1)
    flags.DEFINE_float("minutes", 0, "Stop after so long, as Ctrl-C does; 0: when all is done.", lower_bound=0)


def read_flags(argv: Sequence[str]) -> list[str]:
    """Reads the flags of a command, and returns its arguments `--config.FIELD=VALUE`, which go to every run."""
    overrides = [word for word in argv if word.startswith("--config.")]
    parse_flags([word for word in argv if word not in overrides])
    return overrides


@contextmanager
def until_told() -> Iterator[None]:
    """SIGTERM and the end of `--minutes` stop the block, as Ctrl-C does: exit code 130. A ConfigError is told: 2."""
    for signum in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(signum, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60 * flags.FLAGS.minutes)
    try:
        yield
    except ConfigError as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None


def run(
    sweep: Sweep, file: str, folder: Path, workers: int, wanted: Sequence[tuple[str, int]], overrides: Sequence[str],
    after: Callable[[], None] = lambda: None,
) -> int:
    """Makes the runs that have no result yet, and returns how many failed.

    Args:
      sweep: what to run.
      file: where it is defined.
      folder: holds the workdirs, the benchmark and the compilation cache.
      workers: runs made at the same time.
      wanted: runs of the sweep and their seeds.
      overrides: command-line arguments for every run.
      after: called when a run is over.
    """
    settings = {job: study.settings(_config(sweep, *job), overrides) for job in wanted}
    if any(int(of["log.every"]) != 1 for of in settings.values()):
        raise ConfigError("--config.log.every: the results of experiments count every step; leave it at 1")
    jobs = [job for job in wanted if not results.is_there(sweep, *job, settings[job])]
    if not jobs:
        say(f"{sweep.name}: nothing is missing")
        return 0
    runner = Runner(file, folder, overrides, sweep.results)
    for slot in _slots(workers):
        runner.slots.put(slot)
    starts = {job: _start(sweep, folder, *job, overrides) for job in jobs}
    missing = {place: job for job, place in starts.items() if not _made(place)}
    say(f"{sweep.name}: {len(jobs)} runs and {len(missing)} warm starts to make, {workers} at a time, in {folder}")
    failed = _all(runner, "warm starts", [(*job, place) for place, job in missing.items()], runner.start)

    def one(name: str, seed: int, place: Path) -> int:
        code, start = 0, starts[name, seed]
        if place != start:
            _share(start, place)
            code = runner.main(name, seed, place)
        if code in (0, DIVERGED):
            results.write(sweep, name, seed, place, code == DIVERGED, settings[name, seed])
            if not sweep.keep_checkpoints:
                _delete_checkpoints(place)
        return code

    ready = [job for job in jobs if _made(starts[job])]
    if len(ready) < len(jobs):
        say(f"{len(jobs) - len(ready)} runs are left out: they have no warm start")
    places = {job: workdir(sweep, folder, *job, overrides) for job in ready}
    return failed + _all(runner, sweep.name, [(*job, place) for job, place in places.items()], one, after)


def workdir(sweep: Sweep, folder: Path, name: str, seed: int, overrides: Sequence[str]) -> Path:
    """Where a run is made: in the workdir of its warm start, if that is all of it."""
    config = _config(sweep, name, seed)
    if not config.rl.steps:
        return _start(sweep, folder, name, seed, overrides)
    # The name depends on the config, so a changed config starts in a new workdir.
    return folder / sweep.name / f"{name}-{seed}-{study.digest(config, overrides)}"


def _start(sweep: Sweep, folder: Path, name: str, seed: int, overrides: Sequence[str]) -> Path:
    return folder / "starts" / study.start_digest(_config(sweep, name, seed), overrides)


def _all(
    runner: Runner, title: str, jobs: Sequence[tuple[str, int, Path]], one: Callable[[str, int, Path], int],
    after: Callable[[], None] = lambda: None,
) -> int:
    """Makes all jobs, as many at a time as there are slots, and returns how many failed."""
    failed = 0
    if not jobs:
        return failed
    with progress(title, len(jobs)) as bar, ThreadPoolExecutor(max(runner.slots.qsize(), 1)) as pool:
        futures = {pool.submit(one, *job): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                name, seed, workdir = futures[future]
                code = future.result()
                if code == DIVERGED:
                    bar.print(f"{name}, seed {seed}: diverged")
                elif code:
                    failed += 1
                    bar.print(f"{name}, seed {seed}: failed with exit code {code}; see {workdir / 'log.txt'}")
                bar.update(done)
                after()
        except KeyboardInterrupt:
            runner.stop()
            raise
    return failed


def _config(sweep: Sweep, run: str, seed: int) -> ConfigDict:
    return sweep.get_config(f"{run},seed={seed}")


def _made(start: Path) -> bool:
    """Whether a warm start has ended."""
    return (start / "scorecard.json").exists()


def _share(start: Path, workdir: Path) -> None:
    """Puts the end of a warm start into a fresh workdir, as if it had been made there."""
    if (workdir / "checkpoints").exists():
        return
    half = workdir / "checkpoints.tmp"
    shutil.rmtree(half, ignore_errors=True)
    workdir.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (start / name).exists():
            shutil.copy(start / name, workdir / name)
    shutil.copytree(start / "checkpoints" / "sft_end", half / "sft_end", copy_function=_link)
    half.rename(workdir / "checkpoints")


def _link(source: str, target: str) -> None:
    """Makes a hard link, so that a large warm start is on the disk once, or a copy where links fail."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _delete_checkpoints(workdir: Path) -> None:
    """Deletes the checkpoints of a finished run, except the end of the warm start."""
    for stage in STAGES:
        shutil.rmtree(workdir / "checkpoints" / stage, ignore_errors=True)


def _slots(workers: int) -> list[dict[str, str]]:
    """The environment of each worker: its share of the cores, or one of the visible GPUs."""
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in itertools.islice(itertools.cycle(gpus), workers)]
    if workers == 1 or not hasattr(os, "sched_getaffinity"):
        return [{}] * workers
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i::workers] or cores for i in range(workers)]
    return [{"cores": ",".join(map(str, share))} for share in shares]


def main(argv: list[str]) -> None:
    """Exit code 2 for a sweep that does not exist, 1 if runs failed, 130 if stopped by Ctrl-C."""
    flags.DEFINE_string("sweep", None, "A file with a SWEEP, such as experiments/main_table.py.", required=True)
    define_flags()
    flags.DEFINE_list("only", [], "Names of runs; by default all.")
    flags.DEFINE_list("seeds", [], "Seeds; by default all.")
    overrides = read_flags(argv)
    values = flags.FLAGS
    with until_told():
        sweep = study.load(values.sweep, values.results)
        wanted = select(sweep, values.only, values.seeds)
        failed = run(sweep, values.sweep, Path(values.dir).resolve(), values.workers, wanted, overrides)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv)
