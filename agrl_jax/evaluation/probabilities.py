"""The probability of each tier, through the rule book's decision table.

After the policy's own steps the tier is all but settled; the doubt is in the steps. So each step gets the probabilities
of all its values after the values stated before it, and the table is summed over all combinations:

    P(tier) = sum over combinations of prod over steps of P(value), where the table gives the tier

In `respond_then_think` the tier comes first, and has probabilities of its own. The probability of a value is that of
its whole text, among the texts of the part's values. One temperature on these distributions is fitted on validation
pairs (as Guo et al., arXiv 1706.04599, do on logits) and kept in `calibration.json`, beside the checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from scipy.optimize import minimize_scalar

from agrl_jax.data import pipeline
from agrl_jax.evaluation.metrics import LEAST_PROB, Estimator, Judgements
from agrl_jax.policy.scoring import cut, run_on, score_parts, text_logprobs
from agrl_jax.policy.tokenizer import Tokenizer
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.runtime.files import read_json, write_json
from agrl_jax.types import Array, Params, Policy, Prefix, Reading

FILE = "calibration.json"
ANSWER, PROBABILITIES = "answer", "probabilities"  # where a judge's tier comes from
_CELLS = 1 << 22  # combinations x pairs held at once
_TEMPERATURES = np.geomspace(1 / 16, 16, 65)  # the search starts at the best of these


class CalibrationError(ValueError):
    """A calibration file that cannot be read; the message names it."""


# ------------------------------------------------------------------------------- on the device: the values


@dataclass(frozen=True)
class Statements:
    """The canonical text of each value of each part, parts in the order of the response."""

    tokens: np.ndarray  # [P, values, W] int32
    length: np.ndarray  # [P, values] int32 tokens; 0 past the values of a part
    size: np.ndarray  # [P, values] int32 bytes
    token_size: np.ndarray  # [V] int32 bytes of each token of the vocabulary, 0 of special ones
    order: tuple[int, ...]  # the part at each place
    scored: tuple[int, ...]  # the places that give the tier probabilities: all steps, or the tier alone

    def first(self) -> Statements:
        """Those of the part that comes first."""
        rows = {name: getattr(self, name)[:1] for name in ("tokens", "length", "size", "order")}
        return dataclasses.replace(self, **rows, scored=(0,))


def statements(book: RuleBook, tokenizer: Tokenizer, vocabulary: int) -> Statements:
    """Tokenises the parts as gold responses are. `vocabulary` is the policy's size V, padding included."""
    texts, order = pipeline.part_texts(book, tokenizer), book.part_order
    size = np.zeros(texts.length.shape, np.int32)
    for phrase in book.phrases:
        place = order.index(phrase.part)
        separator = book.response.separator if place else ""
        size[place, phrase.value] = len((separator + phrase.text).encode())
    token_size = np.zeros(vocabulary, np.int32)
    token_size[: tokenizer.vocab_size] = [len(token or b"") for token in tokenizer.token_bytes()]
    tier_first = order[0] == len(book.steps)
    return Statements(texts.tokens, texts.length, size, token_size, order, (0,) if tier_first else order[:-1])


def likeliest_parts(
    policy: Policy, params: Params, prefix: Prefix, texts: Statements
) -> tuple[Array, Array]:
    """Answers without free text and without a decoding loop: part by part the likeliest value after those before it.

    The likeliest value is the one with the likeliest canonical text. A greedy sampler under the grammar goes token by
    token, and may spell in other ways: it can choose another value.

    Returns:
      The values [B, P] by part index, and the log-probabilities of `stated_logprobs`.
    """
    scored = score_parts(
        policy, params, prefix, texts.tokens, texts.length, lambda place, logp: jnp.argmax(logp, axis=1)
    )
    values = jnp.stack([scored[place][1] for place in np.argsort(texts.order)], axis=1)
    return values, _stacked([scored[place][0] for place in texts.scored], texts)


def stated_logprobs(
    policy: Policy, params: Params, prefix: Prefix, own: Array, reading: Reading, texts: Statements
) -> Array:
    """Log-probabilities [B, places scored, values] of the values of each part in the place where a response states it.

    A value's canonical text is scored after all that was written before the part: the other parts, and free text. The
    part's own phrase is left out, with the separator before it (or what stands in its place) and every token that
    overlaps them. Each row is normalised; -inf past the values of a part. Without meaning where a part is not stated.

    Args:
      policy: gives the log-probabilities, with `params`.
      params: its parameters.
      prefix: the prompts.
      own: [B, T] tokens of the responses.
      reading: of the responses, with one of each group, [B, 1, P].
      texts: of the rule book.
    """
    ends = jnp.cumsum(jnp.asarray(texts.token_size)[own], axis=1)  # [B, T] bytes up to the end of each token
    whole, hidden = run_on(policy, params, prefix, own)
    scored = []
    for place in texts.scored:
        position, value = (x[:, 0, texts.order[place]] for x in (reading.position, reading.value))
        end = jnp.take_along_axis(ends, jnp.minimum(position, own.shape[1] - 1)[:, None], axis=1)
        before = jnp.sum(ends <= end - jnp.asarray(texts.size[place])[value][:, None], axis=1)  # tokens
        there = texts.length[place] > 0
        logp, _ = text_logprobs(
            policy, params, cut(whole, hidden, before), texts.tokens[place, there], texts.length[place, there]
        )
        scored.append(logp)
    return _stacked(scored, texts)


def _stacked(scored: Sequence[Array], texts: Statements) -> Array:
    """[B, places, values] of log-probabilities [B, values of the place], each normalised."""
    width = max(logp.shape[1] for logp in scored)
    padded = [
        jnp.pad(jax.nn.log_softmax(logp), ((0, 0), (0, width - logp.shape[1])), constant_values=-jnp.inf)
        for logp in scored
    ]
    return jnp.stack(padded, axis=1)


# ------------------------------------------------------------------------------- on the host: the tiers


def tier_probabilities(
    part_logprobs: np.ndarray, book: RuleBook, temperature: float = 1.0, formed: np.ndarray | None = None
) -> np.ndarray:
    """Probabilities [N, tiers] float64 from the log-probabilities [N, places, values] of `stated_logprobs`.

    Each distribution is taken to the power of 1 / `temperature` and normalised; then the steps are summed over the
    decision table. Steps count as independent given the values that were stated before them. All tiers are equally
    likely where an answer is not well-`formed` [N].
    """
    probs = _through_table(np.asarray(part_logprobs, np.float64) / temperature, book)
    return probs if formed is None else np.where(np.asarray(formed)[:, None], probs, 1 / len(book.tiers))


def _through_table(logp: np.ndarray, book: RuleBook) -> np.ndarray:
    probs = np.exp(logp - logp.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    if book.part_order[0] == len(book.steps):
        return probs[:, 0, : len(book.tiers)]
    tier_of = np.eye(len(book.tiers))[book.tier_table()]  # [combinations, tiers]
    at_once = max(1, _CELLS // len(tier_of))
    pieces = [_joint(probs[i : i + at_once], book.num_values) @ tier_of for i in range(0, len(probs), at_once)]
    return np.concatenate([np.zeros((0, len(book.tiers))), *pieces])


def _joint(probs: np.ndarray, num_values: Sequence[int]) -> np.ndarray:
    """[N, combinations] the products of [N, R, values] over steps, mixed radix, first step slowest."""
    joint = np.ones((len(probs), 1))
    for step, count in enumerate(num_values):
        joint = (joint[:, :, None] * probs[:, step, None, :count]).reshape(len(probs), -1)
    return joint


def at_temperature(judged: Judgements, book: RuleBook, temperature: float) -> Judgements:
    """The judgements with the tier probabilities that follow from their parts at a temperature."""
    probs = tier_probabilities(judged.part_logprobs, book, temperature, judged.well_formed)
    return dataclasses.replace(judged, probs=probs)


# ------------------------------------------------------------------------------- the temperature


class Calibration(NamedTuple):
    """A temperature and a choice of tier, fitted on labelled pairs, and the scores that they reach there."""

    temperature: float  # of the distributions over the values of the parts
    tier_from: str  # ANSWER or PROBABILITIES: the one with the higher macro-F1; ANSWER if they are equal
    pairs: int
    nll: float  # [nats]
    nll_before: float  # at temperature 1
    macro_f1_answer: float  # of the tiers that answers state
    macro_f1_probabilities: float  # of the likeliest tiers


def fit(judged: Judgements, book: RuleBook) -> Calibration:
    """The temperature with the lowest mean -log P(true tier), from 1/16 to 16: a grid, then Brent's method around its
    best. It is 1 where no answer is well-formed."""
    rows = np.arange(len(judged))

    def nll(log_temperature: float) -> float:
        probs = tier_probabilities(judged.part_logprobs, book, float(np.exp(log_temperature)), judged.well_formed)
        return -float(np.mean(np.log(np.maximum(probs[rows, judged.tier], LEAST_PROB))))

    grid = np.log(_TEMPERATURES)
    best, found = int(np.argmin([nll(place) for place in grid])), 0.0
    if judged.well_formed.any():
        around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        found = float(minimize_scalar(nll, bounds=around, method="bounded").x)
    temperature = float(np.exp(found))
    estimator = Estimator(at_temperature(judged, book, temperature), book)
    scores = estimator(np.ones((1, estimator.queries)))
    stated, likeliest = (float(scores[name].value[0]) for name in ("macro_f1", "likeliest_macro_f1"))
    better = PROBABILITIES if likeliest > stated else ANSWER
    return Calibration(temperature, better, len(judged), nll(found), nll(0.0), stated, likeliest)


def keep(path: epath.PathLike, checkpoint: str, fitted: Calibration, book: RuleBook) -> None:
    """Adds a calibration to a file, by the name of the checkpoint that it was fitted for."""
    entry = {"rulebook": book.digest} | fitted._asdict()
    write_json(path, _read(path) | {checkpoint: entry})


def load(path: epath.PathLike, checkpoint: str, book: RuleBook) -> Calibration | None:
    """The calibration that is kept for a checkpoint judging by this rule book; None if there is none.

    Raises:
      CalibrationError: the file is damaged.
    """
    entry = dict(_read(path).get(checkpoint, {}))
    if entry.pop("rulebook", None) != book.digest:
        return None
    try:
        return Calibration(**entry)
    except TypeError as error:
        raise CalibrationError(f"{path}: not a calibration of {checkpoint} ({error}); move it away") from error


def _read(path: epath.PathLike) -> dict[str, dict]:
    kept = read_json(path, CalibrationError, "; move it away") if epath.Path(path).exists() else {}
    if not all(isinstance(entry, dict) for entry in kept.values()):
        raise CalibrationError(f"{path}: not a calibration by the name of each checkpoint; move it away")
    return kept
