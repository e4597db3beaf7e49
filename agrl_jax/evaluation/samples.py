"""Decoded rollouts: what the policy wrote, what was forced, and what it earned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from agrl_jax.data.pairs import Pair
from agrl_jax.data.pipeline import encode
from agrl_jax.policy.tokenizer import Tokenizer
from agrl_jax.rl.reader import read
from agrl_jax.rl.reward import RewardConfig, component_names, score
from agrl_jax.rl.step import Inspection
from agrl_jax.rulebook import wording
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN, Rollout, RuleTables

_PROMPT_LEN = 1024  # tokens; the prompt does not change how an answer is scored


def decode(seen: Inspection, book: RuleBook, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """One JSON-able row per rollout: pair, text with its forced part apart, statements, rewards, advantage."""
    components = component_names(tuple(step.name for step in book.steps))
    rows = []
    for i, row in enumerate(seen.row):
        pair = pairs[int(row)]
        truth = _named(book, [*(pair.steps or (UNKNOWN,) * len(book.steps)), pair.tier])
        for g in range(seen.advantage.shape[1]):
            tokens = seen.rolled.tokens[i, g]
            given, valid = seen.rolled.forced[i, g], seen.rolled.valid[i, g]
            counted = seen.score.counted[i, g]
            earned = zip(components, seen.score.earned[i, g], counted, strict=True)
            forced = tokenizer.decode(tokens[given].tolist())
            text = tokenizer.decode(tokens[valid & ~given & ~np.isin(tokens, tokenizer.end_tokens)].tolist())
            rows.append(
                {
                    "id": pair.id,
                    "family": pair.family,
                    "query": pair.query,
                    "title": pair.title,
                    "truth": truth,
                    **({"variant": pair.variant} if pair.variant else {}),
                    "sample": g,
                    "guided": bool(np.any(given)),
                    "forced": forced,
                    "text": text,
                    "finished": bool(seen.rolled.finished[i, g]),
                    "stated": _named(book, seen.reading.value[i, g].tolist()),
                    "statements": wording.statements(book, forced + text),
                    "parts": {name: float(str(value)) if part else None for name, value, part in earned},
                    "reward": float(str(np.float32(np.sum(seen.score.earned[i, g] * counted)))),
                    "passed": bool(seen.score.passed[i, g]),
                    "advantage": float(str(seen.advantage[i, g])),
                }
            )
    return rows


def score_answers(
    answers: Sequence[str], pair: Pair, book: RuleBook, tokenizer: Tokenizer, tables: RuleTables, cfg: RewardConfig,
    response_len: int,
) -> list[dict[str, Any]]:
    """Rows like those of `decode`, without an advantage, for any answers to a labelled pair: they show what an answer
    would earn in training, where it is cut off after `response_len` tokens."""
    ids = [[*tokenizer.encode(answer), tokenizer.end_token] for answer in answers]
    lengths = np.array([[len(row) for row in ids]])
    tokens = np.full((1, len(ids), response_len), tokenizer.end_token, np.int32)
    for place, row in zip(tokens[0], ids, strict=True):
        place[: len(row)] = row[:response_len]
    valid = np.arange(response_len) < lengths[..., None]
    rolled = Rollout(tokens, np.zeros(tokens.shape, np.float32), valid, valid, lengths <= response_len)
    truth = encode([pair], book, tokenizer, _PROMPT_LEN, response_len).batch
    reading = read(tables, tokens, valid)
    scored = score(reading, rolled, truth, tables, cfg)
    seen = Inspection(np.zeros(1, np.int32), rolled, reading, scored, np.zeros(lengths.shape, np.float32))
    rows = decode(jax.device_get(seen), book, tokenizer, [pair])
    return [{name: value for name, value in row.items() if name != "advantage"} for row in rows]


def render(step: int, rows: Sequence[dict[str, Any]], answers: int = 3) -> str:
    """The first example of `rows` for a terminal: a few of its answers, the forced part in brackets."""
    first = rows[0]
    group = [row for row in rows if row["id"] == first["id"]]
    shown = sorted(group, key=lambda row: -row["guided"])[:answers]
    truth = ", ".join(f"{name} {value}" for name, value in first["truth"].items() if value is not None)
    lines = [f"step {step}: {first['query']!r} -> {first['title']!r} ({first['family']}; truth: {truth})"]
    for row in shown:
        forced = f"[{row['forced']}]" if row["forced"] else ""
        text = (forced + row["text"]).replace("\n", "; ")
        mark = "right" if row["passed"] else "wrong"
        lines.append(f"    {mark}  reward {row['reward']:+.2f}  advantage {row['advantage']:+.2f}  {text}")
    return "\n".join(lines)


def _named(book: RuleBook, values: Sequence[int]) -> dict[str, str | None]:
    """Values by part name, None where unknown."""
    named = {
        step.name: None if value == UNKNOWN else step.values[value]
        for step, value in zip(book.steps, values[:-1], strict=True)
    }
    return named | {"tier": None if values[-1] == UNKNOWN else book.tiers[values[-1]].name}
