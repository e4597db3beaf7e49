"""The rule book: the default one, what a file may say, and every reason to refuse a file."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from agrl_jax.rulebook import book as book_lib
from agrl_jax.rulebook import wording
from agrl_jax.rulebook.book import RuleBook, RuleBookError, load

SMALL = """\
name: small
order: think_then_respond
response:
  separator: "\\n"
tiers:
  - {name: Buy, grade: 2, good: true, meaning: worth it}
  - {name: Skip, grade: 1, good: false, meaning: not worth it}
steps:
  - name: size
    question: Does it fit?
    values:
      yes: it fits
      no: it does not
  - name: colour
    question: Is it the right colour?
    values: [right, wrong, any]
table:
  - when: {size: no}
    tier: Skip
    because: What does not fit is sent back.
  - when: {colour: [right, any]}
    tier: Buy
  - when: otherwise
    tier: Skip
"""

# A furniture shop in Japan: three tiers, two steps, its own form of response and of prompt.
FURNITURE = """\
order: respond_then_think
response:
  phrase: "{part}：{value}。"
  separator: ""
  tier: 判定
prompt:
  terse: "検索語「{query}」商品「{item}」"
  full: "{instructions}\\n\\n検索語「{query}」商品「{item}」\\n回答："
  task: 商品が検索語に合うかを判定する。
  steps: 次の点を順に調べる。
  tiers: 判定は次のいずれか。
  table: 上から順に、最初に当てはまる規則に従う。
  otherwise: それ以外
  format: 次の形で答える。
tiers:
  - {name: 適合, grade: 3, good: true, meaning: 求める品}
  - {name: 代用, grade: 2, good: true, meaning: 代わりになる品}
  - {name: 不適合, grade: 1, good: false, meaning: 合わない品}
steps:
  - name: kind
    label: 種類
    question: 種類は合うか。
    values: {同じ: 同じ種類, 近い: 近い種類, 違う: 違う種類}
  - name: size
    label: 寸法
    question: 寸法は合うか。
    values: {合う: 寸法内, 合わない: 寸法外, 不明: 記載なし}
table:
  - {when: {kind: 違う}, tier: 不適合, because: 種類が違えば役に立たない。}
  - {when: {size: 合わない}, tier: 不適合, because: 入らない家具は返品になる。}
  - {when: {kind: 近い}, tier: 代用}
  - {when: {size: 不明}, tier: 代用}
  - {when: otherwise, tier: 適合}
"""


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def line_of(text: str, snippet: str) -> int:
    return text[: text.index(snippet)].count("\n") + 1


def swap(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.fixture
def small(tmp_path: Path) -> RuleBook:
    return load(write(tmp_path, SMALL))


@pytest.fixture
def furniture(tmp_path: Path) -> RuleBook:
    return load(write(tmp_path, FURNITURE))


# The default rule book

SAME, SUBSTITUTE, COMPLEMENT, DIFFERENT = range(4)
MATCH, MISMATCH, BRAND_NOT_ASKED = range(3)
MET, PARTLY, VIOLATED, UNSTATED, NONE_ASKED = range(5)
KEPT, BROKEN, UNCLEAR, NO_LIMITS = range(4)


@pytest.mark.parametrize(
    ("values", "tier"),
    [
        ((SAME, MATCH, MET, KEPT), "4-Excellent"),
        ((SAME, BRAND_NOT_ASKED, NONE_ASKED, NO_LIMITS), "4-Excellent"),
        ((SAME, MISMATCH, MET, KEPT), "3-Related"),
        ((SAME, MATCH, PARTLY, KEPT), "3-Related"),
        ((SAME, MATCH, UNSTATED, KEPT), "3-Related"),
        ((SAME, MATCH, MET, UNCLEAR), "3-Related"),
        ((SUBSTITUTE, MATCH, MET, KEPT), "3-Related"),
        ((SUBSTITUTE, MATCH, VIOLATED, KEPT), "2-Mismatch"),
        ((SAME, MATCH, VIOLATED, KEPT), "2-Mismatch"),
        ((SAME, MATCH, MET, BROKEN), "2-Mismatch"),
        ((COMPLEMENT, MATCH, MET, KEPT), "2-Mismatch"),
        ((DIFFERENT, MATCH, MET, KEPT), "1-Irrelevant"),
        ((DIFFERENT, MISMATCH, VIOLATED, BROKEN), "1-Irrelevant"),
    ],
)
def test_default_table(values: tuple[int, ...], tier: str) -> None:
    book = load()
    assert book.tiers[book.tier_for(values)].name == tier


def test_default_book_gives_a_reason_for_every_row_and_a_meaning_for_every_name() -> None:
    book = load()
    assert [(tier.name, tier.grade, tier.good) for tier in book.tiers] == [
        ("4-Excellent", 4, True),
        ("3-Related", 3, True),
        ("2-Mismatch", 2, False),
        ("1-Irrelevant", 1, False),
    ]
    assert all(row.because for row in book.rows)
    assert all(tier.meaning for tier in book.tiers)
    assert all(meaning for step in book.steps for meaning in step.meanings)


def test_default_book_implies_the_category_of_the_extreme_tiers() -> None:
    book = load()
    assert [book.implied(tier) for tier in range(4)] == [
        (SAME, -1, -1, -1),
        (-1, -1, -1, -1),
        (-1, -1, -1, -1),
        (DIFFERENT, -1, -1, -1),
    ]


def test_tier_table_is_mixed_radix_with_the_first_step_slowest() -> None:
    book = load()
    table = book.tier_table()
    assert table.dtype == np.int32
    assert table.tolist() == [book.tier_for(values) for values in itertools.product(*map(range, book.num_values))]
    assert table[((SUBSTITUTE * 3 + MISMATCH) * 5 + VIOLATED) * 4 + UNCLEAR] == 2


@pytest.mark.parametrize("values", [(0, 0, 0), (0, 0, 0, -1), (0, 0, 0, 4)])
def test_tier_for_needs_every_step(values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="every step"):
        load().tier_for(values)


@pytest.mark.parametrize(
    ("order", "parts", "part_order", "response"),
    [
        (
            "think_then_respond",
            ("category", "brand", "attributes", "limits", "tier"),
            (0, 1, 2, 3, 4),
            "Category: same\nBrand: match\nAttributes: met\nLimits: none asked\nTier: 4-Excellent",
        ),
        (
            "respond_then_think",
            ("tier", "category", "brand", "attributes", "limits"),
            (4, 0, 1, 2, 3),
            "Tier: 4-Excellent\nCategory: same\nBrand: match\nAttributes: met\nLimits: none asked",
        ),
    ],
)
def test_orders(order: str, parts: tuple[str, ...], part_order: tuple[int, ...], response: str) -> None:
    book = load(order=order)
    assert book.parts == parts
    assert book.part_order == part_order
    segments = wording.gold_segments(book, 0, (SAME, MATCH, MET, NO_LIMITS))
    assert len(segments) == 5
    assert "".join(segments) == response
    assert wording.well_formed(book, response)
    assert wording.read(book, response) == ((0, 0, 0, 3, 0), (1, 1, 1, 1, 1))


# Prompts and gold responses


def test_terse_prompt() -> None:
    assert wording.prompt(load(), "red shoes", "Blue Shoe") == "Query: red shoes\nItem: Blue Shoe\n"


@pytest.mark.parametrize("style", ["terse", "full"])
def test_prompt_is_its_pieces_and_leaves_braces_in_data_alone(style: str) -> None:
    book = load()
    before, between, after = wording.prompt_pieces(book, style)
    query, item = "{item} {query}", "{query} {instructions}"
    assert wording.prompt(book, query, item, style) == before + query + between + item + after


def test_full_prompt_tells_all_that_the_book_knows() -> None:
    book = load()
    text = wording.prompt(book, "q", "i", "full")
    for step in book.steps:
        assert step.question in text
        assert all(value in text for value in step.values)
        assert all(meaning in text for meaning in step.meanings)
    assert "- Attributes <partly met | unknown> -> 3-Related" in text
    assert "- otherwise -> 4-Excellent" in text
    assert sum(wording.read(book, text).count) == 0


def test_unknown_prompt_style() -> None:
    with pytest.raises(ValueError, match="'short'.*terse, full"):
        wording.prompt_pieces(load(), "short")


def test_gold_stops_before_the_first_unknown_part() -> None:
    think, respond = load(), load(order="respond_then_think")
    assert wording.gold_segments(think, 1, (SAME, MISMATCH, -1, KEPT)) == ["Category: same", "\nBrand: mismatch"]
    assert wording.gold_segments(think, 1, ()) == []
    assert wording.gold_segments(respond, 1, ()) == ["Tier: 3-Related"]
    assert wording.gold_segments(respond, -1, (SAME, MATCH, MET, KEPT)) == []


# Reading text


def test_read_takes_phrases_wherever_they_stand() -> None:
    text = "So xCategory: complementary, and Brand: matching. Limits: keptLimits: kept Tier: 5-Superb"
    assert wording.read(load(), text) == ((COMPLEMENT, MATCH, -1, KEPT, -1), (1, 1, 0, 2, 0))


def test_conflicting_repeats_are_not_stated_but_counted() -> None:
    reading = wording.read(load(), "Tier: 3-Related Tier: 2-Mismatch Tier: 3-Related")
    assert reading.value[4] == -1
    assert reading.count[4] == 3


def test_read_is_exact_on_bytes() -> None:
    assert wording.read(load(), b"\xff\xe3Brand: match\x80").value == (-1, MATCH, -1, -1, -1)
    assert sum(wording.read(load(), "brand: match Brand:match Brand : match").count) == 0


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda text: text, True),
        (lambda text: text + "\n", False),
        (lambda text: " " + text, False),
        (lambda text: text.replace("\n", " ", 1), False),
        (lambda text: text.replace("Brand: match\n", ""), False),
        (lambda text: text.replace("Brand: match\n", "Brand: match\nBrand: match\n"), False),
        (lambda text: text.replace("Brand: match", "Brand: matched"), False),
        (lambda text: "", False),
    ],
)
def test_well_formed(edit, expected: bool) -> None:
    text = "Category: same\nBrand: match\nAttributes: met\nLimits: kept\nTier: 4-Excellent"
    assert wording.well_formed(load(), edit(text)) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Size: yes\nColour: any\nTier: Buy", True),
        ("Its Size: yes, I think. Its Colour: any would do. Tier: Buy", True),
        ("Size: yesColour: anyTier: Buy", True),
        ("Size: yes\nColour: any\nTier: Buy.", False),  # nothing follows the last part
        ("Size: yes\nSize: yes\nColour: any\nTier: Buy", False),
        ("Colour: any\nSize: yes\nTier: Buy", False),
        ("Size: yes\nTier: Buy", False),
    ],
)
def test_free_text_between_parts(tmp_path: Path, text: str, expected: bool) -> None:
    book = load(write(tmp_path, swap(SMALL, "response:\n", "response:\n  free_text: between\n")))
    assert wording.well_formed(book, text) is expected


# Another business, another language


def test_small_book(small: RuleBook) -> None:
    assert small.name == "small"
    assert small.num_values == (2, 3)
    assert small.steps[0].values == ("yes", "no")  # text, although they are booleans in YAML 1.1
    assert small.steps[1].values == ("right", "wrong", "any")
    assert small.tier_table().tolist() == [0, 1, 0, 1, 1, 1]
    assert small.implied(0) == (0, -1)
    assert small.rows[0].because == "What does not fit is sent back."
    assert [row.line for row in small.rows] == [18, 21, 23]


def test_book_in_another_language(furniture: RuleBook) -> None:
    assert furniture.name == "rules"
    assert furniture.parts == ("tier", "kind", "size")
    assert "".join(wording.gold_segments(furniture, 1, (1, 0))) == "判定：代用。種類：近い。寸法：合う。"
    assert wording.read(furniture, "寸法：不明。判定：不適合。") == ((-1, 2, 2), (0, 1, 1))
    assert furniture.tier_table().tolist() == [0, 2, 1, 1, 2, 1, 2, 2, 2]
    assert wording.prompt(furniture, "机", "木の机") == "検索語「机」商品「木の机」"
    assert wording.instructions(furniture).isascii() is False
    assert not any(character in wording.instructions(furniture) for character in "abcdefghijklmnopqrstuvwxyz")


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert load(write(tmp_path, b"\xef\xbb\xbf" + SMALL.encode())).name == "small"


def test_digest_follows_meaning_and_not_layout(tmp_path: Path, small: RuleBook) -> None:
    def digest(text: str) -> str:
        return load(write(tmp_path, text)).digest

    assert digest("# A comment.\n\n" + SMALL) == small.digest
    assert digest(swap(SMALL, "What does not fit is sent back.", "It does not fit.")) == small.digest
    changed = [
        ("name: colour", "name: colour\n    label: Hue"),
        ("when: {size: no}", "when: {size: yes}"),
        ("think_then_respond", "respond_then_think"),
        ('separator: "\\n"', 'separator: "; "'),
        ("meaning: worth it", "meaning: well worth it"),
    ]
    digests = {digest(swap(SMALL, old, new)) for old, new in changed}
    assert len(digests | {small.digest}) == len(changed) + 1


# Refusals


@pytest.mark.parametrize(
    ("old", "new", "at", "message"),
    [
        # Unknown and misspelt keys and values, with the nearest
        ("table:", "tabel:", "tabel:", r"unknown key 'tabel'; did you mean 'table'\?"),
        ("  separator:", "  seperator:", "  seperator", r"response.seperator: unknown key 'seperator'; did you mean"),
        ("    question: Does", "    qestion: Does", "    qestion", r"steps\[0\].qestion: unknown key .*; did you mean"),
        ("meaning: worth", "meening: worth", "meening", r"tiers\[0\].meening: unknown .*; did you mean 'meaning'\?"),
        ("    because:", "    becuase:", "becuase", r"table\[0\].becuase: unknown key .*; did you mean 'because'\?"),
        ("{size: no}", "{sise: no}", "{sise", r"table\[0\].when.sise: unknown step 'sise'; did you mean 'size'\?"),
        ("[right, any]", "[rihgt, any]", "[rihgt", r"colour\[0\]: unknown value of 'colour' 'rihgt'; did you mean"),
        ("{size: no}", "{size: never}", "{size: never", r"when.size: unknown value of 'size' 'never'; .* yes, no"),
        ("tier: Buy", "tier: Byu", "tier: Byu", r"table\[1\].tier: unknown tier 'Byu'; did you mean 'Buy'\?"),
        ("when: otherwise", "when: otherwize", "otherwize", r"unknown value 'otherwize'; did you mean 'otherwise'\?"),
        ("think_then_respond", "think_then_answer", "think_then_a", r"order: unknown value .*; did you mean"),
        ("grade: 2, good: true", "grade: 2, good: maybe", "grade: 2", r"good: unknown value 'maybe'; .* true, false"),
        ("grade: 2", "grade: two", "two", r"tiers\[0\].grade: should be a whole number, not 'two'"),
        # Missing, empty or of the wrong kind
        ("    question: Does it fit?\n", "", "  - name: size", r"steps\[0\]: lacks the key 'question'"),
        ("name: small", "name: ''", "name", r"name: is empty"),
        ("{colour: [right, any]}", "{colour: []}", "{colour: []", r"table\[1\].when.colour: is empty"),
        ("{size: no}", "[size, no]", "[size", r"table\[0\].when: should be a mapping"),
        ("name: small", "name: [small]", "name", r"name: should be a single value"),
        ("    values: [right, wrong, any]", "    values: [right]", "values: [right]", r"at least two values, not 1"),
        # Duplicates
        ("order: think_then_respond", "name: other", "name: other", r"'name' stands twice; it is also on line 1"),
        ("name: Skip", "name: Buy", "name: Buy, grade: 1", r"tiers\[1\].name: the tier 'Buy' stands twice"),
        ("name: colour", "name: size\n    label: Hue", "name: size\n    label: Hue", r"the step 'size' stands twice"),
        ("name: colour", "name: tier", "name: tier", r"'tier' is the name of the conclusion"),
        ("[right, wrong, any]", "[right, wrong, right]", "[right, wrong, right]", r"the value 'right' stands twice"),
        ("      no: it does not", "      yes: it does not", "yes: it does not", r"'yes' stands twice"),
        ("[right, any]", "[right, right]", "[right, right]", r"a value stands twice"),
        ("[right, wrong, any]", "[right, wrong, Right]", "[right, wrong, Right]", r"'Right' stands twice, upper and"),
        ("name: Skip", "name: buy", "name: buy, grade: 1", r"tiers\[1\].name: the tier 'buy' stands twice"),
        # White space that the cells of files lose
        ("name: Skip", "name: 'Skip '", "name: 'Skip ", r"tiers\[1\].name: 'Skip ' has white space at an end"),
        ("[right, wrong, any]", "[right, ' wrong', any]", "[right, ' wrong", r"' wrong' has white space at an end"),
        ("name: colour", "name: 'colour  hue'", "name: 'colour", r"more than one space between words"),
        # Tiers that are not a scale
        ("grade: 1", "grade: 2", "name: Skip, grade: 2", r"best first, so this should be below 2"),
        ("good: true", "good: false", "- {name: Buy", r"the best tier should be good and the worst not"),
        ("good: false", "good: true", "- {name: Buy", r"the best tier should be good and the worst not"),
        # The table
        ("  - when: otherwise\n    tier: Skip\n", "", "  - when: {size: no}", r"total: .*{size: yes, colour: wrong}"),
        ("{size: no}", "{}", "  - when: {colour", r"table\[1\]: this row can never win: the rows on lines 18 match"),
        ("tier: Buy", "tier: Skip", "  - when: {size: no}", r"table: no row gives the tier 'Buy'"),
        # Wording
        ("wrong, any]", "wrong, any, right now]", "[right, w", r"'Colour: right' stands inside 'Colour: right now'"),
        ("Is it the right colour?", "'Colour: any?'", "[right, wrong", r"'Colour: any' stands inside the full prompt"),
        ('separator: "\\n"', 'separator: " Size: no "', "no: it does", r"'Size: no' stands inside the separator"),
        ('separator: "\\n"', 'phrase: "{part}"', 'phrase: "', r"phrase: should have {part}, {value}, once each"),
        ('separator: "\\n"', 'phrase: "{part}: {valeu}"', 'phrase: "', r"unknown placeholder {valeu}; did you mean"),
        ("response:", 'prompt: {terse: "{item} {query}"}\nresponse:', "prompt:", r"{query}, {item}, once each and in"),
        ("response:", 'prompt: {full: "{query} {item}"}\nresponse:', "prompt:", r"should have {instructions}, {query}"),
        ('separator: "\\n"', "free_text: anywhere", "free_text", r"response.free_text: unknown value 'anywhere'"),
    ],
)
def test_refusals_name_file_line_and_key(tmp_path: Path, old: str, new: str, at: str, message: str) -> None:
    text = swap(SMALL, old, new)
    path = write(tmp_path, text)
    with pytest.raises(RuleBookError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:{line_of(text, at)}: ")


@pytest.mark.parametrize("section", ["tiers", "steps", "table"])
def test_refuses_a_missing_or_empty_section(tmp_path: Path, section: str) -> None:
    lines = SMALL.splitlines(keepends=True)
    start = lines.index(f"{section}:\n")
    stop = next((i for i in range(start + 1, len(lines)) if lines[i][0] != " "), len(lines))
    with pytest.raises(RuleBookError, match=f"rules.yaml:1: rule book: lacks the key '{section}'"):
        load(write(tmp_path, "".join(lines[:start] + lines[stop:])))
    with pytest.raises(RuleBookError, match=rf"rules.yaml:{start + 1}: {section}: is empty"):
        load(write(tmp_path, "".join([*lines[:start], f"{section}: []\n", *lines[stop:]])))


def test_refuses_a_single_tier(tmp_path: Path) -> None:
    text = swap(SMALL, "  - {name: Skip, grade: 1, good: false, meaning: not worth it}\n", "")
    with pytest.raises(RuleBookError, match="rules.yaml:6: tiers: there should be at least two tiers, not 1"):
        load(write(tmp_path, text))


def test_refuses_equal_phrases_but_not_equal_labels(tmp_path: Path) -> None:
    text = swap(SMALL, "name: colour", "name: colour\n    label: Size")
    assert load(write(tmp_path, text)).phrases[2].text == "Size: right"
    text = text.replace("wrong", "no")
    with pytest.raises(RuleBookError, match=r"'Size: no' stands inside 'Size: no'"):
        load(write(tmp_path, text))


def test_refuses_a_phrase_that_arises_where_parts_meet(tmp_path: Path) -> None:
    # Steps are stated as 12 or 13, then 45 or 46, then 78 or 79, then 34 or 35: "13" and "45" make "34".
    text = """\
response: {phrase: "{part}{value}", separator: "", tier: T}
tiers: [{name: x, grade: 2, good: true}, {name: y, grade: 1, good: false}]
steps:
  - {name: one, label: 1, question: First, values: [2, 3]}
  - {name: two, label: 4, question: Second, values: [5, 6]}
  - {name: three, label: 7, question: Third, values: [8, 9]}
  - {name: four, label: 3, question: Fourth, values: [4, 5]}
table:
  - {when: {one: 2}, tier: x}
  - {when: otherwise, tier: y}
"""
    path = write(tmp_path, text)
    with pytest.raises(RuleBookError, match=r"'34' can be read where parts meet, in '1345'") as error:
        load(path)
    assert str(error.value).startswith(f"{path}:7: steps[3].values[0]: ambiguous wording")
    load(write(tmp_path, text.replace('separator: ""', 'separator: " "')))


def test_refuses_a_table_too_large_to_write_out(tmp_path: Path) -> None:
    steps = "".join(f"  - {{name: s{i}, question: What, values: [a, b]}}\n" for i in range(20))
    text = SMALL[: SMALL.index("  - name: size")] + steps + "table:\n  - {when: otherwise, tier: Buy}\n"
    with pytest.raises(RuleBookError, match="steps: there should be at most 1,000,000 combinations"):
        load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: caf\xe9\n", "rules.yaml:1: not UTF-8"),
        (SMALL.encode() + b"# \xff", "rules.yaml:25: not UTF-8"),
        ("name: small\ntiers: [\n", "rules.yaml:3: not valid YAML"),
        ("name: small\n\ttiers: x\n", "rules.yaml:2: not valid YAML"),
        ("name: small\ntiers: \x07\n", "rules.yaml:2: not valid YAML"),
        ("name: small\n---\nname: other\n", "rules.yaml:2: not valid YAML"),
        ("", "rules.yaml:1: is empty"),
        ("- name: small\n", "rules.yaml:1: rule book: should be a mapping"),
    ],
)
def test_refuses_files_that_are_no_rule_book(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(RuleBookError, match=message):
        load(write(tmp_path, content))


def test_refuses_files_and_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RuleBookError, match=r"missing.yaml: cannot be read"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(RuleBookError, match=r"no bundled rule book 'four_teir'; did you mean 'four_tier'\?"):
        load("four_teir")
    with pytest.raises(RuleBookError, match=r"unknown value 'respond'; .* think_then_respond, respond_then_think"):
        load(order="respond")
    with pytest.raises(RuleBookError, match=r"rule book free text: unknown value 'beween'; did you mean 'between'\?"):
        load(free_text="beween")


def test_free_text_can_be_asked_for_and_refused_whatever_the_file_says(tmp_path: Path) -> None:
    assert load().response.free_text == "none"
    asked = load(free_text="between")
    file = write(tmp_path, book_lib.file_of("four_tier").read_text().replace("free_text: none", "free_text: between"))
    assert asked == load(file) and asked.digest != load().digest
    assert load(file, free_text="none") == load()


def test_every_bundled_book_loads_in_both_orders() -> None:
    for path in Path(book_lib.__file__).parent.glob("*.yaml"):
        assert {load(path.stem, order).order for order in book_lib.ORDERS} == set(book_lib.ORDERS)
