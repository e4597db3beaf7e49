"""The bundled benchmark: its size, truth, splits and files are as promised."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from agrl_jax.data.bundled import benchmark, catalog, world
from agrl_jax.data.bundled.dice import Dice, point
from agrl_jax.data.bundled.items import Item, make_item
from agrl_jax.data.bundled.queries import Limit, Query, make_query
from agrl_jax.data.bundled.reasons import explain
from agrl_jax.data.pairs import Pair, PairsError, item_text
from agrl_jax.rulebook import book, wording

TENTH = catalog.SIZES | {"sft": 2_400, "train": 4_000}  # of what is trained on; the rest is whole
WHOLE = pytest.param(catalog.SIZES, marks=pytest.mark.slow)
# By pairs to train on: sha256 of the splits of seed 0, and of their reasons. Whoever changes one raises
# `catalog.VERSION`.
DIGESTS = {
    4_000: (
        "df1da044c036e0d951b84f6d04bc8a856002fef13acec08238ef0727459980b8",
        "494575e8a435108a1a8205fea571442fb0d9d885fb7403217277c28fbbb853cc",
    ),
    40_000: (
        "bb72bb386da56c2b0761e26cb93eeb953209ccd517d22f499428eae008053241",
        "2b614cbc2599b17b7920f6ee933d1b58bc28c22a1a445c9fb8b1843bd40be734",
    ),
}
SMALL = {"sft": 60, "train": 120, "validation": 20, "b_eval": 40, "w_eval": 40}
EVALS = ("b_eval", "w_eval")
HELD_IN = ("sft", "train", "validation")

Splits = dict[str, list[Pair]]


@pytest.fixture(scope="module", params=[TENTH, WHOLE], ids=["tenth", "whole"])
def made(request: pytest.FixtureRequest) -> Splits:
    return catalog.splits(0, request.param)


def digest(splits: Splits) -> str:
    later = ("reasons", "variant")
    names = [field.name for field in dataclasses.fields(Pair) if field.compare and field.name not in later]
    rows = {split: [[getattr(pair, name) for name in names] for pair in pairs] for split, pairs in splits.items()}
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------- the world


def test_the_world_is_large_enough():
    w = world.load()
    assert len(w.departments) >= 12
    assert len(w.types) >= 120
    assert len(w.brands) >= 60
    assert len(w.attributes) >= 15
    for kind in w.types.values():
        assert len(kind.names) >= 2 and kind.substitutes and kind.complements and kind.attributes
        levels = {levels.get(kind.department) for levels in w.brands.values()}
        assert levels >= set(world.LEVELS)


def test_relations_hold_both_ways_and_exclude_one_another():
    w = world.load()
    for a in w.types:
        assert w.relation([a], a) == "same"
        for b in w.types:
            assert w.relation([a], b) == w.relation([b], a)
    assert w.relation(["running shoes"], "sneakers") == "substitute"
    assert w.relation(["running shoes"], "insoles") == "complement"
    assert w.relation(["running shoes"], "kettle") == "different"
    # If several types are wanted, the one that the item fits best counts.
    assert w.relation(["insoles", "sneakers"], "sneakers") == "same"
    assert w.relation(["insoles", "walking shoes"], "sneakers") == "substitute"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("shoes", "substitutes: [walking shoes,", "substitutes: [walking shoe,", "no type 'walking shoe'"),
        ("shoes", "price: [25, 60,", "price: [25, 20,", "price"),
        ("shoes", "material: [mesh,", "material: [mush,", "no value 'mush'"),
        ("shoes", "width: any", "widht: any", "no attribute 'widht'"),
        ("shoes", "complements: [sports socks]", "complements: [sneakers]", "both a substitute and a complement"),
        ("shoes", "also: [jogging shoes,", "also: [sandals,", "'sandals' is also one of"),
        ("shoes", "also: [jogging shoes,", "also: [red shoes,", "says color red"),
        ("brands", "shoes: premium", "shoes: dear", "dear"),
        ("use_cases", "types: [rain jacket,", "types: [rain jackets,", "no type 'rain jackets'"),
        ("use_cases", "{weather: waterproof}", "{power: solar}", "cannot be power solar"),
        ("attributes", "ruled_out: adjective", "ruled_out: verb", "ruled_out"),
        ("attributes", "red: [red, crimson]", "red: [red, black red]", "also says color black"),
    ],
)
def test_a_mistake_in_the_ontology_is_refused(tmp_path: Path, file: str, old: str, new: str, said: str):
    folder = tmp_path / "ontology"
    shutil.copytree(world.FOLDER, folder)
    path = folder / f"{file}.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(world.OntologyError, match=re.escape(said)) as error:
        world.load(folder)
    assert ".yaml" in str(error.value)


def test_another_ontology_has_another_digest(tmp_path: Path):
    shutil.copytree(world.FOLDER, tmp_path / "ontology")
    assert world.load(tmp_path / "ontology").digest == world.load().digest
    shutil.copytree(world.FOLDER, tmp_path / "changed")
    with (tmp_path / "changed" / "brands.yaml").open("a") as file:
        file.write("Newbrand: {shoes: mid}\n")
    assert world.load(tmp_path / "changed").digest != world.load().digest


# --------------------------------------------------------------------------------------------------- the truth

RED_BOOTS = {"color": "red", "material": "leather"}


def boots(**changes) -> Item:
    """Red leather hiking boots by Tavira (premium in shoes: $160 to $320)."""
    item = Item("hiking boots", brand="Tavira", says=RED_BOOTS, denies=(), price=None)
    return dataclasses.replace(item, **changes)


def steps(item: Item, **query) -> tuple[str, ...]:
    return catalog.judge(world.load(), Query("", "plain", **({"types": ("hiking boots",)} | query)), item)


def test_the_brand_is_the_items_own():
    assert steps(boots())[1] == "not asked"
    assert steps(boots(), brand="Tavira")[1] == "match"
    assert steps(boots(), brand="Quillo")[1] == "mismatch"
    assert steps(boots(brand=""), brand="Tavira")[1] == "mismatch"
    assert steps(boots(), limits=(Limit("not brand", "Quillo"),))[1] == "not asked"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], "none asked"),
        ([("color", "red")], "met"),
        ([("color", "red"), ("material", "leather")], "met"),
        ([("color", "blue")], "violated"),
        ([("color", "red"), ("material", "suede")], "violated"),
        ([("weather", "waterproof")], "unknown"),
        ([("weather", "waterproof"), ("width", "wide")], "unknown"),
        ([("color", "red"), ("weather", "waterproof")], "partly met"),
        ([("color", "blue"), ("weather", "waterproof")], "violated"),
    ],
)
def test_attributes(asked: list[tuple[str, str]], expected: str):
    assert steps(boots(), asked=tuple(asked))[2] == expected


def test_a_denial_contradicts_what_was_asked_and_keeps_what_was_ruled_out():
    item = boots(says={}, denies=(("material", "leather"),))
    assert steps(item, asked=(("material", "leather"),))[2] == "violated"
    assert steps(item, asked=(("material", "suede"),))[2] == "unknown"
    assert steps(item, limits=(Limit("not", "material", "leather"),))[3] == "kept"
    assert steps(item, limits=(Limit("not", "material", "suede"),))[3] == "unknown"


@pytest.mark.parametrize(
    ("limits", "changes", "expected"),
    [
        ([], {}, "none asked"),
        ([("not", "material", "leather")], {}, "broken"),
        ([("not", "material", "suede")], {}, "kept"),
        ([("not", "weather", "waterproof")], {}, "unknown"),
        ([("not brand", "Tavira")], {}, "broken"),
        ([("not brand", "Quillo")], {}, "kept"),
        ([("not brand", "Quillo")], {"brand": ""}, "unknown"),
        ([("under", "", 200)], {"price": 19_999}, "kept"),
        ([("under", "", 200)], {"price": 20_099}, "broken"),
        ([("under", "", 200)], {}, "unknown"),
        # Quillo is mid in shoes, and mid hiking boots cost $90 to $160; Tavira is premium, Olmex budget.
        ([("cheaper", "Quillo")], {}, "broken"),
        ([("cheaper", "Quillo")], {"brand": "Quillo"}, "broken"),
        ([("cheaper", "Quillo")], {"brand": "Olmex"}, "kept"),
        ([("cheaper", "Quillo")], {"brand": "", "price": 8_999}, "kept"),
        ([("cheaper", "Quillo")], {"brand": "", "price": 9_099}, "broken"),
        ([("cheaper", "Quillo")], {"brand": ""}, "unknown"),
        ([("cheaper", "Tavira")], {"brand": "Quillo"}, "kept"),
        # Of several limits, a broken one decides; without one, a limit that cannot be told.
        ([("not", "material", "leather"), ("under", "", 200)], {}, "broken"),
        ([("not", "material", "suede"), ("under", "", 200)], {}, "unknown"),
        ([("not", "material", "suede"), ("under", "", 200)], {"price": 9_999}, "kept"),
    ],
)
def test_limits(limits: list[tuple], changes: dict, expected: str):
    assert steps(boots(**changes), limits=tuple(Limit(*limit) for limit in limits))[3] == expected


def test_a_question_is_answered_by_any_type_that_would_do():
    wanted = ("rain jacket", "hiking boots")
    assert steps(boots(), types=wanted)[0] == "same"
    assert steps(boots(type="rain boots"), types=wanted)[0] == "substitute"
    assert steps(boots(type="hiking socks"), types=wanted)[0] == "complement"
    assert steps(boots(type="kettle"), types=wanted)[0] == "different"


def test_the_text_of_an_item_says_what_the_item_says_and_no_more():
    w = world.load()
    seen, unseen = catalog.holdout(w, 0)
    stock, dice, compared = seen.plus(unseen), Dice("text"), 0
    for _ in range(1500):
        query = make_query(dice, w, stock, dice.pick(catalog.FAMILIES))
        relation = dice.pick(("same", "substitute", "complement", "different"))
        item = query and make_item(dice, w, query, stock, relation, clean=0.5)
        if not item:
            continue
        assert w.relation(query.types, item.type) == relation
        pair = Pair(id="", query=query.text, title=item.title, **item.fields)
        text = item_text(pair)
        if not item.denies:
            assert said(w, item, text) == dict(item.says)
            compared += 1
        for attribute, value in item.denies:
            noun = w.attributes[attribute].nouns[value]
            assert f"no {noun}" in text or f"{noun} free" in text
        assert pair.price == ("" if item.price is None else f"${item.price / 100:.2f}")
        if item.brand:
            assert item.brand in text
        else:  # an accessory may name the brand of the product that it is for
            assert not any(name in re.sub(r" for \w+", "", text) for name in w.brands)
        assert any(name in item.title for name in w.types[item.type].names)
    assert compared > 1000


def said(w: world.World, item: Item, text: str) -> dict[str, str]:
    """The attributes that a text states, found by a search for every wording of every value."""
    kind, found = w.types[item.type], {}
    for attribute, values in kind.attributes.items():
        for value in values:
            for way in w.attributes[attribute].values[value]:
                negated = world.says(text, f"not {way}") or world.says(text, f"no {way}")
                if world.says(text, way) and not negated:
                    found[attribute] = value
    return found


# ------------------------------------------------------------------------------------------------- the reasons

WITH_TEXT = dataclasses.replace(
    book.load(), response=dataclasses.replace(book.load().response, free_text="between")
)


def without_reasons(splits: Splits) -> Splits:
    return {name: [dataclasses.replace(pair, reasons=()) for pair in pairs] for name, pairs in splits.items()}


def reasons(item: Item, text: str = "", **query) -> tuple[str, ...]:
    """The reasons with one wording for all: facts as "asked / found"."""
    query = Query(text, "plain", **({"types": ("hiking boots",)} | query))
    asked = ("wanted", "brand asked", "asked", "ruled out", "at most", "the least at", "cheaper than")
    told = []
    stock, _ = catalog.holdout(world.load(), 0)
    for reason in explain(Dice("reasons"), world.load(), stock, query, item):
        facts = re.findall(r"([^;]+?)[,;] item: ([^;]+)", reason)
        bare = [re.sub(rf"^({'|'.join(asked)}): | ({'|'.join(asked)})$", "", one.strip()) for one, _ in facts]
        told.append("; ".join(f"{one} / {found}" for one, (_, found) in zip(bare, facts, strict=True)) or reason)
    return tuple(told)


def test_reasons_name_what_query_and_item_say():
    item = boots(title="Tavira leather trekking boots, crimson", price=None)
    text = "trail boots by tavira in red"
    assert reasons(item, text, brand="Tavira", asked=(("color", "red"),))[:3] == (
        "hiking boots / trekking boots", "Tavira / Tavira", "red / crimson"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "changes", "expected"),
    [
        (("not", "material", "leather"), {}, "leather / leather"),
        (("not", "material", "suede"), {}, "suede / leather"),
        (("not", "material", "leather"), {"says": {}, "denies": (("material", "leather"),)}, "leather / no leather"),
        (("not brand", "Tavira"), {}, "Tavira / Tavira"),
        (("not brand", "Quillo"), {"brand": ""}, "Quillo / no brand"),
        (("under", "", 200), {"price": 19_999}, "$200 / $199.99"),
        (("under", "", 200), {}, "$200 / no price"),
        # Quillo is mid in shoes, and mid hiking boots cost $90 to $160; Tavira is premium, Olmex budget.
        (("cheaper", "Quillo"), {"price": 8_999}, "Quillo $90 / $89.99"),
        (("cheaper", "Quillo"), {"brand": "Olmex"}, "Quillo (mid) / Olmex (budget)"),
        (("cheaper", "Quillo"), {"brand": ""}, "Quillo / no price, no brand"),
    ],
)
def test_reasons_of_limits(limit: tuple, changes: dict, expected: str):
    assert reasons(boots(**changes), limits=(Limit(*limit),))[3] == expected


def test_what_a_reason_says_of_the_item_stands_in_its_text(made: Splits):
    unsaid = {"not said", "does not say", "no word of it", "no brand", "no price", "no price, no brand"}
    facts = 0
    for pair in made["w_eval"]:
        text = item_text(pair).lower()
        for reason in pair.reasons:
            for found in re.findall(r"[,;] item: ([^;]+)", reason):
                said = re.sub(r" \((budget|mid|premium)\)$", "", found)
                assert found in unsaid or said.lower() in text, (pair, reason)
                facts += 1
    assert facts > 3000


def test_reasons_agree_with_the_steps(made: Splits):
    """The reason gives the brand. What is not asked has no fact of the item; each constraint has one fact."""
    rules = book.load()
    for pair in made["b_eval"]:
        _, brand, attributes, limits = (
            step.values[value] for step, value in zip(rules.steps, pair.steps, strict=True)
        )
        count = [len(re.findall(r"[,;] item: ", reason)) for reason in pair.reasons]
        assert count[0] == 1 and pair.reasons[4] == ""
        assert (count[1] == 0) == (brand == "not asked") and (count[2] == 0) == (attributes == "none asked")
        assert (count[3] == 0) == (limits == "none asked")
        if brand != "not asked":
            asked, found = re.split(r"[,;] item: ", pair.reasons[1])
            assert (brand == "match") == (re.sub("^brand asked: | brand asked$", "", asked) == found)
        unsaid = len(re.findall("not said|does not say|no word of it", pair.reasons[2]))
        assert attributes != "met" or unsaid == 0
        assert attributes != "unknown" or unsaid == count[2]


def test_no_reason_is_read_as_an_answer(made: Splits):
    phrases = [phrase.text for phrase in WITH_TEXT.phrases]
    for pairs in made.values():
        text = "\n".join(reason for pair in pairs for reason in pair.reasons)
        assert not any(phrase in text for phrase in phrases)
    for pair in made["w_eval"]:
        whole = "".join(wording.gold_segments(WITH_TEXT, pair.tier, pair.steps, pair.reasons))
        assert wording.well_formed(WITH_TEXT, whole)


# -------------------------------------------------------------------------------------------------- the splits


def test_sizes_and_balance(made: Splits):
    assert {name: len(pairs) for name, pairs in made.items()} in (TENTH, catalog.SIZES)
    assert catalog.SIZES["train"] >= 40_000 and len(made["b_eval"]) >= 2_000 and len(made["w_eval"]) >= 2_000
    assert Counter(pair.tier for pair in made["b_eval"]) == dict.fromkeys(range(4), len(made["b_eval"]) // 4)


def test_every_tier_follows_from_its_steps(made: Splits):
    rules = book.load()
    for pairs in made.values():
        assert all(pair.tier == rules.tier_for(pair.steps) for pair in pairs)


def test_every_family_and_every_step_value_occurs(made: Splits):
    rules = book.load()
    for name in ("train", "validation", *EVALS):
        assert {pair.family for pair in made[name]} == set(catalog.FAMILIES)
        for i, step in enumerate(rules.steps):
            assert {pair.steps[i] for pair in made[name]} == set(range(len(step.values)))


def test_the_warm_start_sees_the_head_and_evaluation_the_tail(made: Splits):
    def hard(name: str) -> float:
        return sum(pair.family not in catalog.HEAD for pair in made[name]) / len(made[name])

    assert 0.005 < hard("sft") <= 0.02
    assert 0.5 < hard("train") < hard("w_eval")
    most = Counter(pair.tier for pair in made["w_eval"]).most_common()
    assert most[0][1] > 3 * most[-1][1]  # the tiers are not balanced there


def test_rows_are_whole(made: Splits):
    for name, pairs in made.items():
        assert len({pair.id for pair in pairs}) == len(pairs)
        for pair in pairs:
            assert pair.split == name and pair.query and pair.title
            assert not re.search(r"[{}]|  | ,|^[ ,-]|[ ,-]$", pair.query + "\n" + pair.title, re.MULTILINE)
            assert re.fullmatch(r"(\$\d+\.\d\d)?", pair.price)


def test_no_pair_is_in_two_splits_and_no_evaluation_query_elsewhere(made: Splits):
    rows = [(pair.query.lower(), pair.title.lower()) for pairs in made.values() for pair in pairs]
    assert len(set(rows)) == len(rows)
    queries = {name: {pair.query.lower() for pair in pairs} for name, pairs in made.items()}
    for name in ("validation", *EVALS):
        assert all(queries[name].isdisjoint(queries[other]) for other in made if other != name)


def test_what_is_held_out_stays_out_of_training(made: Splits):
    w = world.load()
    seen, unseen = catalog.holdout(w, 0)
    for known, out in ((seen.types, unseen.types), (seen.brands, unseen.brands)):
        assert not set(known) & set(out) and 0.10 <= len(out) / (len(known) + len(out)) <= 0.20
    assert all(unseen.phrasings.values())
    for name in HELD_IN:
        assert all(pair.seen for pair in made[name])
    told = (" | ".join((pair.query, item_text(pair), *pair.reasons)) for name in HELD_IN for pair in made[name])
    text = "\n".join(told).lower()
    words = set(re.findall(r"[\w'-]+", text))
    assert not words & {brand.lower() for brand in unseen.brands}
    # A name may occur as a part of another name or of a use case: "tea" is in "tea ball".
    known_names = [other for kind in seen.types for other in w.types[kind].names]
    others = "\n".join([*known_names, *(use for case in w.use_cases for use in case.uses)])
    names = [name for kind in unseen.types for name in w.types[kind].names if not world.says(others, name)]
    assert len(names) > len(unseen.types)
    assert [name for name in names if world.says(text, name)] == []
    # Questions begin as their phrasing does.
    for ask in ("wear", "need"):
        for phrasing in unseen.phrasings[ask]:
            start = "\n" + phrasing.removesuffix("{use}")
            assert start not in "\n" + text


def test_unseen_rows_have_held_out_words_and_seen_rows_have_none(made: Splits):
    _, unseen = catalog.holdout(world.load(), 0)
    out = [brand.lower() for brand in unseen.brands]
    for name in EVALS:
        share = sum(not pair.seen for pair in made[name]) / len(made[name])
        assert 0.15 <= share <= 0.25
        for pair in made[name]:
            if pair.seen:
                assert not any(brand in f"{pair.query} {item_text(pair)}".lower() for brand in out)
    families = {pair.family for name in EVALS for pair in made[name] if not pair.seen}
    assert families == set(catalog.FAMILIES)


# ------------------------------------------------------------------------------------------------- determinism


def test_the_default_splits_are_the_recorded_ones(made: Splits):
    reasons = json.dumps([pair.reasons for pairs in made.values() for pair in pairs])
    found = digest(made), hashlib.sha256(reasons.encode()).hexdigest()
    assert found == DIGESTS[len(made["train"])], "raise catalog.VERSION and record the new digests, if it is meant"


def test_another_seed_gives_another_benchmark_and_another_holdout():
    assert digest(catalog.splits(1, SMALL)) != digest(catalog.splits(2, SMALL))
    w = world.load()
    assert catalog.holdout(w, 1)[1].types != catalog.holdout(w, 2)[1].types


def test_nothing_depends_on_the_hashes_of_this_process():
    code = (
        "from agrl_jax.data.bundled import catalog; from tests.test_catalog import SMALL, digest; "
        "print(digest(catalog.splits(3, SMALL)))"
    )
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert ran.stdout.strip() == digest(catalog.splits(3, SMALL)), ran.stderr


def test_dice():
    dice = Dice("a", 1)
    assert all(0 <= dice.below(3) < 3 for _ in range(100))
    assert sorted(Dice("a", 1).some("abcde", 9)) == list("abcde")
    counts = Counter(dice.weighted({"x": 3, "y": 1}) for _ in range(4000))
    assert 2800 < counts["x"] < 3200
    assert [Dice("a", 1).below(100) for _ in range(2)] == [Dice("a", 1).below(100)] * 2
    # sha256(b"a:1") begins 1c9ecec90e28, over 2**48.
    assert point("a", 1) == int(hashlib.sha256(b"a:1").hexdigest()[:12], 16) / 2**48


@pytest.mark.parametrize("sizes", [{"test": 10}, {"train": -1}, {"b_eval": 42}])
def test_sizes_that_cannot_be_had_are_refused(sizes: dict[str, int]):
    with pytest.raises(catalog.CatalogError, match=next(iter(sizes))):
        catalog.splits(0, sizes)


# --------------------------------------------------------------------------------------------------- the files


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "SIZES", SMALL)


def test_builds_once_and_reads_back_the_same(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    first = benchmark.load_benchmark(tmp_path, 5)
    assert first == without_reasons(catalog.splits(5))
    assert benchmark.load_benchmark(tmp_path, 5, WITH_TEXT) == catalog.splits(5)
    monkeypatch.setattr(catalog, "splits", lambda seed: pytest.fail("built again"))
    assert benchmark.load_benchmark(tmp_path, 5) == first
    assert "tensorflow" not in sys.modules
    assert capfd.readouterr() == ("", "")


def test_another_seed_or_generator_is_another_dataset(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = benchmark.load_benchmark(tmp_path, 5)
    assert benchmark.load_benchmark(tmp_path, 6) != first
    monkeypatch.setattr(catalog, "SIZES", SMALL | {"sft": 40})
    assert len(benchmark.load_benchmark(tmp_path, 5)["sft"]) == 40


def test_a_build_that_was_killed_is_built_again(small: None, tmp_path: Path):
    code = f"""
import os, signal
from agrl_jax.data.bundled import benchmark, catalog
catalog.SIZES = {SMALL}
real = benchmark.Benchmark._generate_examples
def killed(self, pairs):
    for i, row in enumerate(real(self, pairs)):
        if pairs[0].split == "train" and i == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row
benchmark.Benchmark._generate_examples = killed
benchmark.load_benchmark({str(tmp_path)!r}, 5)
"""
    root = Path(__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)}, cwd=root)
    assert ran.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("benchmark/*/*"))  # it had begun to write
    assert benchmark.load_benchmark(tmp_path, 5) == without_reasons(catalog.splits(5))


def test_a_rule_book_that_takes_a_reason_for_an_answer_is_refused(small: None, tmp_path: Path):
    text = book.file_of("four_tier").read_text().replace("free_text: none", "free_text: between")
    text = text.replace("tier: Tier", "tier: item").replace("1-Irrelevant", "no brand")
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(PairsError, match="would be read as the answer 'item: no brand' of the rule book"):
        benchmark.load_benchmark(tmp_path, 5, book.load(tmp_path / "other.yaml"))


@pytest.mark.parametrize(
    ("old", "new"),
    [("limits", "caps"), ("tier: 3-Related\n    because: The right", "tier: 2-Mismatch\n    because: The right")],
)
def test_a_rule_book_that_judges_otherwise_is_refused(tmp_path: Path, old: str, new: str) -> None:
    text = book.file_of("four_tier").read_text()
    (tmp_path / "other.yaml").write_text(text.replace(old, new))
    with pytest.raises(PairsError, match="labelled by the rule book four_tier.*data.source=pairs"):
        benchmark.load_benchmark(tmp_path, 5, book.load(tmp_path / "other.yaml"))
