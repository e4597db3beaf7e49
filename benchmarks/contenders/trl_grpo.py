"""TRL's GRPOTrainer, with Hugging Face's `generate` or with vLLM in the same process (settings: {"vllm": true}).

Other settings: `micro_batch`, the number of answers that go through the gradient at once (by default all, without
accumulation), and `checkpointing`, which recomputes activations in the backward pass.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset

from benchmarks.contenders.protocol import BETA, LEARNING_RATE, Report, Task, main


def run(task: Task, report: Report) -> None:
    gpu = torch.cuda.is_available()
    report.synchronise = torch.cuda.synchronize if gpu else lambda: None
    total = len(task.texts) * task.group_size
    micro = task.settings.get("micro_batch", total)
    vllm = bool(task.settings.get("vllm"))
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=task.warmup + task.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=total // micro,  # one generation and one update for all answers
        num_generations=task.group_size,
        max_completion_length=task.response_len,
        # No answer ends early.
        generation_kwargs={"min_tokens" if vllm else "min_new_tokens": task.response_len},
        use_vllm=vllm,
        beta=BETA,
        loss_type="grpo",
        learning_rate=LEARNING_RATE,
        gradient_checkpointing=bool(task.settings.get("checkpointing")),
        bf16=task.dtype == "bfloat16",
        use_cpu=not gpu,
        model_init_kwargs={"dtype": "float32"},
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    steps = _Steps(report)
    trainer = trl.GRPOTrainer(
        model=task.folder,
        reward_funcs=_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": task.texts}),
        callbacks=[steps],
    )
    _time_parts(trainer, report, steps)
    trainer.train()
    report.end(
        versions={module.__name__: module.__version__ for module in (trl, torch, transformers)},
        peak_device=torch.cuda.max_memory_allocated() if gpu else None,
    )


def _reward(completions: list[str], **_: Any) -> list[float]:
    """A number that differs between answers."""
    return [float(len(set(text))) for text in completions]


class _Steps(transformers.TrainerCallback):
    """Reports where steps and updates begin and end, and how many tokens a step had."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.tokens = 0, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._report.begin()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._update = self._report.part("update")
        self._update.__enter__()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._update.__exit__(None, None, None)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._report.step(*self.tokens)


def _time_parts(trainer: trl.GRPOTrainer, report: Report, steps: _Steps) -> None:
    """Times generation and the reference's log-probabilities. The rest of a training step is loss and gradient."""
    generate, score = trainer._generate_single_turn, trainer._get_per_token_logps_and_entropies

    def generating(prompts: list[list[int]], *args: Any) -> Any:
        with report.part("rollout"):
            answers, logprobs = generate(prompts, *args)
        steps.tokens = sum(map(len, prompts)) // trainer.num_generations, sum(map(len, answers))
        return answers, logprobs

    def scoring(model: Any, *args: Any, **kwargs: Any) -> Any:
        with report.part("reference" if model is trainer.ref_model else "gradient"):
            return score(model, *args, **kwargs)

    trainer._generate_single_turn = generating
    trainer._get_per_token_logps_and_entropies = scoring
    trainer._generate_and_score_completions = report.timed("other", trainer._generate_and_score_completions)
    trainer.training_step = report.timed("gradient", trainer.training_step)


if __name__ == "__main__":
    main(run)
