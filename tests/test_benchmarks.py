"""The benchmarks run and report what they should, at the smallest size. Nothing here depends on speed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import quick
from tiny import get_config

from agrl_jax.data.bundled import benchmark, catalog
from agrl_jax.policy import huggingface
from benchmarks import growth, guidance, judges, phases, startup, table, workload
from benchmarks.contenders import our_judge, ours, protocol

ROOT = Path(__file__).parent.parent
TINY = workload.WORKS["tiny"]
CEILINGS = {"flops": 2e9, "bytes": 1e9, "load": 0.0}


@pytest.fixture(scope="module")
def model() -> tuple:
    return workload.load("tiny")


@pytest.fixture(scope="module")
def load(model: tuple) -> workload.Workload:
    return workload.build(model, TINY, workload.step_config(TINY))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 7])
def test_our_contender_makes_whole_steps_of_the_work(
    model: tuple, tmp_path: Path, capsys: pytest.CaptureFixture, shared: int
) -> None:
    huggingface.save_pretrained(tmp_path / "model", *model)
    tokenizer = model[2]
    prompts = workload.prompts(tokenizer, dataclasses.replace(TINY, shared_len=shared))
    assert all(prompt[:shared] == prompts[0][:shared] for prompt in prompts) and prompts[0] != prompts[1]
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    task = protocol.Task(str(tmp_path / "model"), texts, 12, 2, 16, "float32", 1, 1, {"micro_batches": 2}, shared)
    ours.run(task, protocol.Report(task))
    said = protocol.answers(capsys.readouterr().out)
    assert [answer["kind"] for answer in said] == ["ready", "step", "step", "end"]
    assert [answer["warm"] for answer in said[1:3]] == [False, True]
    assert said[-1]["compiles"] == 1 and said[-1]["peak_rss"] > 1e7


def test_a_step_over_other_tokens_than_asked_for_is_refused() -> None:
    task = protocol.Task("", ["a", "b"], 12, 2, 16, "float32", 1, 1, {})
    with pytest.raises(ValueError, match=r"24 tokens of prompts, 63 of answers, where \(24, 64\) are due"):
        protocol.Report(task).step(24, 63)


def test_time_of_a_part_inside_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 1.0, 4.0, 9.0])
    monkeypatch.setattr(protocol.time, "monotonic", lambda: next(clock))
    report = protocol.Report(protocol.Task("", [], 0, 0, 0, "float32", 0, 1, {}))
    with report.part("outer"):  # from 0
        with report.part("inner"):  # from 1 to 4
            pass
    assert report._parts == {"inner": 3.0, "outer": 6.0}


def test_phases_cover_the_step_and_do_its_arithmetic(load: workload.Workload) -> None:
    found = dict(phases.of(load))
    assert list(found) == ["prefill", "decode", "read and score", "reference", "gradient", "update"]
    # By hand: each layer has q 32x32, k and v 32x16, out 32x32, three matrices 32x64; two layers, 48 prompt tokens.
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert found["prefill"].flops == 48 * (2 * layers + 2 * 4 * 32 * 6.5)
    assert found["gradient"].flops == 3 * found["reference"].flops
    assert found["update"].bytes == 8 * 4 * sum(leaf.size for leaf in jax.tree.leaves(load.state.params))
    rolled = found["decode"].run()
    assert rolled.valid.all() and not rolled.finished.any()  # exactly T tokens each


def test_what_prompts_share_is_counted_once(model: tuple) -> None:
    work = workload.WORKS["tiny_shared"]
    found = dict(phases.of(workload.build(model, work, workload.step_config(work))))
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    # 7 tokens that see 4 positions on average; then 4 times 5 tokens that see these 7, and 3 more on average.
    assert found["prefill"].flops == 7 * (2 * layers + 2 * 4 * 32 * 4) + 20 * (2 * layers + 2 * 4 * 32 * 10)
    assert found["gradient"].flops == 3 * found["reference"].flops


def test_shares_are_of_the_ceilings() -> None:
    phase = phases.Phase(run=None, flops=4e9, bytes=1e9)
    shares = phases.shares(4.0, phase, CEILINGS)
    assert (shares["of_matrix_product"], shares["of_copy"], shares["roofline"]) == (0.5, 0.25, 0.5)


def test_growth_is_fitted_by_a_power() -> None:
    assert growth.fit([1, 2, 4], [5.0, 20.0, 80.0]) == pytest.approx(2.0)
    assert growth.fit([1, 2], [None, 1.0]) is None
    shape, work = growth.grown(workload.SHAPES["tiny"], TINY, "parameters", 2)
    assert (shape.width, shape.heads, work) == (64, 8, TINY)
    assert growth.grown(shape, TINY, "group_size", 4)[1].group_size == 8


def test_growth_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    path, points = tmp_path / "growth.json", [{"axis": "group_size", "factor": 1}]
    found = {"model": "tiny", "work": "tiny", "machine": {"device": "d", "commit": "c"}, "points": points}
    assert growth._broken_off(found, path) == []
    path.write_text(json.dumps(found))
    assert growth._broken_off(found | {"points": []}, path) == points
    assert growth._broken_off(found | {"machine": {"device": "d", "commit": "other"}}, path) == []
    path.write_text(json.dumps(found | {"fits": {}}))  # it was finished, so all is measured again
    assert growth._broken_off(found, path) == []


def test_as_many_groups_can_be_guided_as_are_asked_for(load: workload.Workload) -> None:
    known = guidance._guidable(load, 0.25).known_parts
    assert (known > 0).tolist() == [True, False, False, False]


def test_a_peer_is_set_over_ours() -> None:
    def run(name: str, seconds: float, parts: dict[str, float]) -> dict:
        warm_up = {"warm": False, "seconds": 9.0, "cpu_seconds": 0.0, "parts": {}}
        steps = [warm_up, {"warm": True, "seconds": seconds, "cpu_seconds": 2 * seconds, "parts": parts}]
        figures = {"steps": steps, "parts": {}, "peak_rss": 2e9, "peak_device": None}
        return {"contender": name, "ceilings": [CEILINGS, CEILINGS], **figures}

    parts = {"rollout": 1.0, "reference": 0.5, "gradient": 0.25, "update": 0.125}
    runs = [run("ours", seconds, parts) for seconds in (2.0, 3.0, 4.0)] + [run("trl", 12.0, parts)]
    failed = {"contender": "tunix", "error": "exit code -9", "output": "", "ceilings": [CEILINGS | {"flops": 3e9}]}
    rows = table.of({"benchmark": "peers", "runs": [*runs, failed]}).splitlines()
    assert rows[2] == "| ours | 3 | 1 | 1 | 1 | 0.5 | 0.25 | 0.125 | 6 | 2 |"
    assert rows[3].startswith("| trl | 12 | 4 | 4 | ") and rows[4] == ""
    assert "reached 2 to 3 GFLOP/s" in rows[5]


@pytest.mark.slow
def test_judges_are_given_the_same_tokens_and_set_over_ours(
    model: tuple, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface.save_pretrained(tmp_path / "model", *model)
    rows = judges.rows_of(3)
    task = judges.task_of(tmp_path / "model", "", rows, batch=2, rounds=2)
    head = os.path.commonprefix(task.prompts)
    assert len(head) > 64 and len({tuple(prompt) for prompt in task.prompts}) == 3  # instructions first
    assert rows[0].title in model[2].decode(task.prompts[0])
    (tmp_path / "task.json").write_text(json.dumps(dataclasses.asdict(task)))
    monkeypatch.setattr(sys, "argv", ["our_judge", str(tmp_path / "task.json")])
    protocol.judge_main(our_judge.make)
    *rounds, end = protocol.answers(capsys.readouterr().out)
    assert [one["kind"] for one in rounds] == ["round", "round"] and len(end["answers"]) == 3
    assert all(answer.startswith("Category: ") for answer in end["answers"])

    def run(name: str, seconds: float, answers: list[str]) -> dict:
        rounds = [{"seconds": seconds, "cpu_seconds": 2 * seconds}]
        return {"contender": name, "rounds": rounds, "answers": answers, "peak_rss": 1e9}

    runs = [run("ours", 2.0, ["a", "b"]), run("hf", 8.0, [" a", "c"]), {"contender": "llama", "error": "exit code 1"}]
    lines = table.of({"benchmark": "judges", "rows": 4, "runs": runs}).splitlines()
    assert lines[2:] == ["| ours | 2 | 1 | 1 | 1 | 1 |", "| hf | 0.5 | 4 | 4 | 0.5 | 1 |"]


def test_a_run_is_timed_to_the_first_row_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    rows = [("sft", 9.0), ("rl", 5.0), ("rl", 1.0), ("rl", 2.0), ("rl", 3.0)]
    text = "".join(json.dumps({"stage": stage, "time/step_s": seconds}) + "\n" for stage, seconds in rows)
    writes = f"import pathlib; pathlib.Path({str(log)!r}).write_text({text!r})"
    found = startup._timed_run([sys.executable, "-c", writes], dict(os.environ), log)
    assert found["to_first_step"] > 0 and (found["first_rl_step"], found["later_rl_step"]) == (5.0, 2.0)
    with pytest.raises(RuntimeError, match="exit code 3"):
        startup._timed_run([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), tmp_path / "none")


@pytest.mark.slow
def test_pairs_are_tokenised() -> None:
    assert all(row["pairs_per_minute"] > 0 for row in startup.tokenising(64))


@pytest.mark.slow
def test_the_training_loop_is_set_against_its_compiled_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = catalog.splits(0, dict.fromkeys(catalog.SIZES, 64))
    monkeypatch.setattr(benchmark, "load_benchmark", lambda *_: few)
    found = startup.host_share(get_config("benchmark"), 4, str(tmp_path))
    assert found["loop_step"] > 0 and found["compiled_step"] > 0 and 0 <= found["host_share"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("peers", "--work=tiny", "--model=tiny", "--only=ours"),
        ("limits", "--work=tiny", "--model=tiny", "--batches=4"),
        ("guidance", "--works=tiny", "--models=tiny"),
        ("instructions", "--model=tiny", "--rows=2"),
        ("growth", "--base_work=tiny", "--base=tiny", "--factors=1"),
    ],
    ids=lambda command: command[0],
)
def test_command_writes_results_of_which_the_table_is_made(command: tuple[str, ...], tmp_path: Path) -> None:
    name, *arguments = command
    out = tmp_path / f"{name}.json"
    words = [sys.executable, "-m", f"benchmarks.{name}", f"--out={out}", "--repeats=1", *arguments]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | quick.COMPILING, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["benchmark"] == name and found["machine"]["cores"] > 0
    assert table.of(found) in done.stdout
    assert table.draw(table.read(tmp_path), tmp_path / "plot.png") == (name == "peers")
