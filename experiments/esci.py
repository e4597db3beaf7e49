"""Real pairs whose only label is the tier: SFT, DPO, GRPO and AGRL on a file of ESCI pairs.

    python -m experiments.run --sweep=experiments/esci.py --config.data.path=esci.parquet
"""

from __future__ import annotations

from experiments import study

# The warm start is shorter than the study's, since its steps take longer: they fill in unknown steps of the pairs.
PAIRS = {
    "data.source": "pairs", "data.prompt_len": 64, "policy.vocab_size": 4000, "sft.source": "both", "sft.steps": 1000,
    "guidance.source": "own", "guidance.threshold": 0.25, "rl.batch_size": 32,
}  # fmt: skip
RL = PAIRS | {"rl.steps": 105}  # as many as the budget allows

SWEEP = study.Sweep("esci", runs={"sft": PAIRS, "grpo": RL, "dpo": PAIRS, "agrl": RL}, seeds=(0, 1, 2))
get_config = SWEEP.get_config
