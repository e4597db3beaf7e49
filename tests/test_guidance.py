"""Guided replay: which groups are guided, how much is shown, what is remembered, and how answers are replaced."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrl_jax.rl import guidance
from agrl_jax.rl.guidance import GuidanceConfig, Revelation, Selection
from agrl_jax.types import UNKNOWN, GuidanceState, OwnAnswers, Reading, Rollout

BASE = GuidanceConfig(
    threshold=0.25, capacity=0.5, replace=2, source="gold", level="adaptive", initial_level=1.5, eta=0.4,
    per_family=False, cap="none",
)


def having(**changes) -> GuidanceConfig:
    return dataclasses.replace(BASE, **changes)


# ------------------------------------------------------------------------------------------- which groups


def slots(selection: Selection) -> list[list[int]]:
    """For each shard, the places of its guided groups, in order."""
    return [
        [int(i) for i, used in zip(*shard, strict=True) if used]
        for shard in zip(selection.index, selection.chosen, strict=True)
    ]


def test_the_hardest_failing_groups_come_first_up_to_the_capacity():
    pass_rate = np.array([0.25, 0.0, 0.9, 0.125, 0.0, 0.26, 1.0, 0.2])
    everyone = np.ones(8, bool)
    chosen = slots(guidance.select(pass_rate, everyone, BASE, shards=1))
    assert [set(chosen[0][:2]), chosen[0][2:]] == [{1, 4}, [3, 7]]  # four slots: none is left for group 0, at 0.25
    assert slots(guidance.select(pass_rate, everyone, having(capacity=1.0), shards=1))[0][4:] == [0]


def test_a_group_at_the_threshold_fails_and_one_above_does_not():
    selection = guidance.select(np.array([0.25, 0.26]), np.ones(2, bool), having(capacity=1.0), shards=1)
    assert slots(selection) == [[0]]


def test_each_shard_selects_within_itself():
    pass_rate = np.array([0.1, 0.0, 0.2, 0.25, 1.0, 1.0, 0.25, 1.0])
    selection = guidance.select(pass_rate, np.ones(8, bool), BASE, shards=2)
    assert selection.index.shape == (2, 2)
    assert slots(selection) == [[1, 0], [2]]  # the second shard has one failing group, and an empty slot


def test_groups_to_which_nothing_can_be_revealed_are_told_and_take_no_slot():
    guidable = np.array([False, True, False, True])
    selection = guidance.select(np.array([0.0, 0.2, 1.0, 1.0]), guidable, BASE, shards=1)
    assert slots(selection) == [[1]]
    np.testing.assert_array_equal(selection.unguidable, [True, False, False, False])


# ---------------------------------------------------------------------------------------------- how much


@pytest.fixture(scope="module")
def batch(small):
    """Rows 0 to 3 (families 0, 1, 0, 1): all known; brand unknown; only the tier known; all known."""
    return small.batch([(0, 0), (1, UNKNOWN), (UNKNOWN, UNKNOWN), (2, 1)], tiers=[0, 1, 1, 2])


def memory(level=(1.0,), offset=(0, 0, 0, 0), seen=(UNKNOWN,) * 4) -> GuidanceState:
    return GuidanceState(jnp.array(level, jnp.float32), jnp.array(offset, jnp.int8), jnp.array(seen, jnp.int8))


@pytest.mark.parametrize(
    ("state", "progress", "changes", "expected"),
    [
        (memory([1.0]), 0.0, {}, [1, 1, 1, 1]),
        (memory([1.0], (1, 0, -1, -2)), 0.0, {}, [2, 1, 0, 0]),  # between 0 and the 2 steps; never the tier
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
    assert found.dtype == jnp.int32 and found.shape == (4,)
    np.testing.assert_array_equal(found, expected)


def test_the_first_state(batch):
    state = guidance.initial_state(5, 3, BASE)
    np.testing.assert_array_equal(state.level, [1.5])
    np.testing.assert_array_equal(state.offset, [0] * 5)
    np.testing.assert_array_equal(state.memory, [UNKNOWN] * 5)
    assert state.own is None
    own = guidance.initial_state(5, 3, having(source="own"), 6, 3).own
    assert own.tokens.shape == (5, 6) and own.part_end.shape == (5, 3) and not own.part_end.any()
    assert guidance.initial_state(5, 3, having(per_family=True)).level.shape == (3,)


def revealed(batch, level, own=None, order=(0, 1, 2)):
    """The tokens revealed to each group, or None if it cannot be guided."""
    seen = guidance.reveal(batch, jnp.array(level), own, order)
    return [
        row[:length].tolist() if most else None
        for row, length, most in zip(*map(np.asarray, (seen.tokens, seen.length, seen.most)), strict=True)
    ]


def test_gold_is_revealed_part_by_part_as_far_as_it_is_known(batch):
    # F:yes 0, F:part 1, F:no 2, B:ok 3, B:off 4
    assert revealed(batch, [0, 0, 0, 0]) == [[], [], None, []]
    assert revealed(batch, [1, 1, 1, 1]) == [[0], [1], None, [2]]
    assert revealed(batch, [2, 2, 2, 2]) == [[0, 3], [1], None, [2, 4]]


def test_the_tier_is_never_revealed_where_it_comes_last(batch):
    assert revealed(batch, [3, 3, 3, 3]) == [[0, 3], [1], None, [2, 4]]


def test_what_is_asked_for_and_what_is_shown_are_told_apart(batch):
    seen = guidance.reveal(batch, jnp.array([0, 2, 2, 1]), None, (0, 1, 2))
    np.testing.assert_array_equal(seen.asked, [0, 2, 2, 1])
    np.testing.assert_array_equal(seen.most, [2, 1, 0, 2])
    np.testing.assert_array_equal(seen.shown, [0, 1, 0, 1])
    assert not seen.gives_tier.any()
    tier_first = guidance.reveal(batch, jnp.array([0, 1, 2, 2]), None, (2, 0, 1))
    np.testing.assert_array_equal(tier_first.gives_tier, [False, True, False, True])


# Two answers of each group. In the second, 8 and 9 are free text, 2 is F:no, 4 is B:off, 7 the tier and 11 the end.
OWN = np.array([[[0, 3, 5, 11, 11, 11], [8, 2, 9, 4, 7, 11]]] * 4, np.int32)
ENDS = np.array([[[0, 1, 2], [1, 3, 4]]] * 4, np.int32)  # where fit, brand and tier were complete
NOTHING = OwnAnswers(jnp.zeros((4, 6), jnp.int32), jnp.zeros((4, 3), jnp.int32))


def remembered(batch, right, own=NOTHING, order=(0, 1, 2), position=ENDS) -> OwnAnswers:
    """What is remembered if these answers are `right`: [2], or [4, 2]."""
    blank = np.ones(OWN.shape, bool)
    rolled = Rollout(OWN, np.zeros(OWN.shape, np.float32), blank, blank, blank[..., 0])
    reading = Reading(value=position, count=position, position=position, well_formed=blank[..., 0])
    return guidance.remember(own, batch, rolled, reading, np.broadcast_to(np.array(right), (4, 2)), order)


def test_own_answers_are_revealed_where_gold_is_not_known_that_far(batch):
    own = remembered(batch, (False, True))
    # Gold, where enough of it is known. Otherwise the right answer to the end of its first parts, with its free text.
    assert revealed(batch, [0, 0, 0, 0], own) == [[], [], [], []]
    assert revealed(batch, [1, 1, 1, 1], own) == [[0], [1], [8, 2], [2]]
    assert revealed(batch, [2, 2, 2, 2], own) == [[0, 3], [8, 2, 9, 4], [8, 2, 9, 4], [2, 4]]
    assert revealed(batch, [1, 1, 1, 1], remembered(batch, (True, True)))[2] == [0]  # the first of the right answers
    assert revealed(batch, [2, 2, 2, 2], remembered(batch, (False, False))) == [[0, 3], [1], None, [2, 4]]


def test_a_row_that_fails_is_shown_what_it_once_said(batch):
    """Row 2, of which no step is known, had a right answer when it was first met, and has none now."""
    first = remembered(batch, [[False, False], [False, False], [False, True], [False, False]])
    assert revealed(batch, [2] * 4, first) == [[0, 3], [1], [8, 2, 9, 4], [2, 4]]
    later = remembered(batch, (False, False), first)
    assert revealed(batch, [2] * 4, later) == revealed(batch, [2] * 4, first)
    newer = remembered(batch, (True, False), later)
    assert revealed(batch, [2] * 4, newer)[2] == [0, 3]  # the latest one
    other = jax.tree.map(lambda x: x[[2, 3, 0, 1]], batch)  # found by row, at any place in the batch
    assert revealed(other, [2] * 4, first)[0] == [8, 2, 9, 4]


def test_own_answers_in_another_order_of_parts(batch):
    """respond_then_think: the first part is the tier; `position` of part R says where it is complete."""
    order, nothing_known = (2, 0, 1), dataclasses.replace(batch, known_parts=np.zeros(4, np.int32))
    own = remembered(nothing_known, (False, True), order=order, position=ENDS[..., [1, 2, 0]])
    assert revealed(nothing_known, [1, 1, 1, 1], own, order) == [[8, 2]] * 4
    assert revealed(nothing_known, [2, 2, 2, 2], own, order) == [[8, 2, 9, 4]] * 4


# ---------------------------------------------------------------------------------------- what is remembered


def seen(shown=1, asked=None, most=2, gives_tier=False) -> Revelation:
    """What was revealed to four groups (one value for all, or one each); by default, what was asked for."""
    shown, asked, most, gives_tier = (
        jnp.broadcast_to(jnp.array(x), 4) for x in (shown, shown if asked is None else asked, most, gives_tier)
    )
    return Revelation(jnp.zeros((4, 6), jnp.int32), shown, asked, most, shown, gives_tier)


def updated(batch, state, plain_pass, guided, guided_pass, what=None, **changes) -> GuidanceState:
    plain_pass, guided_pass = np.array(plain_pass, np.float32), np.array(guided_pass, np.float32)
    return guidance.update(state, batch, plain_pass, np.array(guided), guided_pass, what or seen(), having(**changes))


def test_the_level_moves_towards_a_pass_rate_of_one_half(batch):
    def level(guided, guided_pass, start=1.0, **changes):
        return float(updated(batch, memory([start]), [0] * 4, guided, guided_pass, **changes).level[0])

    some = [True, True, False, False]
    assert np.isclose(level(some, [0.0, 0.0, 9, 9]), 1 + 0.4 * 0.5)  # all fail: reveal more
    assert np.isclose(level(some, [1.0, 1.0, 9, 9]), 1 - 0.4 * 0.5)
    assert np.isclose(level(some, [0.75, 0.5, 9, 9]), 1 + 0.4 * (0.5 - 0.625))
    assert level([False] * 4, [9.0] * 4) == 1.0  # no group was guided
    assert level(some, [0.0, 0.0, 9, 9], start=1.9) == 2.0  # not beyond the steps
    assert level(some, [1.0, 1.0, 9, 9], start=0.1) == 0.0
    assert level(some, [0.0, 0.0, 9, 9], level="fixed") == 1.0


def test_the_level_does_not_wind_up_beyond_what_can_be_shown(batch):
    def level(start, guided, guided_pass, what):
        return float(updated(batch, memory([start]), [0] * 4, guided, guided_pass, what).level[0])

    everyone, failing = [True] * 4, [0.0] * 4
    tier_only = seen(shown=1, asked=2, most=1)
    assert level(2.0, everyone, failing, tier_only) == 1.0  # no row could be shown more than one part
    assert np.isclose(level(2.0, everyone, [1.0] * 4, tier_only), 1.0)
    assert level(1.0, everyone, failing, seen(shown=1, most=1)) == 1.0  # it fails, and no more can be shown
    # One of the two rows could be shown two parts. It alone can ask for more, and it passes.
    mixed = seen(shown=[1, 2, 1, 1], asked=2, most=[1, 2, 1, 1])
    assert np.isclose(level(1.8, [True, True, False, False], [0.0, 0.75, 9, 9], mixed), 1.8 - 0.4 * 0.25 / 2)
    # Rows that were not guided do not hold the level down.
    assert level(2.0, [False, True, False, False], [9, 0.5, 9, 9], mixed) == 2.0


def test_each_family_has_its_own_level(batch):
    guided, passes = [True, False, True, True], [0.0, 9.0, 1.0, 1.0]
    after = updated(batch, memory([1.0, 0.5]), [0] * 4, guided, passes, per_family=True)
    np.testing.assert_allclose(after.level, [1.0, 0.5 - 0.2])  # rows 0 and 2 balance; row 3 alone
    limited = seen(shown=1, asked=2, most=[1, 2, 1, 2])  # family 0 can be shown one part, family 1 two
    after = updated(batch, memory([2.0, 2.0]), [0] * 4, [True] * 4, [0.5] * 4, limited, per_family=True)
    np.testing.assert_allclose(after.level, [1.0, 2.0])


def test_offsets_and_memory_by_hand(batch):
    state = memory(offset=(0, 2, -2, 1, 5), seen=(UNKNOWN, 30, 50, UNKNOWN, 77))  # row 4 is not in this batch
    guided = [True, True, False, False]
    guided_pass, plain_pass = [0.25, 0.26, 0.0, 0.0], [0.0, 0.0, 0.26, 0.25]
    after = updated(batch, state, plain_pass, guided, guided_pass)
    # Fails under guidance: up. Passes under guidance: stays. Passes unguided: down to -2. Fails unguided: stays.
    np.testing.assert_array_equal(after.offset, [1, 2, -2, 1, 5])
    np.testing.assert_array_equal(after.memory, [25, 26, UNKNOWN, UNKNOWN, 77])
    assert after.offset.dtype == after.memory.dtype == jnp.int8
    bounded = updated(batch, memory(offset=(2, 2, 2, 2)), plain_pass, guided, guided_pass)
    np.testing.assert_array_equal(bounded.offset, [2, 2, 1, 2])  # nor above 2
    at_the_end = updated(batch, state, plain_pass, guided, guided_pass, seen(shown=1, most=[1, 2, 2, 2]))
    np.testing.assert_array_equal(at_the_end.offset, [0, 2, -2, 1, 5])  # row 0 was shown all that can be shown


def test_a_pass_by_steps_is_not_kept_to_be_compared_with_a_pass_by_tier(batch):
    given = seen(gives_tier=[True, False, False, False])
    after = updated(batch, memory(), [0] * 4, [True, True, False, False], [0.75, 0.5, 9, 9], given)
    np.testing.assert_array_equal(after.memory, [UNKNOWN, 50, UNKNOWN, UNKNOWN])


def test_the_transfer_gap_is_over_rows_met_again(batch):
    state = memory(seen=(75, UNKNOWN, 0, UNKNOWN))
    gap, number = guidance.transfer_gap(state, batch, np.array([0.25, 1.0, 0.5, 0.0], np.float32))
    assert number == 2 and np.isclose(gap, ((0.75 - 0.25) + (0.0 - 0.5)) / 2)
    gap, number = guidance.transfer_gap(memory(), batch, np.ones(4, np.float32))
    assert number == 0 and np.isnan(gap)  # a log has null there


# ------------------------------------------------------------------------------------- gather and merge


@st.composite
def selections(draw) -> Selection:
    """Selections over 2 shards of 5 groups with 3 slots, as `select` makes them: the indices of a shard differ."""
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
    """One of two groups is guided. The second and third of its four answers pass, and two answers are replaced."""

    def rollout(values):
        values = np.array(values)
        tokens = np.broadcast_to(values[..., None], (*values.shape, 3)).astype(np.int32)
        return Rollout(tokens, tokens * 0.5, tokens > 0, tokens > 0, values > 0)

    selection = Selection(jnp.array([[1, 0]]), jnp.array([[True, False]]), jnp.zeros(2, bool))
    passed = np.array([[False] * 4, [False, True, True, False]])
    before, again = rollout([[1, 2, 3, 4], [5, 6, 7, 8]]), rollout([[-1, -2], [-3, -4]])
    merged = guidance.replace_answers(before, again, passed, selection)
    expected = rollout([[1, 2, 3, 4], [-1, 6, 7, -2]])  # the unused slot is dropped
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    # With one failing answer only, the first of the passing ones goes as well.
    merged = guidance.replace_answers(before, again, np.array([[False] * 4, [True, True, False, True]]), selection)
    np.testing.assert_array_equal(merged.tokens[1, :, 0], [-2, 6, -1, 8])
