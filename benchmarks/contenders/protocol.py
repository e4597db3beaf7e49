"""The task of a contender and its answers. It imports only the standard library, since it runs in peers' environments.

A contender is a module with a function `run(task, report)`, started in a process of its own:

    python -m benchmarks.contenders.NAME TASK.json

It makes `task.warmup + task.steps` full GRPO steps with a reference policy: sampling, scoring, log-probabilities of the
reference, loss and gradient, AdamW. Each answer has exactly `task.response_len` tokens: nothing ends it early.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

MARK = "@benchmark "  # begins the lines of answers; libraries print other lines
BETA = 0.04  # weight of the divergence from the reference policy (k3)
LEARNING_RATE = 1e-6


@dataclasses.dataclass(frozen=True)
class Task:
    """One contender's work."""

    folder: str  # the model as Hugging Face lays it out
    texts: list[str]  # the prompts
    prompt_len: int  # tokens of each prompt
    group_size: int  # answers to each
    response_len: int  # tokens of each answer
    dtype: str  # of the arithmetic, float32 or bfloat16; parameters stay in float32
    warmup: int  # steps before the timed ones
    steps: int
    settings: dict[str, Any]  # of this contender
    shared_len: int = 0  # tokens that all prompts begin with; a contender may run them once


@dataclasses.dataclass(frozen=True)
class JudgeTask:
    """A model, and the rows to judge with it."""

    folder: str  # the model as Hugging Face lays it out
    gguf: str  # the same as a GGUF file; empty where there is none
    rows: list[dict[str, str]]  # query and title
    prompts: list[list[int]]  # the tokens of each row's prompt, instructions included
    grammar: str  # of the answers, as GBNF
    longest: int  # tokens of the longest answer
    batch: int  # rows judged at once, by contenders that can
    rounds: int


class Report:
    """Prints what a contender found. It is also the clock for the parts of a step."""

    def __init__(self, task: Task, synchronise: Callable[[], None] = lambda: None) -> None:
        self._task = task
        self.synchronise = synchronise  # waits for the device
        self._began = self._birth = time.monotonic()
        self._parts: dict[str, float] = {}
        self._steps = 0

    def begin(self) -> None:
        """The first step begins now; every later step begins where the one before ends."""
        self._began, self._cpu = time.monotonic(), time.process_time()
        if not self._steps:
            _say(kind="ready", seconds=self._began - self._birth)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a part of this step. If parts are nested, time counts for the inner one alone.
        """
        self.synchronise()
        began, inside = time.monotonic(), sum(self._parts.values())
        yield
        self.synchronise()
        inside = sum(self._parts.values()) - inside
        self._parts[name] = self._parts.get(name, 0.0) + time.monotonic() - began - inside

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with its calls timed as a part of the step."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def step(self, prompt_tokens: int, answer_tokens: int) -> None:
        """A step has ended, after this many tokens of distinct prompts and of all answers."""
        self.synchronise()
        task = self._task
        wanted = task.prompt_len * len(task.texts), task.response_len * task.group_size * len(task.texts)
        if (prompt_tokens, answer_tokens) != wanted:
            raise ValueError(f"{prompt_tokens} tokens of prompts, {answer_tokens} of answers, where {wanted} are due")
        seconds, cpu = time.monotonic() - self._began, time.process_time() - self._cpu
        _say(kind="step", warm=self._steps >= task.warmup, seconds=seconds, cpu_seconds=cpu, parts=self._parts)
        self._steps += 1
        self._parts = {}
        self.begin()

    def parts(self, seconds: dict[str, float]) -> None:
        """Reports the parts of a step that were timed by themselves."""
        _say(kind="parts", parts=seconds)

    def end(self, **facts: Any) -> None:
        """Reports the peak memory and other facts after all steps."""
        _say(kind="end", peak_rss=peak_rss(), **facts)


def peak_rss() -> int:
    """The most memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(run: Callable[[Task, Report], None]) -> None:
    """Runs a contender on the task whose file is named on the command line."""
    with open(sys.argv[1]) as file:
        task = Task(**json.load(file))
    run(task, Report(task))


def judge_main(make: Callable[[JudgeTask], Callable[[], list[str]]]) -> None:
    """Makes a judge of the task whose file is named on the command line, and times its rounds after one to warm up."""
    with open(sys.argv[1]) as file:
        task = JudgeTask(**json.load(file))
    judge = make(task)
    found = judge()
    for _ in range(task.rounds):
        began, cpu = time.monotonic(), time.process_time()
        judge()
        _say(kind="round", seconds=time.monotonic() - began, cpu_seconds=time.process_time() - cpu)
    _say(kind="end", answers=found, peak_rss=peak_rss())


def answers(output: str) -> list[dict[str, Any]]:
    """A contender's answers, from all that it printed."""
    return [json.loads(line[len(MARK) :]) for line in output.splitlines() if line.startswith(MARK)]


def _say(**fields: Any) -> None:
    print(MARK + json.dumps(fields), flush=True)
