"""Which run a workdir belongs to, what is refused before training, and when a scorecard is made again."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from etils import epath
from ml_collections import ConfigDict
from workdirs import draw, make_workdir

from agrl_jax import evaluate, recipes
from agrl_jax.data import pipeline
from agrl_jax.data.pairs import Pair
from agrl_jax.evaluation import tables
from agrl_jax.judging import trained
from agrl_jax.judging.engine import Judge
from agrl_jax.runtime import processes, sharding
from agrl_jax.runtime.checkpoint import Checkpointer
from agrl_jax.runtime.config import ConfigError, resolve
from agrl_jax.runtime.logs import cut_rows, read_jsonl
from agrl_jax.training import assemble, run

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "agrl_jax" / "rulebook" / "four_tier.yaml"


def pairs_file(path: Path, rows: list[dict[str, str]] | None = None) -> Path:
    """A file with the example's pairs, or with the given ones."""
    with (ROOT / "examples" / "pairs.csv").open(newline="") as file:
        example = list(csv.DictReader(file))
    rows = example if rows is None else rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def labelled(split: str, count: int, query: str = "red shoes") -> list[dict[str, str]]:
    return [{"query": f"{query} {i}", "title": "Shoe", "label": str(i % 4 + 1), "split": split} for i in range(count)]


def config_of(path: Path, **fields: object) -> ConfigDict:
    """A run on a file of pairs that ends as soon as its programs are compiled."""
    config = tiny.get_config("pairs")
    config.update_from_flattened_dict(
        {"data.path": str(path), "sft.source": "train", "sft.steps": 2, "sft.batch_size": 4, "rl.steps": 1,
         "rl.batch_size": 2, "guidance.enabled": False, "method": "rrs", "eval.every": 0, "eval.pairs": 0,
         "eval.bootstrap": 20, "eval.pass_pairs": 0, "rulebook.path": "four_tier"} | fields
    )  # fmt: skip
    return config


def train(config: ConfigDict, workdir: Path) -> dict:
    return run.train(config, str(workdir), say=lambda *_: None)


class _Stop(Exception):
    """Raised in place of the warm start."""


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch):
    """A run that is set up and has a checkpoint, but does not train."""

    def warm_start(run: run.Run) -> None:
        run.checkpoints.save_sft({"w": np.zeros(3, np.float32)})
        raise _Stop

    monkeypatch.setattr(run, "_warm_start", warm_start)

    def start(config: ConfigDict, workdir: Path) -> None:
        with pytest.raises(_Stop):
            train(config, workdir)

    return start


# ------------------------------------------------------------------------------------ whose workdir it is


def test_a_workdir_in_which_another_run_trains_is_refused(tmp_path: Path) -> None:
    config = config_of(pairs_file(tmp_path / "pairs.csv"))
    with processes.the_only_run(epath.Path(tmp_path / "run")):
        with pytest.raises(ConfigError, match=f"{tmp_path}/run: another run trains there now"):
            train(config, tmp_path / "run")
    with processes.the_only_run(epath.Path(tmp_path / "run")):
        pass  # the workdir is free again


def test_pairs_that_changed_are_refused_by_split(tmp_path: Path, set_up) -> None:
    rows = [row for split in ("train", "validation", "test") for row in labelled(split, 8)]
    config = config_of(pairs_file(tmp_path / "pairs.csv", rows))
    set_up(config, tmp_path / "run")
    set_up(config, tmp_path / "run")  # the same run goes on
    kept = (tmp_path / "run" / "config.json").read_bytes()
    rows[9]["title"] = "Boot"
    pairs_file(tmp_path / "pairs.csv", rows)
    data = assemble.load_data(config, assemble.load_rules(config), epath.Path(tmp_path / "run"))
    stage = trained.Stage("sft_end", 2)
    assert trained.changed_pairs(epath.Path(tmp_path / "run"), stage, data.digests) == ["validation"]
    with pytest.raises(run.USER_ERRORS) as error:
        train(config, tmp_path / "run")
    first, *lines = str(error.value).splitlines()
    assert "belong to another run" in first and len(lines) == 1
    assert lines[0].strip().startswith("pairs.validation: ")
    assert (tmp_path / "run" / "config.json").read_bytes() == kept


def test_the_config_of_an_older_version_has_defaults_for_what_it_lacks(tmp_path: Path) -> None:
    config = resolve(recipes.base())
    del config["lora"], config["mesh"]["gather_decode"]
    config["rl"]["steps"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = assemble.read_config(epath.Path(tmp_path))
    assert read.rl.steps == 7 and read.lora.rank == 0 and read.mesh.gather_decode is True


@pytest.mark.parametrize(
    ("field", "value", "depends"),
    [("eval.validation_pairs", 7, True), ("rl.temperature", 0.5, True), ("eval.pass_k", 3, True),
     ("eval.batch_size", 7, False), ("eval.every", 7, False), ("rl.steps", 7, False)],
)
def test_what_a_scorecard_depends_on(field: str, value: float, depends: bool) -> None:
    """The temperature of its probabilities is fitted on validation pairs, and pass@k is of samples."""
    config = recipes.base()
    before = assemble.card_settings(config, 0)
    config.update_from_flattened_dict({field: value})
    assert (assemble.card_settings(config, 0) != before) == depends


def test_a_relative_rule_book_is_read_from_the_workdir_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_up
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    monkeypatch.chdir(home)
    Path("rules.yaml").write_bytes(BUNDLED.read_bytes())
    set_up(config_of(pairs_file(tmp_path / "pairs.csv"), **{"rulebook.path": "rules.yaml"}), Path("run"))
    monkeypatch.chdir(away)
    workdir = epath.Path(home / "run")
    rules = assemble.kept_rules(assemble.read_config(workdir), workdir)
    assert (workdir / "rulebook.yaml").read_bytes() == BUNDLED.read_bytes()
    assert rules.digest == assemble.load_rules(recipes.base()).digest
    assert assemble.load_model(assemble.read_config(workdir), workdir).book.digest == rules.digest


# --------------------------------------------------------------------------- refused before anything trains


def refusal(config: ConfigDict, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(run, "_warm_start", lambda run: pytest.fail("the warm start began"))
    with pytest.raises(run.USER_ERRORS) as error:
        train(config, workdir)
    return str(error.value)


def test_a_split_without_pairs_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pairs_file(tmp_path / "pairs.csv", [*labelled("train", 8), *labelled("validation", 8)])
    said = refusal(config_of(path), tmp_path / "run", monkeypatch)
    assert said.startswith(f"{path}: has no rows for test in its column 'split'")


def test_a_warm_start_that_sees_the_test_pairs_is_told(tmp_path: Path) -> None:
    path = pairs_file(tmp_path / "pairs.csv", [
        {name: value for name, value in row.items() if name != "split"} for row in labelled("", 40)
    ])
    config = config_of(path)
    config.sft.update(source="pairs", path=str(path))
    rules = assemble.load_rules(config)
    data = assemble.load_data(config, rules, epath.Path(tmp_path))
    assert data.splits["test"] and set(data.splits["test"]) <= {dataclasses.replace(p, split="test") for p in data.sft}
    (said,) = [note for note in data.notes if note.startswith("queries of the test pairs that the warm start")]
    assert said.endswith(f"too: {len({pair.query for pair in data.splits['test']})}; sft.source=train trains it on the "
                         "training pairs alone")  # fmt: skip
    config.sft.source = "train"
    assert not [note for note in assemble.load_data(config, rules, epath.Path(tmp_path)).notes if "warm start" in note]


@pytest.mark.parametrize("tail", [b'{"stage": "rl", "step": 3, "text": "\xe9\x9e', b'{"stage": "rl", "st', b""])
def test_a_torn_last_line_of_a_log_is_dropped_wherever_it_is_torn(tmp_path: Path, tail: bytes) -> None:
    rows = [{"stage": "rl", "step": step, "text": "鞋"} for step in (1, 2)]
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (tmp_path / "samples.jsonl").write_bytes(whole + tail)
    assert read_jsonl(tmp_path / "samples.jsonl") == rows
    cut_rows(tmp_path / "samples.jsonl", ("rl", 1))
    assert read_jsonl(tmp_path / "samples.jsonl") == rows[:1]
    (tmp_path / "samples.jsonl").write_bytes(b"\xe9\x9e\n" + whole)
    with pytest.raises(ValueError, match=r"samples.jsonl, line 1: not JSON"):
        read_jsonl(tmp_path / "samples.jsonl")


def test_all_rows_without_room_are_listed_by_the_numbers_of_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for split in ("train", "validation", "test") for row in labelled(split, 8)]
    for number in (3, 11, 13):
        rows[number - 1]["query"] = "very long " * 100
    path = pairs_file(tmp_path / "pairs.csv", rows)
    lines = refusal(config_of(path), tmp_path / "run", monkeypatch).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [
        f"{path}, split train", "row 3", f"{path}, split validation", "row 11", "row 13"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- scorecards


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[ConfigDict, Path]:
    folder = tmp_path_factory.mktemp("finished")
    config = config_of(pairs_file(folder / "pairs.csv"))
    train(config, folder / "run")
    return config, folder / "run"


@pytest.mark.slow
def test_the_scorecard_of_a_run_that_is_extended_is_made_anew(finished: tuple[ConfigDict, Path]) -> None:
    config, workdir = finished
    before = tables.read(workdir / "scorecard.json")
    assert before["sft"]["test"]["settings"]["step"] == 2 and before["rrs"]["test"]["settings"]["step"] == 1
    marked = json.loads((workdir / "scorecard.json").read_text())
    marked["sft"]["test"]["accuracy"]["value"] = marked["rrs"]["test"]["accuracy"]["value"] = 0.125
    (workdir / "scorecard.json").write_text(json.dumps(marked))
    assert train(config, workdir)["rrs"]["test"]["accuracy"]["value"] == 0.125  # nothing changed: it is only read
    config.rl.steps = 2
    after = train(config, workdir)
    assert after == tables.read(workdir / "scorecard.json")
    assert after["rrs"]["test"]["settings"]["step"] == 2 and after["rrs"]["test"]["accuracy"]["value"] != 0.125
    assert after["sft"]["test"]["accuracy"]["value"] == 0.125  # the warm start is as it was
    assert [row["step"] for row in read_jsonl(workdir / "metrics.jsonl")] == [1, 2, 1, 2]
    config.eval.bootstrap = 30
    assert train(config, workdir)["sft"]["test"]["settings"]["bootstrap"] == 30


@pytest.mark.slow
def test_evaluated_splits_are_kept_beside_each_other_and_progress_moves_per_batch(
    finished: tuple[ConfigDict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, out, moved = str(finished[1]), tmp_path / "card.json", []
    monkeypatch.setattr("agrl_jax.runtime.console.Progress.advance", lambda self, pairs: moved.append(pairs))
    for split in ("validation", "train"):
        tables.write(out, evaluate.evaluate(workdir, ["sft_end"], [split], 0))
    card = tables.read(out)["sft"]
    assert set(card) == {"validation", "train"} and {scores["settings"]["pairs"] for scores in card.values()} == {0}
    pairs = {split: scores["accuracy"]["n"] for split, scores in card.items()}
    fitted = 2 * pairs["validation"]  # for the temperature, which is fitted in each call
    assert sum(moved) == sum(pairs.values()) + fitted and max(moved) <= 8
    with pytest.raises(ValueError, match="stage 'last' is not one of"):
        evaluate.evaluate(workdir, ["sft_end", "last"], [], 0)
    with pytest.raises(ValueError, match="'tset' is not a split of"):
        evaluate.evaluate(workdir, ["sft_end"], ["tset"], 0)


@pytest.mark.slow
def test_under_the_grammar_an_untrained_policy_is_read_in_full(tmp_path: Path) -> None:
    workdir = str(make_workdir(tmp_path))
    free, under = (
        evaluate.evaluate(workdir, ["sft_end"], ["b_eval"], 16, constrained)["sft"]["b_eval"]
        for constrained in (None, True)
    )
    assert free["format"]["value"] == free["pass@2"]["value"] == 0.0
    assert under["format"]["value"] == 1.0
    assert under["pass@2"]["value"] > 0
    assert (free["settings"]["constrained"], under["settings"]["constrained"]) == (False, True)


@pytest.mark.slow
def test_pairs_are_sampled_spread_over_those_that_are_judged(tmp_path: Path) -> None:
    folder = epath.Path(make_workdir(tmp_path))
    config = assemble.read_config(folder)
    config.eval.update(constrained=True, pass_pairs=2, pass_k=4)
    model, mesh = assemble.load_model(config, folder), sharding.make_mesh()
    pairs = [Pair(str(i), f"red shoes {i}", "Nike running shoes, red", tier=0) for i in range(8)]
    split = pipeline.encode(pairs, model.book, model.tokenizer, config.data.prompt_len, config.data.response_len)
    params, evaluator = draw(model, 0), assemble.make_evaluator(config, model, mesh)
    some = evaluator.judge(params, split, np.array([5, 1, 6, 2]))
    assert some.sample_index.tolist() == [0, 2] and np.all(some.sample_tier >= 0)
    np.testing.assert_array_equal(some.sample_tier, evaluator.judge(params, split, np.array([5, 6])).sample_tier)
    assert not np.array_equal(some.sample_tier, evaluator.judge(params, split, np.array([1, 2])).sample_tier)


def test_splits_that_were_scored_at_another_step_do_not_stay(tmp_path: Path) -> None:
    def card(split: str, step: int) -> dict:
        return {"agrl": {split: {"settings": {"step": step}}}}

    out = tmp_path / "card.json"
    for split, step in (("b_eval", 400), ("w_eval", 400)):
        tables.write(out, card(split, step) | {"sft": {"b_eval": {}}})
    assert tables.read(out)["agrl"].keys() == {"b_eval", "w_eval"}
    tables.write(out, card("w_eval", 500))
    assert tables.read(out) == card("w_eval", 500) | {"sft": {"b_eval": {}}}


@pytest.mark.slow
def test_a_truncated_checkpoint_is_one_line_for_the_judge(finished: tuple[ConfigDict, Path], tmp_path: Path) -> None:
    workdir = shutil.copytree(finished[1], tmp_path / "run")
    steps = sorted(int(path.name) for path in (workdir / "checkpoints" / "rl").iterdir())
    for path in (workdir / "checkpoints" / "rl" / str(steps[-1])).rglob("d/*"):
        if path.stat().st_size > 20_000:
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(trained.LOAD_ERRORS, match=rf"rl/{steps[-1]} cannot be restored") as error:
        Judge.from_checkpoint(str(workdir), stage="rl")
    assert len(str(error.value).splitlines()) == 1
    with Checkpointer(workdir) as checkpoints:
        assert checkpoints.latest_step("rl") == steps[-1]
