"""Judges pairs of a query and an item with a trained policy: a file by command, or anything by the Python API.

    python -m agrl_jax.judge --checkpoint=runs/quickstart --input=pairs.csv --output=judged.parquet

The checkpoint is the workdir of a training run, a folder that `agrl_jax.export` wrote, any other Hugging
Face folder, or a GGUF file. Input and output are CSV, TSV, JSON lines or Parquet, by their names. A row has a
`query`, a `title`, and what else is known of the item: `description`, `brand`, `color`, `category`, `price`. It
keeps its place and all its columns, and gets

    judge_tier          the tier
    judge_prob_TIER     the probability of each tier: of its canonical text after the policy's own steps
    judge_step_STEP     the value of each step of the rule book
    judge_consistent    whether these steps imply this tier
    judge_response      what the policy wrote
    judge_error         why the row could not be judged; then the others are empty

Answers are greedy, and only tokens are taken that lead to a well-formed response, so every answer can be read,
even an untrained policy's. A command that was stopped, however, goes on where it was when it is given again.

In Python:

    judge = Judge.from_checkpoint("runs/quickstart")
    judge.judge([{"query": "red shoes", "title": "Nike running shoes, red"}])[0].tier

Tiers by cumulative probability (see `cuts`): `--fit_cuts=labelled.csv` fits cut points and keeps them with the
checkpoint; `--use_cuts` then chooses the tier by them, in place of the one in the response.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from absl import flags

from agrl_jax import cuts, trained
from agrl_jax.cuts import CutsError
from agrl_jax.data import pipeline
from agrl_jax.data.pairs import Pair, PairsError, read_pairs
from agrl_jax.data.rows import Journal, OutputError, Record, RowFile, check_output, open_rows, write_rows
from agrl_jax.judging import TierSegments, judge_prompts, tier_segments
from agrl_jax.rulebook.book import ORDERS, RuleBook
from agrl_jax.rulebook.wording import STYLES
from agrl_jax.runtime import processes, sharding
from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags
from agrl_jax.runtime.memory import with_huge_pages
from agrl_jax.runtime.metrics import progress, say
from agrl_jax.trained import Settings, Trained, TrainedError
from agrl_jax.types import Array, Params, Policy, RuleTables

PREFIX = "judge_"  # of the columns that are added
_TEXTS = ("query", "title", "description", "brand", "color", "category", "price")
_LENGTHS = 8  # that prompts are padded to, at most: each is compiled once
_SHORTEST_UNIT = 16  # of which those lengths are multiples, at least
_CHUNK_BATCHES = 4  # batches that are judged and kept together
_LISTED = 10  # bad rows named in the summary

USER_ERRORS = (*trained.LOAD_ERRORS, CutsError, PairsError, OutputError)  # shown as one message


@dataclass(frozen=True)
class Judgement:
    """What the judge says of a pair; `error` alone where it could not be judged."""

    tier: str | None = None
    probs: dict[str, float] = field(default_factory=dict)  # of each tier
    steps: dict[str, str] = field(default_factory=dict)  # the value of each step
    consistent: bool | None = None  # the steps imply the tier
    response: str | None = None  # what the policy wrote
    error: str = ""


class Judge:
    """A policy that judges. `batch_size` is rounded up to what the devices can share."""

    def __init__(
        self, loaded: Trained, batch_size: int = 64, use_cuts: bool = False, mesh: jax.sharding.Mesh | None = None
    ) -> None:
        mesh = mesh or sharding.make_mesh()
        self._loaded, self.book = loaded, loaded.book
        self._made_for = trained.identity(loaded.book, loaded.params)
        self._cuts = cuts.load(loaded.cuts_file, self._tiers, self._made_for) if use_cuts else None
        self.batch_size = -(-batch_size // sharding.data_shards(mesh)) * sharding.data_shards(mesh)
        self._put = partial(sharding.put, shardings=sharding.batch_sharding(mesh))
        shortest = loaded.tables.grammar_distance[0]
        if loaded.response_len < shortest:
            raise TrainedError(f"response_len is {loaded.response_len}, but a response has at least {shortest} tokens")
        self._answer = jax.jit(
            partial(_answer, loaded.policy, loaded.tables, tier_segments(loaded.book, loaded.tokenizer),
                    loaded.response_len)
        )  # fmt: skip

    @classmethod
    def from_checkpoint(
        cls,
        path: str,
        *,
        stage: str = "best",
        settings: Settings | None = None,
        batch_size: int = 64,
        use_cuts: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> Judge:
        """The judge in a workdir, an exported or other Hugging Face folder, or a GGUF file; see `trained.load`.

        Args:
          path: of the checkpoint.
          stage: of a workdir: `best` of RL by validation, `rl` (its latest) or `sft_end`.
          settings: what to take in place of what the checkpoint says; of use for a model that is not ours.
          batch_size: pairs judged at once.
          use_cuts: choose tiers by the cut points that `fit_cuts` has kept with the checkpoint.
          mesh: the devices, by default all, each with all parameters.
        """
        mesh = mesh or sharding.make_mesh()
        return cls(trained.load(path, stage, settings, mesh), batch_size, use_cuts, mesh)

    @property
    def identity(self) -> dict[str, Any]:
        """All that judgements depend on."""
        settings = {name: getattr(self._loaded, name) for name in ("style", "prompt_len", "response_len")}
        return self._made_for | settings | {"batch_size": self.batch_size, "cuts": list(self._cuts or ())}

    @property
    def chunk(self) -> int:
        """How many rows are best judged together: they are batched by length."""
        return self.batch_size * _CHUNK_BATCHES

    def judge(self, rows: Sequence[Mapping[str, Any]]) -> list[Judgement]:
        """Judges rows with a `query`, a `title`, and optional texts of the item; see the top of this module.

        A row that cannot be judged has an `error`; the others do not depend on it.
        """
        pairs = [_pair(row) for row in rows]
        loaded = self._loaded
        prompts = list(pipeline.prompts(pairs, self.book, loaded.tokenizer, loaded.prompt_len, loaded.style))
        errors = [_error(pair, prompt, loaded.prompt_len) for pair, prompt in zip(pairs, prompts, strict=True)]
        judged = [Judgement(error=error) for error in errors]
        good = sorted((i for i, error in enumerate(errors) if not error), key=lambda i: len(prompts[i].tokens))
        batches = [good[first : first + self.batch_size] for first in range(0, len(good), self.batch_size)]
        # All are started before the first is awaited.
        answers = [self._start([prompts[i].tokens for i in batch]) for batch in batches]
        for batch, answer in zip(batches, answers, strict=True):
            answer = jax.device_get(answer)
            for place, i in enumerate(batch):
                judged[i] = self._judgement({name: value[place] for name, value in answer.items()})
        return judged

    def fit_cuts(self, path: str) -> cuts.Fit:
        """Fits cut points on a file of labelled pairs, uses them from now on, and keeps them with the checkpoint."""
        pairs = [pair for split in read_pairs(path, self.book).splits.values() for pair in split]
        self._cuts = None
        rows = [{name: getattr(pair, name) for name in _TEXTS} for pair in pairs]
        judged = [(pair.tier, one) for pair, one in zip(pairs, self.judge(rows), strict=True) if not one.error]
        if not judged:
            raise CutsError(f"{path}: no row could be judged")
        truth = np.array([tier for tier, _ in judged])
        probs = np.array([list(one.probs.values()) for _, one in judged])
        before = np.array([self._tiers.index(one.tier) for _, one in judged])
        fitted = cuts.fit(probs, truth, before)
        cuts.save(self._loaded.cuts_file, self._tiers, fitted, self._made_for)
        self._cuts = fitted.cuts
        return fitted

    @property
    def _tiers(self) -> list[str]:
        return [tier.name for tier in self.book.tiers]

    def _start(self, prompts: Sequence[Sequence[int]]) -> dict[str, Array]:
        """Starts to judge a batch, filled up with its last prompt and padded to one of few lengths."""
        unit = max(_SHORTEST_UNIT, -(-self._loaded.prompt_len // _LENGTHS))
        padded = -(-max(map(len, prompts)) // unit) * unit
        tokens = np.zeros((self.batch_size, padded), np.int32)
        prompts = [*prompts, *itertools.repeat(prompts[-1], self.batch_size - len(prompts))]
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        batch = self._put((tokens, np.array([len(prompt) for prompt in prompts], np.int32)))
        return self._answer(self._loaded.params, *batch)

    def _judgement(self, answer: Mapping[str, np.ndarray]) -> Judgement:
        steps = [int(value) for value in answer["steps"]]
        tier = int(answer["tier"])
        probs = np.array([round(float(p), 6) for p in answer["probs"]])
        if self._cuts is not None:
            tier = int(cuts.choose(probs[None], self._cuts)[0])
        return Judgement(
            tier=self._tiers[tier],
            probs=dict(zip(self._tiers, probs.tolist(), strict=True)),
            steps={step.name: step.values[value] for step, value in zip(self.book.steps, steps, strict=True)},
            consistent=self.book.tier_for(steps) == tier,
            response=self._loaded.tokenizer.decode(answer["tokens"][answer["text"]].tolist()),
        )


def _answer(
    policy: Policy, tables: RuleTables, segments: TierSegments, length: int, params: Params, prompt: Array,
    prompt_len: Array,
) -> dict[str, Array]:
    """Well-formed greedy answers to the prompts [B, S]: tokens, which of them are text, and what they say."""
    judged, rolled = judge_prompts(
        policy, tables, segments, length, params, prompt, prompt_len, constrained=True
    )
    tokens = rolled.tokens[:, 0]
    return {
        "tier": judged["predicted"],
        "steps": judged["predicted_steps"],
        "probs": judged["probs"],
        "tokens": tokens,
        "text": rolled.valid[:, 0] & (tokens != tables.end_token),
    }


def _pair(row: Mapping[str, Any]) -> Pair:
    """A row's texts. Runs of white space become one space, so that no text breaks the lines of a prompt."""
    texts = {name: "" if row.get(name) is None else " ".join(str(row[name]).split()) for name in _TEXTS}
    return Pair(id="", **texts)


def _error(pair: Pair, prompt: pipeline.Prompt, limit: int) -> str:
    """Why a pair cannot be judged; empty if it can."""
    empty = [name for name in ("query", "title") if not getattr(pair, name)]
    if empty:
        return "; ".join(f"{name} is empty" for name in empty)
    if prompt.room < 1:
        return f"its query and the rules alone take {limit - prompt.room} tokens, and prompt_len is {limit}"
    return ""


# ----------------------------------------------------------------------------------------------- files


@dataclass
class Summary:
    """What became of the rows of a file."""

    rows: int = 0
    tiers: Counter[str] = field(default_factory=Counter)
    inconsistent: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)  # number (the first row is 1) and error; the first few
    bad_rows: int = 0

    def add(self, judgement: Mapping[str, Any]) -> None:
        """Counts the next row."""
        self.rows += 1
        if judgement["error"]:
            self.bad_rows += 1
            if self.bad_rows <= _LISTED:
                self.bad.append((self.rows, judgement["error"]))
            return
        self.tiers[judgement["tier"]] += 1
        self.inconsistent += not judgement["consistent"]

    def __str__(self) -> str:
        counts = ", ".join(f"{tier} {count:,}" for tier, count in sorted(self.tiers.items(), reverse=True))
        lines = [f"judged {self.rows - self.bad_rows:,} of {self.rows:,} rows: {counts or 'none'}"]
        if self.inconsistent:
            lines.append(f"rows whose steps do not imply their tier: {self.inconsistent:,}")
        if self.bad_rows:
            lines.append(f"rows that could not be judged: {self.bad_rows:,}")
            lines += [f"  row {number}: {error}" for number, error in self.bad]
        if self.bad_rows > len(self.bad):
            lines.append(f"  ... and {self.bad_rows - len(self.bad):,} more")
        return "\n".join(lines)


def judge_file(judge: Judge, source: str, output: str, prefix: str = PREFIX, overwrite: bool = False) -> Summary:
    """Judges a file of rows into another, whatever its length in little memory, from where it stopped before.

    What is done lies in `OUTPUT.partial` until all is; then the output appears in one piece.

    Raises:
      PairsError: the input cannot be read, or lacks a column.
      OutputError: the output cannot be written, exists, or was begun from another input or judge.
    """
    file = open_rows(source)
    for name in ("query", "title"):
        if name not in file.schema.names:
            raise PairsError(f"{source}: lacks the column {name!r}; it has {', '.join(file.schema.names)}")
    added = _columns(judge.book, prefix)
    check_output(output, file, added)
    if Path(output).exists() and not overwrite:
        raise OutputError(f"{output}: exists already; name another output, or replace it with --overwrite")
    summary = Summary()
    with Journal(f"{output}.partial", judge.identity | {"input": file.digest}, judge.chunk, overwrite) as journal:
        _judge_rest(judge, file, journal)
        write_rows(output, file, added, _cells(journal, summary, added))
        journal.path.unlink()
    return summary


def _judge_rest(judge: Judge, file: RowFile, journal: Journal) -> None:
    """Judges the rows that the journal does not hold."""
    rows = itertools.islice(file.rows(), journal.done, None)
    with progress("judge", file.count, journal.done) as bar:
        if journal.done:
            bar.print(f"going on after row {journal.done:,} of {file.count:,}")
        first, began = journal.done, time.monotonic()
        while chunk := list(itertools.islice(rows, judge.chunk)):
            judged = judge.judge([{} if row.error else row.record for row in chunk])
            judged = [Judgement(error=row.error) if row.error else one for row, one in zip(chunk, judged, strict=True)]
            journal.append(map(asdict, judged))
            bar.update(journal.done, {"rows/s": (journal.done - first) / (time.monotonic() - began)})


def _columns(book: RuleBook, prefix: str) -> pa.Schema:
    """The columns that are added, with their types."""
    text, number = pa.string(), pa.float64()
    return pa.schema([
        (f"{prefix}tier", text),
        *((f"{prefix}prob_{tier.name}", number) for tier in book.tiers),
        *((f"{prefix}step_{step.name}", text) for step in book.steps),
        (f"{prefix}consistent", pa.bool_()),
        (f"{prefix}response", text),
        (f"{prefix}error", text),
    ])  # fmt: skip


def _cells(journal: Journal, summary: Summary, added: pa.Schema) -> Iterator[Record]:
    """The journal's judgements as cells of the added columns, each counted in the summary."""
    for judged in journal.records():
        summary.add(judged)
        cells = [judged["tier"], *judged["probs"].values(), *judged["steps"].values(), judged["consistent"]]
        cells += [judged["response"], judged["error"]]
        if judged["error"]:
            cells = [None] * (len(added) - 1) + [judged["error"]]
        yield dict(zip(added.names, cells, strict=True))


# ------------------------------------------------------------------------------------------- the command


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Workdir, Hugging Face folder or GGUF file.", required=True)
    flags.DEFINE_string("input", None, "A .csv, .tsv, .jsonl or .parquet file with the columns query and title.")
    flags.DEFINE_string("output", None, "Where to write the judged rows; likewise.")
    flags.DEFINE_bool("overwrite", False, "Replace an output that exists, and work that was begun.")
    flags.DEFINE_string("prefix", PREFIX, "Of the columns that are added.")
    flags.DEFINE_integer("batch_size", 64, "Pairs judged at once.", lower_bound=1)
    flags.DEFINE_enum("stage", "best", trained.STAGES, "Of a workdir: the best of RL, its end, or its start.")
    flags.DEFINE_string("fit_cuts", None, "Labelled pairs: fit cut points on them, and keep them with the checkpoint.")
    flags.DEFINE_bool("use_cuts", False, "Choose the tier by the cut points that were kept.")
    flags.DEFINE_string("rulebook", None, "Rule book of a model that is not ours; else where to find the trained one.")
    flags.DEFINE_enum("order", None, ORDERS, "Order of the response of a model that is not ours.")
    flags.DEFINE_enum("style", None, STYLES, "Of the prompt: full with the rule book's instructions.")
    flags.DEFINE_integer("prompt_len", None, "Tokens of a prompt; longer item texts are shortened.", lower_bound=1)
    flags.DEFINE_integer("response_len", None, "Tokens of a response.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of parameters and computation.")


def run(values: flags.FlagValues) -> None:
    """Does what the flags ask for."""
    if bool(values.input) != bool(values.output) or not (values.input or values.fit_cuts):
        raise ConfigError("--input and --output are both needed, or --fit_cuts alone")
    processes.require_one("judges")
    settings = Settings(
        values.rulebook, values.order, values.style, values.prompt_len, values.response_len, values.dtype
    )
    judge = Judge.from_checkpoint(
        values.checkpoint, stage=values.stage, settings=settings, batch_size=values.batch_size,
        use_cuts=values.use_cuts and not values.fit_cuts,
    )  # fmt: skip
    if values.fit_cuts:
        fitted = judge.fit_cuts(values.fit_cuts)
        say(f"cut points {fitted.cuts}: macro-F1 {fitted.macro_f1:.3f} on {values.fit_cuts}, "
            f"{fitted.macro_f1_before:.3f} without")  # fmt: skip
    if values.input:
        say(str(judge_file(judge, values.input, values.output, values.prefix, values.overwrite)))
        say(f"written to {values.output}")


def main(argv: list[str]) -> None:
    """Exit codes: 2 for bad input, 130 if stopped by Ctrl-C."""
    _define_flags()
    parse_flags(argv)
    try:
        run(flags.FLAGS)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    except USER_ERRORS as error:
        exit_with(error)


if __name__ == "__main__":
    with_huge_pages()
    main(sys.argv)
