"""llama.cpp through llama-cpp-python: one prompt after the other, under the grammar."""

from __future__ import annotations

import os
from collections.abc import Callable

from llama_cpp import Llama, LlamaGrammar

from benchmarks.contenders.protocol import JudgeTask, judge_main


def make(task: JudgeTask) -> Callable[[], list[str]]:
    if not task.gguf:
        raise ValueError("llama.cpp needs a GGUF file of the model")
    longest = max(map(len, task.prompts)) + task.longest
    threads = len(os.sched_getaffinity(0))
    # llama.cpp keeps the start that a prompt shares with the one before it, so the instructions are run once.
    llama = Llama(task.gguf, n_ctx=longest, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    grammar = LlamaGrammar.from_string(task.grammar, verbose=False)

    def answer(prompt: list[int]) -> str:
        done = llama.create_completion(prompt, max_tokens=task.longest, temperature=0.0, grammar=grammar)
        return done["choices"][0]["text"]

    return lambda: [answer(prompt) for prompt in task.prompts]


if __name__ == "__main__":
    judge_main(make)
