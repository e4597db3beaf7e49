"""The same small search for every method: each run changes one setting of a centre. One seed, on validation alone.

Each run spends half of the main table's budget. After `python -m experiments.run --sweep=experiments/search.py`,
`python -m experiments.choose` writes the best settings of each method to `results/tuned.json`, which the other sweeps
read.

Clip-higher is not searched. A rollout has one update here, so the ratio is 1 and nothing is clipped: GRPO with
`objective.clip_high=0.28` gave exactly the figures of its centre.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments import study

COMMON = {
    "centre": {},
    "slow": {"rl.learning_rate": 3e-5, "rl.matrix_rate": 0.0004},
    "fast": {"rl.learning_rate": 3e-4, "rl.matrix_rate": 0.004},
    "entropy": {"objective.entropy_weight": 0.02},
}
RL = COMMON | {"kl": {"objective.kl": "k3", "objective.kl_weight": 0.05}, "cool": {"rl.temperature": 0.8}}
GUIDED = COMMON | {"light": {"guidance.imitate_weight": 0.3}, "heavy": {"guidance.imitate_weight": 3.0}}
# DPO has no clipping; beta is its weight of the KL.
DPO = {
    "centre": {},
    "slow": {"dpo.learning_rate": 1e-4, "dpo.matrix_rate": 0.0007},
    "slower": {"dpo.learning_rate": 3e-5, "dpo.matrix_rate": 0.0002},
    "loose": {"dpo.beta": 0.03},
    "tight": {"dpo.beta": 0.3},
    "cool": {"rl.temperature": 0.8},
}
# Supervised training has neither sampling nor a reference.
MORE = {
    "centre": {},
    "slow": {"more.learning_rate": 3e-4, "more.matrix_rate": 0.0013},
    "fast": {"more.learning_rate": 3e-3, "more.matrix_rate": 0.013},
}  # fmt: skip
SEARCHED = {
    **dict.fromkeys(("grpo", "grpo_ds", "grpo_pr", "rrs"), RL), "agrl": GUIDED,
    "dpo": DPO, "sft_more": MORE, "sft_all": MORE,
}  # fmt: skip
NEIGHBOURS = {"agr": "agrl"}  # a method that takes another's settings


def runs() -> dict[str, dict[str, object]]:
    """Every method with each of its settings, as `METHOD.SETTING`."""
    return {
        f"{method}.{name}": {"method": method, **fields}
        for method, settings in SEARCHED.items()
        for name, fields in settings.items()
    }


def half() -> ConfigDict:
    """The study's run on half the budget."""
    c = study.base()
    c.rl.budget //= 2
    c.rl.steps //= 2
    c.dpo.mined //= 2
    c.dpo.steps //= 2
    c.more.steps //= 2
    c.eval.every = 13  # five validations; the last three count
    return c


SWEEP = study.Sweep("search", runs=runs(), seeds=(100,), tuned=None, base=half)
get_config = SWEEP.get_config
