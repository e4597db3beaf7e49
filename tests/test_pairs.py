"""Files of labelled pairs: what is read, how it is split, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrl_jax.data.esci import EXAMPLES, PRODUCTS, read_esci
from agrl_jax.data.format import PairsFormat
from agrl_jax.data.pairs import Pair, PairsError, digest, item_text, read_labelled, read_pairs, split_by_query
from agrl_jax.data.wands import read_wands
from agrl_jax.rulebook import book
from agrl_jax.types import UNKNOWN

BOOK = book.load()
ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "pairs.csv"
_PLACES = [folder / "shared" / "data" / "esci_small" / "pairs.csv" for folder in (ROOT, *ROOT.parents)]
ESCI_SMALL = next((place for place in _PLACES if place.exists()), None)  # real pairs, kept beside the checkout
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def write(tmp_path: Path, text: str, name: str = "pairs.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def all_pairs(path: Path, **form) -> list[Pair]:
    return read_labelled(path, BOOK, PairsFormat(**form)).pairs


def refusal(path: Path, read=read_labelled, **form) -> str:
    with pytest.raises(PairsError) as error:
        read(path, BOOK, form=PairsFormat(**form))
    return str(error.value)


class TestReading:
    def test_the_bundled_example(self):
        pairs = all_pairs(EXAMPLE)
        assert [pair.id for pair in pairs] == [f"p{i:02}" for i in range(1, 25)]
        first = pairs[0]
        assert first.query == "waterproof hiking boots women"
        assert (first.brand, first.price, first.family) == ("Trailborne", "129.00", "attribute")
        # same, not asked, met, none asked
        assert (first.tier, first.steps) == (0, (0, 2, 0, 3))
        assert not read_pairs(EXAMPLE, BOOK).contradicting

    @pytest.mark.skipif(ESCI_SMALL is None, reason="shared/data/esci_small is in no folder above this checkout")
    def test_real_pairs_as_they_are(self):
        file = read_pairs(ESCI_SMALL, BOOK)
        tiers = [pair.tier for split in file.splits.values() for pair in split]
        assert [tiers.count(tier) for tier in range(4)] == [525, 412, 26, 500]
        assert all(file.splits.values()) and not file.contradicting
        queries = [{pair.query for pair in split} for split in file.splits.values()]
        assert len(set.union(*queries)) == sum(map(len, queries)) == 700

    @pytest.mark.parametrize(
        ("label", "tier"),
        [("4-Excellent", 0), ("4-EXCELLENT", 0), ("4", 0), ("4.0", 0), (" 3 ", 1), ("2-mismatch", 2), ("1", 3)],
    )
    def test_labels_by_name_or_grade(self, tmp_path, label, tier):
        assert all_pairs(write(tmp_path, f"query,title,label\nshoe,Red shoe,{label}\n"))[0].tier == tier

    def test_quoted_cells_and_white_space(self, tmp_path):
        text = '\ufeffquery,title,label\n"nails, 5""","Box of\n  5"" nails\t",4\n'
        pair = all_pairs(write(tmp_path, text))[0]
        assert pair == Pair(id="1", query='nails, 5"', title='Box of 5" nails', tier=0, steps=(0, -1, -1, -1))

    def test_pairs_know_their_row_and_their_digest_follows_what_they_say(self, tmp_path):
        text = "query,title,label\nshoe,Red shoe,4\n\nhat,Cap,2\n"
        pairs = all_pairs(write(tmp_path, text))
        assert [pair.row for pair in pairs] == [1, 2]
        assert digest(pairs) == digest(all_pairs(write(tmp_path, text.replace("\n\n", "\n"), "again.csv")))
        others = (text.replace("Cap", "cap"), text.replace(",2", ",1"), text + "shoe,Hat,1\n")
        assert digest(pairs) not in [digest(all_pairs(write(tmp_path, other, "other.csv"))) for other in others]
        assert digest(pairs) != digest(pairs[::-1])
        assert digest([dataclasses.replace(pair, row=7) for pair in pairs]) == digest(pairs)

    def test_csv_tsv_parquet_and_jsonl_read_the_same(self, tmp_path):
        columns = {"id": ["a", "b"], "query": ["shoe", "hat"], "title": ["Red, shoe", "Cap"], "label": ["4", "2"],
                   "brand": ["Acme", None]}
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        for kind, delimiter in (("csv", ","), ("tsv", "\t")):
            with (tmp_path / f"p.{kind}").open("w", newline="") as file:
                writer = csv.DictWriter(file, columns, delimiter=delimiter)
                writer.writeheader()
                writer.writerows(rows)
        numbers = [row | {"label": int(row["label"])} for row in rows]
        pq.write_table(pa.Table.from_pylist(numbers), tmp_path / "p.parquet")
        write(tmp_path, "\n".join(json.dumps(row | {"label": float(row["label"])}) for row in rows), "p.jsonl")
        files = [all_pairs(tmp_path / f"p.{kind}") for kind in ("csv", "tsv", "parquet", "jsonl")]
        assert files[0] == files[1] == files[2] == files[3]
        assert [(pair.title, pair.brand, pair.tier) for pair in files[0]] == [("Red, shoe", "Acme", 0), ("Cap", "", 2)]

    def test_missing_cells_are_empty_and_numbers_are_short(self, tmp_path):
        records = [
            {"query": "mug", "title": "Mug", "label": 4.0, "brand": float("nan"), "price": 129.0, "color": None},
            {"query": "mug", "title": 501.0, "label": "3", "brand": float("nan"), "price": 9.99, "id": 7.0},
        ]
        write(tmp_path, "\n".join(map(json.dumps, records)), "p.jsonl")
        typed = [row | {"title": str(row["title"]), "label": int(float(row["label"]))} for row in records]
        pq.write_table(pa.Table.from_pylist(typed, pa.schema([
            ("query", pa.string()), ("title", pa.string()), ("label", pa.int8()), ("brand", pa.float64()),
            ("price", pa.float32()), ("id", pa.float64()),
        ])), tmp_path / "p.parquet")  # fmt: skip
        for file, title in (("p.jsonl", "501"), ("p.parquet", "501.0")):
            first, second = all_pairs(tmp_path / file)
            assert (first.brand, first.price, first.color, first.id) == ("", "129.00", "", "1")
            assert (second.title, second.brand, second.price, second.id) == (title, "", "9.99", "7")

    def test_a_missing_title_is_an_error_of_its_row(self, tmp_path):
        path = write(tmp_path, '{"query": "mug", "title": NaN, "label": 4}\n', "p.jsonl")
        assert "row 1 (line 1): title is empty" in refusal(path)

    def test_half_a_character_is_an_error_of_its_row(self, tmp_path):
        path = write(tmp_path, '{"query": "mug \\udfff", "title": "t", "label": 4}\n', "p.jsonl")
        assert "p.jsonl: 1 of 1 rows cannot be used" in (message := refusal(path))
        assert "row 1 (line 1): is not valid Unicode" in message

    def test_pairs_know_their_row(self, tmp_path):
        path = write(tmp_path, "query,title,label\na,t,4\n\nb,t,4\n")
        assert [pair.row for pair in all_pairs(path)] == [1, 2]

    def test_a_row_without_id_is_named_by_its_product_or_its_number(self, tmp_path):
        rows = "shoe,Red shoe,4,B07\nhat,Cap,4,\n"
        assert [p.id for p in all_pairs(write(tmp_path, "query,title,label,product_id\n" + rows))] == ["B07", "2"]
        assert [p.id for p in all_pairs(write(tmp_path, "query,title,label,sku\n" + rows))] == ["1", "2"]

    def test_columns_can_be_renamed(self, tmp_path):
        path = write(tmp_path, "search_term,title,label,brand_judgement\nacme shoe,Acme shoe,4,match\n")
        pair = all_pairs(path, columns={"query": "search_term", "step_brand": "brand_judgement"})[0]
        assert (pair.query, pair.steps) == ("acme shoe", (0, 0, UNKNOWN, UNKNOWN))

    def test_the_brand_column_is_the_item_and_not_the_step(self, tmp_path):
        pair = all_pairs(write(tmp_path, "query,title,label,brand\nshoe,Shoe,3,Acme\n"))[0]
        assert (pair.brand, pair.steps) == ("Acme", (UNKNOWN,) * 4)


class TestSteps:
    HEADER = "query,title,label,step_category,step_brand,step_attributes,step_limits\n"

    def steps(self, tmp_path, row: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        path = write(tmp_path, self.HEADER + f"q,t,{row}\n")
        return all_pairs(path)[0].steps, read_labelled(path, BOOK).contradicting

    def test_what_the_tier_implies_is_filled_in(self, tmp_path):
        # 4-Excellent needs the category same; 1-Irrelevant needs it different.
        assert self.steps(tmp_path, "4,,,,") == ((0, -1, -1, -1), ())
        assert self.steps(tmp_path, "1,,,,none asked") == ((3, -1, -1, 3), ())
        assert self.steps(tmp_path, "3,,,,") == ((-1, -1, -1, -1), ())

    def test_values_are_read_in_any_case(self, tmp_path):
        assert self.steps(tmp_path, "3,Substitute,NOT ASKED,Partly met,kept")[0] == (1, 2, 1, 0)

    def test_unknown_is_a_value_where_the_book_has_it_and_empty_is_not(self, tmp_path):
        assert self.steps(tmp_path, "3,same,not asked,unknown,") == ((0, 2, 3, -1), ())

    def test_steps_that_contradict_the_label_are_masked_and_reported(self, tmp_path):
        # The table gives 2-Mismatch for a complement, which contradicts 4. The label 4 implies only the category.
        assert self.steps(tmp_path, "4,complement,match,met,kept") == ((0, -1, -1, -1), (1,))

    def test_a_partly_known_contradiction_is_found_too(self, tmp_path):
        assert self.steps(tmp_path, "4,,,violated,") == ((0, -1, -1, -1), (1,))
        assert self.steps(tmp_path, "1,same,,,") == ((3, -1, -1, -1), (1,))


class TestSplits:
    def test_a_column_that_names_no_test_rows_is_refused(self, tmp_path):
        path = write(tmp_path, "query,title,label,split\na,t,4,train\nb,t,4,train\nc,t,4,validation\n")
        assert "has no rows for test in its column 'split'" in refusal(path, read_pairs)
        path = write(tmp_path, "query,title,label,split\na,t,4,test\n")
        assert "has no rows for train and validation in its column 'split'" in refusal(path, read_pairs)

    def test_one_query_cannot_be_split(self, tmp_path):
        path = write(tmp_path, "query,title,label\n" + "mug,t,4\n" * 30)
        assert "has no rows for validation and test: each split needs a query of its own" in refusal(path, read_pairs)
        assert len(all_pairs(path)) == 30

    def test_the_split_column_is_kept(self, tmp_path):
        path = write(tmp_path, "query,title,label,split\na,t,4,test\nb,t,4,train\nc,t,4,validation\nd,t,4,train\n")
        splits = read_pairs(path, BOOK).splits
        assert {name: [pair.query for pair in pairs] for name, pairs in splits.items()} == {
            "train": ["b", "d"], "validation": ["c"], "test": ["a"],
        }

    def test_without_validation_rows_some_training_queries_are_held_out(self, tmp_path):
        rows = "".join(f"q{i},t,4,{'test' if i < 5 else 'train'}\n" for i in range(105))
        splits = read_pairs(write(tmp_path, "query,title,label,split\n" + rows), BOOK).splits
        assert [pair.query for pair in splits["test"]] == [f"q{i}" for i in range(5)]
        assert 1 <= len(splits["validation"]) <= 25
        assert len(splits["train"]) + len(splits["validation"]) == 100

    def test_shares_are_about_80_10_10_and_repeatable(self):
        pairs = [Pair(id=str(i), query=f"query {i // 2}", title="t") for i in range(4000)]
        splits = split_by_query(pairs, 7, SHARES)
        # 2,000 queries: a standard deviation of 0.9% for train, 0.7% for the others.
        assert abs(len(splits["train"]) / 4000 - 0.8) < 0.04
        assert abs(len(splits["test"]) / 4000 - 0.1) < 0.03
        assert splits == split_by_query(pairs, 7, SHARES)
        assert splits != split_by_query(pairs, 8, SHARES)

    def test_more_rows_move_no_query(self):
        pairs = [Pair(id=str(i), query=f"query {i}", title="t") for i in range(600)]
        side = {pair.query: pair.split for split in split_by_query(pairs[:300], 0, SHARES).values() for pair in split}
        more = {pair.query: pair.split for split in split_by_query(pairs, 0, SHARES).values() for pair in split}
        assert all(more[query] == split for query, split in side.items())

    @given(st.lists(st.sampled_from(["a", "A", "b", "c", "d", "E f"]), min_size=1, max_size=20), st.integers(0, 99))
    def test_no_query_is_on_two_sides_and_none_is_lost(self, queries, seed):
        pairs = [Pair(id=str(i), query=query, title="t") for i, query in enumerate(queries)]
        splits = split_by_query(pairs, seed, SHARES)
        sides = [{pair.query.casefold() for pair in split} for split in splits.values()]
        distinct = {query.casefold() for query in queries}
        assert sum(map(len, sides)) == len(distinct)
        assert sorted(pair.id for split in splits.values() for pair in split) == sorted(pair.id for pair in pairs)
        assert sum(bool(side) for side in sides) == min(3, len(distinct))
        assert splits["train"]


class TestItemText:
    def test_order_and_labels(self):
        pair = Pair(id="1", query="q", title="Red shoe", description="Soft.", brand="Acme", price="9.99", color="red")
        assert item_text(pair) == "Red shoe | brand: Acme | price: 9.99 | color: red | Soft."

    def test_title_alone(self):
        assert item_text(Pair(id="1", query="q", title="Red shoe")) == "Red shoe"


class TestBadFiles:
    def test_missing(self, tmp_path):
        assert "nothing.csv: there is no such file" in refusal(tmp_path / "nothing.csv")

    @pytest.mark.parametrize("text", ["", " \n\n"])
    def test_empty(self, tmp_path, text):
        assert "pairs.csv: is empty" in refusal(write(tmp_path, text))

    def test_header_alone(self, tmp_path):
        assert "has no rows" in refusal(write(tmp_path, "query,title,label\n"))

    def test_kind_of_file(self, tmp_path):
        message = refusal(write(tmp_path, "x", "pairs.xlsx"))
        assert "unknown kind" in message and ".csv" in message

    def test_not_parquet(self, tmp_path):
        assert "not a readable Parquet file" in refusal(write(tmp_path, "query", "pairs.parquet"))

    def test_not_json(self, tmp_path):
        path = write(tmp_path, '{"query": "a", "title": "t", "label": 4}\n{"query": \n', "pairs.jsonl")
        assert "row 2 (line 2): is not valid JSON" in refusal(path)

    def test_unclosed_quote(self, tmp_path):
        assert "row 2 (line 3): is not valid CSV" in refusal(write(tmp_path, 'query,title,label\na,t,4\nb,"t,4\n'))

    def test_column_missing(self, tmp_path):
        message = refusal(write(tmp_path, "Query,titel,label\na,b,4\n"))
        assert "lacks the column 'query'; it has Query, titel, label; did you mean 'Query'?" in message
        assert "did you mean 'titel'?" in refusal(write(tmp_path, "query,titel,label\na,b,4\n"))

    @pytest.mark.parametrize(
        ("name", "delimiter", "said"),
        [("p.csv", ";", "semicolons, where .csv has commas"), ("p.csv", "\t", "tabs, where .csv has commas"),
         ("p.tsv", ",", "commas, where .tsv has tabs")],
    )  # fmt: skip
    def test_another_delimiter(self, tmp_path, name, delimiter, said):
        path = write(tmp_path, "query,title,label\nhat,Cap,4\n".replace(",", delimiter), name)
        assert f"its cells are separated by {said}" in refusal(path)

    def test_column_twice(self, tmp_path):
        assert "'title' twice" in refusal(write(tmp_path, "query,title,title,label\na,b,c,4\n"))

    def test_renamed_column(self, tmp_path):
        path = write(tmp_path, "query,title,label\na,b,4\n")
        assert "columns.qery: there is no such column" in refusal(path, columns={"qery": "query"})
        assert "lacks the column 'colour'" in refusal(path, columns={"color": "colour"})

    def test_misspelt_step_column(self, tmp_path):
        message = refusal(write(tmp_path, "query,title,label,step_atributes\na,b,4,met\n"))
        assert "'step_atributes' is no step" in message and "did you mean 'step_attributes'?" in message


class TestBadRows:
    def test_all_are_named_by_row_and_line(self, tmp_path):
        text = 'query,title,label,step_category,split\n' \
               'a,"two\nlines",4,same,train\n' \
               'b,t,5,same,train\n' \
               ',t,3,sam,train\n' \
               'c,,excellent,,dev\n' \
               'd,t\n'
        message = refusal(write(tmp_path, text))
        assert "4 of 5 rows cannot be used" in message
        lines = [line.strip() for line in message.splitlines()[1:]]
        assert lines[0].startswith("row 2 (line 4): label '5' is outside the tiers; it should be one of: 4-Excellent")
        assert lines[1].startswith("row 3 (line 5): query is empty; step_category 'sam' is unknown")
        assert "did you mean 'same'?" in lines[1]
        assert lines[2].startswith("row 4 (line 6): title is empty; label 'excellent'")
        assert "split 'dev' is unknown; it should be one of: train, validation, test" in lines[2]
        assert lines[3] == "row 5 (line 7): has 2 cells where the header has 5"

    def test_many_are_counted(self, tmp_path):
        message = refusal(write(tmp_path, "query,title,label\n" + "a,t,9\n" * 25 + "a,t,4\n"))
        assert "25 of 26 rows" in message
        assert "row 10 " in message and "row 11 " not in message and "and 15 more" in message

    @pytest.mark.parametrize("label", ["", "nan", "inf", "4.5", "-4", "5-Excellent", "0_4", "4e0", "４.0"])
    def test_labels_outside_the_tiers(self, tmp_path, label):
        assert f"label {label!r} is outside" in refusal(write(tmp_path, f"query,title,label\na,t,{label}\n"))

    def test_a_line_of_json_that_is_no_object(self, tmp_path):
        path = write(tmp_path, '{"query": "a", "title": "t", "label": 4}\n[1]\n', "pairs.jsonl")
        assert "row 2 (line 2): is not a JSON object" in refusal(path)


_ESCI_PRODUCTS = pa.schema([
    (name, pa.string()) for name in (
        "product_id", "product_locale", "product_title", "product_description", "product_bullet_point",
        "product_brand", "product_color",
    )
])  # fmt: skip


class TestFormat:
    """Files with columns, labels or ratings of other programs."""

    def test_labels_are_mapped(self, tmp_path):
        path = write(tmp_path, "query,title,label\na,t,Exact\nb,t,no\nc,t,2.0\nd,t,EXACT\n")
        labels = {"exact": "4", "No": "1-irrelevant", "2": "3"}
        assert [pair.tier for pair in all_pairs(path, labels=labels)] == [0, 3, 1, 0]
        message = refusal(path, labels={"exact": "4", "good": "3"})
        assert "2 of 4 rows cannot be used" in message
        assert "label 'no' is outside the tiers; it should be one of: exact, good" in message
        assert "which should be one of: 4-Excellent or 4" in refusal(path, labels={"exact": "Perfect"})
        assert "other labels can be mapped to them with labels" in refusal(path)

    def test_a_mapped_label_is_no_grade(self, tmp_path):
        path = write(tmp_path, "query,title,label\na,t,0\nb,t,3\n")
        assert [pair.tier for pair in all_pairs(path, labels={"0": "1", "1": "2", "2": "3", "3": "4"})] == [3, 0]
        assert "label '3' is outside" in refusal(path, labels={"0": "1"})

    @pytest.mark.parametrize(
        ("rating", "tier"),
        [("1", 3), ("1.49", 3), ("1.5", 2), ("2.33", 2), ("2.5", 1), ("3.499", 1), ("3.5", 0), ("9", 0), ("-1", 3)],
    )
    def test_ratings_are_binned(self, tmp_path, rating, tier):
        path = write(tmp_path, f"query,title,label\na,t,{rating}\n")
        assert all_pairs(path, bins=(1.5, 2.5, 3.5))[0].tier == tier

    def test_bins_that_do_not_fit(self, tmp_path):
        path = write(tmp_path, "query,title,label\na,t,2.33\nb,t,good\n")
        for bins in ((1.5, 2.5), (1.5, 2.5, 2.5), (3.5, 2.5, 1.5)):
            assert "should be 3 ascending numbers" in refusal(path, bins=bins)
        assert "label 'good' is outside the tiers; it should be a number" in refusal(path, bins=(1, 2, 3))
        assert "either mapped or binned" in refusal(path, bins=(1, 2, 3), labels={"a": "4"})

    def test_texts_of_a_config(self):
        columns, labels = "{title: product_title, query: 'search, term'}", "{yes: 4, 0: 1-Irrelevant}"
        form = PairsFormat.parse(columns, labels, "", "skip")
        assert form == PairsFormat(
            {"title": "product_title", "query": "search, term"}, {"yes": "4", "0": "1-Irrelevant"}, (), True
        )
        assert PairsFormat.parse(bins="[1, 2.5]") == PairsFormat(bins=(1.0, 2.5))

    @pytest.mark.parametrize("text", ["title=t", "[a]", "{a: {b: c}}", "{a", "{a: [b]}"])
    def test_texts_that_are_no_mapping(self, text):
        with pytest.raises(PairsError, match="labels=.*should be written like {E: 4, S: 3}"):
            PairsFormat.parse(labels=text)
        with pytest.raises(PairsError, match="bins="):
            PairsFormat.parse(bins=text)

    def test_bad_rows_are_left_out_and_said(self, tmp_path):
        good = "".join(f"q{n},t,3\n" for n in range(30))
        path = write(tmp_path, f"query,title,label\na,t,4\nb,t,7\n{good}c,,1\n")
        file = read_pairs(path, BOOK, form=PairsFormat(skip_bad_rows=True))
        assert sum(map(len, file.splits.values())) == 31
        (note,) = file.notes
        first, *lines = note.split("\n  ")
        assert first == "rows left out since they cannot be used: 2"
        assert lines[0].startswith("row 2 (line 3): label '7'") and lines[1] == "row 33 (line 34): title is empty"

    def test_a_file_of_bad_rows_alone_is_refused(self, tmp_path):
        path = write(tmp_path, "query,title,label\na,t,7\n")
        assert "1 of 1 rows cannot be used" in refusal(path, skip_bad_rows=True)

    def test_pairs_with_two_labels_are_counted(self, tmp_path):
        rows = ["Mug,t,4", "mug,t,3", "mug,t,1", "mug,u,1", "cap,t,2", "cap,t,2"]
        path = write(tmp_path, "query,title,label,split\n" + "".join(f"{row},{split}\n" for row in rows for split in (
            "train", "validation")) + "rug,t,1,test\n")
        assert read_pairs(path, BOOK).notes == ["pairs that stand more than once with different labels: 1"]

    def test_test_pairs_in_a_file_of_their_own(self, tmp_path):
        train = write(tmp_path, "query,title,label\n" + "".join(f"q{n},t,4\n" for n in range(40)), "train.csv")
        test = write(tmp_path, "query,title,label\nq3,t,1\nhat,t,4\n", "test.csv")
        file = read_pairs(train, BOOK, test=test)
        assert [(pair.query, pair.split) for pair in file.splits["test"]] == [("q3", "test"), ("hat", "test")]
        assert len(file.splits["train"]) + len(file.splits["validation"]) == 40 and file.splits["validation"]
        known = "q3" in [pair.query for pair in file.splits["train"]]
        assert ("queries of the test pairs that are trained on too: 1" in file.notes) == known

    def test_labels_of_test_pairs_that_contradict_their_steps_are_counted(self, tmp_path):
        train = write(tmp_path, "query,title,label\n" + "".join(f"q{n},t,4\n" for n in range(40)), "train.csv")
        test = write(tmp_path, "query,title,label,step_category\nhat,t,4,complement\n", "test.csv")
        file = read_pairs(train, BOOK, test=test)
        assert file.contradicting == (1,) and "labels that contradict the rule book: 1 pairs" in file.notes[0]

    def test_test_pairs_in_both_files_are_refused(self, tmp_path):
        text = "query,title,label,split\na,t,4,train\nb,t,4,validation\nc,t,4,test\n"
        path = write(tmp_path, text)
        with pytest.raises(PairsError, match="has rows for test in its column 'split', and so has"):
            read_pairs(path, BOOK, test=write(tmp_path, text, "test.csv"))
        short = write(tmp_path, text.rpartition("c,")[0], "short.csv")
        assert len(read_pairs(short, BOOK, test=path).splits["test"]) == 3

    def test_frames_and_records(self):
        rows = [{"query": "a", "title": "t", "label": 4, "brand": None}, {"query": "b", "title": "u", "label": 3}]
        expected = read_labelled(rows, BOOK).pairs
        assert [(pair.title, pair.tier, pair.row) for pair in expected] == [("t", 0, 1), ("u", 1, 2)]
        frames = [pa.Table.from_pylist(rows), pandas.DataFrame(rows), polars.DataFrame(rows), iter(rows)]
        assert all(read_labelled(frame, BOOK).pairs == expected for frame in frames)
        with pytest.raises(PairsError, match="the rows: 1 of 1 rows.*\n  row 1: title is not valid Unicode"):
            read_labelled([{"query": "a", "title": "\ud800", "label": 4}], BOOK)
        with pytest.raises(PairsError, match="the rows: lacks the column 'label'"):
            read_labelled(pandas.DataFrame({"query": ["a"], "title": ["t"]}), BOOK)
        with pytest.raises(PairsError, match="there are none"):
            read_labelled([], BOOK)


    def test_numbers_of_frames_are_as_in_a_file(self, tmp_path):
        table = pa.table({"query": ["a", "b"], "title": ["t", "u"], "price": pa.array([9.99, None], pa.float32()),
                          "label": pa.array([3.3, 1.0], pa.float32())})  # fmt: skip
        form = PairsFormat(bins=(1.5, 2.5, 3.3))
        pq.write_table(table, tmp_path / "pairs.parquet")
        expected = read_labelled(tmp_path / "pairs.parquet", BOOK, form).pairs
        assert [(pair.price, pair.tier) for pair in expected] == [("9.99", 0), ("", 3)]
        for frame in (table, table.to_pandas(), polars.from_arrow(table)):
            assert read_labelled(frame, BOOK, form).pairs == expected


class TestPublicReleases:
    @pytest.fixture
    def esci(self, tmp_path) -> Path:
        rows = [(i, f"query {i // 2}", f"B{i % 3}", "us", "ESCI"[i % 4], 1, "train") for i in range(40)]
        rows += [(40, "hat", "B0", "us", "E", 1, "test"), (41, "hat", "B9", "us", "E", 1, "test"),
                 (42, "hat", "B0", "us", "E", 0, "test"), (43, "sombrero", "B0", "es", "E", 1, "test")]
        schema = ["example_id", "query", "product_id", "product_locale", "esci_label", "small_version", "split"]
        columns = dict(zip(schema, map(list, zip(*rows, strict=True)), strict=True))
        pq.write_table(pa.table(columns), tmp_path / EXAMPLES)
        products = {
            "product_id": ["B0", "B1", "B2", "B9", "B0"],
            "product_locale": ["us", "us", "us", "us", "es"],
            "product_title": ["Sun &amp; rain hat", "Cap", "Boot", None, "Gorro"],
            "product_description": ["<p>For <b>all</b> weather</p>", None, None, None, None],
            "product_bullet_point": ["Light\nand soft", None, None, None, None],
            "product_brand": ["Acme", None, None, None, None],
            "product_color": [None, "red", None, None, None],
        }
        pq.write_table(pa.table(products), tmp_path / PRODUCTS)
        return tmp_path

    def test_esci(self, esci):
        file = read_esci(esci, BOOK)
        assert file.dropped == 1  # B9 has no title
        assert file.splits["test"] == [
            Pair(id="40", query="hat", title="Sun & rain hat", description="Light and soft For all weather",
                 brand="Acme", tier=0, steps=(0, -1, -1, -1), split="test")
        ]
        train, validation = file.splits["train"], file.splits["validation"]
        assert len(train) + len(validation) == 40 and validation
        assert not {pair.query for pair in train} & {pair.query for pair in validation}
        # Example i has label ESCI[i % 4]: tiers 0, 1, 2, 3.
        assert all(pair.tier == int(pair.id) % 4 for pair in train)

    def test_esci_whole_or_another_locale(self, esci):
        assert [pair.id for pair in read_esci(esci, BOOK, small_version=False).splits["test"]] == ["40", "42"]
        assert [pair.title for pair in read_esci(esci, BOOK, locale="es").splits["test"]] == ["Gorro"]

    def test_esci_missing(self, tmp_path):
        with pytest.raises(PairsError, match="not a readable ESCI release"):
            read_esci(tmp_path, BOOK)

    def test_esci_without_a_column(self, esci):
        pq.write_table(pq.read_table(esci / PRODUCTS).drop_columns("product_brand"), esci / PRODUCTS)
        with pytest.raises(PairsError, match="not of the ESCI release: it lacks product_brand"):
            read_esci(esci, BOOK)

    @pytest.mark.slow
    def test_esci_is_read_in_the_memory_of_the_pairs_that_are_kept(self, tmp_path):
        """A release of 200,000 products of 4 KB, about 0.8 GB of text; the pairs that are read have 1,000 of them."""
        with pq.ParquetWriter(tmp_path / PRODUCTS, _ESCI_PRODUCTS) as writer:
            for first in range(0, 200_000, 2000):
                names = [f"B{n}" for n in range(first, first + 2000)]
                texts = [f"{name} " * (4000 // (len(name) + 1)) for name in names]
                columns = [names, ["us"] * 2000, names, texts, names, names, names]
                writer.write_table(pa.table(columns, schema=_ESCI_PRODUCTS))
        examples = {
            "example_id": range(1000), "query": [f"query {n // 10}" for n in range(1000)],
            "product_id": [f"B{200 * n}" for n in range(1000)], "product_locale": ["us"] * 1000,
            "esci_label": ["E"] * 1000, "small_version": [1] * 1000, "split": ["train", "test"] * 500,
        }  # fmt: skip
        pq.write_table(pa.table({name: list(column) for name, column in examples.items()}), tmp_path / EXAMPLES)
        code = (
            "import resource, sys; from agrl_jax.data.esci import read_esci; from agrl_jax.rulebook import book; "
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024; rules = book.load(); "
            "before = peak(); found = read_esci(sys.argv[1], rules); "
            "print(sum(map(len, found.splits.values())), peak() - before)"
        )
        out = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout
        count, megabytes = out.split()
        assert int(count) == 1000
        assert float(megabytes) < 300

    def test_wands_keeps_quotes_and_counts_what_it_leaves_out(self, tmp_path):
        write(tmp_path, "query_id\tquery\n0\tdesk\n", "query.csv")
        columns = "product_id\tproduct_name\tproduct_class\tproduct_description"
        write(tmp_path, f'{columns}\n8\t"Mod" 48" desk\tDesks\t"big, ""oak"""\n9\t\t\t\n', "product.csv")
        rows = "".join(f"{n}\t{query}\t{product}\tExact\n" for n, (query, product) in enumerate(
            [(0, 8), (0, 9), (0, 7), (1, 8), (0, 8)]))
        write(tmp_path, "id\tquery_id\tproduct_id\tlabel\n" + rows, "label.csv")
        file = read_wands(tmp_path, BOOK)
        pairs = [pair for split in file.splits.values() for pair in split]
        assert [(pair.id, pair.title) for pair in pairs] == [("0", '"Mod" 48" desk'), ("4", '"Mod" 48" desk')]
        assert file.dropped == 3

    def test_wands(self, tmp_path):
        write(tmp_path, "query_id\tquery\tquery_class\n0\tsalon chair\tMassage Chairs\n1\tdesk\tDesks\n", "query.csv")
        write(tmp_path, "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\n"
              "7\tbarber chair\tMassage Chairs\tFurniture / Chairs\tsturdy , black\n8\toak desk\t\t\t\n", "product.csv")
        write(tmp_path, "id\tquery_id\tproduct_id\tlabel\n0\t0\t7\tExact\n1\t0\t8\tIrrelevant\n2\t1\t8\tPartial\n",
              "label.csv")
        splits = read_wands(tmp_path, BOOK).splits
        pairs = {pair.id: pair for split in splits.values() for pair in split}
        assert {name: pairs[name].tier for name in pairs} == {"0": 0, "1": 3, "2": 1}
        assert (pairs["0"].query, pairs["0"].title, pairs["0"].category) == ("salon chair", "barber chair",
                                                                             "Massage Chairs")
        assert pairs["0"].split == pairs["1"].split != pairs["2"].split

    def test_wands_with_an_unknown_label(self, tmp_path):
        write(tmp_path, "query_id\tquery\n0\tdesk\n", "query.csv")
        columns = "product_id\tproduct_name\tproduct_class\tproduct_description"
        write(tmp_path, f"{columns}\n8\toak desk\t\t\n", "product.csv")
        write(tmp_path, "id\tquery_id\tproduct_id\tlabel\n5\t0\t8\tPerfect\n", "label.csv")
        with pytest.raises(PairsError, match="id 5: unknown label 'Perfect'"):
            read_wands(tmp_path, BOOK)
