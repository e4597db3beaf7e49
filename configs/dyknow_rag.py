"""GRPO on the bundled benchmark, with the settings published for DyKnow-RAG (arXiv 2510.11122) and nothing else of it.

    python -m agrl_jax.main --config=configs/dyknow_rag.py --workdir=runs/dyknow_rag

The paper has 16 answers to each example, a sampling temperature of 0.99, a KL weight of 0.02, advantages clamped to
[-2, 2], and examples with pass rates from 0.01 to 0.9. Its retrieval, data and model are left out, and all other fields
are our defaults. The KL estimate k3 is that of GRPO. It is our choice to update pass rates as the policy changes. The
group is four times that of `quickstart.py` and the batch a quarter, so that a step costs the same. Not measured yet.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from agrl_jax import recipes


def get_config() -> ConfigDict:
    """The method is `grpo`; the policy and the warm start are the quickstart's."""
    c = recipes.base()
    c.rl.update(group_size=16, batch_size=16, temperature=0.99)
    c.objective.update(kl="k3", kl_weight=0.02, clamp=2.0)
    c.difficulty.update(pool=2, low=0.01, high=0.9)
    return recipes.with_method(c, "grpo")
