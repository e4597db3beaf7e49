"""Side by side: GSB by hand, a page that does not contain which list is whose, answers in a browser, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from workdirs import make_workdir

from agrl_jax import side_by_side
from agrl_jax.data.pairs import PairsError
from agrl_jax.evaluation.html import render
from agrl_jax.judging.engine import Judgement
from agrl_jax.runtime.config import ConfigError
from agrl_jax.side_by_side import Gsb, SideBySideError, arrange, count, gsb

HOSTILE = "</script><b>shoes</b>"
ROWS = [{"query": q, "title": f"item {i} of {q}", "price": None} for q in (HOSTILE, "bag") for i in range(3)]
ROWS += [{"query": "hat", "title": "red hat"}, {"query": "cup", "title": "cup"}, {"query": "cup", "title": "mug"}]
QUERIES = {HOSTILE: [0, 1, 2], "bag": [3, 4, 5], "hat": [6], "cup": [7, 8]}
A = {i: (-4.0, -float(i)) for i in range(7)} | {7: (-4.0, -4.0), 8: (-3.0, -3.0)}  # reversed, except the cups
B = {i: (-4.0, float(i)) for i in range(7)} | {7: (-3.0, -3.2), 8: (-3.0, -3.0)}  # the order of the file


# Lists


def test_items_are_ordered_by_tier_then_by_expected_grade() -> None:
    grades = {"good": 3, "fair": 2, "bad": 1}
    judged = [
        Judgement("fair", {"good": 0.2, "fair": 0.6, "bad": 0.2}),  # expects 2.0
        Judgement("good", {"good": 0.4, "fair": 0.3, "bad": 0.3}),  # expects 2.1, and has the better tier
        Judgement("fair", {"good": 0.4, "fair": 0.6, "bad": 0.0}),  # expects 2.4
    ]
    ranks = [side_by_side.rank(one, grades) for one in judged]
    assert sorted(range(3), key=ranks.__getitem__) == [1, 2, 0]
    assert ranks[2] == (-2, pytest.approx(-2.4))


def test_lists_are_cut_equal_ones_not_asked_and_single_items_left_out() -> None:
    study = arrange(ROWS, QUERIES, A, B, top=2, seed=0)
    lists = {c["query"]: {study.left[c["query"]]: c["left"]} | {_other(study, c): c["right"]} for c in _asked(study)}
    assert lists == {HOSTILE: {"a": [2, 1], "b": [0, 1]}, "bag": {"a": [5, 4], "b": [3, 4]}}
    assert (study.equal, study.single) == (["cup"], ["hat"])
    assert sorted(study.data["items"]) == [0, 1, 2, 3, 4, 5]
    without = arrange(ROWS, QUERIES, A, {i: r for i, r in B.items() if i not in (1, 2)}, top=2, seed=0)
    assert HOSTILE in without.single  # both judged only one of its items


def _asked(study) -> list[dict]:
    return study.data["comparisons"]


def _other(study, comparison) -> str:
    return {"a": "b", "b": "a"}[study.left[comparison["query"]]]


def test_the_page_does_not_know_which_judge_is_which() -> None:
    """Swapping the judges changes only the key. The sides are drawn again for each query and seed."""
    queries = {f"q{i}": [0, 1, 2] for i in range(200)}
    one, swapped = arrange(ROWS, queries, A, B, 3, seed=0), arrange(ROWS, queries, B, A, 3, seed=0)
    assert render("side_by_side", one.data) == render("side_by_side", swapped.data)
    assert all(one.left[query] != swapped.left[query] for query in queries)
    assert 70 < sum(side == "a" for side in one.left.values()) < 130
    assert arrange(ROWS, queries, A, B, 3, seed=1).left != one.left
    some = dict(list(queries.items())[:5])
    assert arrange(ROWS, some, A, B, 3, seed=0).left.items() <= one.left.items()


# GSB


def test_gsb_by_hand() -> None:
    assert gsb(0, 0, 0) == Gsb(0, 0, 0, None, None, None)
    assert gsb(0, 0, 1).value == -1 and gsb(0, 0, 1).low is None
    one = gsb(60, 100, 40)
    assert one.value == pytest.approx(0.1)
    # The mean of 200 values with variance 0.5 - 0.01, so +-1.96 * 0.0495 by the normal approximation.
    assert (one.low, one.high) == (pytest.approx(0.003, abs=0.01), pytest.approx(0.197, abs=0.01))
    assert gsb(5, 0, 0)[3:] == (1, 1, 1)


def test_answers_are_counted_by_whose_list_was_left() -> None:
    left = {"p": "a", "q": "b", "r": "a", "s": "b", "t": "b"}
    answers = {"p": "left", "q": "left", "r": "right", "s": "same"}  # better: a, b, b, neither
    assert count(answers, left)[:4] == (2, 1, 1, 0.25)


# The page


def test_the_page_in_a_browser(browser, tmp_path: Path) -> None:
    study = arrange(ROWS, QUERIES, A, B, top=3, seed=0)
    page = tmp_path / "page.html"
    page.write_text(render("side_by_side", study.data))
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.get(page.as_uri())

    def find(selector: str) -> list:
        return browser.find_elements("css selector", selector)

    def press(key: str) -> None:
        browser.switch_to.active_element.send_keys(key)

    def pressed() -> list[str]:
        return [b.get_dom_attribute("data-answer") for b in find("[aria-pressed='true']")]

    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert not [log for log in browser.get_log("browser") if log["level"] == "SEVERE"]
    assert find("#query")[0].text == HOSTILE and find("#count")[0].text == "0 of 2 queries answered"
    expected = [f"item {row} of {HOSTILE}" for row in _asked(study)[0]["left"]]
    assert [item.text for item in find("#left li")] == expected and not find("#left li b b")
    find("[data-answer='left']")[0].click()
    assert find("#query")[0].text == "bag" and find("#count")[0].text == "1 of 2 queries answered"
    _reload_until(browser, "1 of 2 queries answered")
    assert find("#query")[0].text == "bag"
    press("p")
    assert find("#query")[0].text == HOSTILE and pressed() == ["left"]
    press("\ue014")  # the right arrow changes the answer
    press("\ue015")  # the down arrow
    assert "All are answered" in find("#message")[0].text and pressed() == ["same"]
    find("#save")[0].click()
    saved = tmp_path / f"answers_{study.data['page']}.json"
    _wait(saved.exists)
    key = {"page": study.data["page"], "left": study.left}
    answers = side_by_side.read_answers(saved, key)
    assert answers == {HOSTILE: "right", "bag": "same"}

    browser.execute_script("localStorage.clear()")
    _reload_until(browser, "0 of 2 queries answered")
    find("#file")[0].send_keys(str(saved))
    _wait(lambda: find("#count")[0].text == "2 of 2 queries answered")
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps({"page": "other", "answers": {"bag": "left"}}))
    find("#file")[0].send_keys(str(foreign))
    _wait(lambda: "another page" in find("#message")[0].text)
    press("n")
    assert find("#query")[0].text == "bag" and pressed() == ["same"]


def test_queries_that_every_object_has_a_name_for_are_not_answered_already(browser, tmp_path: Path) -> None:
    study = arrange(ROWS, {"constructor": [0, 1, 2], "__proto__": [3, 4, 5]}, A, B, top=3, seed=0)
    page = tmp_path / "page.html"
    page.write_text(render("side_by_side", study.data))
    browser.get(page.as_uri())
    assert browser.find_element("id", "count").text == "0 of 2 queries answered"
    for answered in (1, 2):
        browser.find_element("css selector", "[data-answer='left']").click()
        _reload_until(browser, f"{answered} of 2 queries answered")


def _reload_until(browser, count: str) -> None:
    """Another process of Chromium writes what a page keeps: a page reloaded at once may read what was there before."""

    def reloaded() -> bool:
        browser.refresh()
        return browser.find_element("id", "count").text == count

    _wait(reloaded)


def _wait(until) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(None, 20, poll_frequency=0.05).until(lambda _: until())


# The command


def flags(folder: Path, **given) -> SimpleNamespace:
    values = {
        "a": None, "b": None, "queries": None, "answers": None, "out": str(folder / "page.html"), "top": 10,
        "sample": 0, "seed": 0, "a_stage": "best", "b_stage": "best", "batch_size": 4, "overwrite": False,
    }  # fmt: skip
    return SimpleNamespace(**values | given)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_two_stages_of_a_run_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    run = str(make_workdir(tmp_path / "run"))
    rows = [{"query": f"shoes {q}", "title": "red " * (5 * i % 7) + "Nike"} for q in range(4) for i in range(4)]
    queries = write_rows(tmp_path / "rows.jsonl", [*rows, {"query": "shoes 0", "title": ""}])
    side_by_side.run(flags(tmp_path, a=run, b=run, a_stage="sft_end", queries=queries))
    said = capsys.readouterr().out
    assert "row 17: title is empty" in said
    key = json.loads((tmp_path / "page.key.json").read_text())
    asked = list(key["left"])
    assert asked and len(asked) + len(key["equal"]) == 4
    page = (tmp_path / "page.html").read_text()
    assert key["page"] in page and run not in page and "sft_end" not in page

    answers = tmp_path / "answers.json"
    better = {query: "left" if side == "b" else "right" for query, side in key["left"].items()}
    answers.write_text(json.dumps({"page": key["page"], "answers": better}))
    side_by_side.run(flags(tmp_path, answers=str(answers)))
    said = capsys.readouterr().out
    assert "+1.000 to +1.000" in said or len(asked) == 1
    assert f"A: {run} (sft_end)" in said and "not answered" not in said
    answers.write_text(json.dumps({"page": key["page"], "answers": {}}))
    side_by_side.run(flags(tmp_path, answers=str(answers)))
    assert f"{len(asked)} of {len(asked)} queries are not answered" in capsys.readouterr().out

    with pytest.raises(SideBySideError, match="another page.*--overwrite"):
        side_by_side._write(tmp_path / "page.html", {}, {"page": "other"}, overwrite=False)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--a, --b and --queries"):
        side_by_side.run(flags(tmp_path, a="x"))
    with pytest.raises(ConfigError, match="--queries does not go with it"):
        side_by_side.run(flags(tmp_path, answers="x", queries="y"))
    with pytest.raises(PairsError, match="lacks the column 'query'"):
        side_by_side.read_queries(write_rows(tmp_path / "a.jsonl", [{"title": "x"}]))
    with pytest.raises(PairsError, match="row 2: query is empty"):
        side_by_side.read_queries(write_rows(tmp_path / "b.jsonl", [{"query": "x", "title": "x"}, {"title": "y"}]))
    with pytest.raises(SideBySideError, match="page.key.json: cannot be read"):
        side_by_side.run(flags(tmp_path, answers=str(tmp_path / "none.json")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('["left"]', "should be a JSON object; it should be"),
        ('{"page": "p2", "answers": {}}', "answers to the page p2"),
        ('{"page": "p1", "answers": []}', "should be {query: answer}"),
        ('{"page": "p1", "answers": {"hat": "left"}}', "does not ask for 'hat'"),
        ('{"page": "p1", "answers": {"bag": "better"}}', "'better', should be left, same, right"),
    ],
)
def test_answers_to_something_else_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(SideBySideError, match=f"answers.json: .*{message}"):
        side_by_side.read_answers(tmp_path / "answers.json", {"page": "p1", "left": {"bag": "a"}})
