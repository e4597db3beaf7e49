"""Qwen3-0.6B, on one GPU of 80 GB.

    hf download Qwen/Qwen3-0.6B --local-dir=DIR
    python -m agrl_jax.main --config=configs/qwen3_0p6b.py --config.policy.pretrained=DIR --workdir=runs/qwen3_0p6b

The argument names another method: `--config=configs/qwen3_0p6b.py:grpo`. Not run yet: compiled for one CPU device, the
steps of both stages take less than 28 GB.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The shared settings: parameters, gradients and AdamW's moments take 10 GB."""
    variant = parse_arg(arg, variant=tuple(recipes.METHODS)).variant
    return recipes.with_method(recipes.language_model(), variant)
