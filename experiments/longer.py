"""Three times the main table's budget: whether what a method gains lasts, or others catch up."""

from __future__ import annotations

from experiments import study

TIMES = 3
METHODS = ("sft_more", "grpo", "grpo_ds", "agrl")


def _fields(method: str) -> dict[str, object]:
    """The main table's run of a method, its budget and its schedule as many times as long."""
    if method == "sft_more":
        return {"sft.steps": study.base().sft.steps + round(TIMES * study.BUDGET / study.SFT_STEP)}
    steps = study.tuned().get(method, {}).get("rl.steps", study.base().rl.steps)
    return {"rl.budget": TIMES * study.BUDGET, "rl.steps": TIMES * steps, "eval.every": TIMES * study.base().eval.every}


SWEEP = study.Sweep("longer", runs={method: _fields(method) for method in METHODS}, seeds=(0, 1, 2))
get_config = SWEEP.get_config
