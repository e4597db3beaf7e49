"""The main table: every method on the same data, prompts, policy, warm start and budget."""

from __future__ import annotations

from experiments import study

METHODS = ("sft", "sft_more", "sft_all", "dpo", "grpo", "grpo_ds", "grpo_pr", "rrs", "agr", "agrl")

SWEEP = study.Sweep("main_table", runs={method: {} for method in METHODS}, seeds=(0, 1, 2, 3, 4))
get_config = SWEEP.get_config
