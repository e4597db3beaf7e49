"""Real pairs of which the tier alone is known: SFT, DPO, GRPO and AGRL on a file of ESCI pairs.

    python -m experiments.run --sweep=experiments/esci.py --config.data.path=esci.parquet
"""

from __future__ import annotations

from experiments import study

PAIRS = {
    "data.source": "pairs", "data.prompt_len": 96, "policy.vocab_size": 4000, "sft.source": "both",
    "guidance.source": "own", "rl.batch_size": 32, "rl.steps": 220,
}  # fmt: skip

SWEEP = study.Sweep("esci", runs={method: PAIRS for method in ("sft", "grpo", "dpo", "agrl")}, seeds=(0, 1, 2, 3, 4))
get_config = SWEEP.get_config
