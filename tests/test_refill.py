"""Dynamic sampling: other groups replace those with equal rewards, and the cost is counted."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RESPONSE_LEN, lenient
from test_step import CONFIG, KEY, B, G, N, fresh_state, jitted

from agrl_jax.policy.scoring import prefill
from agrl_jax.rl import reader
from agrl_jax.rl.refill import Groups, exchange, refill
from agrl_jax.rl.reward import score
from agrl_jax.rl.rollout import PURPOSE_ROLLOUT, rollout, row_keys
from agrl_jax.types import Rollout

K = 4
PLAIN = dataclasses.replace(
    CONFIG, guidance=None, shards=2, candidates=K,
    reward=dataclasses.replace(CONFIG.reward, composition="terminal"),
    objective=dataclasses.replace(CONFIG.objective, kl="none"),
)


def groups(small, rows, teaches) -> Groups:
    """Groups with their row in every token."""
    said = np.broadcast_to(np.array(rows, np.int32)[:, None, None], (len(rows), G, RESPONSE_LEN))
    rolled = Rollout(said, said * 1.0, said >= 0, said >= 0, said[..., 0] >= 0)
    return Groups(small.batch([(0, 0)] * len(rows), rows=rows), rolled, np.array(teaches, bool))


def test_exchange_takes_what_teaches_within_each_shard(small):
    """Two shards of four places. The first has more groups to put in than places, the second has fewer."""
    old = groups(small, range(8), [1, 0, 1, 0, 0, 0, 1, 0])
    new = groups(small, range(10, 18), [1, 0, 1, 1, 0, 0, 0, 1])
    out = jax.jit(exchange, static_argnames="shards")(old, new, shards=2)
    np.testing.assert_array_equal(out.batch.row, [0, 10, 2, 12, 17, 5, 6, 7])
    np.testing.assert_array_equal(out.teaches, [1, 1, 1, 1, 1, 0, 1, 0])
    for name in ("tokens", "logp"):
        np.testing.assert_array_equal(getattr(out.rolled, name)[:, 0, 0], out.batch.row)
    np.testing.assert_array_equal(out.batch.prompt[1], new.batch.prompt[0])


@pytest.mark.parametrize(("teaching", "rounds"), [([4, 0, 0, 0], 1), ([1, 1, 2, 0], 3), ([1, 1, 1, 0], 4)])
def test_rounds_go_on_until_every_place_teaches_or_none_is_left(small, teaching, rounds):
    """In round i, `teaching[i]` of four groups teach."""
    pieces = [groups(small, range(4 * i, 4 * i + 4), np.arange(4) < number) for i, number in enumerate(teaching)]
    all_groups = jax.tree.map(lambda *x: jnp.stack(x), *pieces)

    def roll(batch):
        return jax.tree.map(lambda x: x[batch.row[0] // 4], all_groups)

    out, figures = jax.jit(partial(refill, roll=roll, shards=1))(pieces[0], all_groups.batch)
    assert figures["refill/rounds"] == rounds
    assert out.teaches.sum() == min(sum(teaching[:rounds]), 4)
    prompts = sum(piece.batch.prompt_len.sum() for piece in pieces[1:rounds])
    assert figures["tokens/refilled"] == prompts + (rounds - 1) * 4 * G * RESPONSE_LEN


@pytest.mark.slow
def test_a_step_learns_from_the_groups_that_teach_and_pays_for_all(small):
    """The step's choice, compared with all candidates rolled at once. Half of the groups teach nothing here."""
    rows = list(range(K * B))
    batch = small.batch([[(0, 0), (1, 0), (2, 1)][row % 3] for row in rows], rows=rows)
    prefix = prefill(small.policy, small.params, batch.prompt, batch.prompt_len)
    every = rollout(
        small.policy, small.params, prefix, row_keys(KEY, PURPOSE_ROLLOUT, 0, batch.row, G), length=RESPONSE_LEN,
        temperature=PLAIN.temperature, end_token=small.tables.end_token,
    )
    reading = reader.read(lenient(small.tables), every.tokens, every.valid)
    total = np.asarray(score(reading, every, batch, small.tables, PLAIN.reward).total)
    teaches = total.std(axis=1) > 1e-4

    step = jitted(small, PLAIN)
    state = jax.device_put(fresh_state(small.params, PLAIN))
    after, metrics, seen = step(state, batch, None)
    # Round i has examples i, i + K, i + 2 K, ...; a shard has the first or the second half of them.
    kept, rolled = [], 0
    for shard in range(2):
        half = np.arange(shard * K * B // 2, (shard + 1) * K * B // 2)
        places = half[::K].copy()
        for i in range(1, int(metrics["refill/rounds"])):
            fresh = [row for row in half[i::K] if teaches[row]]
            for place in [p for p in range(len(places)) if not teaches[places[p]]][: len(fresh)]:
                places[place] = fresh.pop(0)
        kept += list(places)
    np.testing.assert_array_equal(seen.row, kept)
    np.testing.assert_array_equal(seen.rolled.tokens, np.asarray(every.tokens)[kept])
    assert 1 < metrics["refill/rounds"] <= K and metrics["refill/rounds"] * B <= N
    assert metrics["reward/equal_groups"] == 1 - teaches[::K].mean() > metrics["reward/equal_groups_after"]
    assert (metrics["refill/rounds"] == K) or teaches[kept].all()
    # Every round counts, and the groups that are learnt from are trained on once.
    tokens = batch.prompt_len + np.asarray(every.valid).sum(axis=(1, 2))
    rolled = sum(tokens[i::K].sum() for i in range(int(metrics["refill/rounds"])))
    assert metrics["tokens/prompt"] + metrics["tokens/rolled"] == tokens[::K].sum()
    assert metrics["tokens/trained"] == tokens[kept].sum()
    assert metrics["budget/tokens"] == rolled + 3 * tokens[kept].sum()
    step(after, batch, None)
    assert step._cache_size() == 1
