"""The main table's methods where pairs after the warm start have the tier as their only label, as most real ones do.

    python -m experiments.run --sweep=experiments/tier_only.py

Warm start, budget and settings are those of the main table; `grpo` has those that the search put second there.
`sft_tiers` goes on with supervised training on the tiers, and the policy fills in the steps; `sft_sum` maximises the
probability of the tier, summed over all steps from which the decision table reaches it. AGRL guides with right answers
of its own.
"""

from __future__ import annotations

from experiments import main_table, study

# The tokenizer sees fewer texts of steps, so a gold answer has up to 18 tokens.
_TIERS = {"data.steps_known": 0, "data.response_len": 18, "reward.overlong_from": 17, "labels": "tier"}
_MORE = _TIERS | {"method": "sft_all", "more.steps": 290}  # filling in steps costs tokens, so the budget allows fewer

SWEEP = study.Sweep(
    "tier_only",
    runs={
        "sft": _TIERS | {"labels": study.LABELS["sft"]},
        "sft_tiers": _MORE,
        "sft_sum": _MORE | {"sft.unknown_steps": "sum"},
        "grpo": main_table.SECOND | _TIERS,
        "agrl": _TIERS | {"guidance.source": "own", "guidance.threshold": 0.25},
    },
    seeds=(0, 1, 2),
)
get_config = SWEEP.get_config
