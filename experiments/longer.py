"""Three times the main table's budget: does a method's gain last, or do others catch up?"""

from __future__ import annotations

from agrl_jax.runtime.config import flatten, last_branch
from experiments import study

TIMES = 3
METHODS = ("sft_more", "grpo", "grpo_ds", "agrl")


def _fields(method: str) -> dict[str, object]:
    """The main table's run of a method, with a longer budget and schedule."""
    name = f"{last_branch(method)}.steps"
    steps = study.tuned().get(method, {}).get(name, flatten(study.base())[name])
    return {"rl.budget": TIMES * study.BUDGET, name: TIMES * steps, "eval.every": TIMES * study.base().eval.every}


SWEEP = study.Sweep("longer", runs={method: _fields(method) for method in METHODS}, seeds=(0, 1, 2))
get_config = SWEEP.get_config
