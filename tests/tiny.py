"""A config that goes through every stage in seconds: the policy is too small to learn much."""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime.config import parse_arg
from configs import pairs


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of a source, `benchmark` or `pairs`."""
    source = parse_arg(arg, variant=("benchmark", "pairs")).variant
    c = recipes.base() if source == "benchmark" else pairs.get_config()
    c.policy.update(vocab_size=600, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64)
    c.data.update(prompt_len=96, response_len=40)
    c.sft.update(steps=12, batch_size=16)
    c.rl.update(steps=12, batch_size=8, group_size=4)
    c.dpo.update(samples=4, mined=60, pairs=2, steps=12, batch_size=8)
    c.guidance.update(capacity=0.5, replace=2, threshold=0.5)
    c.reward.overlong_from = 32
    c.eval.update(every=6, pairs=24, validation_pairs=24, pass_k=2, pass_pairs=8, batch_size=8, bootstrap=50)
    c.checkpoint.every = 4
    c.log.samples_every = 4
    return c
