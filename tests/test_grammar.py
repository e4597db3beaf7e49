"""The rule book as a grammar for other engines: it accepts what the recogniser accepts, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from agrl_jax.rulebook import automaton, grammar, wording
from agrl_jax.rulebook.book import RuleBook, RuleBookError, load
from agrl_jax.rulebook.grammar import GrammarError

ORDERS = ["think_then_respond", "respond_then_think"]
# Characters that dialects could take for syntax, and letters that recur, so that phrases begin inside each other.
LETTERS = ["abc", "abcdefgh", 'a"\\[]^-.*(){}|?+$/#\'é判👟 \n']


def in_text(book: RuleBook, free_text: str) -> RuleBook:
    return dataclasses.replace(book, response=dataclasses.replace(book.response, free_text=free_text))


@st.composite
def books(draw: st.DrawFn) -> RuleBook:
    """Rule books of one or two steps, with wording that could mostly be mistaken for syntax."""
    letters = draw(st.sampled_from(LETTERS))
    word = st.text(letters.strip(), min_size=1, max_size=4)
    tiers = draw(st.lists(word, min_size=2, max_size=3, unique_by=str.casefold))
    steps = draw(st.lists(st.lists(word, min_size=2, max_size=3, unique_by=str.casefold), min_size=1, max_size=2))
    phrase = draw(st.sampled_from(["{part}: {value}", "{value}<{part}>", "{part}{value}", '{part} = "{value}"\n']))
    response = {"phrase": phrase, "separator": draw(st.text(letters, max_size=2)), "tier": draw(word)}
    rows = [{"when": {"0": steps[0][0]}, "tier": tiers[0]}, {"when": "otherwise", "tier": tiers[1]}]
    if len(tiers) > 2:
        rows.insert(0, {"when": {"0": steps[0][1]}, "tier": tiers[2]})
    content = {
        "order": draw(st.sampled_from(ORDERS)),
        "response": response | {"free_text": draw(st.sampled_from(["none", "between"]))},
        "tiers": [{"name": name, "grade": str(9 - i), "good": str(i < 1).lower()} for i, name in enumerate(tiers)],
        "steps": [{"name": str(i), "label": draw(word), "question": "?", "values": v} for i, v in enumerate(steps)],
        "table": rows,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "book.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        try:
            return load(path)
        except RuleBookError:  # ambiguous, or a row that never wins
            assume(False)


def texts(book: RuleBook) -> st.SearchStrategy[str]:
    """Whole responses, some with free text, some broken; and pieces of phrases in any order."""
    parts = [[phrase.text for phrase in book.phrases if phrase.part == part] for part in book.part_order]
    everything = "".join(phrase.text for phrase in book.phrases) + book.response.separator
    text = st.one_of(st.just(""), st.text(everything, max_size=3), st.text(max_size=2))
    piece = st.sampled_from([phrase.text for phrase in book.phrases] + [book.response.separator])
    broken = st.builds(lambda text, cut, kept: text[cut:][:kept], piece, st.integers(0, 2), st.integers(1, 12))
    whole = st.tuples(*map(st.sampled_from, parts)).map(book.response.separator.join)
    amid = st.tuples(*(st.tuples(text, st.sampled_from(one)).map("".join) for one in parts)).map("".join)
    cut = st.builds(lambda text, at, new: text[:at] + new + text[at + len(new) :], whole, st.integers(0, 30), text)
    return st.one_of(whole, amid, cut, st.lists(st.one_of(piece, broken, text), max_size=5).map("".join))


def recognised(book: RuleBook) -> Callable[[str], bool]:
    machine, _, final = automaton.recognise(book)

    def accepts(text: str) -> bool:
        state = automaton.START
        for byte in text.encode():
            state = machine.next[state, byte]
        return state == final

    return accepts


@functools.cache
def xgrammar() -> tuple[type, Callable]:
    """The class of its grammars, and the function that tells whether a grammar accepts a text."""
    engine = pytest.importorskip("xgrammar", reason="pip install --no-deps xgrammar apache-tvm-ffi")
    from xgrammar import testing

    return engine.Grammar, testing._is_grammar_accept_string


def outlines(expression: str) -> Callable[[str], bool]:
    """Whether `outlines_core` accepts a text, byte by byte, as with a vocabulary of bytes."""
    core = pytest.importorskip("outlines_core")
    vocabulary = core.Vocabulary(0, {bytes([byte]): [byte + 1] for byte in range(256)})
    index = core.Index(expression, vocabulary)

    def accepts(text: str) -> bool:
        state = index.get_initial_state()
        for byte in text.encode():
            if state is not None:
                state = index.get_next_state(state, byte + 1)
        return state is not None and index.is_final_state(state)

    return accepts


@pytest.fixture(params=[(order, free) for order in ORDERS for free in ("none", "between")], ids=" ".join)
def bundled(request: pytest.FixtureRequest) -> RuleBook:
    order, free_text = request.param
    return in_text(load(order=order), free_text)


def test_the_bundled_book_by_hand() -> None:
    book = load()
    assert grammar.regex(book).startswith(r"Category: (same|substitute|complement|different)\nBrand: (match|")
    assert grammar.ebnf(book).endswith(r'"\nTier: " ("4-Excellent" | "3-Related" | "2-Mismatch" | "1-Irrelevant")' "\n")
    matched = re.compile(grammar.regex(book)).fullmatch
    text = "Category: same\nBrand: match\nAttributes: met\nLimits: kept\nTier: 4-Excellent"
    assert matched(text)
    assert not any(map(matched, [text + "\n", " " + text, text.replace("same", "alike"), text.partition("\n")[2]]))


def test_ebnf_of_a_bundled_book(bundled: RuleBook) -> None:
    make, accepts = xgrammar()
    source, ours = make.from_ebnf(grammar.ebnf(bundled)), recognised(bundled)

    @settings(max_examples=100, deadline=None)
    @given(texts(bundled))
    def check(text: str) -> None:
        assert accepts(source, text) == ours(text) == wording.well_formed(bundled, text)

    check()


def test_regex_of_a_bundled_book(bundled: RuleBook) -> None:
    theirs, ours = outlines(grammar.regex(bundled)), recognised(bundled)

    @settings(max_examples=200, deadline=None)
    @given(texts(bundled))
    def check(text: str) -> None:
        assert theirs(text) == ours(text)

    check()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(books(), st.data())
def test_any_rule_book(book: RuleBook, data: st.DataObject) -> None:
    make, accepts = xgrammar()
    ours = recognised(book)
    checks = [functools.partial(accepts, make.from_ebnf(grammar.ebnf(book)))]
    try:
        expression = grammar.regex(book)
    except GrammarError:  # free text with phrases that overlap
        assert book.response.free_text == "between"
    else:
        checks += [functools.partial(accepts, make.from_regex(expression)), outlines(expression)]
    for text in data.draw(st.lists(texts(book), min_size=5, max_size=15)):
        assert [check(text) for check in checks] == [ours(text)] * len(checks), text


def test_a_phrase_may_begin_within_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "book.yaml"
    path.write_text("""\
response: {phrase: "{part}:{value}", separator: ",", tier: T, free_text: between}
tiers: [{name: good, grade: 2, good: true}, {name: bad, grade: 1, good: false}]
steps:
  - {name: s, label: S, question: "?", values: [yes, noT]}
table: [{when: {s: noT}, tier: bad}, {when: otherwise, tier: good}]
""")
    book = load(path)
    for text, right in (("S:noT:bad", True), ("S:noT.:bad", False), ("S:yes T:good", True), ("S:yesT:goodS:no", False)):
        assert recognised(book)(text) == right
        assert outlines(grammar.regex(book))(text) == right
        make, accepts = xgrammar()
        assert accepts(make.from_ebnf(grammar.ebnf(book)), text) == right


def test_a_regex_that_would_be_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "book.yaml"
    path.write_text("""\
response: {phrase: "{part}{value}", separator: ",", tier: abca, free_text: between}
tiers: [{name: bcab, grade: 2, good: true}, {name: cabc, grade: 1, good: false}]
steps:
  - {name: s, label: cbac, question: "?", values: [abac, bcba, caab]}
  - {name: t, label: bacb, question: "?", values: [cab, bca]}
table: [{when: {s: abac}, tier: bcab}, {when: otherwise, tier: cabc}]
""")
    with pytest.raises(GrammarError, match="over 65,536 characters; use the EBNF"):
        grammar.regex(load(path))
    assert len(grammar.ebnf(load(path))) < 20_000
