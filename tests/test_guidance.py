"""Guided replay: which groups, how much, what is remembered, and how answers find their way back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrl_jax.rl import guidance
from agrl_jax.rl.guidance import GuidanceConfig, Selection
from agrl_jax.types import UNKNOWN, GuidanceState, Reading, Rollout

BASE = GuidanceConfig(
    threshold=0.25, capacity=0.5, replace=2, source="gold", level="adaptive", initial_level=1.5, eta=0.4,
    per_family=False, cap="none",
)

pytestmark = pytest.mark.usefixtures("quick_compiles")


def having(**changes) -> GuidanceConfig:
    return dataclasses.replace(BASE, **changes)


# ------------------------------------------------------------------------------------------- which groups


def slots(selection: Selection) -> list[list[int]]:
    """For each shard the places of the groups in use, in order."""
    return [
        [int(i) for i, used in zip(*shard, strict=True) if used]
        for shard in zip(selection.index, selection.chosen, strict=True)
    ]


def test_the_hardest_failing_groups_come_first_up_to_the_capacity():
    pass_rate = np.array([0.25, 0.0, 0.9, 0.125, 0.0, 0.26, 1.0, 0.2])
    everyone = np.ones(8, bool)
    chosen = slots(guidance.select(pass_rate, everyone, BASE, shards=1))
    assert [set(chosen[0][:2]), chosen[0][2:]] == [{1, 4}, [3, 7]]  # four slots; the place 0, at 0.25, finds none left
    assert slots(guidance.select(pass_rate, everyone, having(capacity=1.0), shards=1))[0][4:] == [0]


def test_a_group_at_the_threshold_fails_and_one_above_does_not():
    selection = guidance.select(np.array([0.25, 0.26]), np.ones(2, bool), having(capacity=1.0), shards=1)
    assert slots(selection) == [[0]]


def test_each_shard_selects_within_itself():
    pass_rate = np.array([0.1, 0.0, 0.2, 0.25, 1.0, 1.0, 0.25, 1.0])
    selection = guidance.select(pass_rate, np.ones(8, bool), BASE, shards=2)
    assert selection.index.shape == (2, 2)
    assert slots(selection) == [[1, 0], [2]]  # the second shard has one failing group, and leaves a slot empty


def test_groups_to_which_nothing_can_be_revealed_are_told_and_take_no_slot():
    guidable = np.array([False, True, False, True])
    selection = guidance.select(np.array([0.0, 0.2, 1.0, 1.0]), guidable, BASE, shards=1)
    assert slots(selection) == [[1]]
    np.testing.assert_array_equal(selection.unguidable, [True, False, False, False])


# ---------------------------------------------------------------------------------------------- how much


@pytest.fixture(scope="module")
def batch(small):
    """Rows 0 to 3 (families 0, 1, 0, 1): all known; brand not known; nothing known but the tier; all known."""
    return small.batch([(0, 0), (1, UNKNOWN), (UNKNOWN, UNKNOWN), (2, 1)], tiers=[0, 1, 1, 2])


def memory(level=(1.0,), offset=(0, 0, 0, 0), seen=(UNKNOWN,) * 4) -> GuidanceState:
    return GuidanceState(jnp.array(level, jnp.float32), jnp.array(offset, jnp.int8), jnp.array(seen, jnp.int8))


@pytest.mark.parametrize(
    ("state", "progress", "changes", "expected"),
    [
        (memory([1.0]), 0.0, {}, [1, 1, 1, 1]),
        (memory([1.0], (1, 0, -1, -2)), 0.0, {}, [2, 1, 0, 0]),  # from 0 to the 2 steps, never the tier
        (memory([1.4], (2, 0, 0, 0)), 0.0, {}, [2, 1, 1, 1]),
        (memory([1.6], (-1, 0, 0, 0)), 0.0, {}, [1, 2, 2, 2]),
        (memory([1.0], (1, 1, 1, 1)), 0.0, {"level": "fixed"}, [1, 1, 1, 1]),
        (memory([0.0, 2.0]), 0.0, {"per_family": True}, [0, 2, 0, 2]),
        (memory([2.0]), 0.5, {"cap": "linear"}, [1, 1, 1, 1]),  # at most 2 * (1 - 1/2)
        (memory([2.0]), 0.9, {"cap": "linear"}, [0, 0, 0, 0]),
        (memory([2.0]), 0.6, {"cap": "cosine"}, [1, 1, 1, 1]),  # at most 2 * cos(54 degrees) = 1.18
        (memory([2.0]), 0.3, {"cap": "cosine"}, [2, 2, 2, 2]),  # 1.78
    ],
)
def test_levels(batch, state, progress, changes, expected):
    found = guidance.levels(state, batch, jnp.float32(progress), having(**changes))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_the_first_state(batch):
    state = guidance.initial_state(5, 3, BASE)
    np.testing.assert_array_equal(state.level, [1.5])
    np.testing.assert_array_equal(state.offset, [0] * 5)
    np.testing.assert_array_equal(state.memory, [UNKNOWN] * 5)
    assert guidance.initial_state(5, 3, having(per_family=True)).level.shape == (3,)


# What the groups said themselves: two answers each. A right answer of tokens brand-free, then 2 (F:no), 4, 7, end.
OWN = np.array([[[0, 3, 5, 11, 11, 11], [8, 2, 9, 4, 7, 11]]] * 4, np.int32)
ENDS = np.array([[[0, 1, 2], [1, 3, 4]]] * 4, np.int32)  # where fit, brand and tier were complete


def revealed(batch, level, right, source, order=(0, 1, 2)):
    """The tokens revealed to each group, or None where it cannot be guided."""
    blank = np.ones(OWN.shape, bool)
    rolled = Rollout(OWN, np.zeros(OWN.shape, np.float32), blank, blank, blank[..., 0])
    reading = Reading(value=ENDS, count=ENDS, position=ENDS, well_formed=blank[..., 0])
    right = np.broadcast_to(np.array(right), (4, 2))
    tokens, lengths, available = guidance.reveal(
        batch, jnp.array(level), rolled, reading, right, order, having(source=source)
    )
    return [
        row[:length].tolist() if known else None
        for row, length, known in zip(np.asarray(tokens), np.asarray(lengths), np.asarray(available), strict=True)
    ]


def test_gold_is_revealed_part_by_part_as_far_as_it_is_known(batch):
    nobody = (False, False)
    # F:yes 0, F:part 1, F:no 2, B:ok 3, B:off 4
    assert revealed(batch, [0, 0, 0, 0], nobody, "gold") == [[], [], None, []]
    assert revealed(batch, [1, 1, 1, 1], nobody, "gold") == [[0], [1], None, [2]]
    assert revealed(batch, [2, 2, 2, 2], nobody, "gold") == [[0, 3], [1], None, [2, 4]]


def test_the_tier_is_never_revealed_where_it_comes_last(batch):
    assert revealed(batch, [3, 3, 3, 3], (False, False), "gold") == [[0, 3], [1], None, [2, 4]]


def test_own_answers_are_revealed_where_gold_is_not_known_that_far(batch):
    second = (False, True)
    # Known far enough: gold. Otherwise the right answer up to where its first parts were complete, detours included.
    assert revealed(batch, [1, 1, 1, 1], second, "own") == [[0], [1], [8, 2], [2]]
    assert revealed(batch, [2, 2, 2, 2], second, "own") == [[0, 3], [8, 2, 9, 4], [8, 2, 9, 4], [2, 4]]
    assert revealed(batch, [1, 1, 1, 1], (True, True), "own")[2] == [0]  # the first of the right answers
    assert revealed(batch, [2, 2, 2, 2], (False, False), "own") == [[0, 3], [1], None, [2, 4]]


def test_own_answers_in_another_order_of_parts(batch):
    """respond_then_think: the first part is the tier, complete where `position` of part R says."""
    tier_first = dataclasses.replace(batch, known_parts=np.zeros(4, np.int32))
    ends = revealed(tier_first, [1, 1, 1, 1], (False, True), "own", order=(2, 0, 1))
    assert ends == [[8, 2, 9, 4, 7]] * 4


# ---------------------------------------------------------------------------------------- what is remembered


def test_the_level_moves_towards_a_pass_rate_of_one_half(batch):
    def level(guided, guided_pass, start=1.0, **changes):
        passes = np.array(guided_pass, np.float32)
        after = guidance.update(memory([start]), batch, np.zeros(4), np.array(guided), passes, having(**changes))
        return float(after.level[0])

    some = [True, True, False, False]
    assert np.isclose(level(some, [0.0, 0.0, 9, 9]), 1 + 0.4 * 0.5)  # all fail: reveal more
    assert np.isclose(level(some, [1.0, 1.0, 9, 9]), 1 - 0.4 * 0.5)
    assert np.isclose(level(some, [0.75, 0.5, 9, 9]), 1 + 0.4 * (0.5 - 0.625))
    assert level([False] * 4, [9.0] * 4) == 1.0  # nobody was guided
    assert level(some, [0.0, 0.0, 9, 9], start=1.9) == 2.0  # not beyond the steps
    assert level(some, [1.0, 1.0, 9, 9], start=0.1) == 0.0
    assert level(some, [0.0, 0.0, 9, 9], level="fixed") == 1.0


def test_each_family_has_its_own_level(batch):
    guided, passes = np.array([True, False, True, True]), np.array([0.0, 9.0, 1.0, 1.0], np.float32)
    after = guidance.update(memory([1.0, 0.5]), batch, np.zeros(4), guided, passes, having(per_family=True))
    np.testing.assert_allclose(after.level, [1.0, 0.5 - 0.2])  # rows 0 and 2 balance; row 3 alone


def test_offsets_and_memory_by_hand(batch):
    state = memory(offset=(0, 2, -2, 1, 5), seen=(UNKNOWN, 30, 50, UNKNOWN, 77))  # row 4 is not in this batch
    guided = np.array([True, True, False, False])
    guided_pass = np.array([0.25, 0.26, 0.0, 0.0], np.float32)
    plain_pass = np.array([0.0, 0.0, 0.26, 0.25], np.float32)
    after = guidance.update(state, batch, plain_pass, guided, guided_pass, BASE)
    # Failed even guided: up. Passed guided: stays. Passes unguided: down, but not below -2. Fails, not guided: stays.
    np.testing.assert_array_equal(after.offset, [1, 2, -2, 1, 5])
    np.testing.assert_array_equal(after.memory, [25, 26, UNKNOWN, UNKNOWN, 77])
    assert after.offset.dtype == after.memory.dtype == jnp.int8
    bounded = guidance.update(memory(offset=(2, 2, 2, 2)), batch, plain_pass, guided, guided_pass, BASE)
    np.testing.assert_array_equal(bounded.offset, [2, 2, 1, 2])  # nor above 2


def test_the_transfer_gap_is_over_rows_met_again(batch):
    state = memory(seen=(75, UNKNOWN, 0, UNKNOWN))
    gap, number = guidance.transfer_gap(state, batch, np.array([0.25, 1.0, 0.5, 0.0], np.float32))
    assert number == 2 and np.isclose(gap, (0.75 - 0.25) + (0.0 - 0.5))
    gap, number = guidance.transfer_gap(memory(), batch, np.ones(4, np.float32))
    assert number == 0 and gap == 0


# ------------------------------------------------------------------------------------- gather and merge


@st.composite
def selections(draw) -> Selection:
    """Selections over 2 shards of 5 groups, 3 slots each, as `select` makes them: indices of a shard differ."""
    index = [draw(st.permutations(range(5)))[:3] for _ in range(2)]
    chosen = draw(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=2))
    return Selection(jnp.array(index, jnp.int32), jnp.array(chosen), jnp.zeros(10, bool))


gather, scatter = jax.jit(guidance.gather, static_argnames="axis"), jax.jit(guidance.scatter)


@settings(max_examples=40, deadline=None)
@given(selections())
def test_scattering_what_was_gathered_changes_nothing(selection):
    rows = np.arange(20.0).reshape(10, 2)
    np.testing.assert_array_equal(scatter(rows, gather(rows, selection), selection), rows)


@settings(max_examples=40, deadline=None)
@given(selections())
def test_scattering_changes_the_groups_in_use_and_no_others(selection):
    new = -1.0 - np.arange(6.0)
    merged = scatter(np.arange(10.0), new, selection)
    expected = np.arange(10.0)
    for shard in range(2):
        for slot in range(3):
            if selection.chosen[shard, slot]:
                expected[5 * shard + selection.index[shard, slot]] = new[3 * shard + slot]
    np.testing.assert_array_equal(merged, expected)
    gathered = gather(np.arange(10.0), selection)
    np.testing.assert_array_equal(gathered, np.reshape(selection.index + np.array([[0], [5]]), -1))


def test_groups_are_gathered_from_another_axis():
    selection = Selection(jnp.array([[1], [0]]), jnp.ones((2, 1), bool), jnp.zeros(4, bool))
    rows = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(gather(rows, selection, axis=1), rows[:, [1, 2]])


def test_replayed_answers_take_the_place_of_failing_ones():
    """One group of two is guided: of its four answers the second and third pass, and two are replaced."""

    def rollout(values):
        values = np.array(values)
        tokens = np.broadcast_to(values[..., None], (*values.shape, 3)).astype(np.int32)
        return Rollout(tokens, tokens * 0.5, tokens > 0, tokens > 0, values > 0)

    selection = Selection(jnp.array([[1, 0]]), jnp.array([[True, False]]), jnp.zeros(2, bool))
    passed = np.array([[False] * 4, [False, True, True, False]])
    before, again = rollout([[1, 2, 3, 4], [5, 6, 7, 8]]), rollout([[-1, -2], [-3, -4]])
    merged = guidance.replace_answers(before, again, passed, selection)
    expected = rollout([[1, 2, 3, 4], [-1, 6, 7, -2]])  # the slot not in use is dropped
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    # With one failing answer only, the first of the passing ones goes as well.
    merged = guidance.replace_answers(before, again, np.array([[False] * 4, [True, True, False, True]]), selection)
    np.testing.assert_array_equal(merged.tokens[1, :, 0], [-2, 6, -1, 8])
