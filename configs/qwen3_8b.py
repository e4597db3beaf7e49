"""Qwen3-8B, on eight devices of 80 GB, or on more.

    hf download Qwen/Qwen3-8B --local-dir=DIR
    python -m agrl_jax.main --config=configs/qwen3_8b.py --config.policy.pretrained=DIR --workdir=runs/qwen3_8b

The argument names another method: `--config=configs/qwen3_8b.py:grpo`. Not run yet: compiled for eight CPU devices, the
steps of both stages take less than 35 GB on each.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The shared settings, with the parameters spread over all devices."""
    variant = parse_arg(arg, variant=tuple(recipes.METHODS)).variant
    c = recipes.language_model()
    c.mesh.data, c.mesh.fsdp = 1, -1  # parameters, gradients and AdamW's moments take 131 GB, split over the devices
    c.sft.learning_rate = 1e-5  # a large model takes smaller steps
    c.checkpoint.every = 100  # a checkpoint has 98 GB
    c.checkpoint.keep = 1
    return recipes.with_method(c, variant)
