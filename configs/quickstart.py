"""The first run: a small policy learns the bundled benchmark on two CPU cores in about ten minutes.

    python -m agrl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

The argument names another method on the same data, warm start and budget:
`--config=configs/quickstart.py:grpo` (agrl, rrs, agr, grpo_pr, grpo, grpo_ds, dpo, sft, sft_more, sft_all, distill).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The defaults of `recipes`, which are chosen for this run."""
    variant = parse_arg(arg, variant=tuple(recipes.METHODS)).variant
    return recipes.with_method(recipes.base(), variant)
