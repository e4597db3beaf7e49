"""Trains a student that states the tier first from a judge that reasons before it answers; see `agrl_jax.distill`.

The teacher judges the pairs, once, into `teacher.parquet` of the student's workdir. The workdir gets the teacher's
weights as the end of a warm start of no steps. From there the student is trained as any policy is
(`training.run`, method `distill`; the loss is in `supervised.distill`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import polars as pl
from etils import epath
from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.data import pipeline, rows
from agrl_jax.data.cells import TEXTS
from agrl_jax.data.format import PairsFormat
from agrl_jax.evaluation import intervals, tables
from agrl_jax.judging import files, trained
from agrl_jax.judging.engine import Judge
from agrl_jax.judging.trained import TrainedError
from agrl_jax.policy import loading, shipped
from agrl_jax.policy import tokenizer as tokenizers
from agrl_jax.runtime import sharding
from agrl_jax.runtime.checkpoint import Checkpointer
from agrl_jax.runtime.config import resolve, validate, validate_together
from agrl_jax.runtime.console import say
from agrl_jax.runtime.files import OutputError, in_one_piece, read_json, write_json
from agrl_jax.training import assemble, run

USER_ERRORS = (*run.USER_ERRORS, *files.USER_ERRORS)  # shown as one message
ASKED_FILE = "asked.parquet"  # the teacher's own training pairs, if it judges these
IDENTITY_FILE = "teacher.json"  # what the judgements depend on
_TOKENIZER_FILES = (assemble.TOKENIZER_FILE, "tokenizer_config.json", assemble.POLICY_FILE)


def distill(
    checkpoint: str, workdir: str, *, stage: str = "best", pairs: str = "", number: int = 0, batch_size: int = 64,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains a student in a workdir, or goes on with it; returns the scorecards `{stage: {split: scores}}` of both.

    Args:
      checkpoint: the teacher: a workdir, an export or a judge in the box.
      workdir: the student's.
      stage: of a teacher's workdir, see `trained.find_stage`.
      pairs: a file of pairs, labelled or not, that the teacher judges; empty: its own training pairs.
      number: how many of its training pairs, drawn by the seed; 0: all.
      batch_size: pairs that the teacher judges at once.
      changes: fields of the student's config, by dotted names, that differ from the teacher's.

    Raises:
      TrainedError, ConfigError, ...: see `USER_ERRORS`.
    """
    if pairs and number:
        raise TrainedError(f"--number={number} draws from the teacher's own pairs, not from --pairs: give one of them")
    folder = epath.Path(workdir)
    config = student_config(checkpoint, folder, changes or {})
    mesh = sharding.make_mesh(*(config.mesh[axis] for axis in sharding.AXES))
    validate(config)
    recipes.check(config)
    validate_together(config, sharding.data_shards(mesh))
    judge = Judge.from_checkpoint(checkpoint, stage=stage, batch_size=batch_size, mesh=mesh)
    folder.mkdir(parents=True, exist_ok=True)
    _give_weights(checkpoint, stage, config, folder, mesh)
    _teach(judge, pairs or _own_pairs(config, folder, number), config, folder)
    _score(judge, config, folder)
    del judge  # and its weights
    return run.train(config, workdir)


def student_config(checkpoint: str, folder: epath.Path, changes: Mapping[str, Any]) -> ConfigDict:
    """The config of a student: the teacher's, with the tier first and with `changes`.

    Raises:
      TrainedError: there is no record of how the teacher was trained, or it states the tier first already.
    """
    place, more = epath.Path(shipped.named(checkpoint) or checkpoint), {}
    if (place / "checkpoints").exists():
        config = assemble.read_config(place)
        rules, tokenizer = assemble.rules_file(config, place), tokenizers.load(place)
    elif (place / trained.RECORD_FILE).exists():
        record = read_json(place / trained.RECORD_FILE, TrainedError)
        config = assemble.whole_config(record["config"])
        rules, tokenizer = place / record["rulebook"], loading.read_tokenizer(place)
        more = {"policy.pretrained": checkpoint, "lora.start": ""}  # the adapters that it began with are merged into it
    else:
        raise TrainedError(
            f"{checkpoint}: should be the workdir of a training run or a folder that agrl_jax.export wrote, which say "
            "how the judge was trained"
        )
    if config.rulebook.order == "respond_then_think":
        raise TrainedError(f"{checkpoint}: states the tier first already; judge with it as it is, with --steps=False")
    if config.policy.thinking == "on":
        raise TrainedError(f"{checkpoint}: thinks before it answers, and a student answers at once: policy.thinking=on")
    recipes.with_method(config, "distill")
    config.update_from_flattened_dict(more | {
        "rulebook.path": str(rules), "rl.budget": 0, "distill.teacher": checkpoint,
        "distill.path": str(folder / assemble.TAUGHT_FILE),
        "sft.steps": 0, "sft.unknown_steps": "fill",  # the warm start makes no step; `sum` needs the tier last
        "rl.constrained": False, "rulebook.variants": 0,  # a student learns without sampling, by the book itself
    })  # fmt: skip
    if config.lora.rank:
        config.distill.matrix_rate = 0.0  # adapters have no matrices for Muon
    # In another order a tokenizer may spell the parts with more tokens.
    longest = pipeline.part_texts(assemble.load_rules(config), tokenizer).longest_response
    config.data.response_len = max(config.data.response_len, longest)
    config.update_from_flattened_dict(changes)
    return config


def _give_weights(
    checkpoint: str, stage: str, config: ConfigDict, folder: epath.Path, mesh: jax.sharding.Mesh
) -> None:
    """Copies a teacher's tokenizer and weights to the student's workdir, as the end of its warm start. A student of an
    export loads them from the export, as of any pretrained model."""
    rules = assemble.load_rules(config)
    identity = {"config": resolve(config), "rulebook": rules.digest, "versions": {}}
    defaults = {"config": resolve(recipes.base())}
    with Checkpointer(folder, config.checkpoint.keep, identity, defaults=defaults) as checkpoints:
        theirs = epath.Path(checkpoint)
        if checkpoints.sft_ended or not (theirs / "checkpoints").exists():
            return
        their_config = assemble.read_config(theirs)
        model = assemble.load_model(their_config, theirs, mesh=mesh)
        found = trained.find_stage(theirs, their_config, model.book, stage)
        # Training goes on with adapters of the warm start; adapters of RL alone are merged into their base.
        load = assemble.load_params if assemble.adapters_of(their_config, "sft") is None else assemble.load_trained
        params = load(theirs, their_config, model, mesh, *found)
        for name in _TOKENIZER_FILES:
            if (theirs / name).exists():
                (theirs / name).copy(folder / name, overwrite=True)
        checkpoints.save_sft(params)


def _own_pairs(config: ConfigDict, folder: epath.Path, number: int) -> str:
    """Writes the teacher's training pairs, each once, and returns the file."""
    data = assemble.load_data(config, assemble.load_rules(config), folder)
    texts = list(dict.fromkeys(
        tuple(getattr(pair, name) for name in TEXTS) for pair in (*data.sft, *data.splits["train"])
    ))
    if 0 < number < len(texts):
        chosen = np.random.default_rng(config.seed).permutation(len(texts))[:number]
        texts = [texts[i] for i in np.sort(chosen)]
    file = folder / ASKED_FILE
    with in_one_piece(file) as half, half.open("wb") as out:
        pl.DataFrame(texts, schema=dict.fromkeys(TEXTS, pl.String), orient="row").write_parquet(out)
    return str(file)


def _teach(judge: Judge, source: str, config: ConfigDict, folder: epath.Path) -> None:
    """Lets the teacher judge the pairs of a file, unless it has done so.

    Raises:
      OutputError: the workdir holds the judgements of another teacher, or of other pairs.
    """
    columns = dict(PairsFormat.parse(config.distill.columns).columns)
    identity = judge.identity | {"input": rows.open_rows(source).digest, "columns": columns}
    kept = folder / IDENTITY_FILE
    before = read_json(kept, OutputError) if kept.exists() else identity
    if differ := [name for name, value in identity.items() if before.get(name) != value]:
        raise OutputError(f"{folder}: holds the judgements of another {', '.join(differ)}; use a new workdir, or undo")
    write_json(kept, identity)
    target = folder / assemble.TAUGHT_FILE
    if target.exists():
        say(f"the teacher has judged the pairs already: {target}")
        return
    say(f"the teacher judges {source}")
    say(str(files.judge_file(judge, source, str(target), columns=columns)))


def _score(judge: Judge, config: ConfigDict, folder: epath.Path) -> None:
    """Scores the teacher, as it judges, on the pairs of the student's scorecard."""
    path, settings = folder / "scorecard.json", assemble.card_settings(config, 0)
    written = tables.kept(path).get(run.TEACHER, {})
    if written and all(scores["settings"] == settings for scores in written.values()):
        return
    rules = assemble.load_rules(config)
    assemble.keep_pretrained(config, folder)
    data = assemble.load_data(config, rules, folder)
    model = assemble.load_model(config, folder, rules)
    cards = {}
    for name, split in assemble.encode(config, model, data, data.eval_splits).items():
        chosen = pipeline.stratified(split, config.eval.pairs, config.data.seed)
        judged, _ = judge.judgements([split.pairs[i] for i in chosen])
        scores = intervals.score(judged, judge.book, config.eval.bootstrap, config.seed)
        cards[name] = scores | {"settings": settings}
    tables.write(path, {run.TEACHER: cards})
