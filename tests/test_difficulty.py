"""Sampling by difficulty: which examples of a pool are rolled, what is remembered, and that no example is lost."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lenient
from hypothesis import given, settings
from hypothesis import strategies as st
from test_step import CONFIG, B, N, fresh_state, jitted

from agrl_jax.rl import difficulty, reader
from agrl_jax.rl.difficulty import DifficultyConfig
from agrl_jax.runtime.checkpoint import Checkpointer
from agrl_jax.types import UNKNOWN, Batch, DifficultyState

BAND = DifficultyConfig(pool=2, low=0.25, high=0.75, again=10)
NEW = (UNKNOWN, 0)


def memory(*rows: tuple[float, int]) -> DifficultyState:
    """The state in which rows 0, 1, ... have these pass rates and were last met in these steps."""
    rate, met = zip(*rows, strict=True)
    return DifficultyState(jnp.array(rate, jnp.float32), jnp.array(met, jnp.int32))


def chosen(small, state, step, cfg=BAND, shards=1, order=None) -> tuple[list[int], list[bool]]:
    rows = range(len(state.rate)) if order is None else order
    batch, outside = difficulty.choose(state, small.batch([(0, 0)] * len(rows), rows=rows), step, cfg, shards)
    prompts = small.batch([(0, 0)] * len(batch.row), rows=batch.row.tolist()).prompt
    np.testing.assert_array_equal(batch.prompt, prompts)  # the whole example goes with its row
    return batch.row.tolist(), outside.tolist()


# ------------------------------------------------------------------------------------------- which are rolled


def test_rows_of_the_band_and_new_ones_come_first_in_the_order_of_the_pool(small):
    state = memory((0.0, 8), (0.25, 8), (1.0, 8), NEW, (0.75, 8), (0.2, 8), NEW, (0.8, 8))
    assert chosen(small, state, 12) == ([1, 3, 4, 6], [False] * 4)
    order = [7, 6, 5, 4, 3, 2, 1, 0]
    assert chosen(small, state, 12, order=order) == ([6, 4, 3, 1], [False] * 4)
    assert chosen(small, state, 12, dataclasses.replace(BAND, pool=4)) == ([1, 3], [False] * 2)


def test_where_they_are_too_few_those_that_waited_longest_fill_the_batch(small):
    state = memory((0.0, 8), (0.5, 8), (1.0, 5), (0.0, 6))
    assert chosen(small, state, 12) == ([1, 2], [False, True])
    assert chosen(small, memory((0.0, 8), (1.0, 5), (1.0, 9), (0.0, 6)), 12) == ([1, 3], [True, True])  # none inside


def test_a_row_outside_comes_back_after_so_many_steps(small):
    state = memory((0.0, 2), (0.5, 8), (0.5, 8), (1.0, 3))
    assert chosen(small, state, 11) == ([1, 2], [False, False])
    assert chosen(small, state, 12) == ([0, 1], [True, False])  # row 0 has waited for 10 steps, row 3 for 9


def test_each_shard_chooses_among_its_own(small):
    state = memory((0.0, 8), (1.0, 7), (0.0, 6), (0.0, 5), NEW, NEW, (0.5, 8), (0.5, 8))
    assert chosen(small, state, 12, shards=2) == ([3, 2, 4, 5], [True, True, False, False])


# --------------------------------------------------------------------------------------- what is remembered


def test_each_group_counts_as_much_as_all_before_it(small):
    state = memory(NEW, (0.5, 3), (1.0, 3), (0.25, 3))
    batch = small.batch([(0, 0)] * 3, rows=[2, 0, 1])
    after = difficulty.remember(state, batch, jnp.array([0.0, 0.25, 1.0]), jnp.int32(7))
    np.testing.assert_array_equal(after.rate, [0.25, 0.75, 0.5, 0.25])
    np.testing.assert_array_equal(after.met, [7, 7, 7, 3])


def test_rows_are_counted_by_their_place(small):
    state = memory((0.0, 1), (0.25, 1), (0.5, 1), (0.75, 1), (0.8, 1), (1.0, 1), NEW)
    counts = {name.removeprefix("difficulty/"): int(n) for name, n in difficulty.count(state, BAND).items()}
    assert counts == {"inside": 3, "above": 2, "below": 1, "unmet": 1}
    assert int(difficulty.count(difficulty.initial_state(9), BAND)["difficulty/unmet"]) == 9


@jax.jit
def rolled_in(rate, pools, again):
    """How often each row is rolled if its pass rate is always `rate` [N]; `pools` [steps, 2] has the rows of pools."""
    blank = jnp.zeros((2, 1), jnp.int32)

    def one(state, now):
        step, rows = now
        pair = Batch(blank, blank, blank, blank, blank, blank, blank, blank, rows, blank)
        batch, _ = difficulty.choose(state, pair, step, dataclasses.replace(BAND, again=again), 1)
        return difficulty.remember(state, batch, rate[batch.row], step), batch.row[0]

    steps = jnp.arange(len(pools), dtype=jnp.int32)
    _, rows = jax.lax.scan(one, difficulty.initial_state(len(rate)), (steps, pools))
    return jnp.zeros(len(rate), jnp.int32).at[rows].add(1)


@settings(max_examples=20, deadline=None)
@given(
    rates=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=12, max_size=12), seed=st.integers(0, 99),
)
def test_no_row_is_lost_whatever_the_pass_rates(rates, seed):
    """One of two rows is rolled in each step. In 900 steps, 150 pools hold a given row.

    If no row outside the band comes back, rows inside it are rolled more often. If rows outside come back soon, nearly
    all have come back at any time, and chance decides.
    """
    rng = np.random.default_rng(seed)
    pools = np.stack([rng.permutation(12)[:2] for _ in range(900)]).astype(np.int32)
    rolled = np.asarray(rolled_in(np.array(rates, np.float32), pools, 3))
    assert rolled.sum() == 900 and rolled.min() > 20
    rolled = np.asarray(rolled_in(np.array(rates, np.float32), pools, len(pools)))
    inside = np.array([rate == 0.5 for rate in rates])
    if inside.any() and not inside.all():
        assert rolled[inside].mean() >= rolled[~inside].mean()


# ------------------------------------------------------------------------------------------------ the step

WITH = dataclasses.replace(CONFIG, objective=dataclasses.replace(CONFIG.objective, kl="none"),
                           difficulty=DifficultyConfig(pool=2, low=0.3, high=0.7, again=3))  # fmt: skip
WITHOUT = dataclasses.replace(WITH, difficulty=None)


def start(small):
    """Rows 0 to 7 never passed; all others have not been met."""
    rates = difficulty.initial_state(N)
    rates = rates.replace(rate=rates.rate.at[:B].set(0.0))
    return jax.device_put(fresh_state(small.params, WITH).replace(difficulty=rates))


def pool(small, first=0):
    rows = [(first + i) % N for i in range(2 * B)]
    return small.batch([[(0, 0), (1, 0), (2, 1)][row % 3] for row in rows], rows=rows)


@pytest.fixture(scope="module")
def step(small):
    return jitted(small, WITH)


@pytest.mark.slow
def test_a_step_learns_from_what_was_chosen_as_if_it_alone_were_given(small, step, close):
    after, metrics, seen = step(start(small), pool(small), None)
    assert seen.row.tolist() == list(range(B, 2 * B))
    alone = jax.tree.map(lambda x: x[B:], pool(small))
    state = start(small).replace(difficulty=None)
    expected, of_alone, _ = jitted(small, WITHOUT)(state, alone, None)
    close(after.params, expected.params)
    for name, value in of_alone.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    # Pass rates are those of the answers before guided ones replaced some of them.
    assert metrics["guide/share"] > 0 and metrics["difficulty/outside"] == 0
    assert np.all(np.asarray(after.difficulty.rate)[2 * B :] == UNKNOWN)
    mine = np.asarray(after.difficulty.rate)[B : 2 * B]
    assert mine.mean() == pytest.approx(float(metrics["reward/tier_accuracy"]))
    unguided = ~np.asarray(seen.rolled.forced).any(axis=(1, 2))
    reading = reader.read(lenient(small.tables), seen.rolled.tokens, seen.rolled.valid)
    right = np.asarray(reading.value[..., -1] == alone.tier[:, None])
    np.testing.assert_allclose(mine[unguided], right.mean(axis=1)[unguided])
    counted = [metrics[f"difficulty/{name}"] for name in ("inside", "above", "below", "unmet")]
    assert sum(counted) == N and counted[-1] == N - 2 * B and counted[2] >= B


@pytest.mark.slow
def test_a_run_that_is_resumed_chooses_and_learns_the_same(small, step, tmp_path):
    states, rows = [start(small)], []
    for first in (0, 8, 0, 8, 0, 8):
        after, _, seen = step(states[-1], pool(small, first), None)
        states.append(after)
        rows.append(seen.row.tolist())
    assert step._cache_size() == 1
    assert len({tuple(row) for row in rows[::2]}) > 1  # the choice from the same pool depends on memory
    with Checkpointer(tmp_path, identity={}) as checkpoints:
        checkpoints.save("rl", 3, states[3])
        state = checkpoints.restore(states[0]).state
    for k, first in enumerate((8, 0, 8)):
        state, _, seen = step(state, pool(small, first), None)
        assert seen.row.tolist() == rows[3 + k]
    jax.tree.map(np.testing.assert_array_equal, state, states[-1])
