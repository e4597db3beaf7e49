"""The table of what probabilities through the rule book are worth, over seeds: by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_scorecard import BOOK, random_judgements

from agrl_jax import recipes
from agrl_jax.runtime.config import ConfigError
from experiments import probabilities


def result(seed: int, shift: float, **config) -> dict:
    values = {"auc": 0.7, "nll": 5.0, "ece": 0.4, "macro_f1": 0.5}
    split = {
        "pairs": 500, "before": {name: value + shift for name, value in values.items()},
        "after": {name: value / 2 for name, value in values.items()},
    }  # fmt: skip
    return {"seed": seed, "stage": "best", "temperature": 2.0, "config": {"rl.steps": 4} | config,
            "b_eval": split, "w_eval": split}  # fmt: skip


def test_a_table_by_hand():
    lines = probabilities.table([result(0, 0.0), result(1, 0.1)]).splitlines()
    assert "Seeds 0, 1: mean ± standard deviation. Temperatures 2.00, 2.00." in lines[0]
    (auc,) = (line for line in lines if line.startswith("| AUC"))
    assert [cell.strip() for cell in auc.split("|")[2:4]] == ["0.750 ± 0.071", "0.350 ± 0.000"]
    (each,) = (line for line in lines if line.startswith("| seed 1: NLL"))
    assert [cell.strip() for cell in each.split("|")[2:4]] == ["5.100", "2.500"]


def test_before_and_after_differ_in_probabilities_and_in_which_tier_counts():
    before = random_judgements(0)
    after = probabilities.dataclasses.replace(before, probs=np.roll(before.probs, 1, axis=1))
    found = probabilities.compare(before, after, BOOK)
    assert found["before"]["auc"] != found["after"]["auc"]
    scores = probabilities.intervals.score(after, BOOK, bootstrap=0)
    assert found["after"]["macro_f1"] == scores["likeliest_macro_f1"]["value"]
    assert found["before"]["macro_f1"] == scores["macro_f1"]["value"] != found["after"]["macro_f1"]


def test_results_are_added_run_by_run_and_of_one_config(tmp_path):
    for one in (result(10, 0.0), result(2, 0.1)):
        (tmp_path / f"{one['seed']}.json").write_text(json.dumps(one))
    assert [one["seed"] for one in probabilities.read_results(tmp_path)] == [2, 10]
    # A field that a result lacks has its default, and a field without effect may differ.
    same = {"rl.batch_size": recipes.base().rl.batch_size, "lora.base_dtype": "float32"}
    (tmp_path / "11.json").write_text(json.dumps(result(11, 0.0, **same)))
    assert len(probabilities.read_results(tmp_path)) == 3
    (tmp_path / "3.json").write_text(json.dumps(result(3, 0.0, **{"rl.steps": 8})))
    with pytest.raises(ConfigError, match="seeds 2 and 3 differ in rl.steps"):
        probabilities.read_results(tmp_path)
