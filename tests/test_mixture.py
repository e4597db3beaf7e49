"""The mixture that the judge in the box is trained on: bundled pairs in other spellings, and real ones."""

from __future__ import annotations

import collections
import dataclasses

import pytest

from agrl_jax.data.bundled.dice import Dice
from agrl_jax.data.disguise import disguise, typed
from agrl_jax.data.mixture import MixtureConfig, mix, strangers
from agrl_jax.data.pairs import Pair, PairsError
from agrl_jax.rulebook import book

RULES = book.load()
BUNDLED = [
    Pair(f"b{i}", f"red kettle {i}", f"steel kettle {i} - red", brand="Maveck", price="$12.99", tier=i % 4,
         steps=(0, 0, 0, 0), family="plain")
    for i in range(80)
]  # fmt: skip
REAL = [
    Pair(f"r{i}", f"query{i} word{i}", f"Title{i} of Things", tier=i % 2, steps=RULES.implied(i % 2)) for i in range(9)
]
CFG = MixtureConfig(rows=100, real=0.3, strangers=0.1, disguised=0.5)


def test_the_shares_are_as_asked_and_each_tier_has_as_many_bundled_pairs():
    pairs = mix(BUNDLED, REAL, RULES, CFG, seed=0)
    real = [pair for pair in pairs if pair.id.startswith("r")]
    assert (len(pairs), len(real)) == (100, 40)
    assert collections.Counter(pair.tier for pair in pairs if pair not in real) == dict.fromkeys(range(4), 15)
    assert collections.Counter(pair.tier for pair in real) == {0: 16, 1: 14, 3: 10}  # tier 3 has the strangers
    texts = {(pair.query, pair.title) for pair in BUNDLED}
    disguised = [pair for pair in pairs if pair not in real and (pair.query, pair.title) not in texts]
    assert 20 <= len(disguised) <= 40  # half of 60


def test_a_disguise_is_one_of_many():
    found = [disguise(BUNDLED[0], i) for i in range(300)]
    assert len({pair.title for pair in found}) > 100 and len({pair.query for pair in found}) > 5
    assert {pair.brand for pair in found} == {"Maveck", ""} and len({pair.price for pair in found}) > 3


def test_the_same_for_the_same_seed_and_another_for_another():
    assert mix(BUNDLED, REAL, RULES, CFG, 0) == mix(BUNDLED, REAL, RULES, CFG, 0) != mix(BUNDLED, REAL, RULES, CFG, 1)


def test_strangers_share_no_word_and_are_of_the_worst_tier():
    real = [Pair("1", "red shoes", "Red Shoe", tier=0), Pair("2", "blue hat", "Hat", tier=0),
            Pair("3", "shoes for a hat", "Thing", tier=1)]  # fmt: skip
    for pair in strangers(real, 20, RULES, seed=0):
        assert (pair.query.casefold()[:4], pair.title.casefold()) in {("red ", "hat"), ("blue", "red shoe")}
        assert pair.tier == 3 and pair.steps == RULES.implied(3)


def test_pairs_that_all_share_a_word_make_no_strangers():
    with pytest.raises(PairsError, match="too few share no word"):
        strangers([dataclasses.replace(pair, query="same words") for pair in REAL], 5, RULES, seed=0)


def test_without_pairs_there_is_no_mixture():
    with pytest.raises(PairsError, match="real pairs, and bundled ones"):
        mix(BUNDLED, [], RULES, CFG, seed=0)


def test_a_disguise_keeps_what_the_pair_says():
    for i in range(300):
        pair = disguise(BUNDLED[0], i)
        text = f"{pair.title} {pair.brand}".casefold()
        assert "maveck" in text and "kettle" in text and "red" in text and "steel" in text
        assert "12.99" in pair.price
        assert (pair.tier, pair.steps, pair.family) == (BUNDLED[0].tier, BUNDLED[0].steps, "plain")


def test_a_slip_changes_one_word_and_a_limit_keeps_its_sum():
    text = "waterproof hiking boots women"
    slips = [zip(typed(text, Dice(i)).casefold().split(), text.split(), strict=True) for i in range(300)]
    assert {sum(one != other for one, other in words) for words in slips} == {0, 1}
    for i in range(300):
        words = typed("waterproof boots under $50", Dice(i)).casefold().split()
        assert len(words) == 4 and words[2:] == ["under", "$50"] or words[2] != "under" and words[3] == "$50"
        assert "50" in disguise(Pair("1", "boots under $50", "boots"), i).query
