"""The main table: every method on the same data, prompts, policy, warm start and budget."""

from __future__ import annotations

from experiments import study

METHODS = ("sft", "sft_more", "sft_all", "dpo", "grpo", "grpo_ds", "grpo_pr", "rrs", "agr", "agrl")

MORE = {"sft.steps": study.base().sft.steps + round(study.BUDGET / study.SFT_STEP)}  # the same budget on a longer start
RUNS = {method: MORE if method in ("sft_more", "sft_all") else {} for method in METHODS}

SWEEP = study.Sweep("main_table", runs=RUNS, seeds=(0, 1, 2, 3, 4))
get_config = SWEEP.get_config
