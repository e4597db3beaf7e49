"""The machinery of the experiments, on a sweep that takes a minute: missing runs are made, and no run twice."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import commands
import hf_models
import mini_sweep
import numpy as np
import pytest
import quick
import test_scorecard

from agrl_jax import recipes
from agrl_jax.evaluation import judgements
from agrl_jax.evaluation.metrics import Judgements
from agrl_jax.policy import tokenizer as tokenizers
from agrl_jax.rulebook import book
from agrl_jax.runtime.config import ConfigError, check_guidance, flatten, validate, validate_together
from agrl_jax.runtime.files import write_json
from agrl_jax.training.run import first_batch
from agrl_jax.types import UNKNOWN
from experiments import (
    ablations,
    choose,
    esci,
    language_model,
    language_model_long,
    longer,
    main_table,
    reasoning,
    results,
    search,
    study,
    table,
    tier_only,
)  # fmt: skip
from experiments import run as run_sweep

ROOT = Path(__file__).parent.parent
PLAN = language_model.PLAN
SWEEPS = (
    main_table.SWEEP, longer.SWEEP, search.SWEEP, ablations.SWEEP, esci.SWEEP, PLAN.search, PLAN.sweep,
    language_model_long.SWEEP, reasoning.SWEEP, tier_only.SWEEP,
)  # fmt: skip


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_every_run_of_a_sweep_has_a_config_in_order(sweep: study.Sweep) -> None:
    for run, seed in sweep.jobs():
        config = sweep.get_config(f"{run},seed={seed}")
        if config.data.source == "pairs":
            config.data.path = "pairs.csv"
        validate(config)
        recipes.check(config)
        validate_together(config)
        check_guidance(config, 64_000)
        assert config.seed == seed and config.method in study.LABELS
        assert sweep.fields(run).items() <= flatten(config).items()
        assert config.method != "sft" or config.rl.steps == 0


def test_runs_share_a_warm_start_exactly_if_they_differ_after_it_alone() -> None:
    starts = {run: study.start_of(main_table.get_config(run)) for run in main_table.METHODS}
    assert all(start == starts["agrl"] for start in starts.values())
    assert study.start_of(ablations.get_config("tier_first")) != starts["agrl"]
    assert study.start_of(main_table.get_config("agrl,seed=1")) != starts["agrl"]


def test_a_warm_start_is_another_where_an_argument_of_the_command_changes_it() -> None:
    config = main_table.get_config("agrl")
    start = study.start_digest(config, [])
    assert start == study.start_digest(config, ["--config.rl.steps=3"])  # RL comes after it
    for word in ("sft.steps=3", "optim.b2=0.9", "mixture.real=0.5", "eval.constrained=True"):
        assert start != study.start_digest(config, [f"--config.{word}"])
    moved = [study.start_digest(config, [f"--config.data.test_path={folder}/esci.csv"]) for folder in ("/a", "/b")]
    assert moved[0] == moved[1] != start


def test_more_of_the_same_goes_on_with_the_next_pairs() -> None:
    config = PLAN.get_config("all/sft_more")
    assert (config.sft.steps, config.sft.batch_size) == (1200, 16)
    config.more.batch_size = 8
    assert first_batch(config) == 2400
    config.more.source = "train"
    assert first_batch(config) == 0  # these pairs have an order of their own


def test_every_method_has_the_same_search() -> None:
    searched = {run.split(".")[0] for run in search.SWEEP.runs}
    assert searched == set(main_table.METHODS) - {"sft"} - set(search.NEIGHBOURS)
    settings = {
        method: [run.split(".")[1] for run in search.SWEEP.runs if run.startswith(f"{method}.")] for method in searched
    }
    assert {len(some) for method, some in settings.items() if not method.startswith("sft")} == {6}
    assert settings["agrl"] == list(search.GUIDED) and settings["grpo"] == list(search.RL)


def test_results_of_another_config_do_not_count() -> None:
    config = main_table.get_config("agrl")
    wanted = study.settings(config, [])
    assert study.same(wanted, study.settings(main_table.get_config("agrl"), []))
    assert not study.same(wanted, study.settings(main_table.get_config("grpo"), []))
    assert not study.same({}, wanted)
    moved = [study.settings(config, [f"--config.data.path={folder}/esci.csv"]) for folder in ("/here", "/there")]
    assert study.same(*moved) and not study.same(moved[0], wanted)


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_a_result_still_counts_when_a_field_is_new_and_has_its_default(sweep: study.Sweep) -> None:
    wanted = study.settings(sweep.get_config(f"{next(iter(sweep.runs))},seed=0"), [])
    older = {name: value for name, value in wanted.items() if name != "policy.attention"}
    assert study.same(older, wanted)
    assert not study.same(older, wanted | {"policy.attention": "dense"})
    assert not study.same(wanted | {"policy.gone": 1}, wanted)


@pytest.mark.parametrize("module", [main_table, ablations, language_model, language_model_long, reasoning])
def test_a_sweep_is_loaded_by_its_file(module: ModuleType, tmp_path: Path) -> None:
    sweep = study.load(module.__file__, str(tmp_path))
    assert (sweep.name, sweep.runs, sweep.results) == (module.SWEEP.name, module.SWEEP.runs, tmp_path)


def test_a_run_takes_what_the_search_chose_also_where_its_results_are_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(study.RESULTS_VARIABLE, str(tmp_path))  # as a run of `--results` is told
    child = runpy.run_path(study.__file__)
    assert (child["RESULTS"], child["TUNED"]) == (tmp_path, study.TUNED) and study.TUNED.exists()


def test_the_search_of_supervised_training_has_half_the_budget() -> None:
    for setting in search.MORE:
        assert search.get_config(f"sft_all.{setting}").more.steps == study.base().more.steps // 2


def test_a_table_tells_of_results_with_other_settings() -> None:
    found = {run: {0: {"settings": study.settings(main_table.get_config(run), [])}} for run in ("grpo", "dpo", "agrl")}
    assert table._mixed(main_table.SWEEP, found) == ""
    found["dpo"][0]["settings"]["data.test_path"] = "pairs.csv"
    assert "data.test_path=pairs.csv: dpo (seed 0)" in table._mixed(main_table.SWEEP, found)
    for run in found:
        found[run][0]["settings"]["data.test_path"] = "pairs.csv"
    assert table._mixed(main_table.SWEEP, found) == ""


def test_steps_that_are_not_logged_would_not_be_counted(tmp_path: Path) -> None:
    sweep = dataclasses.replace(mini_sweep.SWEEP, results=tmp_path)
    with pytest.raises(ConfigError, match="log.every.*leave it at 1"):
        run_sweep.run(sweep, "mini.py", tmp_path, 1, [("agrl", 0)], ["--config.log.every=10"])


@pytest.mark.parametrize(("name", "said"), [("no.py", "not a file"), ("experiments/choose.py", "defines no SWEEP")])
def test_a_file_that_is_no_sweep_is_refused(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=f"{said}.*experiments/main_table.py"):
        study.load(name, "results")


@pytest.mark.parametrize("module", [run_sweep, table, choose], ids=["run", "table", "choose"])
def test_a_mistyped_flag_is_refused_in_one_line(module: ModuleType, capfd: pytest.CaptureFixture) -> None:
    assert commands.exit_code(module.main, "--swep=x") == 2
    assert capfd.readouterr().err.startswith("error: Unknown command line flag 'swep'")


def command(folder: Path, module: str, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | quick.ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    words = [sys.executable, "-m", module, f"--sweep={mini_sweep.__file__}", f"--results={folder / 'results'}"]
    return subprocess.Popen(
        [*words, *more], env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(folder: Path) -> subprocess.Popen[str]:
    return command(folder, "experiments.run", f"--dir={folder / 'runs'}", "--workers=2")


def test_runs_are_chosen_by_name_and_seed() -> None:
    sweep = main_table.SWEEP
    assert run_sweep.select(sweep, [], []) == list(sweep.jobs())
    assert run_sweep.select(sweep, ["sft", "agrl"], ["3"]) == [("sft", 3), ("agrl", 3)]
    with pytest.raises(ConfigError, match="--only=ppo: not in main_table; there are sft, "):
        run_sweep.select(sweep, ["agrl", "ppo"], [])
    with pytest.raises(ConfigError, match="--seeds=9: not in main_table; there are 0, 1, 2, 3, 4"):
        run_sweep.select(sweep, [], ["9"])


@pytest.mark.parametrize(("code", "failed", "kept"), [(0, 0, [False]), (3, 0, [True]), (1, 1, []), (-9, 1, [])])
def test_only_a_run_that_says_so_has_diverged_and_a_crash_is_no_result(
    code: int, failed: int, kept: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(run_sweep.Runner, "main", lambda *_: code)
    monkeypatch.setattr(run_sweep, "_made", lambda start: True)
    monkeypatch.setattr(run_sweep, "_share", lambda start, workdir: None)
    monkeypatch.setattr(results, "write", lambda *args: written.append(args[4]))
    sweep = dataclasses.replace(mini_sweep.SWEEP, results=tmp_path)
    assert run_sweep.run(sweep, "mini.py", tmp_path, 1, [("agrl", 0)], []) == failed
    assert written == kept


@pytest.mark.slow
def test_a_sweep_killed_and_started_again_makes_each_run_once_and_a_table_of_them(
    tmp_path: Path, data_dir: Path
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "data").symlink_to(data_dir)
    kept = tmp_path / "results" / "mini"
    process = run(tmp_path)
    while not list(kept.glob("*.json")):  # warm starts are results too
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert "goes on where it was" in process.communicate()[0] and process.returncode == 130
    before = {file: file.stat().st_mtime_ns for file in kept.glob("*.json")}
    assert 0 < len(before) < 6

    process = run(tmp_path)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    sweep = dataclasses.replace(mini_sweep.SWEEP, results=tmp_path / "results")
    found = results.read(sweep)
    assert {run: list(seeds) for run, seeds in found.items()} == {run: [0, 1] for run in sweep.runs}
    for seed in (0, 1):
        assert found["agrl"][seed]["start"] == found["sft_all"][seed]["start"] == found["sft"][seed]["scores"]
        assert found["agrl"][seed]["cost"]["steps"] == 8
        assert found["sft_all"][seed]["cost"]["forward_equivalents"] > 0 == found["sft"][seed]["cost"]["steps"]
        assert (found["sft_all"][seed]["stage"], found["sft"][seed]["stage"]) == ("sft_all", "sft")
    starts = list((tmp_path / "runs" / "starts").iterdir())
    assert len(starts) == 2 and not any((start / "checkpoints" / "rl" / "1").exists() for start in starts)
    for workdir in (tmp_path / "runs" / "mini").iterdir():
        assert "the end of the warm start" in json.loads((workdir / "calibration.json").read_text())
    process = run(tmp_path)
    assert "nothing is missing" in process.communicate()[0]

    process = command(tmp_path, "experiments.table", "--bootstrap=20")
    said = process.communicate()[0]
    assert process.returncode == 0 and "b_eval: agrl minus each other method" in said, said
    plots = {"scores.png", "curves.png", "training.png"}
    assert {file.name for file in kept.iterdir()} >= {"table.md", "table.csv", *plots}

    shutil.copy(kept / "agrl-0.json", kept / "agrl-1.json")
    result = json.loads((kept / "agrl-1.json").read_text())
    assert not results.is_there(sweep, "agrl", 1, result["settings"] | {"rl.steps": 0})


def test_a_measure_by_hand() -> None:
    values = np.concatenate([[0.5], np.linspace(0, 1, 1001)])
    assert table.measure(values) == pytest.approx((0.5, 0.025, 0.975))
    assert str(table.measure(np.array([np.nan, 1.0]))) == "-"


def test_scores_without_a_bootstrap_are_plotted_without_intervals(tmp_path: Path) -> None:
    found = {"agrl": {0: {"diverged": False, "scores": {"b_eval": {"macro_f1": 0.5}}}}}
    table.plot_scores(tmp_path / "scores.png", found, {"b_eval": {"agrl": {"macro_f1": np.array([0.5])}}})
    assert (tmp_path / "scores.png").exists()


def test_a_difference_is_one_over_the_seeds_that_both_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def means(found: table.Found, split: str, bootstrap: int) -> dict[str, dict[str, np.ndarray]]:
        score = {"agrl": 10.0, "grpo": 1.0, "dpo": 2.0, "rrs": 3.0}
        return {run: {"macro_f1": np.array([np.mean([score[run] * (s + 1) for s in of])])} for run, of in found.items()}

    monkeypatch.setattr(table, "resampled", means)
    fine, diverged = {"diverged": False}, {"diverged": True}
    found = {
        "agrl": {0: fine, 1: fine}, "grpo": {0: fine, 1: fine}, "dpo": {1: fine, 2: fine}, "rrs": {1: diverged}
    }  # fmt: skip
    differences = table.ahead(found, means(found, "", 0), "b_eval", "agrl", 0)
    assert {run: float(of["macro_f1"][0]) for run, of in differences.items()} == {"grpo": 15 - 1.5, "dpo": 20 - 4}


def test_the_language_model_is_searched_first_and_then_seed_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, jobs = dataclasses.replace(PLAN, results=tmp_path), []
    cost = {"steps": 30, "forward_equivalents": language_model.BUDGET // 2}
    best = {"slow": 0.5, "centre": 0.4, "fast": 0.3}

    def made(sweep: study.Sweep, *args: object) -> int:
        jobs.extend(args[3])
        return 0

    def read(sweep: study.Sweep) -> dict:
        assert jobs == list(plan.search.jobs()) and len(jobs) == 9
        return {run: {0: fake([best[run.split(".")[1]]] * 3) | {"cost": cost}} for run in sweep.runs}

    monkeypatch.setattr(run_sweep, "run", made)
    monkeypatch.setattr(results, "read", read)
    assert plan.run(tmp_path, 1, ["scarce", "head"], [], search=True) == 0
    after = jobs[9:]
    scarce, head = (len(language_model.REGIMES[regime][1]) for regime in ("scarce", "head"))
    assert [seed for _, seed in after] == [seed for seed in (0, 1, 2) for _ in range(scarce + head)]
    assert {run for run, _ in after[:scarce]} == {f"scarce/{name}" for name in language_model.REGIMES["scarce"][1]}
    slow = {"rl.learning_rate": 7e-6, "rl.steps": 60}  # the schedule ends with the whole budget
    assert json.loads(plan.tuned.read_text())["agrl"] == slow
    assert slow.items() <= plan.sweep.fields("head/rrs").items()  # it takes the settings of agrl
    assert flatten(plan.get_config("scarce/dpo,seed=1"))["dpo.learning_rate"] == 7e-6
    assert plan.search.fields("search/agrl.fast")["rl.learning_rate"] == 6e-5
    assert "| agrl | slow | 0.5000 | chosen |" in (tmp_path / "language_model/search/table.md").read_text()


def test_the_language_model_may_take_the_centre_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, jobs = dataclasses.replace(PLAN, results=tmp_path), []
    monkeypatch.setattr(run_sweep, "run", lambda *args: jobs.extend(args[4]) or 0)
    assert plan.run(tmp_path, 1, ["plain"], [], search=False) == 0
    assert jobs == [(f"plain/{name}", seed) for seed in language_model.SEEDS for name in ("untrained", "tier_alone")]
    assert not plan.tuned.exists()
    chosen, centre = plan.get_config("scarce/grpo"), plan.get_config("search/grpo.centre")
    assert chosen.rl.learning_rate == centre.rl.learning_rate


def test_a_failed_search_stops_the_study_of_the_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(run_sweep, "run", lambda *args: called.append(args) or 1)
    assert dataclasses.replace(PLAN, results=tmp_path).run(tmp_path, 1, ["head"], [], search=True) == 1 == len(called)


def test_runs_share_the_files_of_a_warm_start_and_lose_only_their_own_checkpoints(tmp_path: Path) -> None:
    start, workdir = tmp_path / "start", tmp_path / "run"
    for file in ("scorecard.json", "checkpoints/sft_end/0/params", "checkpoints/sft/20/state"):
        (start / file).parent.mkdir(parents=True, exist_ok=True)
        (start / file).write_text(file)
    hf_models.tokenizer().ending_with(7).save(start)  # one file has the words, another says which of them ends
    run_sweep._share(start, workdir)
    assert tokenizers.load(workdir).end_token == 7
    shared = "checkpoints/sft_end/0/params"
    assert (workdir / shared).samefile(start / shared) and not (workdir / "checkpoints" / "sft").exists()
    (workdir / "checkpoints" / "rl" / "3").mkdir(parents=True)
    run_sweep._delete_checkpoints(workdir)
    assert [folder.name for folder in (workdir / "checkpoints").iterdir()] == ["sft_end"]
    assert (start / "checkpoints/sft/20/state").exists()


def test_words_held_out_of_training_are_told_apart() -> None:
    right, wrong, rules = 0, 1, results.rules({"rulebook": {"path": "four_tier", "order": "think_then_respond"}})
    unknown = np.full((4, len(rules.steps)), -1)
    judged = Judgements(
        query=list("abcd"), family=["all"] * 4, seen=np.array([True, True, False, False]), tier=np.zeros(4, int),
        predicted=np.array([right, right, right, wrong]), steps=unknown, predicted_steps=unknown,
        probs=np.full((4, 4), 0.25), well_formed=np.ones(4, bool), truncated=np.zeros(4, bool),
        consistent=np.ones(4, bool), response_tokens=np.ones(4, int),
    )  # fmt: skip
    found = {"sft": {0: {"diverged": False, "judged": {"b_eval": judged},
                         "rulebook": {"path": "four_tier", "order": "think_then_respond"}}}}  # fmt: skip
    shown = table._held_out("b_eval", found, bootstrap=0)
    row = dict(zip(shown.columns, shown.rows[0], strict=True))
    assert (row["seen (2): accuracy"], row["unseen (2): accuracy"]) == ("1.000", "0.500")


def test_a_judge_with_reasons_is_compared_on_the_same_pairs(tmp_path: Path) -> None:
    sweep = dataclasses.replace(reasoning.SWEEP, results=tmp_path)
    tiers = {"verdicts": ([0, 1, 3, 3], 0.2), "reasons": ([0, 1, 2, 0], 0.5), "student": ([0, 1, 0, 1], 0.1)}
    for name, (predicted, seconds) in tiers.items():
        judged = test_scorecard.judgements([0, 1, 2, 3], predicted)
        if name == "student":
            judged = dataclasses.replace(judged, predicted_steps=np.full_like(judged.predicted_steps, UNKNOWN))
        file = sweep.result(f"judged/{name}", seed=1)
        file.parent.mkdir(exist_ok=True, parents=True)
        judgements.write(file.with_suffix(".parquet"), name, dict.fromkeys(reasoning.SPLITS, judged), book.load())
        write_json(file, {"cpu_seconds": seconds, "free": {"b_eval": 0.75, "w_eval": 0.5}})
    said = reasoning.write_table(sweep, bootstrap=0).read_text()
    assert said.count("| verdicts | 1 | 0.750 |") == said.count("| reasons | 1 | 0.750 |") == 2
    assert said.count("| reasons minus verdicts | 1 | 0.000 |") == 2 and "constrained minus" not in said
    assert "| reasons | 20.0 | 2.50 | 0.75 | 0.50 |" in said
    assert "| student | 1 | 0.500 | 0.333 | - | - | - |" in said  # it states no steps, so it has none wrong


def fake(macro_f1: list[float], diverged: bool = False) -> dict:
    points = [{"step": 10 * i, "tokens": 1e5 * i, "macro_f1": value} for i, value in enumerate(macro_f1, start=1)]
    return {"validation": points, "diverged": diverged}


def test_the_budget_that_a_method_needs_to_reach_the_end_of_grpo() -> None:
    slow = {0: fake([0.1, 0.3, 0.5]), 1: fake([0.1, 0.3, 0.5])}
    fast = {0: fake([0.2, 0.6, 0.6]), 1: fake([0.2, 0.4, 0.8])}
    goal = table.goal_of(slow)
    assert goal == (3e5, 0.5)
    assert table.needed(fast, goal) == "67%"
    assert table.needed(slow, (3e5, 0.51)) == "never" and table.needed({}, goal) == table.needed(slow, None) == "-"


def test_the_search_chooses_by_the_last_validations_and_never_what_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {"steps": 100, "forward_equivalents": 2 * study.BUDGET}
    best = {"slow": [0.0, 0.5, 0.5, 0.5], "centre": [0.9, 0.1, 0.1, 0.1], "fast": [0.9, 0.9, 0.9, 0.9]}
    found = {
        run: {100: fake(best.get(run.split(".")[1], [0.0]), run.endswith("fast")) | {"cost": cost}}
        for run in search.SWEEP.runs
    }
    monkeypatch.setattr(results, "read", lambda sweep: found)
    fields, rows = choose.choose()
    assert fields["grpo"] == {**search.RL["slow"], "rl.steps": 50}
    assert [row[3] for row in rows if row[0] == "grpo"].count("chosen") == 1
    del found["agrl.light"]
    assert fields["agr"] == fields["agrl"]
    assert set(choose.choose()[0]) == set(search.SEARCHED) - {"agrl"}  # nor is there anything for its neighbour
    found.clear()
    with pytest.raises(ConfigError, match="no method of search has been searched"):
        choose.choose()
