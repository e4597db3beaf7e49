"""Hugging Face's `generate`, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.contenders.protocol import JudgeTask, judge_main


def make(task: JudgeTask) -> Callable[[], list[str]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(task.folder)

    def answers(prompts: list[list[int]]) -> list[str]:
        width = max(map(len, prompts))
        tokens = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            whole = model.generate(
                tokens.to(device), attention_mask=mask.to(device), max_new_tokens=task.longest, do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        return tokenizer.batch_decode(whole[:, width:], skip_special_tokens=True)

    starts = range(0, len(task.prompts), task.batch)
    return lambda: [answer for start in starts for answer in answers(task.prompts[start : start + task.batch])]


if __name__ == "__main__":
    judge_main(make)
