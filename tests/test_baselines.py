"""The baselines: trained on pairs in which a word decides the tier, and scored as a judge is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from agrl_jax.data.pairs import Pair
from agrl_jax.rulebook import book
from agrl_jax.runtime.config import ConfigError
from experiments import baselines

RULES = book.load()
ROOT = Path(__file__).parent.parent
THINGS = ("lamp", "chair", "kettle", "mug", "sofa", "desk", "rug", "clock")


def pairs(name: str, count: int) -> list[Pair]:
    """Half of the items are the thing asked for, with the best tier; half are another thing, with the worst."""
    kinds = [(THINGS[i % 8], THINGS[(i + 3 * (i % 2)) % 8], 3 * (i % 2)) for i in range(count)]
    return [
        Pair(id=f"{name}{i}", query=f"{asked} {name}{i}", title=f"new {thing}", tier=tier)
        for i, (asked, thing, tier) in enumerate(kinds)
    ]


def splits() -> dict[str, list[Pair]]:
    return {"train": pairs("a", 160), "validation": pairs("b", 24), "test": pairs("c", 24)}


def test_tfidf_learns_whether_the_item_has_the_word_of_the_query() -> None:
    found = baselines.measure("tfidf", splits(), RULES, [0], {})
    card = found["scores"]["test"]
    assert card["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert card["auc"]["value"] == 1.0 and found["chosen"][0]["C"] in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    assert set(found["scores"]) == {"test"} and "scikit-learn" in found["versions"]
    assert "adherence" not in card and "step_accuracy/brand" not in card  # it states no steps


def test_judgements_are_scored_as_scikit_learn_scores_them() -> None:
    tested, probs = pairs("c", 24), np.random.default_rng(0).dirichlet(np.ones(4), 24)
    judged = baselines.judgements(tested, probs, RULES)
    scores = baselines.intervals.score(judged, RULES, bootstrap=0)
    truth, good = [pair.tier for pair in tested], [tier.good for tier in RULES.tiers]
    expected = f1_score(truth, probs.argmax(axis=1), labels=[0, 3], average="macro", zero_division=0)
    assert scores["macro_f1"]["value"] == pytest.approx(expected)
    assert baselines._macro_f1(tested, probs) == pytest.approx(expected)
    assert scores["auc"]["value"] == pytest.approx(roc_auc_score(np.array(truth) == 0, probs[:, good].sum(axis=1)))


@pytest.mark.slow
def test_the_cross_encoder_learns_it_too_and_by_the_same_seed_the_same() -> None:
    pytest.importorskip("torch")
    try:
        baselines._minilm()
    except ConfigError as error:
        pytest.skip(str(error))
    settings = {"epochs": 4, "threads": 1}
    found = [baselines.cross_encoder(splits(), 4, 0, settings) for _ in range(2)]
    assert found[0][1]["validation_macro_f1"] > 0.9
    np.testing.assert_array_equal(found[0][0]["test"], found[1][0]["test"])
    np.testing.assert_allclose(found[0][0]["test"].sum(axis=1), 1, rtol=1e-5)


def test_judges_of_other_pairs_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same, file = {"data_seed": 0, "pairs": {"test": 9}, "digest": "abc"}, tmp_path / "mine.json"
    assert baselines.judges_before(file, same) == {}
    file.write_text(json.dumps({"data_seed": 0, "pairs": {"test": 9}, "judges": {"tfidf": 1}}))  # an older version's
    assert baselines.judges_before(file, same) == {"tfidf": 1}
    assert baselines.judges_before(file, same | {"data_seed": 1}) == {}
    assert "its judges were scored on other pairs (data_seed)" in capsys.readouterr().out


def command(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "experiments.baselines", f"--results={tmp_path}", *more]
    return subprocess.run(words, cwd=ROOT, text=True, capture_output=True)


@pytest.mark.slow
def test_the_command_writes_figures_and_a_table_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    rows = [f"{pair.query},{pair.title},{4 - pair.tier}" for pair in pairs("q", 120)]
    (tmp_path / "mine.csv").write_text("\n".join(["query,title,label", *rows]) + "\n")
    said = command(tmp_path, f"--pairs={tmp_path / 'mine.csv'}", "--judges=tfidf")
    assert said.returncode == 0, said.stderr
    kept = json.loads((tmp_path / "baselines" / "mine.json").read_text())
    tfidf = kept["judges"]["tfidf"]
    assert tfidf["train_pairs"] + kept["pairs"]["test"] < 120 and kept["data_seed"] == 0
    value = tfidf["scores"]["test"]["macro_f1"]["value"]
    assert f"| tfidf | 1 | {tfidf['train_pairs']} | {value:.3f} [" in (tmp_path / "baselines/mine.md").read_text()
    said = command(tmp_path, "--judges=bm25")
    assert (said.returncode, said.stderr) == (2, "error: --judges=bm25: there are tfidf, cross_encoder\n")
