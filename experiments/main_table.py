"""The main table: every method on the same data, prompts, policy, warm start and budget."""

from __future__ import annotations

from experiments import study

METHODS = ("sft", "sft_more", "sft_all", "dpo", "grpo", "grpo_ds", "grpo_pr", "rrs", "agr", "agrl")

# What the search found second for GRPO. The first, three times the rate, does best with the search's seed alone.
SECOND = {"method": "grpo", "rl.learning_rate": 1e-4, "rl.matrix_rate": 0.0013, "objective.entropy_weight": 0.02}
RUNS = {method: {} for method in METHODS} | {"grpo_entropy": SECOND}

SWEEP = study.Sweep("main_table", runs=RUNS, seeds=(0, 1, 2, 3, 4))
get_config = SWEEP.get_config
