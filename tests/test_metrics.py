"""Logs are read back bit for bit and survive a kill; the progress bar; tables."""

import io
import json
import struct

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from conftest import empty_bucket
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from agrl_jax.runtime import console as console_module
from agrl_jax.runtime import logs
from agrl_jax.runtime.checkpoint import Checkpointer
from agrl_jax.runtime.console import console_table, progress
from agrl_jax.runtime.logs import MetricsWriter, read_jsonl


def write_run(workdir, steps, resume=None):
    """Rows for the given (stage, step) pairs, each with one sample."""
    with MetricsWriter(workdir, resume) as writer:
        for stage, step in steps:
            writer.write(stage, step, {"reward/total": np.float32(step) / 3, "accuracy": step / 7})
            writer.write_samples(stage, step, [{"text": f"Tier {step} naïve", "advantage": jnp.float32(0.1)}])


def events(folder):
    """(step, tag or None) of every TensorBoard event; a session start has no tag."""
    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("summary"):
                found += [(event.step, value.tag) for value in event.summary.value]
            elif event.HasField("session_log"):
                found.append((event.step, None))
    return found


# ------------------------------------------------------------------------------------------------ rows


def test_rows_hold_stage_step_and_sorted_values(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("sft", 1, {"b": 2, "a": jnp.float32(0.1), "c": True})
        assert read_jsonl(tmp_path / "metrics.jsonl")  # rows are flushed at once
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "stage": "sft", "a": 0.1, "b": 2, "c": true}\n'


def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("rl", 1, {"a": jnp.nan, "b": np.float32("inf"), "c": float("-inf"), "d": jnp.bfloat16(0.5)})
    line = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "stage": "rl", "a": None, "b": None, "c": None, "d": 0.5}


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_reads_back_bit_for_bit(value):
    written = json.loads(json.dumps(logs._plain(np.float32(value))))
    assert np.float32(written).tobytes() == np.float32(value).tobytes()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float64_reads_back_bit_for_bit(value):
    for form in (value, np.float64(value)):
        assert np.float64(json.loads(json.dumps(logs._plain(form)))).tobytes() == np.float64(value).tobytes()


def test_samples_keep_their_order_and_text(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write_samples("rl", 3, [{"z": 1, "text": "é\n", "parts": np.array([0.5, np.nan])}, {"a": None}])
    assert read_jsonl(tmp_path / "samples.jsonl") == [
        {"step": 3, "stage": "rl", "z": 1, "text": "é\n", "parts": [0.5, None]},
        {"step": 3, "stage": "rl", "a": None},
    ]


def test_an_unknown_stage_is_refused(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="'RL', expected one of sft, rl"):
        writer.write("RL", 1, {})


# ---------------------------------------------------------------------------------------------- resume

WHOLE = [("sft", 1), ("sft", 2), ("sft", 3), ("rl", 1), ("rl", 2), ("rl", 3)]


@pytest.mark.parametrize("resume", WHOLE[:5])  # no checkpoint is past the rows that were written
@pytest.mark.parametrize("tail", ["", '{"step": 9, "sta'])
def test_a_resumed_run_leaves_the_same_logs_as_one_never_killed(tmp_path, resume, tail):
    write_run(tmp_path / "whole", WHOLE)
    write_run(tmp_path / "killed", WHOLE[:5])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / "killed" / name).open("a") as file:
            file.write(tail)
    write_run(tmp_path / "killed", WHOLE[WHOLE.index(resume) + 1 :], resume=resume)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_without_a_checkpoint_the_logs_start_empty(tmp_path):
    write_run(tmp_path, WHOLE)
    write_run(tmp_path, [("sft", 1)])
    assert [(row["stage"], row["step"]) for row in read_jsonl(tmp_path / "metrics.jsonl")] == [("sft", 1)]
    assert {step for step, _ in events(tmp_path / "tensorboard" / "sft")} == {1}
    assert not (tmp_path / "tensorboard" / "rl").exists()


def test_a_kill_while_the_log_is_cut_leaves_the_old_one(tmp_path, monkeypatch):
    write_run(tmp_path, WHOLE)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    path = type(epath.Path(tmp_path))
    monkeypatch.setattr(path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        logs.cut_rows(tmp_path / "metrics.jsonl", ("sft", 1))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_broken_line_that_is_not_the_last_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "stage": "sft"}\n{"step": \n{"step": 3, "stage": "sft"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        MetricsWriter(tmp_path, ("sft", 3))


def test_tensorboard_holds_the_scalars_and_is_purged_on_resuming(tmp_path):
    write_run(tmp_path, WHOLE)
    tags = {"reward/total", "accuracy"}
    assert set(events(tmp_path / "tensorboard" / "rl")) == {(step, tag) for step in (1, 2, 3) for tag in tags}
    write_run(tmp_path, [("rl", 2)], resume=("rl", 1))
    assert (2, None) in events(tmp_path / "tensorboard" / "rl")  # it voids earlier events from step 2 on
    write_run(tmp_path, [("sft", 3), ("rl", 1)], resume=("sft", 2))
    assert (3, None) in events(tmp_path / "tensorboard" / "sft")
    assert (0, None) in events(tmp_path / "tensorboard" / "rl")


# --------------------------------------------------------------------------------------------- console


def test_progress_off_a_terminal_is_a_plain_line_now_and_then():
    out = io.StringIO()
    with progress("rl", total=4, start=1, every_s=3600, console=rich.console.Console(file=out)) as bar:
        bar.update(2, {"reward": 0.5})
        bar.print("[forced] Category: same")
        bar.update(4, {"reward": 0.61234, "tok/s": 5212.4})
    first, last = out.getvalue().splitlines()
    assert first == "[forced] Category: same"  # brackets are text, not markup
    assert last.startswith("rl 4/4  0:00 eta 0:00") and last.endswith("reward 0.612  tok/s 5,212")


def test_progress_off_a_terminal_speaks_each_interval():
    out = io.StringIO()
    with progress("sft", total=3, every_s=0, console=rich.console.Console(file=out)) as bar:
        for step in (1, 2, 3):
            bar.update(step)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/3", "2/3", "3/3"]


def test_the_time_left_does_not_count_the_first_step_which_compiles(monkeypatch):
    out, clock = io.StringIO(), iter([0.0, 60.0, 62.0, 64.0, 70.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    with progress("rl", total=11, every_s=0, console=rich.console.Console(file=out)) as bar:
        bar.update(1)  # 60 s, of which compiling takes 58
        bar.update(2)
        bar.advance(1)
        bar.note("validation 8/24")
    lines = out.getvalue().splitlines()
    assert lines[0] == "rl 1/11  1:00 eta ?"
    assert lines[1] == "rl 2/11  1:02 eta 0:18"  # 9 steps of 2 s
    assert lines[2] == "rl 3/11  1:04 eta 0:16"
    assert lines[3] == "rl 3/11  validation 8/24"


def test_the_time_left_counts_no_step_that_compiles(monkeypatch):
    out, clock = io.StringIO(), iter([0.0, 60.0, 62.0, 90.0, 94.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    with progress("sft", total=10, every_s=0, console=rich.console.Console(file=out)) as bar:
        bar.update(1)
        bar.update(2)
        bar.update(3, compiled=True)  # batches of another width
        bar.update(4)
    assert [line.split("eta ")[1] for line in out.getvalue().splitlines()] == ["?", "0:16", "0:14", "0:18"]


def test_progress_on_a_terminal_is_a_bar_with_figures():
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=120)
    with progress("rl", total=10, console=console) as bar:
        bar.update(5, {"reward": 0.25})
        bar.print("a rollout")
    text = out.getvalue()
    assert "5/10" in text and "eta ?" in text and "reward 0.250" in text and "a rollout" in text


def test_table_shows_numbers_short_and_brackets_as_text():
    out = io.StringIO()
    table = console_table("Scores", ["metric", "sft", "agrl"], [["F1 [4]", 0.51239, None], ["pairs", 12, 51234.5]])
    rich.console.Console(file=out, width=80).print(table)
    text = out.getvalue()
    assert "Scores" in text and "F1 [4]" in text and "0.512" in text and "51,234" in text and "-" in text


def test_logs_of_a_bucket_are_copied_there_and_resume_from_there():
    fsspec.register_implementation("gcs", empty_bucket(), clobber=True)
    workdir = epath.Path("gs://bucket/run")
    with MetricsWriter(workdir) as writer:
        writer.write("sft", 1, {"a": 1.0})
        writer.sync()
        assert (workdir / "metrics.jsonl").read_text() == '{"step": 1, "stage": "sft", "a": 1.0}\n'
        writer.write("rl", 2, {"a": 2.0})
    assert [row["step"] for row in read_jsonl(workdir / "metrics.jsonl")] == [1, 2]
    with MetricsWriter(workdir, resume=("rl", 1)) as writer:
        writer.write("rl", 2, {"a": 3.0})
    assert [row["a"] for row in read_jsonl(workdir / "metrics.jsonl")] == [1.0, 3.0]
    with MetricsWriter(workdir):
        pass  # another run keeps nothing of the first
    assert read_jsonl(workdir / "metrics.jsonl") == [] and not (workdir / "tensorboard").exists()
    with Checkpointer(workdir) as checkpoints:
        assert str(checkpoints.directory) == "gs://bucket/run/checkpoints" and checkpoints.newest() is None
