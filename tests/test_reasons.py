"""Reasons in words before the verdicts: where they are written, what is refused, and what is learnt of them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import END, RESPONSE_LEN
from hypothesis import given
from hypothesis import strategies as st
from test_fill import TEXTS, fill

from agrl_jax.data import pipeline
from agrl_jax.data.format import PairsFormat
from agrl_jax.data.pairs import Pair, PairsError, digest, hide_steps, read_labelled, read_pairs
from agrl_jax.policy.scoring import predicting_hidden, prefill
from agrl_jax.policy.tokenizer import Tokenizer, train_bpe
from agrl_jax.rl import guidance
from agrl_jax.rulebook import book, wording
from agrl_jax.rulebook.schema import RuleBook
from agrl_jax.supervised import sft
from agrl_jax.supervised.fill import Blanks
from agrl_jax.supervised.marginal import forks
from agrl_jax.types import UNKNOWN


def with_text(rules: RuleBook, **response: str) -> RuleBook:
    return dataclasses.replace(
        rules, response=dataclasses.replace(rules.response, free_text="between", **response)
    )


CLOSED, BOOK = book.load(), with_text(book.load())
REASONS = ("shoes asked, shoes sold", "no brand is named", "asked: red; item: red", "", "all that was asked is there")
PAIR = Pair("p1", query="red shoes", title="Acme red running shoes", tier=0, steps=(0, 2, 0, 3), reasons=REASONS)
GOLD = (
    "shoes asked, shoes sold\nCategory: same\nno brand is named\nBrand: not asked\nasked: red; item: red\n"
    "Attributes: met\nLimits: none asked\nall that was asked is there\nTier: 4-Excellent"
)
BARE = "Category: same\nBrand: not asked\nAttributes: met\nLimits: none asked\nTier: 4-Excellent"


# In words


def test_a_reason_stands_before_its_verdict():
    assert "".join(wording.gold_segments(BOOK, 0, PAIR.steps, REASONS)) == GOLD
    assert wording.well_formed(BOOK, GOLD)
    assert wording.read(BOOK, GOLD) == wording.read(BOOK, BARE)
    assert wording.statements(BOOK, GOLD) == BARE.split("\n")
    cut = wording.gold_segments(BOOK, 0, (0, UNKNOWN, 0, 3), REASONS)
    assert cut == ["shoes asked, shoes sold\nCategory: same"]


def test_without_free_text_there_is_no_room_for_reasons():
    assert "".join(wording.gold_segments(CLOSED, 0, PAIR.steps, REASONS)) == BARE
    assert wording.misread_reason(CLOSED, 1, 2, "Brand: match") is None


def test_the_tier_first_with_its_reason():
    first = with_text(book.load(order="respond_then_think"))
    segments = wording.gold_segments(first, 0, PAIR.steps, REASONS)
    assert segments[:2] == [
        "all that was asked is there\nTier: 4-Excellent", "\nshoes asked, shoes sold\nCategory: same"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "value", "reason", "heard"),
    [
        (1, 2, "none; Brand: match it is not", "Brand: match"),
        (1, 2, "Brand: not asked", "Brand: not asked"),
        (0, 0, "so Tier: 4-Excellent", "Tier: 4-Excellent"),
        (1, 2, "brand: match, Brand : match, Brand: matc", None),
        (4, 0, "Limits: none ask", None),
    ],
)
def test_a_reason_that_spells_a_phrase(part: int, value: int, reason: str, heard: str | None):
    assert wording.misread_reason(BOOK, part, value, reason) == heard


TIGHT = with_text(CLOSED, separator="", phrase="{part}{value}", tier="T")


def test_a_phrase_may_also_arise_where_a_reason_meets_the_text_around_it():
    # "Brandmatch" ends in "h", with which the label of the next step begins.
    step = dataclasses.replace(CLOSED.steps[2], label="hue ")
    rules = dataclasses.replace(TIGHT, steps=(*CLOSED.steps[:2], step, CLOSED.steps[3]))
    assert wording.misread_reason(rules, 2, 0, "ue metal ") == "hue met"  # after "Brandmatch"
    assert wording.misread_reason(rules, 2, 0, "ue is not said ") is None
    assert wording.misread_reason(rules, 1, 0, "ue metal ") is None  # not after "Categorysame"


def reasons_like_phrases(rules: RuleBook) -> st.SearchStrategy[list[str]]:
    """Reasons of phrases, of pieces of them, and of what stands between them."""
    phrases = st.sampled_from([phrase.text for phrase in rules.phrases])
    cut = st.builds(lambda text, start, size: text[start:][:size], phrases, st.integers(0, 9), st.integers(1, 12))
    reason = st.lists(st.one_of(phrases, cut, st.sampled_from([" ", "\n", ", "])), max_size=3).map("".join)
    return st.lists(reason, min_size=5, max_size=5)


@pytest.mark.parametrize("rules", [BOOK, TIGHT], ids=["book", "tight"])
@given(st.data())
def test_reasons_that_are_let_through_leave_the_response_as_it_is_read(rules: RuleBook, data: st.DataObject):
    values, reasons = (*PAIR.steps, PAIR.tier), data.draw(reasons_like_phrases(rules))
    kept = [
        "" if wording.misread_reason(rules, part, values[part], reason) else reason
        for part, reason in enumerate(reasons)
    ]
    text = "".join(wording.gold_segments(rules, PAIR.tier, PAIR.steps, kept))
    assert wording.well_formed(rules, text)
    assert wording.read(rules, text).value == values


# In files

HEADER = "query,title,label,step_category,step_brand,reason_category,reason_brand,reason\n"


def read(tmp_path: Path, text: str, rules: RuleBook = BOOK, **form) -> list[Pair]:
    path = tmp_path / "pairs.csv"
    path.write_text(text, encoding="utf-8")
    return read_labelled(path, rules, PairsFormat(**form)).pairs


def test_columns_of_reasons(tmp_path: Path):
    rows = 'shoe,Red shoe,3,same,mismatch,"a shoe,  a shoe",by Acme,other brand\n'
    rows += "shoe,Red shoe,3,same,,is one,who knows,\n"
    first, second = read(tmp_path, HEADER + rows)
    assert first.reasons == ("a shoe, a shoe", "by Acme", "", "", "other brand")
    assert second.reasons == ("is one", "", "", "", "")  # the brand is unknown, so there is nothing to explain
    renamed = HEADER.replace("reason_brand", "why")
    assert read(tmp_path, renamed + rows, columns={"reason_brand": "why"}) == [first, second]
    assert read(tmp_path, "query,title,label,reason\nshoe,Red shoe,4,fits\n")[0].reasons == ("",) * 4 + ("fits",)


def test_a_value_that_the_tier_implies_has_its_reason(tmp_path: Path):
    (pair,) = read(tmp_path, HEADER + "shoe,Kettle,1,,,a kettle is no shoe,,\n")
    assert pair.steps[0] == 3 and pair.reasons[0] == "a kettle is no shoe"


def test_a_pair_without_reasons_is_the_pair_it_was(tmp_path: Path):
    rows = "shoe,Red shoe,3,same,mismatch,,,\n"
    (pair,) = read(tmp_path, HEADER + rows)
    (bare,) = read(tmp_path, HEADER.replace(",reason_category,reason_brand,reason", "") + rows[:-4] + "\n")
    assert pair == bare and digest([pair]) == digest([bare]) and pair.reasons == ()
    explained = dataclasses.replace(pair, reasons=REASONS)
    assert digest([explained]) != digest([pair])


def test_a_reason_that_would_be_read_as_a_verdict_is_refused(tmp_path: Path):
    rows = "shoe,Red shoe,3,same,mismatch,fine,Brand: match?,\nshoe,Boot,1,different,,,,\n"
    with pytest.raises(PairsError) as error:
        read(tmp_path, HEADER + rows)
    assert "row 1 (line 2): reason_brand 'Brand: match?' would be read as the answer 'Brand: match'" in str(error.value)
    (kept,) = read(tmp_path, HEADER + rows, skip_bad_rows=True)
    assert kept.title == "Boot"


def test_a_column_of_no_step_is_refused(tmp_path: Path):
    with pytest.raises(PairsError, match="'reason_colour' is no step of the rule book.*reason_brand"):
        read(tmp_path, "query,title,label,reason_colour\nshoe,Red shoe,4,red\n")


def test_without_free_text_the_columns_are_named_and_left_out(tmp_path: Path):
    rows = "".join(f"shoe {i},Red shoe,3,same,mismatch,fine,Brand: match?,\n" for i in range(9))
    pairs = read(tmp_path, HEADER + rows, CLOSED)
    assert all(pair.reasons == () for pair in pairs)
    found = read_pairs(tmp_path / "pairs.csv", CLOSED)
    assert found.notes[-1].endswith("no free text for reasons: reason_category, reason_brand, reason")
    assert read_pairs(tmp_path / "pairs.csv", BOOK, form=PairsFormat(columns={"reason_brand": "title"})).unread == ()


def test_reasons_go_with_the_steps(tmp_path: Path):
    contradicting = "shoe,Red shoe,4,different,,no shoe,,\n"
    (pair,) = read(tmp_path, HEADER + contradicting)
    assert pair.steps[0] == 0 and pair.reasons == ()
    (hidden,) = hide_steps([PAIR], 0, BOOK, seed=0)
    assert hidden.reasons == () and hide_steps([PAIR], 1, BOOK, seed=0) == [PAIR]


# In batches


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([GOLD, BARE, PAIR.query, PAIR.title] * 5, 420)


def encode(tokenizer: Tokenizer, pairs: list[Pair], rules: RuleBook = BOOK):
    return pipeline.encode(pairs, rules, tokenizer, 64, 96).batch


def test_a_revealed_part_is_reason_and_verdict(tokenizer: Tokenizer):
    batch = encode(tokenizer, [PAIR])
    tokens = batch.gold[0, : batch.gold_len[0]].tolist()
    assert tokenizer.decode(tokens) == GOLD and tokens[-1] == tokenizer.end_token
    ends = [GOLD.index(f"\n{after}") for after in ("no brand", "asked: red", "Limits", "all that")] + [len(GOLD)]
    assert [tokenizer.decode(tokens[:end]) for end in batch.part_end[0]] == [GOLD[:end] for end in ends]
    shown = guidance.reveal(batch, jnp.array([2]), None, (0, 1, 2, 3, 4))
    assert tokenizer.decode(np.asarray(shown.tokens[0, : int(shown.length[0])])) == GOLD[: ends[1]]


def test_a_statement_is_spelt_by_the_same_tokens_with_a_reason_and_without(tokenizer: Tokenizer):
    batch, texts = encode(tokenizer, [PAIR]), pipeline.part_texts(BOOK, tokenizer)
    for place, (end, value) in enumerate(zip(batch.part_end[0], (*PAIR.steps, PAIR.tier), strict=True)):
        size = texts.length[place, value]
        np.testing.assert_array_equal(batch.gold[0, end - size : end], texts.tokens[place, value, :size])


def test_without_free_text_batches_are_bit_for_bit_the_same(tokenizer: Tokenizer):
    pairs = [PAIR, dataclasses.replace(PAIR, tier=1, steps=(0, 1, -1, -1)), dataclasses.replace(PAIR, tier=3, steps=())]
    bare = [dataclasses.replace(pair, reasons=()) for pair in pairs]
    for one, other in zip(*(jax.tree.leaves(encode(tokenizer, some, CLOSED)) for some in (pairs, bare)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert encode(tokenizer, pairs, CLOSED).reason is None
    without = encode(tokenizer, bare, BOOK), encode(tokenizer, bare, CLOSED)
    for one, other in zip(*map(jax.tree.leaves, without), strict=True):
        np.testing.assert_array_equal(one, other)


def test_reasons_stand_apart_where_steps_are_unknown(tokenizer: Tokenizer):
    unknown = dataclasses.replace(PAIR, steps=(0, -1, 0, 3))
    assert encode(tokenizer, [PAIR]).reason is None
    batch = encode(tokenizer, [PAIR, unknown])
    said = [
        [tokenizer.decode(text[:size]) for text, size in zip(*rows, strict=True)]
        for rows in zip(batch.reason, batch.reason_len, strict=True)
    ]
    whole = ["shoes asked, shoes sold\n", "\nno brand is named", "\nasked: red; item: red", "", f"\n{REASONS[4]}"]
    assert said == [whole, [whole[0], "", *whole[2:]]]


# In supervised training with unknown steps. Tokens of the tiny book: fit 0 to 2, brand 3 and 4, tier 5 to 7.

X, Y = 8, 9  # tokens of free text


@pytest.fixture(scope="module")
def explained(small):
    """All known, with reasons of fit and tier; the brand known, with a reason; only the tier known, without reasons."""
    batch = small.batch([(1, 1), (UNKNOWN, 1), (UNKNOWN, UNKNOWN)], tiers=[1, 1, 1])
    reason = np.zeros((3, 3, 2), np.int32)
    reason[0, 0], reason[0, 2, 0], reason[1, 1] = (X, Y), Y, (Y, X)
    return batch.replace(
        gold=np.zeros((3, RESPONSE_LEN + 2), np.int32), reason=reason,
        reason_len=np.array([[2, 0, 1], [0, 2, 0], [0, 0, 0]], np.int32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(small, explained):
    return fill(small, explained)


def test_reasons_are_written_where_they_are_known(small, explained, written):
    tokens, known, starts, reasons = written

    def likeliest(row, response, values):
        prompt = explained.prompt[row, : explained.prompt_len[row]].tolist()
        logits = small.logits(prompt + response)[-1]
        return max(values, key=lambda value: logits[value])

    fit = likeliest(1, [], [0, 1])  # fair with brand off, so the fit is not no
    last = likeliest(2, [], [0, 1])
    brand = likeliest(2, [last], [3, 4] if last == 1 else [4])
    assert tokens.tolist() == [
        [X, Y, 1, 4, Y, 6, END, END],
        [fit, Y, X, 4, 6, END, END, END],
        [last, brand, 6, END, END, END, END, END],
    ]
    assert reasons.astype(int).tolist() == [[1, 1, 0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0], [0] * 8]
    assert known.astype(int).tolist() == [[1] * 7 + [0], [0, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]
    assert starts.tolist() == [[2, 3, 5], [0, 3, 4], [0, 1, 2]]


def test_the_sum_over_unknown_steps_reads_them_after_their_reasons(small, explained, written):
    """By hand: pairs with unknown steps teach their reasons, their tier, and the probability of their label."""
    tokens, known, starts, reasons = map(jnp.asarray, written)

    @jax.jit
    def losses(params):
        loss, metrics = sft.gold_loss(small.policy, params, explained, blanks=Blanks(small.tables, TEXTS, forks(TEXTS)))
        prefix = prefill(small.policy, params, explained.prompt, explained.prompt_len)
        hidden = predicting_hidden(small.policy, params, prefix, tokens[:, None])[:, 0]
        return loss, metrics["policy/label_loss"], jax.nn.log_softmax(small.policy.unembed(params, hidden))

    loss, of_labels, logp = losses(small.params)
    labels = []
    for row, places in ((1, (0, 3)), (2, (0, 1))):
        fit, brand = jax.nn.softmax(logp[row, places[0], :3]), jax.nn.softmax(logp[row, places[1], 3:5])
        fair = [(i, j) for i, j in itertools.product(range(2), range(2)) if (i, j) != (0, 0) and (row == 2 or j == 1)]
        labels.append(-np.log(sum(fit[i] * brand[j] for i, j in fair)))
    np.testing.assert_allclose(of_labels, np.mean(labels), rtol=1e-5)
    counted = np.array([[1] * 7 + [0], [0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]])
    stated = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, (sum(labels) - np.sum(stated * counted)) / counted.sum(), rtol=1e-5)
