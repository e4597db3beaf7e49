"""The report: its figures by hand, its messages about missing files, and the page in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import polars as pl
import pytest
from test_scorecard import BOOK, random_judgements

from agrl_jax import report
from agrl_jax.evaluation import intervals, judgements, tables

HOSTILE = "<script>document.title = 'taken'</script><b>shoes</b>"


def row(i: int, **fields) -> dict:
    truth = {"category": "same", "brand": None, "tier": "4-Excellent"}
    stated = {"category": "same" if i % 2 else "other", "brand": "match", "tier": "4-Excellent"}
    return {
        "step": 1 + i, "stage": "rl", "id": f"p{i}", "family": "brand", "query": f"query {i}", "title": "a shoe",
        "truth": truth, "sample": 0, "guided": False, "forced": "", "text": "Category: same", "finished": True,
        "stated": stated, "parts": {"tier": 1.0, "brand": None}, "reward": 1.0, "passed": True, "advantage": -0.5,
    } | fields  # fmt: skip


def make(folder: Path) -> Path:
    """The logs of a run of 90 steps: `format` rises throughout, accuracy falls from step 30 to 90."""
    folder.mkdir()
    accuracy = {30: 0.6, 60: 0.58, 90: 0.5}
    steps = [
        {"stage": "rl", "step": s, "reward/total": 1.0, "reward/total_spread": 0.1, "reward/tier": 0.5,
         "reward/tier_spread": 0.1, "reward/format": s / 100, "reward/format_spread": 0.1,
         "policy/entropy": float("nan")}
        | ({"validation/accuracy": accuracy[s]} if s in accuracy else {})
        for s in range(1, 91)
    ]  # fmt: skip
    hostile = {"query": HOSTILE, "family": "plain", "guided": True, "forced": "</script>Category: same\n"}
    samples = [*map(row, range(23)), row(23, **hostile)]
    for name, rows in (("metrics.jsonl", steps), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in rows))
    judged = random_judgements(1)
    judgements.write(folder / judgements.FILE, "rl", {"b_eval": judged}, BOOK)
    tables.write(folder / "scorecard.json", {"rl": {"b_eval": intervals.score(judged, BOOK, bootstrap=20)}})
    return folder


def test_a_part_that_rises_while_accuracy_falls_is_an_alarm(tmp_path: Path) -> None:
    run = report._run(make(tmp_path / "run"))
    (alarm,) = run["alarms"]
    assert (alarm["part"], alarm["start"], alarm["end"]) == ("format", 30, 90)
    assert (alarm["rise"], alarm["fall"]) == pytest.approx((0.6, 0.1))
    assert "policy/entropy" not in run["curves"]  # not a number
    assert run["curves"]["reward/format"][59] == [60, 0.6, pytest.approx((0.57 + 0.58 + 0.59 + 0.6) / 4)]
    curves = run["curves"] | {"validation/accuracy": [[30, 0.6, 0.6], [60, 0.5, 0.5], [90, 0.59, 0.59]]}
    assert report.alarms(curves, run["parts"]) == []


def test_confusion_counts_known_truths_by_what_was_stated() -> None:
    frame = pl.DataFrame(
        {"stage": "rl", "split": "b_eval", "tier": ["x", "x", "y", "y"], "judged_tier": ["x", None, "x", "y"],
         "prob_y": 0.5, "prob_x": 0.5, "step_s": ["a", None, None, None], "judged_step_s": ["b", "b", "a", "a"]}
    )  # fmt: skip
    (group,) = report.confusions(frame)
    tier, step = ([[cell["n"] for cell in line["cells"]] for line in m["rows"]] for m in group["matrices"])
    assert tier == [[1, 1, 0], [0, 1, 1]]  # y, then x, in the order of the book; the last column: no tier stated
    assert step == [[0, 1, 0], [0, 0, 0]] and group["matrices"][1]["n"] == 1


def test_reliability_by_hand() -> None:
    """Two answers at 0.8, one of them right; a right one at 0.6; a malformed one with equal probabilities, wrong."""
    frame = pl.DataFrame(
        {"stage": "rl", "split": "b_eval", "tier": ["x", "y", "y", "x"], "well_formed": [True, True, True, False],
         "prob_x": [0.8, 0.8, 0.4, 0.5], "prob_y": [0.2, 0.2, 0.6, 0.5]}
    )  # fmt: skip
    (found,) = report.reliabilities(frame)
    bins = [(bin["confidence"], bin["right"], bin["n"]) for bin in found["bins"]]
    assert bins == [pytest.approx((0.5, 0, 1)), pytest.approx((0.6, 1, 1)), pytest.approx((0.8, 0.5, 2))]
    assert found["error"] == pytest.approx((0.5 + 0.4 + 2 * 0.3) / 4)


def test_reliability_is_that_of_the_scorecard() -> None:
    judged = random_judgements(1)
    frame = judgements._frame("rl", "b_eval", judged, BOOK)
    expected = intervals.score(judged, BOOK, bootstrap=0)["ece"]["value"]
    assert report.reliabilities(frame)[0]["error"] == pytest.approx(expected, abs=1e-6)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "policy/loss": 2.0}\n')
    written = report.page([tmp_path])
    for said in ("no steps of RL: the curves are those of the stage sft", "no rollouts", "no scorecard", "no conf"):
        assert said in written
    with pytest.raises(ValueError, match="workdir of a training run"):
        report.page([tmp_path / "nowhere"])


def test_an_output_in_a_folder_that_is_not_there_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "no" / "report.html"
    assert commands.exit_code(report.main, f"--workdir={make(tmp_path / 'run')}", f"--out={out}") == 2
    assert capfd.readouterr().err == f"error: --out={out}: there is no folder {tmp_path}/no\n"


def test_the_page_in_a_browser(browser, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import Select

    run = make(tmp_path / "run")
    page = tmp_path / "report.html"
    page.write_text(report.page([run, run]))
    browser.get(page.as_uri())

    def find(selector: str) -> list:
        return browser.find_elements("css selector", selector)

    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.title == str(run) and not [log for log in browser.get_log("browser") if log["level"] == "SEVERE"]
    assert len(find("#legend li")) == 2 and len(find("[data-metric='reward/format'] path.raw")) == 2
    assert len(find(".reliability circle")) > 2
    assert find("#alarms td") and find("#scorecards td") and len(find(".matrix")) == 2 * 5

    def choose(name: str, value: str) -> str:
        Select(find(f"select[name='{name}']")[0]).select_by_visible_text(value)
        return find("#count")[0].text

    assert len(find(".answer")) == 20
    find("#more")[0].click()
    assert len(find(".answer")) == 40
    assert choose("part", "category wrong").startswith("24 of 48")
    assert len(find(".chip.wrong")) == 20 and "truth: same" in find(".chip.wrong")[0].text
    assert choose("part", "brand right").startswith("0 of 48")  # its truth is unknown
    choose("part", "all")
    assert choose("guided", "guided").startswith("2 of 48")
    assert HOSTILE in find(".answer")[0].text and not find(".answer script, .query b b")
    assert find(".answer .forced")[0].text.startswith("</script>Category") and "−0.50" in find(".answer")[0].text
    assert choose("family", "brand").startswith("0 of 48")
