"""The judge: well-formed answers from any policy, whole files, resumed work, and clear refusals."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import commands
import hf_models
import jax
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import quick
from etils import epath
from workdirs import make_workdir

from agrl_jax import judge as judge_command
from agrl_jax.data import rows as rows_module
from agrl_jax.data.pairs import PairsError
from agrl_jax.data.rows import OutputError
from agrl_jax.judging import cuts, engine, trained
from agrl_jax.judging import labelled as labelling
from agrl_jax.judging.cuts import CutsError
from agrl_jax.judging.engine import Judge
from agrl_jax.judging.files import judge_file, parse_shard
from agrl_jax.judging.trained import Settings, TrainedError
from agrl_jax.rulebook import wording
from agrl_jax.runtime.checkpoint import CheckpointError
from agrl_jax.runtime.config import ConfigError

ROOT = Path(__file__).parent.parent
BATCH = 4
SHORT = Settings(prompt_len=32)  # two padded lengths, so two programs to compile


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workdir(tmp_path_factory.mktemp("workdir"))


@pytest.fixture(scope="module")
def judge(workdir: Path) -> Judge:
    return Judge.from_checkpoint(str(workdir), batch_size=BATCH, settings=SHORT)


def some_rows(count: int) -> list[dict[str, str]]:
    """Rows of many lengths."""
    return [{"query": f"shoes {i}", "title": "red " * (i * 7 % 17) + "Nike", "price": f"{i}.50"} for i in range(count)]


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


# The tier alone


@pytest.fixture(scope="module")
def tier_first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workdir(tmp_path_factory.mktemp("tier_first"), order="respond_then_think")


@pytest.mark.slow
def test_the_tier_alone_is_the_tier_of_the_whole_answer(tier_first: Path, tmp_path: Path) -> None:
    whole = Judge.from_checkpoint(str(tier_first), batch_size=BATCH, settings=SHORT)
    alone = Judge.from_checkpoint(str(tier_first), batch_size=BATCH, settings=SHORT, steps=False)
    rows = some_rows(9)
    for one, other in zip(whole.judge(rows), alone.judge(rows), strict=True):
        assert (other.tier, other.stated, other.likeliest) == (one.tier, one.stated, one.likeliest)
        assert list(other.probs.values()) == pytest.approx(list(one.probs.values()), abs=2e-6)
        assert one.response.startswith(f"{other.response}\n") and len(one.steps) == len(whole.book.steps)
        assert other.response == f"Tier: {one.tier}" and other.steps == {} and other.consistent is None
    # A file has the columns of steps, but they are empty.
    summary = judge_file(alone, str(write_csv(tmp_path / "in.csv", rows)), str(tmp_path / "out.parquet"))
    assert "do not imply" not in str(summary) and alone.identity != whole.identity
    table = pq.read_table(tmp_path / "out.parquet")
    steps = [f"judge_step_{step.name}" for step in alone.book.steps]
    assert [table[name].null_count for name in [*steps, "judge_consistent"]] == [9] * (len(steps) + 1)
    assert table["judge_tier"].to_pylist() == [one.tier for one in whole.judge(rows)]


def test_the_tier_alone_is_scored_without_steps(tier_first: Path, tmp_path: Path) -> None:
    alone = Judge.from_checkpoint(str(tier_first), batch_size=BATCH, settings=SHORT, steps=False)
    labelled = [row | {"label": str(1 + i % 4), "step_brand": "match"} for i, row in enumerate(some_rows(8))]
    scored = labelling.judge_pairs(alone, write_csv(tmp_path / "in.csv", labelled))
    scores = scored.scores(alone.book, bootstrap=0)
    right = np.mean([one.tier[0] == row["label"] for one, row in zip(alone.judge(labelled), labelled, strict=True)])
    assert scores["accuracy"]["value"] == right
    assert [scores[name]["value"] for name in ("step_accuracy", "step_accuracy/brand", "all_right", "adherence")] == (
        [None] * 4
    )


def test_a_judge_that_states_the_tier_last_is_not_asked_for_it_alone(workdir: Path, capfd) -> None:
    arguments = [f"--checkpoint={workdir}", "--input=examples/pairs.csv", "--output=out.csv", "--nosteps"]
    assert commands.exit_code(judge_command.main, *arguments) == 2
    assert "needs a judge that states the tier first" in capfd.readouterr().err


def test_cut_points_of_another_temperature_are_not_used(workdir: Path, capfd) -> None:
    arguments = [f"--checkpoint={workdir}", "--fit_temperature=examples/pairs.csv", "--use_cuts"]
    assert commands.exit_code(judge_command.main, *arguments) == 2
    assert "cut points depend on the temperature; add --fit_cuts" in capfd.readouterr().err


# Judgements


def test_an_untrained_policy_answers_in_form(judge: Judge) -> None:
    judged = judge.judge(some_rows(10))
    assert len(judged) == 10
    for one in judged:
        assert wording.well_formed(judge.book, one.response)
        *steps, tier = wording.read(judge.book, one.response).value
        assert one.tier == judge.book.tiers[tier].name
        assert list(one.steps.values()) == [s.values[v] for s, v in zip(judge.book.steps, steps, strict=True)]
        assert one.consistent == (judge.book.tier_for(steps) == tier)
        assert sum(one.probs.values()) == pytest.approx(1, abs=1e-5)
        assert list(one.probs) == [tier.name for tier in judge.book.tiers]
        assert one.error == ""
    assert len({one.response for one in judged}) > 1  # the policy is large enough for different answers


@pytest.mark.slow
def test_free_text_is_ended_in_time(tmp_path: Path) -> None:
    folder = make_workdir(tmp_path, free_text="between")
    free = Judge.from_checkpoint(str(folder), batch_size=BATCH, settings=Settings(response_len=64, prompt_len=32))
    for one in free.judge(some_rows(3)):
        assert wording.well_formed(free.book, one.response)


def test_a_judgement_does_not_depend_on_its_neighbours(judge: Judge) -> None:
    rows = some_rows(9)
    together = judge.judge(rows)
    for row, one in zip(rows[::4], together[::4], strict=True):
        (alone,) = judge.judge([row])
        assert (alone.response, alone.tier) == (one.response, one.tier)
        assert alone.probs == pytest.approx(one.probs, abs=1e-5)


def test_probabilities_are_those_of_the_values_texts(judge: Judge, workdir: Path) -> None:
    """Against plain sums: of log-probabilities over the tokens of each text, and over all combinations of steps."""
    loaded = trained.load(str(workdir))
    (one,) = judge.judge([{"query": "red shoes", "title": "Nike running shoes"}])
    encode = loaded.tokenizer.encode
    before = encode("Query:") + encode(" red shoes\nItem:") + encode(" Nike running shoes") + encode("\n")
    run = jax.jit(lambda tokens: loaded.policy.unembed(loaded.params, loaded.policy.apply(loaded.params, tokens)[0]))
    probs = []
    for step in loaded.book.steps:
        lead = "" if step is loaded.book.steps[0] else "\n"
        texts = [encode(f"{lead}{step.label}: {value}") for value in step.values]
        tokens = np.zeros((len(texts), 1, 96), np.int32)  # all of one length, so that it compiles once
        for row, text in zip(tokens, texts, strict=True):
            row[0, : len(before + text)] = before + text
        logp = np.asarray(jax.nn.log_softmax(run(np.pad(tokens, ((0, 5 - len(texts)), (0, 0), (0, 0))))))[:, 0]
        scores = [
            sum(logp[i, len(before) + k - 1, token] for k, token in enumerate(text)) for i, text in enumerate(texts)
        ]
        probs.append(np.exp(scores) / np.exp(scores).sum())
        chosen = int(np.argmax(scores))
        assert one.steps[step.name] == step.values[chosen]
        before += texts[chosen]
    expected = dict.fromkeys(one.probs, 0.0)
    for values in itertools.product(*(range(len(step.values)) for step in loaded.book.steps)):
        tier = loaded.book.tiers[loaded.book.tier_for(values)].name
        expected[tier] += np.prod([of[value] for of, value in zip(probs, values, strict=True)])
    assert one.probs == pytest.approx(expected, abs=1e-5)
    assert one.likeliest == max(one.probs, key=one.probs.get) and one.stated in one.response
    assert one.tier == one.stated and one.tier_from == "answer"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"query": "", "title": "Nike"}, "query is empty"),
        ({"query": "shoes"}, "title is empty"),
        ({}, "query is empty; title is empty"),
        ({"query": "red " * 200, "title": "Nike"}, "prompt_len is 32"),
        ({"query": "shoes", "title": float("nan")}, "title is empty"),
        ({"query": "shoes \ud83d", "title": "Nike"}, "query is not valid Unicode"),
        ({"query": "shoes", "title": "Nike", "color": "\udc00 red"}, "color is not valid Unicode"),
    ],
)
def test_a_row_that_cannot_be_judged_says_why_and_spoils_no_other(judge: Judge, row: dict, said: str) -> None:
    good = {"query": "shoes", "title": "Nike"}
    first, bad, last = judge.judge([good, row, good])
    assert said in bad.error and bad.tier is None and bad.response is None
    assert first == last and first.tier


class NAType:
    """Like NA of pandas: a comparison with itself is neither true nor false."""

    def __ne__(self, other: object) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


@pytest.mark.parametrize("missing", [None, "", float("nan"), np.float32("nan"), np.datetime64("NaT"), NAType()])
def test_a_missing_text_is_no_text(judge: Judge, missing: object) -> None:
    row = {"query": "shoes", "title": "Nike"}
    without, with_missing = judge.judge([row, row | {"brand": missing, "price": missing}])
    assert without == with_missing and without.tier


def test_a_price_is_the_same_as_text_and_as_a_number(judge: Judge) -> None:
    row = {"query": "shoes", "title": "Nike", "price": "129.00"}
    first, *others = judge.judge([row, row | {"price": 129.0}, row | {"price": Decimal("129.00")}])
    assert others == [first, first]


# Files


def test_a_file_keeps_its_rows_and_gains_columns(judge: Judge, tmp_path: Path) -> None:
    rows = some_rows(6)
    rows[3]["title"] = ""
    summary = judge_file(judge, str(write_csv(tmp_path / "in.csv", rows)), str(tmp_path / "out.parquet"))
    assert (summary.rows, summary.bad) == (6, [(4, "title is empty")])
    assert "row 4: title is empty" in str(summary) and "judged 5 of 6 rows" in str(summary)
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [{name: one[name] for name in rows[0]} for one in found] == rows
    for one, judged in zip(found, judge.judge(rows), strict=True):
        assert one["judge_error"] == judged.error
        assert one["judge_tier"] == judged.tier
        assert one["judge_response"] == judged.response
        assert one["judge_prob_4-Excellent"] == judged.probs.get("4-Excellent")
        assert one["judge_step_brand"] == judged.steps.get("brand")
        assert (one["judge_stated"], one["judge_likeliest"]) == (judged.stated, judged.likeliest)
        assert one["judge_tier_from"] == judged.tier_from
        if not judged.error:
            assert one["judge_disagree"] == (judged.stated != judged.likeliest)
        assert one["judge_consistent"] == judged.consistent
    assert not (tmp_path / "out.parquet.partial").exists()


def test_a_broken_row_of_a_file_is_reported_by_number(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"query": "a", "title": "A"}\n{"query": \n{"query": "b", "title": "B"}\n')
    summary = judge_file(judge, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    (number, error), = summary.bad
    assert number == 2 and "not valid JSON" in error
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [bool(one["judge_tier"]) for one in found] == [True, False, True]


def test_work_that_was_stopped_goes_on_and_comes_out_the_same(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "_CHUNK_BATCHES", 2)
    source = str(write_csv(tmp_path / "in.csv", some_rows(21)))
    judge_file(judge, source, str(tmp_path / "whole.jsonl"))
    calls = []

    def stopping(rows: list, *advance: object) -> list:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Judge.judge(judge, rows, *advance)

    monkeypatch.setattr(judge, "judge", stopping)
    with pytest.raises(KeyboardInterrupt):
        judge_file(judge, source, str(tmp_path / "stopped.jsonl"))
    assert not (tmp_path / "stopped.jsonl").exists()
    partial = tmp_path / "stopped.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-20])  # as a process that was killed while it wrote may leave the file
    judge_file(judge, source, str(tmp_path / "stopped.jsonl"))
    assert calls == [8, 8, 5, 8, 5]
    assert (tmp_path / "stopped.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert "going on after row 8 of 21" in capsys.readouterr().out


def test_an_output_is_replaced_only_if_asked(judge: Judge, workdir: Path, tmp_path: Path) -> None:
    source, output = str(write_csv(tmp_path / "in.csv", some_rows(1))), tmp_path / "out.csv"
    output.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        judge_file(judge, source, str(output))
    judge_file(judge, source, str(output), overwrite=True)
    assert output.read_text().startswith("query,title,price,judge_tier")
    with pytest.raises(OutputError, match="judge_tier.*--prefix"):
        judge_file(judge, str(output), str(tmp_path / "again.csv"))
    judge_file(judge, str(output), str(tmp_path / "again.csv"), prefix="second_")


def test_a_file_with_other_columns_is_judged_alike(judge: Judge, tmp_path: Path) -> None:
    rows = some_rows(3)
    judge_file(judge, str(write_csv(tmp_path / "ours.csv", rows)), str(tmp_path / "a.jsonl"))
    renamed = [{"search": row["query"], "name": row["title"], "price": row["price"], "title": "-"} for row in rows]
    source, columns = str(write_csv(tmp_path / "theirs.csv", renamed)), {"query": "search", "title": "name"}
    judge_file(judge, source, str(tmp_path / "b.jsonl"), columns=columns)
    ours, theirs = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in "ab")
    assert [row["judge_response"] for row in ours] == [row["judge_response"] for row in theirs]
    assert [list(row)[:4] for row in theirs] == [["search", "name", "price", "title"]] * 3
    with pytest.raises(PairsError, match="lacks the column 'nmae'.*did you mean 'name'"):
        judge_file(judge, source, str(tmp_path / "c.csv"), columns=columns | {"title": "nmae"})
    with pytest.raises(PairsError, match="columns: there is no column 'label'"):
        judge_file(judge, source, str(tmp_path / "c.csv"), columns={"label": "name"})


def test_lines_that_cannot_be_read_are_kept(judge: Judge, tmp_path: Path) -> None:
    bad = 'cup,"Cup 3\\" high, red"'
    (tmp_path / "in.csv").write_text(f"query,title\nshoes,Nike\n{bad}\n")
    for name in ("out.csv", "out.jsonl"):
        summary = judge_file(judge, str(tmp_path / "in.csv"), str(tmp_path / name))
        assert (summary.rows, summary.bad_rows) == (2, 1)
    assert f"\n{bad},,," in (tmp_path / "out.csv").read_text()
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert first["judge_tier"] and second["judge_error"].endswith(f": {bad}") and second["judge_tier"] is None


def test_frames_are_judged_as_records(judge: Judge) -> None:
    rows = some_rows(2)
    assert judge.judge(pandas.DataFrame(rows)) == judge.judge(rows)


def test_work_of_another_judge_is_not_gone_on_with(judge: Judge, workdir: Path, tmp_path: Path) -> None:
    source = str(write_csv(tmp_path / "in.csv", some_rows(2)))
    (tmp_path / "out.csv.partial").write_text(json.dumps(judge.identity | {"checkpoint": "other"}) + "\n")
    with pytest.raises(OutputError, match="another checkpoint, input"):
        judge_file(judge, source, str(tmp_path / "out.csv"))


def test_progress_is_told_of_each_batch(judge: Judge) -> None:
    told: list[int] = []
    rows = [*some_rows(2 * BATCH + 1), {"query": "", "title": "no query"}]
    judge.judge(rows, told.append)
    assert told == [1, BATCH, BATCH, 1]


def test_a_file_without_titles_is_refused(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="lacks the column 'title'; it has query, name"):
        judge_file(judge, str(write_csv(tmp_path / "in.csv", [{"query": "a", "name": "b"}])), str(tmp_path / "o.csv"))


def test_equal_pairs_are_judged_once(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*some_rows(2), *some_rows(2), {"query": "shoes  0", "title": "Nike", "price": 0.5}]  # as the first
    started, start = [], judge._start
    monkeypatch.setattr(judge, "_start", lambda prompts: started.append(len(prompts)) or start(prompts))
    before, told = judge.repeated, []
    judged = judge.judge(rows, told.append)
    assert (started, judge.repeated - before, told) == ([2], 3, [3, 2])
    assert judged[:2] == judged[2:4] and judged[4] == judged[0] != judged[1]
    summary = judge_file(judge, str(write_csv(tmp_path / "in.csv", rows[:4])), str(tmp_path / "out.csv"))
    assert "rows equal to another of their chunk, which were judged once: 2" in str(summary)


# Shards and buckets


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_shard_of_no_rows_is_a_file_of_no_rows(judge: Judge, tmp_path: Path, kind: str) -> None:
    table = pandas.DataFrame(some_rows(2))
    source, output = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    table.to_csv(source, index=False) if kind == "csv" else table.to_json(source, orient="records", lines=True)
    judge_file(judge, str(source), str(output), shard=(1, 3))  # rows 1 to 0
    lines = output.read_text().splitlines()
    assert lines[0].startswith("query,title,") if kind == "csv" else not lines
    assert len(lines) <= 1 and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_shards_one_after_the_other_are_the_whole(judge: Judge, tmp_path: Path, kind: str) -> None:
    rows = [*some_rows(6), {"query": "", "title": "no query", "price": "1"}]
    table = pandas.DataFrame(rows)
    source = tmp_path / f"in.{kind}"
    if kind == "parquet":
        table.to_parquet(source, row_group_size=2)
    elif kind == "csv":
        table.to_csv(source, index=False)
    else:
        table.to_json(source, orient="records", lines=True)

    def judged(name: str, shard: tuple[int, int]) -> tuple[str, list[dict]]:
        output = tmp_path / f"{name}.{kind}"
        summary = judge_file(judge, str(source), str(output), shard=shard)
        return str(summary), [row.record for row in rows_module.open_rows(output).rows()]

    whole = judged("whole", (1, 1))[1]
    parts = [judged(f"part{i}", (i, 3)) for i in (1, 2, 3)]
    assert [len(part) for _, part in parts] == [2, 2, 3]
    assert "row 7: query is empty" in parts[2][0]  # the number is that in the file
    together = [row for _, part in parts for row in part]
    assert [row["query"] for row in together] == [row["query"] for row in rows]
    for one, other in zip(together, whole, strict=True):
        assert list(one) == list(other)
        for name, value in one.items():
            near = "_prob_" in name and value not in (None, "")
            assert (float(value) == pytest.approx(float(other[name]), abs=1e-5)) if near else value == other[name]


def test_the_work_of_another_shard_is_not_gone_on_with(judge: Judge, tmp_path: Path) -> None:
    source = str(write_csv(tmp_path / "in.csv", some_rows(4)))
    identity = judge.identity | {"input": rows_module.open_rows(source).digest, "columns": {}, "shard": [1, 2]}
    (tmp_path / "other.csv.partial").write_text(json.dumps(identity) + "\n")
    with pytest.raises(OutputError, match=r"another shard\)"):
        judge_file(judge, source, str(tmp_path / "other.csv"), shard=(2, 2))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/4/2", "-1/4"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--shard={text}: should be i/n with i from 1 to n, such as 1/8"):
        parse_shard(text)


def test_a_bucket_s_files_are_judged_as_local_ones(
    judge: Judge, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = write_csv(tmp_path / "in.csv", some_rows(9))
    epath.Path(f"{bucket}/in.csv").write_bytes(source.read_bytes())
    output = f"{bucket}/deep/in/it/out.csv"
    judge_file(judge, str(source), str(tmp_path / "out.csv"))

    def stopping(rows: list, *advance: object) -> list:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(judge, "judge", stopping)
        judge_file(judge, f"{bucket}/in.csv", output)
    assert len(list(tmp_path.glob("agrl_jax-*.partial"))) == 1
    judge_file(judge, f"{bucket}/in.csv", output)
    assert epath.Path(output).read_bytes() == (tmp_path / "out.csv").read_bytes()
    assert not list(tmp_path.glob("agrl_jax-*"))
    assert [path.name for path in epath.Path(output).parent.iterdir()] == ["out.csv"]
    with pytest.raises(OutputError, match="exists already"):
        judge_file(judge, f"{bucket}/in.csv", output)
    with pytest.raises(OutputError, match="is the input"):
        judge_file(judge, f"{bucket}/in.csv", f"{bucket}/in.csv")


# Cut points


def test_cut_points_are_fitted_kept_and_used(workdir: Path, judge: Judge, tmp_path: Path) -> None:
    rows = [{"query": f"shoes {i}", "title": "red shoes", "label": str(4 - i % 4)} for i in range(12)]
    labelled = write_csv(tmp_path / "labelled.csv", rows)
    other = Judge.from_checkpoint(str(workdir), batch_size=BATCH, settings=SHORT)
    fitted = other.fit_cuts(str(labelled))
    kept = Judge.from_checkpoint(str(workdir), batch_size=BATCH, settings=SHORT, use_cuts=True)
    assert kept.identity == other.identity == judge.identity | {"cuts": list(fitted.cuts), "tier_from": "cuts"}
    assert kept.fit_cuts(str(labelled), use=False) == fitted and kept.identity == judge.identity
    judged = other.judge(rows)
    tiers = [tier.name for tier in judge.book.tiers]
    truth, chosen = np.arange(12) % 4, np.array([tiers.index(one.tier) for one in judged])
    assert fitted.macro_f1 == pytest.approx(cuts.macro_f1(truth, chosen))
    for plain, cut in zip(judge.judge(rows), judged, strict=True):
        cumulative = np.cumsum(list(cut.probs.values()))[:-1]
        reached = np.flatnonzero(cumulative >= fitted.cuts)
        assert cut.tier == judge.book.tiers[reached[0] if len(reached) else -1].name
        assert (cut.probs, cut.response) == (plain.probs, plain.response)
        *steps, _ = wording.read(judge.book, cut.response).value
        assert cut.consistent == (judge.book.tiers[judge.book.tier_for(steps)].name == cut.tier)
    with pytest.raises(CutsError, match="another checkpoint"):
        Judge.from_checkpoint(str(workdir), stage="sft_end", use_cuts=True)
    (workdir / "cuts.json").unlink()
    with pytest.raises(CutsError, match="--fit_cuts"):
        Judge.from_checkpoint(str(workdir), use_cuts=True)


# Checkpoints


def test_a_run_without_rl_has_the_end_of_its_warm_start_alone(tmp_path: Path) -> None:
    folder = epath.Path(make_workdir(tmp_path))
    assert trained.stages_of(folder) == ["sft_end", "rl"]
    shutil.rmtree(tmp_path / "checkpoints" / "rl")
    assert trained.stages_of(folder) == ["sft_end"]
    shutil.rmtree(tmp_path / "checkpoints" / "sft_end")
    assert trained.stages_of(folder) == []


def test_a_workdir_has_three_stages(workdir: Path, judge: Judge) -> None:
    names = {stage: trained.fingerprint(trained.load(str(workdir), stage).params) for stage in trained.STAGES}
    assert len(set(names.values())) == 3
    assert judge.identity["checkpoint"] == names["best"]
    with pytest.raises(TrainedError, match="'last' is not one of best, rl, sft_end"):
        trained.load(str(workdir), "last")


def test_without_rl_the_best_is_the_end_of_the_warm_start(workdir: Path, tmp_path: Path) -> None:
    for path in ("config.json", "tokenizer.json", "tokenizer_config.json", "checkpoints/sft_end"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).symlink_to(workdir / path)
    ours, theirs = trained.load(str(tmp_path)), trained.load(str(workdir), "sft_end")
    assert trained.fingerprint(ours.params) == trained.fingerprint(theirs.params)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        trained.load(str(tmp_path), "rl")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainedError, match="no such checkpoint"):
        trained.load(str(tmp_path / "none"))
    with pytest.raises(TrainedError, match="should be a training run's workdir"):
        trained.load(str(tmp_path))


def test_a_config_that_is_torn_is_refused_by_name(workdir: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text()[:99])
    with pytest.raises(ConfigError, match="config.json: not valid JSON"):
        trained.load(str(tmp_path))


def test_another_rule_book_than_in_training_is_refused(workdir: Path) -> None:
    with pytest.raises(TrainedError, match="trained with another rule book"):
        trained.load(str(workdir), settings=Settings(order="respond_then_think"))


def test_a_length_in_which_no_response_fits_is_refused(workdir: Path) -> None:
    with pytest.raises(TrainedError, match="response_len is 3, but a response has at least"):
        Judge.from_checkpoint(str(workdir), settings=Settings(response_len=3))


def test_a_model_that_was_never_trained_here_judges_too(tmp_path: Path) -> None:
    hf_models.write(tmp_path, "llama")
    judge = Judge.from_checkpoint(str(tmp_path), batch_size=2, settings=Settings(style="terse"))
    for one in judge.judge(some_rows(2)):
        assert wording.well_formed(judge.book, one.response)


# The temperature


@pytest.mark.slow
def test_a_temperature_is_fitted_kept_and_used(judge: Judge, tmp_path: Path) -> None:
    folder = make_workdir(tmp_path)
    rows = [{"query": f"shoes {i}", "title": "red " * (i % 3 + 1), "label": str(4 - i % 4)} for i in range(24)]
    labelled = str(write_csv(tmp_path / "labelled.csv", rows))
    other = Judge.from_checkpoint(str(folder), batch_size=BATCH, settings=SHORT)
    plain = other.judge(rows)
    fitted = other.fit_temperature(labelled)
    assert fitted.pairs == 24 and fitted.nll < fitted.nll_before  # the labels do not depend on the policy
    kept = Judge.from_checkpoint(str(folder), batch_size=BATCH, settings=SHORT)
    assert kept.calibration == fitted and kept.identity == other.identity != judge.identity
    judged = kept.judge(rows)
    for before, after in zip(plain, judged, strict=True):
        assert (after.stated, after.steps, after.response) == (before.stated, before.steps, before.response)
        assert after.tier_from == fitted.tier_from
        assert after.tier == (after.likeliest if fitted.tier_from == "probabilities" else after.stated)
    tiers = [tier.name for tier in judge.book.tiers]
    nll = -np.mean([np.log(one.probs[tiers[i % 4]]) for i, one in enumerate(judged)])
    assert nll == pytest.approx(fitted.nll, abs=1e-4)
    # Another checkpoint of the same workdir has no temperature of its own. Cut points belong to a temperature.
    assert Judge.from_checkpoint(str(folder), stage="rl", settings=SHORT).calibration is None
    kept.fit_cuts(labelled)
    Judge.from_checkpoint(str(folder), settings=SHORT, use_cuts=True)
    (folder / "calibration.json").unlink()
    with pytest.raises(CutsError, match="another temperature"):
        Judge.from_checkpoint(str(folder), settings=SHORT, use_cuts=True)


# The command


def test_the_command_judges_a_file(workdir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, output = ROOT / "examples" / "pairs.csv", tmp_path / "judged.csv"
    files = (f"--checkpoint={workdir}", f"--input={source}", f"--output={output}")
    words = ("--batch_size=8", "--prompt_len=64", "--prefix=our_", f"--qrels={tmp_path / 'out.qrels'}")
    assert commands.exit_code(judge_command.main, *files, *words) == 0
    said = capfd.readouterr().out
    assert "judged 24 of 24 rows" in said and str(output) in said
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    qrels = [line.split() for line in (tmp_path / "out.qrels").read_text().splitlines()]
    assert [(item, int(gain) + 1) for _, _, item, gain in qrels] == [
        (row["id"], int(row["our_tier"][0])) for row in rows
    ]
    numbers = dict(line.split("\t") for line in (tmp_path / "out.qrels.queries.tsv").read_text().splitlines())
    assert [numbers[query] for query, _, _, _ in qrels] == [row["query"] for row in rows]


FOUR_DEVICES = """
import json, sys
import jax
from agrl_jax import judge
from agrl_jax.judging import checkpoint_flags

load, loaded = checkpoint_flags.load, []
checkpoint_flags.load = lambda *given: loaded.append(load(*given)) or loaded[-1]
judge.main(["judge", *sys.argv[1:]])
split = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(loaded[0]._loaded.params)]
print(min(split), sum(size < 1 for size in split))
"""


@pytest.mark.slow
def test_a_model_over_four_devices_judges_as_on_one(workdir: Path, judge: Judge, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "in.csv", some_rows(6))
    environment = os.environ | quick.ENVIRONMENT
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES, f"--checkpoint={workdir}", f"--input={source}", "--mesh.tensor=4",
         f"--output={tmp_path}/out.jsonl", f"--batch_size={BATCH}", "--prompt_len=32"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    smallest, number = done.stdout.splitlines()[-1].split()
    assert float(smallest) == 0.25 and int(number) >= 4  # vocabulary and feed-forward; norms are whole
    judged = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    for one, expected in zip(judged, judge.judge(some_rows(6)), strict=True):
        assert (one["judge_tier"], one["judge_response"]) == (expected.tier, expected.response)
        assert [one[f"judge_prob_{name}"] for name in expected.probs] == pytest.approx(
            list(expected.probs.values()), abs=1e-4
        )


def test_a_mesh_that_cannot_be_is_refused(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (f"--input={ROOT}/examples/pairs.csv", f"--output={tmp_path}/out.csv")
    assert commands.exit_code(judge_command.main, f"--checkpoint={workdir}", *files, "--mesh.tensor=3") == 2
    said = "mesh.data=-1, mesh.fsdp=1, mesh.tensor=3: cannot be laid over 1 device"
    assert capsys.readouterr().err == f"error: {said}\n"


def test_the_command_refuses_in_one_message(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.exit_code(judge_command.main, f"--checkpoint={workdir}", "--input=no_such.csv") == 2
    said = "--input and --output are both needed, or --fit_cuts or --fit_temperature alone"
    assert capsys.readouterr().err == f"error: {said}\n"
