"""The machine, weights as a Hugging Face folder, and a virtual environment for each peer."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from agrl_jax.policy import huggingface
from benchmarks import workload
from benchmarks.contenders import protocol
from benchmarks.machine import ROOT

_HERE = flags.DEFINE_list("here", [], "contenders to run in this very environment, which has their packages")
_CACHE = flags.DEFINE_string("cache", "", "folder of weights and environments; by default `cache` beside --out")


@dataclass(frozen=True)
class Contender:
    """A module of `benchmarks.contenders`, and the packages of its environment."""

    module: str
    install: tuple[tuple[str, ...], ...] = ()  # packages of each pip command, in order; none: it uses this environment
    gpu_install: tuple[str, ...] = ()  # packages of one more pip command on a GPU
    needs_gpu: bool = False
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def answers_of(contender: Contender, python: str, task: Any) -> tuple[list[dict[str, Any]], dict[str, str] | None]:
    """The answers of a contender to a task (a dataclass), in a process of its own; and its error, if it failed."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(dataclasses.asdict(task), file)
        file.flush()
        command = [python, "-m", f"benchmarks.contenders.{contender.module}", file.name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = protocol.answers(done.stdout)
    if done.returncode or not any(one["kind"] == "end" for one in said):
        return said, {"error": f"exit code {done.returncode}", "output": done.stderr[-2000:]}
    return said, None


def here() -> list[str]:
    """The contenders of `--here`."""
    return _HERE.value


def cache_beside(out: Path) -> Path:
    """The folder of `--cache`, or the one beside the results."""
    return (Path(_CACHE.value) if _CACHE.value else out.parent / "cache").absolute()


def machine(dtype: str) -> dict[str, Any]:
    """The machine as it is now, measured in a process of its own, so that this process takes no memory of a GPU."""
    command = [sys.executable, "-m", "benchmarks.machine", f"--dtype={dtype}"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def weights(model: str, cache: Path) -> Path:
    """The Hugging Face folder of a model, by the name of its shape. It is written if it does not exist."""
    folder = cache / f"{model}-{'pretrained' if workload.is_pretrained(model) else 'random'}"
    if not folder.exists():
        fresh = folder.with_suffix(".part")
        shutil.rmtree(fresh, ignore_errors=True)
        huggingface.save_pretrained(fresh, *workload.load(model))
        fresh.rename(folder)
    return folder


def python_of(name: str, contender: Contender, cache: Path, platform: str) -> str | None:
    """The Python of a contender's virtual environment, made if it does not exist; None if that fails."""
    if not contender.install or name in _HERE.value:
        return sys.executable
    commands = [*contender.install, *([contender.gpu_install] if contender.gpu_install and platform == "gpu" else [])]
    words = json.dumps(commands)
    folder = cache / "venv" / "-".join(package.split("==")[0] for command in commands for package in command)
    python, mark = str(folder / "bin" / "python"), folder / "made_of.json"
    if not mark.exists() or mark.read_text() != words:
        venv.create(folder, clear=True, with_pip=True)
        for packages in commands:
            if subprocess.run([python, "-m", "pip", "install", "--quiet", *packages]).returncode:
                print(f"{name}: left out, since {' '.join(packages)} cannot be installed here")
                return None
        mark.write_text(words)
    return python
