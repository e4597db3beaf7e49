"""Your own labelled pairs: warm start on the bundled benchmark, then RL on a CSV, Parquet or JSON-lines file.

    python -m agrl_jax.main --config=configs/pairs.py --config.data.path=PAIRS.csv --workdir=runs/pairs

Columns: `query`, `title`, `label`; optional `id`, `description`, `brand`, `color`, `category`, `price`,
`family`, `split`, and for each step of the rule book `step_NAME`. Without `split`, pairs are split by query.
The argument names another method: `--config=configs/pairs.py:grpo`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.runtime.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The quickstart's policy and method, on pairs whose steps may be unknown."""
    variant = parse_arg(arg, variant=tuple(recipes.METHODS)).variant
    return recipes.with_method(recipes.pairs(), variant)
