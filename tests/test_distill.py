"""Distillation: the loss by hand, the pairs that are learnt from, and students that the command trains."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import commands
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from conftest import END, PROMPT_LEN, RESPONSE_LEN
from etils import epath
from workdirs import make_workdir

from agrl_jax import distill as command
from agrl_jax import recipes
from agrl_jax.data.judged import read_taught
from agrl_jax.data.pairs import PairsError
from agrl_jax.data.pipeline import PartTexts
from agrl_jax.judging import distillation, trained
from agrl_jax.judging.engine import Judge
from agrl_jax.judging.export import export
from agrl_jax.policy import smollm2
from agrl_jax.rulebook import book
from agrl_jax.runtime.config import validate, validate_together
from agrl_jax.runtime.logs import read_jsonl
from agrl_jax.supervised import distill
from agrl_jax.supervised.distill import Lessons
from agrl_jax.supervised.step import make_step
from agrl_jax.training import assemble
from agrl_jax.types import Cache, Policy, TrainState

KEY = np.asarray(jax.random.key_data(jax.random.key(1)))
TIERS = ("4-Excellent", "3-Related", "2-Mismatch", "1-Irrelevant")

# --------------------------------------------------------------------------------------------------- the loss

# Tokens: "Tier:" 0, "very" 1, "good" 2, "bad" 3, a step 4, the end 5, and a prompt of 6. The tiers "very good",
# "very bad" and "bad" part at their second or third token.
NEXT = {6: {0: 1 / 2}, 0: {1: 3 / 4, 3: 1 / 4}, 1: {2: 2 / 3, 3: 1 / 3}, 2: {4: 1 / 2}, 3: {4: 1 / 8}, 4: {5: 1 / 4}}
TEXTS = PartTexts(
    np.array([[[0, 1, 2], [0, 1, 3], [0, 3, 0]], [[4, 0, 0]] * 3], np.int32), np.array([[3, 3, 2], [1, 0, 0]], np.int32)
)


def bigrams(following: Mapping[int, Mapping[int, float]], size: int) -> Policy:
    """A policy whose next token depends only on the last one."""
    table = np.full((size, size), 1e-6)
    for token, after in following.items():
        for other, probability in after.items():
            table[token, other] = probability
        table[token, 6] = 1 - sum(after.values())  # the rest
    logits = jnp.log(jnp.asarray(np.maximum(table, 1e-6)))

    def apply(params, tokens, **_):
        nothing = jnp.zeros((1, *tokens.shape[:2], 1, tokens.shape[2], 1))
        return tokens[..., None].astype(jnp.float32), Cache(nothing, nothing)

    return Policy(apply, lambda params, hidden: logits[hidden[..., 0].astype(int)], None, None)


def test_the_loss_is_that_of_soft_targets_wherever_texts_go_apart_and_of_the_steps_after_them():
    pairs = Lessons(
        prompt=np.array([[3, 6], [6, 1]], np.int32),
        prompt_len=np.array([2, 1], np.int32),
        probs=np.array([[0.5, 0.2, 0.3], [0.0, 0.0, 1.0]], np.float32),
        tokens=np.array([[0, 1, 2, 4, 5], [0, 3, 4, 0, 0]], np.int32),
        tier_len=np.array([3, 2], np.int32),
        length=np.array([5, 3], np.int32),
    )
    loss, figures = distill.distill_loss(bigrams(NEXT, 7), {}, pairs, TEXTS, step_weight=0.4)
    log = math.log
    # After "Tier:", 0.7 of the first judgement is on "very" and 0.3 on "bad"; of the 0.7, "good" has 0.5 and "bad" 0.2.
    first = log(1 / 2) + 0.7 * log(3 / 4) + 0.3 * log(1 / 4) + 0.5 * log(2 / 3) + 0.2 * log(1 / 3)
    second = log(1 / 2) + log(1 / 4)
    steps = (log(1 / 2) + log(1 / 4)) + log(1 / 8)  # a step and the end, then a step alone
    np.testing.assert_allclose(loss, -(first + second) / 2 - 0.4 * steps / 2, rtol=1e-4)
    np.testing.assert_allclose(figures["policy/step_loss"], -steps / 2, rtol=1e-4)
    # Normalised over the tiers, the probabilities are 1/2, 1/4 and 1/4.
    gaps = 0.2 * log(0.2 / 0.25) + 0.3 * log(0.3 / 0.25), log(1 / 0.25)
    np.testing.assert_allclose(figures["distill/kl"], sum(gaps) / 2, rtol=1e-4)
    assert figures["distill/agreement"] == 0.5
    assert figures["tokens/trained"] == 3 + 8 + 2 * 8  # prompts, answers, and the texts of all tiers for each pair


def test_a_batch_in_pieces_gives_the_gradient_of_the_whole(small):
    rng = np.random.default_rng(0)
    pairs = Lessons(
        prompt=rng.integers(0, END, (6, PROMPT_LEN), np.int32),
        prompt_len=rng.integers(1, PROMPT_LEN + 1, 6).astype(np.int32),
        probs=rng.dirichlet(np.ones(3), 6).astype(np.float32),
        tokens=rng.integers(0, END, (6, RESPONSE_LEN), np.int32),
        tier_len=np.array([1, 2, 1, 2, 1, 2], np.int32),
        length=np.array([2, 3, 4, 5, 6, 6], np.int32),
    )
    texts = PartTexts(np.array([[[5, 8], [5, 9], [6, 0]]], np.int32), np.array([[2, 2, 1]], np.int32))

    def descend(grads, params, opt_state, skipped):
        return params, grads, skipped, {}

    state = TrainState(small.params, small.params, jnp.int32(0), KEY, None, jnp.int32(0))
    loss = partial(distill.distill_loss, texts=texts, step_weight=0.3, chunk=5)
    whole, pieces = (
        jax.jit(make_step(loss, small.policy, descend, micro_batches=n))(state, pairs)
        for n in (1, 3)
    )
    for one, other in zip(jax.tree.leaves(whole[0].opt_state), jax.tree.leaves(pieces[0].opt_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    for name, value in whole[1].items():
        np.testing.assert_allclose(pieces[1][name], value, rtol=1e-4, err_msg=name)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole[0].opt_state)) > 0.01


# ------------------------------------------------------------------------------------------ what is learnt from


def judged_row(tier: str, probs: tuple[float, ...], **steps: str) -> dict[str, Any]:
    row = {"query": "red shoes", "title": "Nike shoes, red", "judge_tier": tier}
    row |= {f"judge_prob_{name}": value for name, value in zip(TIERS, probs, strict=True)}
    return row | {f"judge_step_{name}": steps.get(name) for name in ("category", "brand", "attributes", "limits")}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    pl.DataFrame(list(rows), infer_schema_length=None).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def rules() -> book.RuleBook:
    return book.load("four_tier", "respond_then_think")


def test_judged_pairs_are_read_with_the_tier_that_their_steps_imply(rules, tmp_path):
    steps = {step.name: step.values[0] for step in rules.steps}
    implied = rules.tier_for([0] * len(rules.steps))
    rows = (
        judged_row(TIERS[1], (0.4, 0.6, 0.0, 0.0), **steps),
        judged_row(None, (None,) * 4),
        judged_row(TIERS[3], (0.1, 0.2, 0.3, 0.4)),
    )
    taught = read_taught(write(tmp_path / "a.parquet", *rows), rules, {})
    assert [(pair.query, pair.title) for pair in taught.pairs] == [("red shoes", "Nike shoes, red")] * 2
    assert [pair.tier for pair in taught.pairs] == [implied, 3] and implied != 1
    assert [pair.steps for pair in taught.pairs] == [(0, 0, 0, 0), (-1, -1, -1, -1)]
    np.testing.assert_allclose(taught.probs, [[0.4, 0.6, 0, 0], [0.1, 0.2, 0.3, 0.4]])
    assert taught.unjudged == 1
    renamed = pl.read_parquet(tmp_path / "a.parquet").rename({"title": "name"})
    renamed.write_parquet(tmp_path / "b.parquet")
    again = read_taught(tmp_path / "b.parquet", rules, {"title": "name"})
    assert again.pairs == taught.pairs and again.digest != taught.digest


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (judged_row(TIERS[0], (0.4, 0.4, 0.4, 0.0)), "row 1: its probabilities should be at least 0, and sum to 1"),
        (judged_row("5-Superb", (1.0, 0.0, 0.0, 0.0)), "row 1: judge_tier '5-Superb' should be one of"),
        (judged_row(None, (None,) * 4), "no row has a judgement in judge_tier"),
        ({"query": "a", "title": "b", "judge_tier": TIERS[0]}, "judge_prob_4-Excellent"),
        ({"query": "a", "judge_tier": TIERS[0]}, "title"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_by_row_and_column(rules, tmp_path, row, message):
    with pytest.raises(PairsError) as error:
        read_taught(write(tmp_path / "bad.parquet", row), rules, {})
    assert message in str(error.value) and "bad.parquet" in str(error.value)


# ------------------------------------------------------------------------------------------------ the command

SMALL = {
    "distill.batch_size": 16, "distill.learning_rate": 3e-3, "distill.matrix_rate": 0.01, "distill.warmup": 5,
    "distill.step_weight": 0.1, "checkpoint.every": 5, "eval.every": 0, "eval.bootstrap": 20, "eval.pass_pairs": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workdir(tmp_path_factory.mktemp("teacher"))


def flags(teacher: Path | str, student: Path, data_dir: Path, **changes: object) -> list[str]:
    fields = SMALL | {"data.dir": str(data_dir)} | {name.replace("__", "."): v for name, v in changes.items()}
    return [
        f"--checkpoint={teacher}", f"--workdir={student}", "--batch_size=16",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> tuple[Path, list[str]]:
    """A student of a few pairs; the command trained it twice, the second time for more steps."""
    folder = tmp_path_factory.mktemp("students") / "student"
    assert commands.exit_code(command.main, *flags(teacher, folder, data_dir, distill__steps=50), "--number=64") == 0
    more = flags(teacher, folder, data_dir, distill__steps=400)
    assert commands.exit_code(command.main, *more, "--number=64") == 0
    return folder, more


@pytest.mark.slow
def test_a_student_comes_to_judge_as_its_teacher_does_and_the_command_goes_on(student, teacher):
    folder, _ = student
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["stage"] == "rl"]
    assert [row["step"] for row in rows] == list(range(1, 401)) and rows[-1]["compiles"] == 1
    asked = pl.read_parquet(folder / assemble.TAUGHT_FILE)
    records = asked.select("query", "title", "description", "brand", "color", "category", "price").to_dicts()
    assert len(records) == 64 and len({tuple(one.values()) for one in records}) == 64
    theirs = np.array([list(one.probs.values()) for one in Judge.from_checkpoint(str(teacher)).judge(records)])
    np.testing.assert_allclose(theirs, asked.select(f"judge_prob_{name}" for name in TIERS), atol=1e-5)
    mine = Judge.from_checkpoint(str(folder), stage="rl", steps=False)
    temperature = mine.calibration.temperature
    assert mine.book.order == "respond_then_think" and mine._loaded.checkpoint == "step 400 of RL"
    raw = np.array([list(one.probs.values()) for one in mine.judge(records)]) ** temperature
    raw /= raw.sum(axis=1, keepdims=True)

    def divergence(q: np.ndarray, p: np.ndarray) -> float:
        return float(np.mean(np.sum(q * (np.log(q + 1e-9) - np.log(p + 1e-9)), axis=1)))

    by_chance = divergence(theirs, np.broadcast_to(theirs.mean(axis=0), theirs.shape))
    assert by_chance > 0.05  # judgements differ between pairs
    assert divergence(theirs, raw) < by_chance / 2
    assert rows[-1]["distill/kl"] < rows[0]["distill/kl"] / 4


@pytest.mark.slow
def test_the_scorecard_has_the_teacher_beside_the_student(student):
    cards = json.loads((student[0] / "scorecard.json").read_text())
    assert list(cards) == ["teacher", "distill"]
    for card in cards.values():
        assert {name: scores["accuracy"]["n"] for name, scores in card.items()} == {"b_eval": 24, "w_eval": 24}
    kept = json.loads((student[0] / "calibration.json").read_text())
    assert "step 400 of RL" in kept


@pytest.mark.slow
def test_a_workdir_keeps_to_one_teacher_and_its_pairs(student, capfd):
    folder, more = student
    before = (folder / assemble.TAUGHT_FILE).read_bytes()
    assert commands.exit_code(command.main, *more, "--number=65") == 2
    assert "holds the judgements of another input; use a new workdir" in capfd.readouterr().err
    assert commands.exit_code(command.main, *more, "--number=64", "--stage=sft_end") == 2
    assert "holds the judgements of another checkpoint" in capfd.readouterr().err
    assert commands.exit_code(command.main, *more, "--number=64", "--config.distill.step_weight=1.0") == 2
    assert "distill.step_weight: 0.1 -> 1.0" in capfd.readouterr().err
    assert (folder / assemble.TAUGHT_FILE).read_bytes() == before


@pytest.mark.slow
def test_unlabelled_pairs_of_ones_own_are_learnt_from(teacher, tmp_path, data_dir, capfd):
    rows = [{"query": f"shoes {i}", "name": "red " * (i % 5) + "Nike", "mine": i} for i in range(20)]
    rows[3]["query"] = ""
    pl.DataFrame(rows).write_csv(tmp_path / "mine.csv")
    arguments = flags(teacher, tmp_path / "student", data_dir, distill__steps=2)
    asked = [f"--pairs={tmp_path / 'mine.csv'}", "--config.distill.columns={title: name}"]
    assert commands.exit_code(command.main, *arguments, *asked) == 0
    said = capfd.readouterr().out
    assert "row 4: query is empty" in said
    assert "judged pairs to learn from: 19; 1 rows without a judgement are left out" in said
    assert pl.read_parquet(tmp_path / "student" / assemble.TAUGHT_FILE)["mine"].to_list() == [str(i) for i in range(20)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nowhere"], "nowhere: should be the workdir of a training run or a folder that agrl_jax.export"),
        (["--pairs=nowhere.csv"], "nowhere.csv: there is no such file"),
        (["--config.distill.batch_size=0"], "distill.batch_size is 0, expected a whole number >= 1"),
        (["--config.distil.steps=3"], "unknown field distil.steps; did you mean 'distill.steps'"),
        (["--config.distill.steps=few"], "distill.steps is 'few', expected a whole number such as 1000"),
        (["--config.rulebook.order=think_then_respond"], "a student states the tier first"),
        (["--pairs=mine.csv", "--number=5"], "draws from the teacher's own pairs, not from --pairs"),
    ],
)
def test_bad_input_is_refused_in_a_line(teacher, tmp_path, data_dir, capfd, arguments, message):
    given = [f"--checkpoint={teacher}", f"--workdir={tmp_path / 'student'}", f"--config.data.dir={data_dir}"]
    assert commands.exit_code(command.main, *given, *arguments) == 2
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said


def test_the_judge_in_the_box_can_teach():
    """Its config is valid as a student's, if there are pairs for validation and scorecard."""
    try:
        smollm2.find_smollm2()
    except smollm2.NotInstalledError as error:
        pytest.skip(str(error))
    name = "smollm2-four-tier"
    config = distillation.student_config(name, epath.Path("student"), {"data.path": "mine.csv"})
    validate(config)
    recipes.check(config)
    validate_together(config)
    assert (config.policy.pretrained, config.rulebook.order, config.sft.steps) == (name, "respond_then_think", 0)
    assert config.lora.rank and not config.lora.start  # new adapters, over weights that hold the box's
    assert (config.method, config.distill.path) == ("distill", "student/teacher.parquet")
    assert config.distill.learning_rate == config.sft.learning_rate / 3 and config.distill.matrix_rate == 0


@pytest.mark.parametrize(
    "fields",
    [{"rl.constrained": True}, {"rulebook.variants": 2, "data.style": "full", "data.prompt_len": 900},
     {"lora.rank": 4, "lora.stages": "rl", "rl.matrix_rate": 0.0}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_a_teacher_was_trained_with_does_not_keep_it_from_teaching(fields, tmp_path):
    teacher = epath.Path(make_workdir(tmp_path))
    config = assemble.read_config(teacher)
    config.update_from_flattened_dict(fields)
    assemble.write_config(config, teacher)
    config = distillation.student_config(str(teacher), tmp_path / "student", {})
    validate(config)
    recipes.check(config)
    validate_together(config)


def test_a_teacher_that_states_the_tier_first_is_refused(tmp_path, capfd):
    (tmp_path / "first").mkdir()
    first = make_workdir(tmp_path / "first", order="respond_then_think")
    assert commands.exit_code(command.main, f"--checkpoint={first}", f"--workdir={tmp_path / 'student'}") == 2
    assert "states the tier first already; judge with it as it is, with --steps=False" in capfd.readouterr().err
    assert not (tmp_path / "student").exists()


# ------------------------------------------------------------------------------------------- kinds of teachers


def start_of(folder: Path) -> Any:
    """The weights that a student began with."""
    config = assemble.read_config(epath.Path(folder))
    model = assemble.load_model(config, epath.Path(folder))
    return assemble.load_params(epath.Path(folder), config, model, distillation.sharding.make_mesh(), "sft_end")


@pytest.mark.slow
def test_an_export_teaches_as_its_workdir_does(teacher, tmp_path, data_dir):
    export(str(teacher), str(tmp_path / "export"))
    arguments = ["--number=32", "--config.distill.steps=3"]
    for name, source in (("a", teacher), ("b", tmp_path / "export")):
        given = flags(source, tmp_path / name, data_dir, distill__steps=3)
        assert commands.exit_code(command.main, *given, *arguments) == 0
    one, other = (pl.read_parquet(tmp_path / name / assemble.TAUGHT_FILE) for name in "ab")
    assert one["judge_response"].to_list() == other["judge_response"].to_list()
    theirs = trained.load(str(teacher)).params
    for name in "ab":
        jax.tree.map(np.testing.assert_array_equal, start_of(tmp_path / name), theirs)
    losses = [[row["policy/loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in "ab"]
    np.testing.assert_allclose(losses[0], losses[1][-3:], rtol=1e-3)
