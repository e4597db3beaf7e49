"""Rankings by judged pairs: figures by hand and by scipy, files, and judgement lists read back by other tools."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
from scipy import stats

from agrl_jax import rank
from agrl_jax.data.format import PairsFormat
from agrl_jax.data.rows import PairsError
from agrl_jax.evaluation import rankings
from agrl_jax.judging import lists
from agrl_jax.rulebook.book import load

ir_measures = pytest.importorskip("ir_measures")
BOOK = load("four_tier")
ROOT = Path(__file__).parent.parent
GAINS = {"q": {"a": 3, "b": 2, "c": 0, "d": 1}, "r": {"a": 0}, "s": {"a": 3}}
IDEAL = 3 + 2 / math.log2(3) + 1 / 2


def test_figures_by_hand():
    """The list of q is an item that is not judged, then b, c, a. r has no gain, s no list, x no judgements."""
    found = rankings.measure(GAINS, {"q": ["z", "b", "c", "a"], "r": ["a"], "x": ["a"]}, k=3, good=2)
    assert list(found) == ["q", "r", "s"]
    assert found["q"]["ndcg"] == pytest.approx(2 / math.log2(3) / IDEAL)
    assert found["q"]["precision"] == pytest.approx(1 / 3) and found["q"]["judged"] == pytest.approx(2 / 3)
    assert found["r"] == {"ndcg": 0, "precision": 0, "judged": 1}
    assert found["s"] == {"ndcg": 0, "precision": 0, "judged": 0}
    best = rankings.measure(GAINS, {"q": ["a", "b", "d"]}, k=3, good=2)["q"]
    assert best["ndcg"] == pytest.approx(1) and best["precision"] == pytest.approx(2 / 3)


def test_exponential_gains_by_hand():
    found = rankings.measure(GAINS, {"q": ["b", "a"]}, k=2, good=2, exponential=True)["q"]
    assert found["ndcg"] == pytest.approx((3 + 7 / math.log2(3)) / (7 + 3 / math.log2(3)))
    assert found["precision"] == 1  # precision takes the gains as they are


def test_gains_that_are_too_large_to_be_exponential_are_refused():
    with pytest.raises(rankings.RankingError, match="within 20 grades, not 100"):
        rankings.measure({"q": {"a": 100, "b": 0}}, {"q": ["b", "a"]}, k=2, good=2, exponential=True)


def test_the_paired_test_is_that_of_scipy():
    a, b = np.random.default_rng(0).random((2, 20))
    found = rankings.compare(a, b)
    assert found["p"] == pytest.approx(stats.ttest_1samp(b - a, 0).pvalue)
    half = stats.t.ppf(0.975, 19) * np.std(b - a, ddof=1) / math.sqrt(20)
    assert (found["low"], found["high"]) == pytest.approx((found["difference"] - half, found["difference"] + half))
    assert found["better"] + found["worse"] == 20 and found["better"] == int((b > a).sum())
    other = rankings.compare(b, a)
    assert other["difference"] == pytest.approx(-found["difference"]) and other["p"] == pytest.approx(found["p"])


@pytest.mark.parametrize("b", [[0.5], [0.5, 0.5, 0.5]])
def test_without_spread_there_is_no_test(b):
    found = rankings.compare([0.25] * len(b), b)
    assert found["difference"] == 0.25 and found["p"] is found["low"] is found["high"] is None


def test_a_missing_library_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(rankings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(rankings.RankingError, match=r"`ir_measures`: pip install 'agrl_jax\[rank\]'"):
        rankings.measure(GAINS, {}, 3, 2)


# Files

JUDGED = """\
query_id,query,id,title,judge_tier
7,red shoes,p1,"Shoe, red",4-Excellent
7,red shoes,p2,Boot,2
8,oat milk,p1,"Shoe, red",1-Irrelevant
8,oat milk,p3,Oat milk,
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_judged_file_gives_gains(tmp_path):
    judged = lists.read_judged_items(write(tmp_path / "j.csv", JUDGED), BOOK, "id")
    assert judged.gains == {"red shoes": {"p1": 3, "p2": 1}, "oat milk": {"p1": 0}} and judged.unjudged == 1
    assert judged.query_ids == {"red shoes": "7", "oat milk": "8"}
    labels = PairsFormat(columns={"judge_tier": "grade"}, labels={"E": "4", "I": "1"})
    file = write(tmp_path / "l.csv", "query,id,grade\nq,a,E\nq,b,I\n")
    assert lists.read_judged_items(file, BOOK, "id", labels).gains == {"q": {"a": 3, "b": 0}}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("7,red shoes,p1,x,3", "row 2: id 'p1' has another tier in row 1"),
        ("7,red shoes,p9,x,good", "row 2: judge_tier 'good' should be one of: 4-Excellent"),
        ("7,red shoes,,x,3", "row 2: id is empty"),
    ],
)
def test_judged_rows_that_cannot_be_used_are_refused(tmp_path, row, said):
    file = write(tmp_path / "j.csv", "\n".join([*JUDGED.splitlines()[:2], row]))
    with pytest.raises(PairsError, match="1 of 2 rows cannot be used") as error:
        lists.read_judged_items(file, BOOK, "id")
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "query,id\nq,b\nr,a\nq,a\nq,c\n",
        "query,id,rank\nq,c,10\nr,a,1\nq,b,2\nq,a,9\n",
        "query,id,score\nq,c,-1e3\nr,a,1\nq,b,0.5\nq,a,0.25\n",
    ],
)
def test_a_list_is_in_order_of_rank_of_score_or_of_the_file(tmp_path, text):
    assert lists.read_list(write(tmp_path / "a.csv", text), "id") == {"q": ["b", "a", "c"], "r": ["a"]}


def test_lists_that_cannot_be_used_are_refused(tmp_path):
    file = write(tmp_path / "a.csv", "query,id,rank\nq,a,1\nq,a,2\nq,b,first\nq,,3\nq,c,NaN\n")
    with pytest.raises(PairsError, match="4 of 5 rows cannot be used") as error:
        lists.read_list(file, "id")
    assert "row 2: id 'a' stands twice for the query 'q'" in str(error.value)
    assert "row 3: rank 'first' should be a number" in str(error.value)
    assert "row 5: rank 'NaN' should be a number" in str(error.value)


def test_the_item_is_what_all_files_have(tmp_path):
    judged = write(tmp_path / "j.csv", JUDGED)
    titles = write(tmp_path / "a.csv", "query,title\nq,a\n")
    assert lists.item_column([judged], {}) == "id" and lists.item_column([judged, titles], {}) == "title"
    assert lists.item_column([judged], {"id": "title"}) == "title"
    assert lists.item_column([judged], {}, "query") == "query"
    with pytest.raises(PairsError, match="a.csv: lacks the column 'sku'"):
        lists.item_column([titles], {}, "sku")


# Judgement lists


def qrels(path: Path) -> list[tuple[str, str, int]]:
    return [(one.query_id, one.doc_id, one.relevance) for one in ir_measures.read_trec_qrels(str(path))]


def test_qrels_are_what_ir_measures_reads(tmp_path):
    judged = lists.read_judged_items(write(tmp_path / "j.csv", JUDGED), BOOK, "id")
    assert lists.write_qrels(tmp_path / "out.qrels", judged) == [tmp_path / "out.qrels"]
    assert qrels(tmp_path / "out.qrels") == [("7", "p1", 3), ("7", "p2", 1), ("8", "p1", 0)]


def test_names_with_white_space_are_numbered_in_qrels(tmp_path):
    file = write(tmp_path / "j.csv", JUDGED.replace("query_id", "other"))
    judged = lists.read_judged_items(file, BOOK, "title")
    written = lists.write_qrels(tmp_path / "out.qrels", judged)
    assert [path.name for path in written] == ["out.qrels", "out.qrels.queries.tsv", "out.qrels.items.tsv"]
    assert qrels(tmp_path / "out.qrels") == [("1", "1", 3), ("1", "2", 1), ("2", "1", 0)]
    assert written[1].read_text() == "1\tred shoes\n2\toat milk\n"
    assert written[2].read_text() == "1\tShoe, red\n2\tBoot\n"


def test_queries_of_one_id_are_numbered(tmp_path):
    judged = lists.read_judged_items(write(tmp_path / "j.csv", JUDGED.replace("8,oat", "7,oat")), BOOK, "id")
    lists.write_qrels(tmp_path / "out.qrels", judged)
    assert {query for query, _, _ in qrels(tmp_path / "out.qrels")} == {"1", "2"}


def test_lists_for_quepid_and_opensearch(tmp_path):
    judged = lists.read_judged_items(write(tmp_path / "j.csv", JUDGED), BOOK, "title")
    lists.write_quepid(tmp_path / "out.csv", judged)
    with (tmp_path / "out.csv").open(newline="") as file:
        assert list(csv.DictReader(file))[0] == {"query": "red shoes", "docid": "Shoe, red", "rating": "3"}
    lists.write_opensearch(tmp_path / "out.json", judged)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["type"] == "IMPORT_JUDGMENT" and found["name"] == "out" and len(found["judgmentRatings"]) == 2
    assert found["judgmentRatings"][1] == {"query": "oat milk", "ratings": [{"docId": "Shoe, red", "rating": "0.000"}]}


# The command


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agrl_jax.rank", *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_command_compares_two_lists(tmp_path):
    write(tmp_path / "j.csv", "query,id,judge_tier\n" + "".join(f"q{q},a,4\nq{q},b,1\n" for q in range(3)))
    write(tmp_path / "old.csv", "query,id\n" + "".join(f"q{q},b\nq{q},a\n" for q in range(3)))
    write(tmp_path / "new.csv", "query,id\nq0,a\nq0,b\nq1,b\nq1,a\nnone,a\n")
    done = command(tmp_path, "--judged=j.csv", "--a=old.csv", "--b=new.csv", "--k=2", "--qrels=out.qrels")
    assert done.returncode == 0, done.stderr
    second = 1 / math.log2(3)  # nDCG of a list with the good item second
    mean = (1 + second) / 3  # q2 has no list
    assert f"nDCG@2 a {second:.4f}, b {mean:.4f}, difference {mean - second:+.4f} [" in done.stdout
    assert "b better on 1, worse on 1, equal on 1" in done.stdout
    assert "queries of j.csv that new.csv does not list, worth 0: 1" in done.stdout
    assert "queries of new.csv that are not judged, left out: 1" in done.stdout
    with (tmp_path / "ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["query"] for row in rows] == ["q2", "q1", "q0"] and float(rows[2]["ndcg_b"]) == 1
    summary = json.loads((tmp_path / "ranking.json").read_text())
    assert summary["precision"]["b"] == pytest.approx(1 / 3) and len(qrels(tmp_path / "out.qrels")) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--judged=no_such.csv",), "no_such.csv: there is no such file"),
        (("--judged=j.csv", "--item=sku"), "j.csv: lacks the column 'sku'"),
        (("--judged=j.csv", "--qrels=none/out.qrels"), "--qrels=none/out.qrels: there is no folder none"),
    ],
)
def test_the_command_refuses_in_one_message(tmp_path, monkeypatch, capfd, arguments, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "j.csv", JUDGED)
    assert commands.exit_code(rank.main, *arguments) == 2
    assert said in capfd.readouterr().err
