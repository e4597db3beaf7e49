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
from agrl_jax.evaluation import probabilities
from agrl_jax.evaluation.evaluator import judge_prompts
from agrl_jax.evaluation.metrics import Judgements
from agrl_jax.evaluation.probabilities import Statements, likeliest_parts, tier_probabilities
from agrl_jax.judging import cuts, trained
from agrl_jax.judging.cuts import CutsError
from agrl_jax.judging.trained import Settings, Trained, TrainedError
from agrl_jax.policy.scoring import instructed, prefill
from agrl_jax.rulebook import wording
from agrl_jax.runtime import sharding
from agrl_jax.runtime.console import progress
from agrl_jax.types import UNKNOWN, Array, Params, Policy, RuleTables, is_end

_LENGTHS = 8  # prompts are padded to so many lengths at most, each of which is compiled once
_SHORTEST_UNIT = 16  # these lengths are multiples of this, or of more
_DECIMALS = 6  # of probabilities
_CHUNK_BATCHES = 4  # batches that are judged and kept together


@dataclass(frozen=True)
class Judgement:
    """What the judge says of a pair; `error` alone where it could not be judged."""

    tier: str | None = None
    probs: dict[str, float] = field(default_factory=dict)  # of each tier
    steps: dict[str, str] = field(default_factory=dict)  # the value of each step; empty where none was asked for
    consistent: bool | None = None  # the steps imply the tier; None without steps
    response: str | None = None  # what the policy wrote
    tier_from: str | None = None  # `answer`, `probabilities` or `cuts`
    stated: str | None = None  # the tier in the answer
    likeliest: str | None = None  # the tier by the probabilities
    error: str = ""


class Judge:
    """A policy that judges. `batch_size` is rounded up to a multiple of the devices that share a batch.

    Without `steps`, a policy that states the tier first is asked for the tier alone: one decision a pair.
    """

    def __init__(
        self, loaded: Trained, batch_size: int = 64, use_cuts: bool = False, mesh: jax.sharding.Mesh | None = None,
        steps: bool = True,
    ) -> None:
        mesh = mesh or sharding.make_mesh()
        self._loaded, self.book, self.steps = loaded, loaded.book, steps
        if not steps:
            _check_tier_alone(loaded)
        self.repeated = 0  # pairs so far that equalled another one of their call, and so were not judged again
        self._made_for = trained.identity(loaded.book, loaded.weights)
        self.calibration = probabilities.load(loaded.calibration_file, loaded.checkpoint, loaded.book)
        self._cuts = cuts.load(loaded.cuts_file, self._tiers, self._cuts_made_for) if use_cuts else None
        self.batch_size = -(-batch_size // sharding.data_shards(mesh)) * sharding.data_shards(mesh)
        self._put = partial(sharding.put, shardings=sharding.batch_sharding(mesh))
        if loaded.response_len < (shortest := loaded.tables.shortest):
            raise TrainedError(f"response_len is {loaded.response_len}, but a response has at least {shortest} tokens")
        policy, instruct = instructed(loaded.policy, loaded.instructions)
        self._params = jax.jit(instruct)(loaded.params)
        texts = probabilities.statements(loaded.book, loaded.tokenizer, len(loaded.tables.token_class))
        texts = texts if steps else texts.first()
        self._closed = loaded.book.response.free_text == "none" or not steps
        answer = _closed_answer if self._closed else partial(_free_answer, loaded.tables, loaded.response_len)
        self._answer = jax.jit(partial(answer, policy, texts))

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
        steps: bool = True,
    ) -> Judge:
        """The judge in the box, a workdir, an exported or other Hugging Face folder or a GGUF file; see `trained.load`.

        Args:
          path: the checkpoint's path or name.
          stage: of a workdir: `best` of RL by validation, `rl` (its latest) or `sft_end`.
          settings: replace those of the checkpoint; of use for a model that agrl_jax did not train.
          batch_size: pairs judged at once.
          use_cuts: choose tiers by the cut points that `fit_cuts` has kept with the checkpoint.
          mesh: the devices; by default all, each with all parameters.
          steps: False asks for the tier alone, of a judge that states it first.
        """
        mesh = mesh or sharding.make_mesh()
        return cls(trained.load(path, stage, settings, mesh), batch_size, use_cuts, mesh, steps)

    @property
    def identity(self) -> dict[str, Any]:
        """All that judgements depend on."""
        settings = {name: getattr(self._loaded, name) for name in ("style", "prompt_len", "response_len")}
        chosen = {"temperature": self._temperature, "tier_from": self.tier_from, "cuts": list(self._cuts or ())}
        return self._made_for | settings | {"batch_size": self.batch_size, "steps": self.steps} | chosen

    @property
    def tier_from(self) -> str:
        """Where the tier comes from: cut points if they are used, else what was better on validation pairs."""
        if self._cuts is not None:
            return "cuts"
        return probabilities.ANSWER if self.calibration is None else self.calibration.tier_from

    @property
    def _temperature(self) -> float:
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def _cuts_made_for(self) -> dict[str, str]:
        """What cut points depend on: the probabilities, and so their temperature."""
        return self._made_for | {"temperature": repr(self._temperature)}

    @property
    def chunk(self) -> int:
        """How many rows to judge in one call, so that they can be batched by length."""
        return self.batch_size * _CHUNK_BATCHES

    def judge(self, rows: Source, advance: Callable[[int], None] = lambda rows: None) -> list[Judgement]:
        """Judges rows with a `query`, a `title`, and optional texts of the item: records, or a frame.

        Rows with the same prompt are judged once, and counted in `repeated`. A row that cannot be judged has an
        `error`; the others do not depend on it. `advance` is told after each batch how many more rows are done.
        """
        answers = self._answers(records_of(rows), advance)
        return [Judgement(error=one) if isinstance(one, str) else self._judgement(one) for one in answers]

    def judgements(self, pairs: Sequence[Pair]) -> tuple[Judgements, list[tuple[int, str]]]:
        """Judges labelled pairs for scoring: the answers beside the truth; and the indices of the pairs that could not
        be judged, with reasons."""
        rows = [{name: getattr(pair, name) for name in cells.TEXTS} for pair in pairs]
        answers: list[dict[str, np.ndarray] | str] = []
        with progress("judge", len(rows)) as bar:
            for first in range(0, len(rows), self.chunk):
                answers += self._answers(rows[first : first + self.chunk], bar.advance)
        errors = [(i, one) for i, one in enumerate(answers) if isinstance(one, str)]
        judged = [(pair, one) for pair, one in zip(pairs, answers, strict=True) if not isinstance(one, str)]
        pairs, answers = [pair for pair, _ in judged], [one for _, one in judged]
        tiers, parts, n = len(self._tiers), len(self.book.steps), len(judged)
        tier = _stacked(answers, "tier", ())
        steps = _stacked(answers, "steps", (parts,)) if self.steps else np.full((n, parts), UNKNOWN)
        probs = _stacked(answers, "probs", (tiers,))
        chosen = self._chosen(probs, tier)
        return Judgements(
            query=[pair.query for pair in pairs],
            family=[pair.family for pair in pairs],
            seen=np.array([pair.seen for pair in pairs], bool),
            tier=np.array([pair.tier for pair in pairs], int),
            predicted=chosen,
            steps=np.array([pair.steps or (UNKNOWN,) * parts for pair in pairs], int).reshape(n, parts),
            predicted_steps=steps,
            probs=probs,
            well_formed=np.ones(n, bool),
            truncated=np.zeros(n, bool),
            consistent=np.array([self._follows(*one) for one in zip(steps.tolist(), chosen, strict=True)], bool),
            response_tokens=np.array([len(self._loaded.tokenizer.encode(self._response(one))) for one in answers], int),
            part_logprobs=_stacked(answers, "part_logprobs", (0, 0)),
        ), errors

    def fit_temperature(self, path: str, form: PairsFormat = AS_DESCRIBED) -> probabilities.Calibration:
        """Fits the temperature of the probabilities on a file of labelled pairs, and finds whether the stated or the
        likeliest tier is the better one there; uses both from then on, and keeps them with the checkpoint."""
        self._loaded.check_keeps()
        self._cuts = self.calibration = None
        judged = self._labelled(path, form)
        self.calibration = probabilities.fit(judged, self.book)
        probabilities.keep(self._loaded.calibration_file, self._loaded.checkpoint, self.calibration, self.book)
        return self.calibration

    def fit_cuts(self, path: str, form: PairsFormat = AS_DESCRIBED, use: bool = True) -> cuts.Fit:
        """Fits cut points on a file of labelled pairs, keeps them with the checkpoint, and judges by them if `use`.

        `form` says how the file differs from what `agrl_jax.data.pairs` describes.
        """
        self._loaded.check_keeps()
        self._cuts = None
        judged = self._labelled(path, form)
        fitted = cuts.fit(np.round(judged.probs, _DECIMALS), judged.tier, judged.predicted)
        cuts.save(self._loaded.cuts_file, self._tiers, fitted, self._cuts_made_for)
        self._cuts = fitted.cuts if use else None
        return fitted

    def _labelled(self, path: str, form: PairsFormat) -> Judgements:
        judged, _ = self.judgements(read_labelled(path, self.book, form).pairs)
        if not len(judged):
            raise CutsError(f"{path}: no row could be judged")
        return judged

    @property
    def _tiers(self) -> list[str]:
        return [tier.name for tier in self.book.tiers]

    @property
    def _unit(self) -> int:
        """The number of which all padded lengths are multiples."""
        return max(_SHORTEST_UNIT, -(-self._loaded.prompt_len // _LENGTHS))

    def warm_up(self) -> None:
        """Compiles the programs for prompts of all lengths, so that no pair waits for them."""
        for length in range(self._unit, self._loaded.prompt_len + self._unit, self._unit):
            jax.block_until_ready(self._start([[0] * length]))

    def _start(self, prompts: Sequence[Sequence[int]]) -> dict[str, Array]:
        """Starts to judge a batch, filled up with its last prompt and padded to one of few lengths."""
        padded = -(-max(map(len, prompts)) // self._unit) * self._unit
        tokens = np.zeros((self.batch_size, padded), np.int32)
        prompts = [*prompts, *itertools.repeat(prompts[-1], self.batch_size - len(prompts))]
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        batch = self._put((tokens, np.array([len(prompt) for prompt in prompts], np.int32)))
        return self._answer(self._params, *batch)

    def _answers(
        self, rows: Sequence[Mapping[str, Any]], advance: Callable[[int], None]
    ) -> list[dict[str, np.ndarray] | str]:
        """The policy's answer to each row, or why the row cannot be judged. An answer has `tier` and `steps` as stated,
        `part_logprobs`, `probs` of the tiers and, with free text, the `tokens` and which of them are `text`."""
        pairs = [_pair(row) for row in rows]
        loaded = self._loaded
        prompts = list(pipeline.prompts(pairs, self.book, loaded.tokenizer, loaded.prompt_len, loaded.style))
        found: list[Any] = [_error(*each, loaded.prompt_len) for each in zip(rows, pairs, prompts, strict=True)]
        asked = {i: tuple(prompts[i].tokens) for i, error in enumerate(found) if not error}
        first = {tokens: i for i, tokens in reversed(asked.items())}  # the first row with a prompt stands for all
        self.repeated += len(asked) - len(first)
        advance(len(rows) - len(first))
        good = sorted(first.values(), key=lambda i: (len(prompts[i].tokens), i))
        batches = [good[first : first + self.batch_size] for first in range(0, len(good), self.batch_size)]
        # All are started before the first is awaited.
        answers = [self._start([prompts[i].tokens for i in batch]) for batch in batches]
        for batch, answer in zip(batches, answers, strict=True):
            answer = jax.device_get(answer)
            answer["probs"] = tier_probabilities(answer["part_logprobs"], self.book, self._temperature)
            for place, i in enumerate(batch):
                found[i] = {name: value[place] for name, value in answer.items()}
            advance(len(batch))
        for i, tokens in asked.items():
            found[i] = found[first[tokens]]
        return found

    def _judgement(self, answer: Mapping[str, np.ndarray]) -> Judgement:
        steps = [int(value) for value in answer["steps"]]
        probs = np.round(answer["probs"], _DECIMALS)
        tier = int(self._chosen(answer["probs"][None], answer["tier"][None])[0])
        return Judgement(
            tier=self._tiers[tier],
            tier_from=self.tier_from,
            probs=dict(zip(self._tiers, probs.tolist(), strict=True)),
            stated=self._tiers[int(answer["tier"])],
            likeliest=self._tiers[int(probs.argmax())],
            steps={step.name: step.values[value] for step, value in zip(self.book.steps, steps, strict=self.steps)},
            consistent=self._follows(steps, tier) if self.steps else None,
            response=self._response(answer),
        )

    def _chosen(self, probs: np.ndarray, stated: np.ndarray) -> np.ndarray:
        """[N] int: the judge's tiers, from the probabilities [N, tiers] and the tiers [N] that the answers state."""
        probs = np.round(probs, _DECIMALS)  # as they are written
        if self._cuts is not None:
            return cuts.choose(probs, self._cuts)
        return probs.argmax(axis=1) if self.tier_from == probabilities.PROBABILITIES else stated

    def _follows(self, steps: Sequence[int], tier: int) -> bool:
        """Whether the steps imply the tier."""
        return self.steps and self.book.tier_for(steps) == tier

    def _response(self, answer: Mapping[str, np.ndarray]) -> str:
        """What the policy wrote; without free text, this follows from what it states."""
        if not self.steps:
            return wording.part_text(self.book, len(self.book.steps), int(answer["tier"]), first=True)
        if self._closed:
            return "".join(wording.gold_segments(self.book, int(answer["tier"]), answer["steps"].tolist()))
        return self._loaded.tokenizer.decode(answer["tokens"][answer["text"]].tolist())


def _check_tier_alone(loaded: Trained) -> None:
    """Raises TrainedError where a policy cannot be asked for the tier alone."""
    if loaded.book.order != "respond_then_think":
        raise TrainedError(
            "judging without steps needs a judge that states the tier first, and this one states its steps before it: "
            "agrl_jax.distill makes one of it"
        )
    if loaded.tables.thought is not None:
        raise TrainedError("judging without steps: this judge thinks before it answers")


def _closed_answer(
    policy: Policy, texts: Statements, params: Params, prompt: Array, prompt_len: Array
) -> dict[str, Array]:
    """The likeliest answers without free text to the prompts [B, S], and the log-probabilities of their parts."""
    values, part_logprobs = likeliest_parts(policy, params, prefill(policy, params, prompt, prompt_len), texts)
    return {"tier": values[:, -1], "steps": values[:, :-1], "part_logprobs": part_logprobs}


def _free_answer(
    tables: RuleTables, length: int, policy: Policy, texts: Statements, params: Params, prompt: Array, prompt_len: Array
) -> dict[str, Array]:
    """Well-formed greedy answers to the prompts [B, S]: their tokens, which of them are text, and what they say."""
    judged, rolled = judge_prompts(policy, tables, texts, length, params, prompt, prompt_len, constrained=True)
    tokens = rolled.tokens[:, 0]
    return {
        "tier": judged["predicted"],
        "steps": judged["predicted_steps"],
        "part_logprobs": judged["part_logprobs"],
        "tokens": tokens,
        "text": rolled.valid[:, 0] & ~is_end(tokens, tables.end_token, tables.other_ends),
    }


def _stacked(answers: Sequence[Mapping[str, np.ndarray]], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A field of all answers, [N, ...]; `shape` is that of one answer, for N = 0."""
    return np.stack([answer[name] for answer in answers]) if answers else np.zeros((0, *shape))


def _pair(row: Mapping[str, Any]) -> Pair:
    """A row's texts; none if the row is not valid Unicode."""
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
