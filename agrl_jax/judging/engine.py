"""`Judge`: a trained policy that answers for queries and products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from agrl_jax.data import cells, pipeline
from agrl_jax.data.format import PairsFormat
from agrl_jax.data.pairs import AS_DESCRIBED, Pair, read_labelled
from agrl_jax.data.rows import NOT_UNICODE, Source, records_of
from agrl_jax.evaluation.evaluator import TierSegments, judge_prompts, tier_segments
from agrl_jax.judging import cuts, trained
from agrl_jax.judging.cuts import CutsError
from agrl_jax.judging.trained import Settings, Trained, TrainedError
from agrl_jax.policy.scoring import instructed
from agrl_jax.runtime import sharding
from agrl_jax.runtime.console import progress
from agrl_jax.types import Array, Params, Policy, RuleTables

_LENGTHS = 8  # that prompts are padded to, at most: each is compiled once
_SHORTEST_UNIT = 16  # of which those lengths are multiples, at least
_CHUNK_BATCHES = 4  # batches that are judged and kept together


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
        policy, instruct = instructed(loaded.policy, loaded.instructions)
        self._params = jax.jit(instruct)(loaded.params)
        self._answer = jax.jit(
            partial(_answer, policy, loaded.tables, tier_segments(loaded.book, loaded.tokenizer), loaded.response_len)
        )

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

    def judge(self, rows: Source, advance: Callable[[int], None] = lambda rows: None) -> list[Judgement]:
        """Judges rows with a `query`, a `title`, and optional texts of the item: records, or a frame.

        A row that cannot be judged has an `error`; the others do not depend on it. `advance` is told after each batch
        how many more rows are done.
        """
        rows = records_of(rows)
        pairs = [_pair(row) for row in rows]
        loaded = self._loaded
        prompts = list(pipeline.prompts(pairs, self.book, loaded.tokenizer, loaded.prompt_len, loaded.style))
        errors = [_error(*each, loaded.prompt_len) for each in zip(rows, pairs, prompts, strict=True)]
        judged = [Judgement(error=error) for error in errors]
        advance(sum(map(bool, errors)))
        good = sorted((i for i, error in enumerate(errors) if not error), key=lambda i: len(prompts[i].tokens))
        batches = [good[first : first + self.batch_size] for first in range(0, len(good), self.batch_size)]
        # All are started before the first is awaited.
        answers = [self._start([prompts[i].tokens for i in batch]) for batch in batches]
        for batch, answer in zip(batches, answers, strict=True):
            answer = jax.device_get(answer)
            for place, i in enumerate(batch):
                judged[i] = self._judgement({name: value[place] for name, value in answer.items()})
            advance(len(batch))
        return judged

    def fit_cuts(self, path: str, form: PairsFormat = AS_DESCRIBED) -> cuts.Fit:
        """Fits cut points on a file of labelled pairs, uses them from now on, and keeps them with the checkpoint.

        `form` says how the file differs from what `agrl_jax.data.pairs` describes.
        """
        pairs = read_labelled(path, self.book, form).pairs
        self._cuts = None
        rows = [{name: getattr(pair, name) for name in cells.TEXTS} for pair in pairs]
        with progress("fit cut points", len(rows)) as bar:
            judgements = self.judge(rows, bar.advance)
        judged = [(pair.tier, one) for pair, one in zip(pairs, judgements, strict=True) if not one.error]
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
        return self._answer(self._params, *batch)

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
    """A row's texts; one that is not valid Unicode has none."""
    texts = cells.texts(row)
    return Pair(id="", **(texts if all(map(cells.is_unicode, texts.values())) else dict.fromkeys(texts, "")))


def _error(row: Mapping[str, Any], pair: Pair, prompt: pipeline.Prompt, limit: int) -> str:
    """Why a row cannot be judged; empty if it can."""
    broken = [name for name, text in cells.texts(row).items() if not cells.is_unicode(text)]
    if broken:
        return "; ".join(f"{name} {NOT_UNICODE}" for name in broken)
    empty = [name for name in ("query", "title") if not getattr(pair, name)]
    if empty:
        return "; ".join(f"{name} is empty" for name in empty)
    if prompt.room < 1:
        return f"its query and the fixed text take {limit - prompt.room} tokens, and prompt_len is {limit}"
    return ""
