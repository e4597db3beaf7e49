"""Qwen3-30B-A3B, a mixture of 128 experts, on sixteen devices of 80 GB, or on more.

    hf download Qwen/Qwen3-30B-A3B --local-dir=DIR
    python -m agrl_jax.main --config=configs/qwen3_30b_a3b.py --config.policy.pretrained=DIR --workdir=runs/qwen3_30b

The metrics `experts/...` tell how its routers spread the tokens of the prompts. The argument names another method:
`--config=configs/qwen3_30b_a3b.py:grpo`. Not run yet: parameters and moments take 23 GB on each of sixteen devices. The
other memory of the steps has not been measured on devices with native ragged products (on CPUs they are dense and
large).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The shared settings, with the parameters spread over all devices and the experts over four of them."""
    variant = parse_arg(arg, variant=tuple(recipes.METHODS)).variant
    c = recipes.language_model()
    c.mesh.data, c.mesh.fsdp = 1, -1  # parameters, gradients and AdamW's moments take 490 GB, split over the devices
    c.mesh.tensor = 4  # 32 experts, and one of the 4 key/value heads, on each
    c.sft.learning_rate = 1e-5  # a large model takes smaller steps
    c.checkpoint.every = 100  # a checkpoint has 366 GB
    c.checkpoint.keep = 1
    return recipes.with_method(c, variant)
