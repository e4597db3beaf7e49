"""Several processes on one machine, started by the real command, make one run, which stops and resumes as one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import quick
from test_main import ROOT, without_times

pytestmark = pytest.mark.slow

# All failing groups are guided. If only some could be, the choice would depend on the number of data shards.
SAME = ("--config.guidance.capacity=1.0",)


class Job:
    """The processes of one run, each with one device."""

    def __init__(
        self, number: int, workdir: Path, shared: Path, *overrides: str, command: str = "main", each: Sequence[str] = ()
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = os.environ | quick.ENVIRONMENT | {
            "JAX_COMPILATION_CACHE_DIR": str(shared / "cache"),
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number),
        }  # fmt: skip
        arguments = [f"--workdir={workdir}", *(["--distributed"] if number > 1 else []), *overrides]
        if command == "main":
            arguments += [f"--config={ROOT / 'tests' / 'tiny.py'}", f"--config.data.dir={shared / 'data'}", *SAME]
        self.workdir = workdir
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", f"agrl_jax.{command}",
                 *sorted([*arguments, *each[index : index + 1]], key=lambda word: "config." in word)],
                cwd=ROOT, env=environment | {"JAX_PROCESS_ID": str(index)}, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for index in range(number)
        ]  # fmt: skip

    def wait_for_rows(self, number: int) -> None:
        metrics = self.workdir / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= number):
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.02)

    def said(self) -> list[str]:
        """The output of each process, once all have ended."""
        return [process.communicate(timeout=550)[0] for process in self.processes]

    def finish(self) -> list[str]:
        said = self.said()
        assert not any(process.returncode for process in self.processes), "\n".join(said)
        return said


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The benchmark and compiled programs, for all runs of this file."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "data").symlink_to(data_dir)
    return folder


def test_processes_of_different_runs_are_refused(tmp_path: Path, shared: Path) -> None:
    job = Job(2, tmp_path / "run", shared, each=("--config.seed=1", "--config.seed=2"))
    for process, said in zip(job.processes, job.said(), strict=True):
        assert process.returncode == 2, said
        assert "the processes have different configs, rule books, pairs or libraries; start all with the same" in said


@pytest.fixture(scope="module")
def two(shared: Path) -> tuple[Path, list[str]]:
    """A run of two processes that was never interrupted, and their output."""
    workdir = shared / "two"
    return workdir, Job(2, workdir, shared).finish()


def assert_same_run(workdir: Path, whole: Path) -> None:
    """The logs of both runs are equal up to rounding, which changes no sampled token here."""
    rows, expected = without_times(workdir / "metrics.jsonl"), without_times(whole / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [(row["stage"], row["step"]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        exact = [name for name in row if name.startswith("tokens/") or name == "compiles"]
        assert [row[name] for name in exact] == [other[name] for name in exact]
        for name in ("policy/loss", "policy/entropy", "optim/update_norm", "reward/total", "guide/level"):
            if other.get(name) is not None:
                where = f"{row['stage']} {row['step']}: {name}"
                np.testing.assert_allclose(row[name], other[name], rtol=1e-3, atol=1e-5, err_msg=where)


def test_two_processes_train_as_one_does(two: tuple[Path, list[str]], shared: Path) -> None:
    workdir, (first, second) = two
    assert "macro" in first and "rl 12/12" in first
    assert "rl 12/12" not in second and "rule book" not in second  # only the first prints
    one = shared / "one"
    Job(1, one, shared).finish()
    assert_same_run(workdir, one)
    samples = [len((folder / "samples.jsonl").read_text().splitlines()) for folder in (workdir, one)]
    assert samples[0] == samples[1]
    cards = [json.loads((folder / "scorecard.json").read_text()) for folder in (workdir, one)]
    assert cards[0].keys() == cards[1].keys() == {"sft", "agrl"}


def test_two_processes_evaluate(two: tuple[Path, list[str]], shared: Path) -> None:
    cards = []
    for number in (1, 2):
        out = shared / f"card{number}.json"
        Job(number, two[0], shared, f"--out={out}", "--pairs=24", "--splits=b_eval", command="evaluate").finish()
        cards.append(json.loads(out.read_text())["agrl"]["b_eval"])
    for name in ("accuracy", "format", "step_accuracy"):
        assert cards[0][name]["value"] == cards[1][name]["value"]


def test_one_process_killed_stops_the_others_and_the_restart_resumes(
    two: tuple[Path, list[str]], shared: Path
) -> None:
    job = Job(2, shared / "killed", shared)
    job.wait_for_rows(19)
    job.processes[1].kill()
    began = time.monotonic()
    said = job.said()
    assert time.monotonic() - began < 60
    assert job.processes[0].returncode != 0
    assert "another" in said[0]
    assert "resuming from" in Job(2, job.workdir, shared).finish()[0]
    assert without_times(job.workdir / "metrics.jsonl") == without_times(two[0] / "metrics.jsonl")
    assert (job.workdir / "samples.jsonl").read_bytes() == (two[0] / "samples.jsonl").read_bytes()


@pytest.fixture(scope="module")
def stopped(shared: Path) -> Path:
    """A run of two processes, of which the second was asked to stop. Both save at the same step."""
    job = Job(2, shared / "stopped", shared, "--config.checkpoint.every=1000")
    job.wait_for_rows(15)
    job.processes[1].send_signal(signal.SIGTERM)
    said = job.said()
    assert {process.returncode for process in job.processes} == {128 + signal.SIGTERM}, "\n".join(said)
    assert len({text.splitlines()[-1] for text in said}) == 1 and "the same command continues" in said[0]
    return job.workdir


@pytest.mark.parametrize(("number", "mesh"), [(1, ()), (2, ("--config.mesh.data=1", "--config.mesh.fsdp=2"))])
def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_another_mesh(
    two: tuple[Path, list[str]], stopped: Path, shared: Path, number: int, mesh: tuple[str, ...]
) -> None:
    workdir = shared / f"goes_on_on_{number}"
    shutil.copytree(stopped, workdir)
    assert "resuming from rl step" in Job(number, workdir, shared, *mesh).finish()[0]
    assert_same_run(workdir, two[0])


def test_processes_that_are_not_there_are_one_clear_message(shared: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-m", "agrl_jax.main", f"--config={ROOT / 'tests' / 'tiny.py'}",
         f"--workdir={shared / 'none'}", "--distributed"],
        cwd=ROOT, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "JAX_COORDINATOR_ADDRESS" in done.stderr and "Traceback" not in done.stderr
