"""The real command, end to end: it trains, is killed, resumes, and refuses bad input with one clear message."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quick
import tiny

from agrl_jax.evaluation import judgements
from agrl_jax.judging import trained
from agrl_jax.runtime.logs import read_jsonl
from agrl_jax.training import run

ROOT = Path(__file__).parent.parent


def start(workdir: Path, data_dir: Path, *overrides: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "agrl_jax.main", f"--config={ROOT / 'tests' / 'tiny.py'}", f"--workdir={workdir}",
        f"--config.data.dir={data_dir}", *overrides,
    ]  # fmt: skip
    environment = os.environ | quick.ENVIRONMENT
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def train(workdir: Path, data_dir: Path, fields: dict[str, object], variant: str = "benchmark") -> str:
    """Trains as the command does, in this process, in which JAX has started already. Returns the output."""
    config, said = tiny.get_config(variant), []
    config.update_from_flattened_dict({"data.dir": str(data_dir)} | fields)
    run.train(config, str(workdir), say=lambda *words: said.append(" ".join(map(str, words))))
    return "\n".join(said)


def without_times(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_jsonl(path)]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> tuple[Path, str]:
    """A run that was never interrupted, and its output."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, finish(start(workdir, data_dir))


def test_writes_everything_it_promises(whole: tuple[Path, str]) -> None:
    workdir, output = whole
    card = json.loads((workdir / "scorecard.json").read_text())
    assert set(card) == {"sft", "agrl"}
    for stage in card.values():
        assert set(stage) == {"b_eval", "w_eval"}
        for scores in stage.values():
            assert set(scores["accuracy"]) >= {"value", "low", "high"}
            assert scores["accuracy"]["low"] <= scores["accuracy"]["value"] <= scores["accuracy"]["high"]
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["stage"] == "sft"] == list(range(1, 13))
    assert [row["step"] for row in rows if row["stage"] == "rl"] == list(range(1, 13))
    assert list((workdir / "tensorboard" / "rl").glob("events*"))
    assert json.loads((workdir / "config.json").read_text())["rl"]["group_size"] == 4
    frame = judgements.read(workdir / "judgements.parquet")  # the accuracy follows from this file
    mine = frame.filter(stage="agrl", split="b_eval")
    assert (mine["tier"] == mine["judged_tier"]).sum() / 24 == card["agrl"]["b_eval"]["accuracy"]["value"]
    assert frame.group_by("stage", "split").len()["len"].to_list() == [24] * 4
    # Each checkpoint that was validated has a temperature, under the name that the judge looks up.
    kept = json.loads((workdir / "calibration.json").read_text())
    assert set(kept) == {"the end of the warm start", "step 6 of RL", "step 12 of RL"}
    assert trained.load(str(workdir)).checkpoint in kept
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "macro" in output and str(workdir / "scorecard.json") in output


def test_the_step_compiles_once_with_guided_and_unguided_steps(whole: tuple[Path, str]) -> None:
    rows = [row for row in read_jsonl(whole[0] / "metrics.jsonl") if row["stage"] == "rl"]
    assert {row["compiles"] for row in rows} == {1}


def test_the_budget_spent_is_the_sum_over_the_steps_of_a_stage(whole: tuple[Path, str]) -> None:
    rows = read_jsonl(whole[0] / "metrics.jsonl")
    for stage in ("sft", "rl"):
        mine = [row for row in rows if row["stage"] == stage]
        tokens, spent = ([row[f"budget/{name}"] for row in mine] for name in ("tokens", "spent"))
        assert min(tokens) > 0 and spent == list(itertools.accumulate(tokens))


def test_samples_show_forced_tokens_and_parts(whole: tuple[Path, str]) -> None:
    samples = read_jsonl(whole[0] / "samples.jsonl")
    guided = [row for row in samples if row["guided"]]
    assert guided and all(row["forced"] for row in guided)
    assert all(not row["forced"] for row in samples if not row["guided"])
    for row in samples:
        assert row["reward"] == pytest.approx(sum(v for v in row["parts"].values() if v is not None), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("after_rows", [3, 19])
def test_killed_at_any_moment_and_resumed_it_leaves_the_same_logs(
    whole: tuple[Path, str], tmp_path: Path, data_dir: Path, after_rows: int
) -> None:
    process = start(tmp_path, data_dir)
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= after_rows):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finish(start(tmp_path, data_dir))
    assert without_times(metrics) == without_times(whole[0] / "metrics.jsonl")
    assert (tmp_path / "samples.jsonl").read_bytes() == (whole[0] / "samples.jsonl").read_bytes()
    for name in ("scorecard.json", "judgements.parquet"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()


@pytest.mark.slow
def test_the_stage_ends_with_the_step_that_reaches_the_budget_and_goes_on_if_it_grows(
    whole: tuple[Path, str], tmp_path: Path, data_dir: Path
) -> None:
    rows = without_times(whole[0] / "metrics.jsonl")
    spent = [row["budget/spent"] for row in rows if row["stage"] == "rl"]
    for _ in range(2):  # the second run has nothing left to do
        finish(start(tmp_path, data_dir, f"--config.rl.budget={spent[4] - 1:.0f}"))
        found = without_times(tmp_path / "metrics.jsonl")
        assert found[:-1] == rows[:16] and found[-1]["budget/spent"] == spent[4]
        assert "validation/macro_f1" in found[-1] and "agrl" in json.loads((tmp_path / "scorecard.json").read_text())
    finish(start(tmp_path, data_dir, f"--config.rl.budget={spent[6]:.0f}"))
    assert without_times(tmp_path / "metrics.jsonl")[-1]["budget/spent"] == spent[6]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(
    whole: tuple[Path, str], tmp_path: Path, data_dir: Path
) -> None:
    process = start(tmp_path, data_dir, "--config.checkpoint.every=1000")
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 14):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command continues" in output
    assert "resuming from rl step" in finish(start(tmp_path, data_dir))
    assert without_times(metrics) == without_times(whole[0] / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [{}, {"lora.rank": 2, "lora.stages": "rl", "dpo.matrix_rate": 0.0}],
    ids=["whole", "adapters"],
)
def test_preferences_are_mined_learnt_from_and_mined_again_by_a_run_that_resumes(
    tmp_path: Path, data_dir: Path, lora: dict[str, object]
) -> None:
    """The warm start is long enough that some answers are right."""
    warm = {"sft.steps": 200, "sft.batch_size": 32, "sft.prompt_weight": 0.0}
    fields = warm | {"method": "dpo", "eval.pairs": 8} | lora
    assert "preferences: " in train(tmp_path, data_dir, fields | {"dpo.steps": 5})
    output = train(tmp_path, data_dir, fields | {"dpo.steps": 8})
    assert "resuming from rl step 5" in output and "preferences: " in output
    assert set(json.loads((tmp_path / "scorecard.json").read_text())) == {"sft", "dpo"}
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["stage"] == "rl"]
    assert [row["step"] for row in rows] == list(range(1, 9)) and {row["compiles"] for row in rows} == {1}
    assert rows[0]["policy/loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference
    mined = rows[0]["budget/spent"] - rows[0]["budget/tokens"]
    assert mined > 60 * 4  # mining is paid once, however often the run starts
    assert rows[-1]["budget/spent"] == mined + sum(row["budget/tokens"] for row in rows)
    assert rows[-1]["dpo/margin"] > 0 and "validation/macro_f1" in rows[-1]


@pytest.mark.slow
def test_supervised_training_goes_on_from_the_warm_start_in_place_of_rl(
    tmp_path: Path, data_dir: Path
) -> None:
    fields = {"method": "sft_more", "eval.pairs": 8}
    train(tmp_path, data_dir, fields | {"more.steps": 20})
    assert "resuming from rl step 20" in train(tmp_path, data_dir, fields | {"more.steps": 24})
    assert set(json.loads((tmp_path / "scorecard.json").read_text())) == {"sft", "sft_more"}
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    loss = {stage: [row["policy/loss"] for row in rows if row["stage"] == stage] for stage in ("sft", "rl")}
    assert len(loss["rl"]) == 24 and loss["rl"][0] < loss["sft"][0] and min(loss["rl"]) < min(loss["sft"])
    after = [row for row in rows if row["stage"] == "rl"]
    assert {row["compiles"] for row in after} == {1} and "validation/macro_f1" in after[-1]
    assert after[-1]["budget/spent"] == sum(row["budget/tokens"] for row in after)


@pytest.mark.slow
def test_trains_on_pairs_of_which_the_tier_alone_is_known(tmp_path: Path, data_dir: Path) -> None:
    lines = (ROOT / "examples" / "pairs.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines))
    kept = ("query", "title", "label")
    bare = tmp_path / "bare.csv"
    with bare.open("w", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    fields = {"data.path": str(bare), "rl.batch_size": 4, "sft.source": "both"}
    output = train(tmp_path / "run", data_dir, fields, "pairs")
    card = json.loads((tmp_path / "run" / "scorecard.json").read_text())
    assert set(card["agrl"]) == {"test"}
    assert "their tier alone counts" in output


# ------------------------------------------------------------------------------------------- bad input


def test_the_command_refuses_a_bad_field_in_one_message_and_without_a_traceback(tmp_path: Path, data_dir: Path) -> None:
    process = start(tmp_path / "run", data_dir, "--config.rl.group_sizes=4")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and "rl.group_size" in output and "Traceback" not in output


def refusal(workdir: Path, variant: str, **fields: object) -> str:
    """The message of the error that `train` raises for these fields of the tiny config. The command prints it."""
    config = tiny.get_config(variant)
    config.update_from_flattened_dict(fields)
    with pytest.raises(run.USER_ERRORS) as error:
        run.train(config, str(workdir))
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rl.group_size": 1}, "rl.group_size is 1"),
        ({"rl.batch_size": 9, "rl.micro_batches": 4}, "rl.batch_size"),
        ({"guidance.capacity": 0.01}, "guidance.capacity"),
        ({"objective.loss": "gpro"}, "did you mean 'grpo'"),
        ({"rulebook.path": "no_such_book"}, "no_such_book"),
        ({"mesh.data": 3}, "mesh.data=3"),
    ],
)
def test_a_bad_field_is_refused_by_name(tmp_path: Path, fields: dict[str, object], said: str) -> None:
    assert said in refusal(tmp_path, "benchmark", **fields)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "pairs.csv"),
        (b"", "empty"),
        (b"query,title\nboots,Boot\n", "label"),
        (b"query,title,label\nboots,Boot,4\nboots,Shoe,7\n", "row 2"),
        (b"query,title,label\n,Boot,4\n", "query"),
        (b"query,title,label\nboots,\xff\xfe,4\n", "UTF-8"),
    ],
)
def test_a_bad_pairs_file_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_bytes(content)
    assert said in refusal(tmp_path / "run", "pairs", **{"data.path": str(path)})


def test_a_batch_larger_than_the_pairs_is_refused_before_anything_is_trained(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    fields = {"data.path": str(ROOT / "examples" / "pairs.csv"), "data.dir": str(data_dir), "rl.batch_size": 64}
    assert "rl.batch_size=64 is more than the" in refusal(tmp_path / "run", "pairs", **fields)
    fields |= {"rl.batch_size": 8, "difficulty.pool": 100}
    assert "rl.batch_size=8 x difficulty.pool=100 is more than the" in refusal(tmp_path / "run", "pairs", **fields)
    assert "warm start" not in capsys.readouterr().out


def test_a_workdir_of_another_run_is_refused(whole: tuple[Path, str], data_dir: Path) -> None:
    assert "rl.group_size: 4 -> 8" in refusal(whole[0], "benchmark", **{"data.dir": str(data_dir), "rl.group_size": 8})


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_a_diagnosis(tmp_path: Path, data_dir: Path) -> None:
    process = start(tmp_path, data_dir, "--config.sft.learning_rate=1e30", "--config.rl.max_skipped=3")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 3, output
    assert "not finite" in output and "learning_rate" in output
