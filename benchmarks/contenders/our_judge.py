"""agrl_jax's own judge."""

from __future__ import annotations

from collections.abc import Callable

from agrl_jax.judging.engine import Judge
from benchmarks.contenders.protocol import JudgeTask, judge_main


def make(task: JudgeTask) -> Callable[[], list[str]]:
    judge = Judge.from_checkpoint(task.folder, batch_size=task.batch)
    return lambda: [judgement.response or judgement.error for judgement in judge.judge(task.rows)]


if __name__ == "__main__":
    judge_main(make)
