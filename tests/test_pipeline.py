"""From pairs to batches: what is cut, what is counted, and the order of batches."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrl_jax.data import pipeline
from agrl_jax.data.pairs import Pair, PairsError, item_text
from agrl_jax.policy.tokenizer import Tokenizer, train_bpe
from agrl_jax.rulebook import book, wording
from agrl_jax.types import Batch

BOOK = book.load()
PAIR = Pair(id="p1", query="red shoes", title="Acme red running shoes", brand="Acme", tier=0, steps=(0, 2, 0, 3))
GOLD = "Category: same\nBrand: not asked\nAttributes: met\nLimits: none asked\nTier: 4-Excellent"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([wording.prompt(BOOK, PAIR.query, item_text(PAIR)), GOLD] * 5, 400)


def encode(tokenizer: Tokenizer, pairs: list[Pair], prompt_len=64, response_len=64, rules=BOOK, **options):
    return pipeline.encode(pairs, rules, tokenizer, prompt_len, response_len, **options)


def many(count: int, **fields) -> list[Pair]:
    return [dataclasses.replace(PAIR, id=str(i), query=f"query {i}", **fields) for i in range(count)]


def text_of(tokenizer: Tokenizer, batch: Batch, row: int = 0) -> str:
    return tokenizer.decode(batch.prompt[row, : batch.prompt_len[row]])


class TestPrompts:
    @pytest.mark.parametrize("style", ["terse", "full"])
    def test_the_tokens_spell_the_prompt(self, tokenizer, style):
        batch = encode(tokenizer, [PAIR], prompt_len=4000, style=style).batch
        head = tokenizer.decode(pipeline.instructions(BOOK, tokenizer, style))
        assert head + text_of(tokenizer, batch) == wording.prompt(BOOK, PAIR.query, item_text(PAIR), style)
        assert not batch.prompt[0, batch.prompt_len[0] :].any()

    def test_instructions_are_what_all_prompts_begin_with_if_it_is_worth_it(self, tokenizer):
        assert not len(pipeline.instructions(BOOK, tokenizer, "terse"))
        head = pipeline.instructions(BOOK, tokenizer, "full")
        assert head.dtype == np.int32 and tokenizer.decode(head) == wording.prompt_pieces(BOOK, "full")[0].rstrip(" ")
        batch = encode(tokenizer, [PAIR], style="full").batch  # the limit is for the tokens after them
        assert text_of(tokenizer, batch).startswith(" red shoes\n")

    def test_a_space_goes_with_the_word_after_it(self, tokenizer):
        batch = encode(tokenizer, [PAIR]).batch
        pieces = [tokenizer.decode([token]) for token in batch.prompt[0, : batch.prompt_len[0]]]
        assert " red" in pieces and " Acme" in pieces and " " not in pieces

    def test_shortening_cuts_the_end_of_the_item_alone(self, tokenizer):
        whole = encode(tokenizer, [PAIR])
        assert whole.shortened == 0
        limit = int(whole.batch.prompt_len[0])
        assert encode(tokenizer, [PAIR], prompt_len=limit).shortened == 0
        cut = encode(tokenizer, [PAIR, dataclasses.replace(PAIR, title="shoe", brand="")], prompt_len=limit - 1)
        assert cut.shortened == 1
        assert cut.batch.prompt_len[0] == limit - 1
        expected = [*whole.batch.prompt[0, : limit - 2], whole.batch.prompt[0, limit - 1]]  # no last item token
        np.testing.assert_array_equal(cut.batch.prompt[0], expected)

    def test_query_and_rules_over_the_limit(self, tokenizer):
        bare = len(tokenizer.encode("Query:")) + len(tokenizer.encode(" red shoes\nItem:")) + 1
        assert encode(tokenizer, [PAIR], prompt_len=bare + 1).shortened == 1
        with pytest.raises(PairsError, match=f"prompt_len={bare} tokens or.*\n  pair p1: {bare} tokens: 'red shoes'"):
            encode(tokenizer, [PAIR], prompt_len=bare)

    def test_all_pairs_without_room_are_listed_by_the_numbers_of_their_file(self, tokenizer):
        limit = 4001 - next(pipeline.prompts([PAIR], BOOK, tokenizer, 4000, "terse")).room
        long = dataclasses.replace(PAIR, query="red shoes " * 40)
        rows = [dataclasses.replace(long if row % 2 else PAIR, row=row) for row in range(31, 61)]
        with pytest.raises(PairsError) as error:
            encode(tokenizer, rows, prompt_len=limit)
        first, *lines = str(error.value).split("\n  ")
        assert first.startswith(f"15 pairs whose query and fixed text take prompt_len={limit} tokens or more")
        assert [line.split(":")[0] for line in lines[:-1]] == [f"row {row}" for row in range(31, 51, 2)]
        assert lines[-1].startswith("and row 51, row 53, row 55, row 57, row 59, of up to ")

    def test_a_title_cannot_forge_the_end_token(self, tokenizer):
        batch = encode(tokenizer, [dataclasses.replace(PAIR, title="shoe<|end|>", query="<|end|>")]).batch
        assert tokenizer.end_token not in batch.prompt[0, : batch.prompt_len[0]]

    def test_the_bos_token_comes_first(self, tokenizer):
        with_bos = Tokenizer(tokenizer._text, tokenizer.end_token, bos_token=5)
        plain, batch = encode(tokenizer, [PAIR]).batch, encode(with_bos, [PAIR]).batch
        np.testing.assert_array_equal(batch.prompt[0], [5, *plain.prompt[0, :-1]])
        assert batch.prompt_len[0] == plain.prompt_len[0] + 1


class TestGold:
    def test_a_whole_response(self, tokenizer):
        batch = encode(tokenizer, [PAIR]).batch
        tokens = batch.gold[0, : batch.gold_len[0]].tolist()
        assert tokens[-1] == tokenizer.end_token
        assert tokenizer.decode(tokens) == GOLD
        lines = [GOLD[: GOLD.index(f"\n{word}")] for word in ("Brand", "Attributes", "Limits", "Tier")] + [GOLD]
        assert [tokenizer.decode(tokens[:end]) for end in batch.part_end[0]] == lines
        assert batch.part_end[0, -1] == batch.gold_len[0] - 1
        assert batch.known_parts[0] == 5

    def test_it_stops_before_the_first_unknown_part(self, tokenizer):
        batch = encode(tokenizer, [dataclasses.replace(PAIR, steps=(0, 2, -1, 3))]).batch
        assert tokenizer.decode(batch.gold[0, : batch.gold_len[0]]) == "Category: same\nBrand: not asked"
        assert batch.known_parts[0] == 2
        end = batch.gold_len[0]
        assert batch.part_end[0, 0] < end
        np.testing.assert_array_equal(batch.part_end[0, 1:], [end] * 4)
        np.testing.assert_array_equal(batch.steps[0], [0, 2, -1, 3])

    def test_nothing_is_known_but_the_tier(self, tokenizer):
        for order, text, known in [("think_then_respond", "", 0), ("respond_then_think", "Tier: 3-Related", 1)]:
            pair = dataclasses.replace(PAIR, tier=1, steps=())
            batch = encode(tokenizer, [pair], rules=book.load(order=order)).batch
            assert tokenizer.decode(batch.gold[0, : batch.gold_len[0]]) == text
            assert batch.known_parts[0] == known
            assert (batch.part_end[0] == batch.gold_len[0]).all()
            np.testing.assert_array_equal(batch.steps[0], [-1] * 4)

    def test_each_pair_has_its_own(self, tokenizer):
        other = dataclasses.replace(PAIR, tier=3, steps=(3, -1, -1, -1))
        batch = encode(tokenizer, [PAIR, other, PAIR]).batch
        texts = [tokenizer.decode(gold[:length]) for gold, length in zip(batch.gold, batch.gold_len, strict=True)]
        assert texts == [GOLD, "Category: different", GOLD]
        assert batch.known_parts.tolist() == [5, 1, 5]

    def test_the_needed_length_is_named(self, tokenizer):
        needed = int(encode(tokenizer, [PAIR]).batch.gold_len[0])
        assert encode(tokenizer, [PAIR], response_len=needed).batch.gold.shape == (1, needed)
        with pytest.raises(PairsError, match=f"has {needed} tokens: response_len={needed - 1}"):
            encode(tokenizer, [PAIR], response_len=needed - 1)


class TestEncoded:
    def test_rows_types_and_families(self, tokenizer):
        pairs = [dataclasses.replace(PAIR, tier=3, steps=(3, 2, 0, 3), family="price"), *many(3, family="brand")]
        encoded = encode(tokenizer, pairs)
        assert len(encoded) == 4
        assert encoded.families == ("brand", "price")
        np.testing.assert_array_equal(encoded.batch.family, [1, 0, 0, 0])
        np.testing.assert_array_equal(encoded.batch.tier, [3, 0, 0, 0])
        np.testing.assert_array_equal(encoded.batch.row, [0, 1, 2, 3])
        assert {leaf.dtype for leaf in jax.tree.leaves(encoded.batch)} == {np.dtype(np.int32)}
        taken = encoded.take(np.array([2, 0]))
        np.testing.assert_array_equal(taken.row, [2, 0])
        np.testing.assert_array_equal(taken.prompt, encoded.batch.prompt[[2, 0]])

    def test_given_families(self, tokenizer):
        encoded = encode(tokenizer, many(1, family="price"), families=("plain", "price"))
        assert encoded.batch.family.tolist() == [1]
        with pytest.raises(PairsError, match="unknown family 'brand'; it should be one of: plain, price"):
            encode(tokenizer, many(1, family="brand"), families=("plain", "price"))

    def test_refusals(self, tokenizer):
        with pytest.raises(PairsError, match="no pairs"):
            encode(tokenizer, [])
        with pytest.raises(PairsError, match="pair p1: has 2 steps where the rule book has 4"):
            encode(tokenizer, [dataclasses.replace(PAIR, steps=(0, 1))])

    def test_chunks_join_in_order(self, tokenizer, monkeypatch):
        whole = encode(tokenizer, many(10))
        monkeypatch.setattr(pipeline, "_CHUNK", 3)
        jax.tree.map(np.testing.assert_array_equal, encode(tokenizer, many(10)).batch, whole.batch)


def rows(encoded: pipeline.EncodedSplit, count: int, *args, **options) -> np.ndarray:
    return np.array([batch.row for batch in itertools.islice(pipeline.batches(encoded, *args, **options), count)])


@pytest.fixture(scope="module")
def encoded(tokenizer) -> pipeline.EncodedSplit:
    return encode(tokenizer, many(23))


class TestBatches:
    def test_an_epoch_has_no_row_twice_and_the_next_another_order(self, encoded):
        order = rows(encoded, 15, 4, seed=1).reshape(3, 20)  # 5 batches of 4 from 23 rows; 3 are left out
        assert all(len(set(epoch)) == 20 for epoch in order.tolist())
        assert not (order[0] == order[1]).all() and not (order[1] == order[2]).all()
        assert set(range(23)) - set(order[0].tolist()) != set(range(23)) - set(order[1].tolist())

    def test_the_seed_alone_decides(self, encoded):
        np.testing.assert_array_equal(rows(encoded, 9, 4, seed=1), rows(encoded, 9, 4, seed=1))
        assert not (rows(encoded, 9, 4, seed=1) == rows(encoded, 9, 4, seed=2)).all()

    @settings(max_examples=10, deadline=None)
    @given(st.integers(1, 23), st.integers(0, 20), st.integers(0, 9))
    def test_resuming_goes_on_as_if_never_stopped(self, encoded, batch_size, start, seed):
        whole = rows(encoded, start + 3, batch_size, seed=seed)
        np.testing.assert_array_equal(rows(encoded, 3, batch_size, seed=seed, start=start), whole[start:])
        assert all(len(set(batch)) == batch_size for batch in whole.tolist())

    @settings(max_examples=10, deadline=None)
    @given(st.integers(1, 23), st.integers(0, 40))
    def test_rows_of_like_length_share_a_batch_that_is_as_wide_as_they_are(self, encoded, batch_size, start):
        per_epoch = 23 // batch_size
        found = list(itertools.islice(pipeline.batches(encoded, batch_size, seed=1, by_length=True), 3 * per_epoch))
        taken = np.array([batch.row for batch in found])
        for epoch, plain in enumerate(np.split(rows(encoded, 3 * per_epoch, batch_size, seed=1), 3)):
            mine = taken[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert sorted(mine.ravel()) == sorted(plain.ravel())  # the same rows in other batches, each once an epoch
        for batch in found:
            longest = batch.prompt_len.max()
            assert batch.prompt.shape[1] % 8 == 0 and longest <= batch.prompt.shape[1] < longest + 8
        start = min(start, len(found) - 1)
        resumed = next(pipeline.batches(encoded, batch_size, seed=1, start=start, by_length=True))
        np.testing.assert_array_equal(resumed.row, taken[start])

    def test_refusals(self, encoded):
        with pytest.raises(ValueError, match="batch_size=24 should be from 1 to 23"):
            pipeline.batches(encoded, 24, seed=0)


class TestEvalBatches:
    @given(st.integers(1, 9))
    def test_each_row_once_in_order(self, tokenizer, batch_size):
        found = list(pipeline.eval_batches(encode(tokenizer, many(7)), batch_size))
        assert all(batch.row.shape == mask.shape == (batch_size,) for batch, mask in found)
        assert np.concatenate([batch.row[mask] for batch, mask in found]).tolist() == list(range(7))

    def test_chosen_rows(self, tokenizer):
        (batch, mask), = pipeline.eval_batches(encode(tokenizer, many(7)), 4, np.array([5, 1, 6]))
        assert batch.row.tolist() == [5, 1, 6, 6]
        assert mask.tolist() == [True, True, True, False]


@pytest.fixture(scope="module")
def strata(tokenizer) -> pipeline.EncodedSplit:
    """60 brand pairs of tier 0, 30 price pairs of tier 0, 10 price pairs of tier 1."""
    pairs = [*many(60, family="brand"), *many(30, family="price"), *many(10, family="price", tier=1, steps=())]
    return encode(tokenizer, pairs)


class TestStratified:
    def test_shares_are_kept(self, strata):
        chosen = pipeline.stratified(strata, 20, seed=0)
        assert len(set(chosen.tolist())) == 20
        assert [int(((chosen >= a) & (chosen < b)).sum()) for a, b in [(0, 60), (60, 90), (90, 100)]] == [12, 6, 2]

    @given(st.integers(1, 100), st.integers(0, 99))
    def test_every_share_is_exact_to_within_one(self, strata, count, seed):
        chosen = pipeline.stratified(strata, count, seed)
        assert len(set(chosen.tolist())) == count
        assert (np.diff(chosen) > 0).all()
        for a, b in [(0, 60), (60, 90), (90, 100)]:
            assert abs(((chosen >= a) & (chosen < b)).sum() - count * (b - a) / 100) < 1

    def test_repeatable_and_all_where_there_are_fewer(self, strata):
        np.testing.assert_array_equal(pipeline.stratified(strata, 30, 5), pipeline.stratified(strata, 30, 5))
        assert not np.array_equal(pipeline.stratified(strata, 30, 5), pipeline.stratified(strata, 30, 6))
        for count in (0, 500):
            np.testing.assert_array_equal(pipeline.stratified(strata, count, 5), np.arange(100))
