"""GRPO on the bundled benchmark with the settings published for DyKnow-RAG (arXiv 2510.11122), and nothing more of it.

    python -m agrl_jax.main --config=configs/dyknow_rag.py --workdir=runs/dyknow_rag

Published are 16 answers to each example, a sampling temperature of 0.99, a KL weight of 0.02, advantages clamped to
[-2, 2], and examples whose pass rate lies from 0.01 to 0.9. Its retrieval, its data and its model are no part of this,
and all other fields are our defaults. The KL estimate k3 is GRPO's, and that pass rates are followed as the policy
changes is ours. The batch is smaller by as much as the group is larger, so that a step costs what it does in
`quickstart.py`. Not measured yet.
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
