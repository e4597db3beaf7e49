"""Supervised training on pairs with unknown steps: it raises the probability of what is known, through the rule book.

No step is made up. Where a response states a step, the policy gives a probability to each value of the step. The
probability of the label is a sum over the combinations of values that agree with the known steps and for which the
decision table gives the tier:

    P(tier, known steps) = sum over combinations of prod P(value)

Training raises its logarithm. The steps that stand before a step are the ones that `fill` writes: for unknown steps,
the likeliest values that the label allows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agrl_jax.data.pipeline import PartTexts
from agrl_jax.policy.scoring import shared_start
from agrl_jax.types import Array, Params, Policy, RuleTables


class Forks(NamedTuple):
    """Where the texts of a part's values first differ; parts in the order of the response."""

    place: np.ndarray  # [P] number of tokens that the texts of all values of a part begin with
    token: np.ndarray  # [P, values] int32 the token after those, different for each value; 0 past a part's values


def forks(texts: PartTexts) -> Forks | None:
    """The forks of a rule book's texts; None if the values of some part cannot be told apart by one token."""
    place = np.zeros(len(texts.length), np.int32)
    token = np.zeros(texts.length.shape, np.int32)
    for part, lengths in enumerate(texts.length):
        values, sizes = texts.tokens[part, lengths > 0], lengths[lengths > 0]
        same = shared_start(values, sizes)
        if same == sizes.min() or len(np.unique(values[:, same])) < len(values):
            return None
        place[part], token[part, : len(values)] = same, values[:, same]
    return Forks(place, token)


def label_logprob(
    policy: Policy, params: Params, tables: RuleTables, fork: Forks, hidden: Array, starts: Array, possible: Array
) -> Array:
    """[B] log-probability of the labels, summed over all combinations of steps that agree with them.

    Args:
      policy, params: unembed the hidden states.
      tables: of the rule book, in the order think_then_respond.
      fork: where the texts of the steps' values first differ.
      hidden: [B, T, D] that predict the tokens of the responses.
      starts: [B, P] tokens of the response before each part.
      possible: [B, values of step 0, ..., values of step R - 1] bool, the combinations that agree with the labels.
    """
    steps = tables.num_steps
    at = starts[:, :steps] + fork.place[:steps]
    logits = policy.unembed(params, jnp.take_along_axis(hidden, at[..., None], axis=1))  # [B, R, V]
    total = jnp.where(possible, 0.0, -jnp.inf)
    for place, part in enumerate(tables.order[:steps]):
        size = tables.num_values[part]
        logp = jax.nn.log_softmax(logits[:, place, fork.token[place, :size]])
        total += logp.reshape(-1, *(size if axis == part else 1 for axis in range(steps)))
    return jax.nn.logsumexp(total.reshape(len(total), -1), axis=1)
