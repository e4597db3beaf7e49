"""From pairs to batches: tokens of fixed shape, in an order that depends on the seed and the batch number alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from agrl_jax.data import chat
from agrl_jax.data.pairs import Pair, PairsError, item_text
from agrl_jax.data.rows import MAX_LISTED
from agrl_jax.policy.tokenizer import Tokenizer
from agrl_jax.rulebook import wording
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN, Batch, Thought

_CHUNK = 8192  # pairs tokenised at once
_WORTH = 32  # tokens that instructions must have to be computed apart; fewer are cheaper within each prompt


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """Tokenised pairs."""

    batch: Batch  # numpy, one row for each of the N pairs
    pairs: Sequence[Pair]  # N
    families: tuple[str, ...]  # the names that `batch.family` indexes
    shortened: int  # pairs whose item text was cut to fit the prompt

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, indices: np.ndarray) -> Batch:
        """The rows at `indices`, in that order."""
        return jax.tree.map(lambda rows: rows[indices], self.batch)


def encode(
    pairs: Sequence[Pair],
    book: RuleBook,
    tokenizer: Tokenizer,
    prompt_len: int,
    response_len: int,
    style: str = "terse",
    families: Sequence[str] | None = None,
    variants: Sequence[RuleBook] = (),
) -> EncodedSplit:
    """Tokenises gold responses, and prompts without the `instructions` that all of them begin with.

    A prompt over the limit loses the end of its item text, never of its query. With `variants` each prompt begins with
    the instructions of its pair's rule book, besides its S tokens.

    Args:
      pairs: N pairs.
      book: words the prompts and the gold responses.
      tokenizer: of the policy.
      prompt_len: S, tokens of a prompt at most, without the instructions.
      response_len: T, tokens of a response at most, end token included.
      style: `terse`, `full`, or `chat`: through the chat template of the tokenizer's model.
      families: names of the query families, the first being 0; by default those of the pairs, sorted.
      variants: of the rule book, with the same steps, tiers and wording of answers; `Pair.variant` counts them from 1.

    Raises:
      PairsError: there are no pairs, a query alone is over `prompt_len`, a gold response is over `response_len`, or
        a pair is of no known family.
      TokenizerError: `chat` is asked of a model that has no usable chat template.
    """
    if not pairs:
        raise PairsError("there are no pairs to encode")
    names = tuple(sorted({pair.family for pair in pairs}) if families is None else families)
    prompt, length, shortened = _prompts(pairs, [book, *variants], tokenizer, prompt_len, style)
    thinks = style == "chat" and tokenizer.thinking
    steps = [_steps(pair, book) for pair in pairs]
    batch = Batch(
        prompt=prompt,
        prompt_len=length,
        **_gold(pairs, steps, book, tokenizer, response_len, chat.thought(book, tokenizer) if thinks else None),
        steps=np.array(steps, np.int32).reshape(len(pairs), len(book.steps)),
        tier=np.array([pair.tier for pair in pairs], np.int32),
        row=np.arange(len(pairs), dtype=np.int32),
        family=_family(pairs, names),
        book=np.array([pair.variant for pair in pairs], np.int32) if variants else None,
    )
    return EncodedSplit(batch, pairs, names, shortened)


@dataclasses.dataclass(frozen=True)
class PartTexts:
    """The canonical text of each value of each part, as tokens; parts in the order of the response."""

    tokens: np.ndarray  # [P, values, W] int32
    length: np.ndarray  # [P, values] int32; 0 past the values of a part

    @property
    def longest_response(self) -> int:
        """Tokens of the longest canonical response, its end token included."""
        return int(self.length.max(axis=1).sum()) + 1


def part_texts(book: RuleBook, tokenizer: Tokenizer) -> PartTexts:
    """Tokenises the parts as gold responses are."""
    texts = [
        [
            tokenizer.encode(wording.part_text(book, part, phrase.value, first=place == 0))
            for phrase in sorted(book.phrases, key=lambda phrase: phrase.value)
            if phrase.part == part
        ]
        for place, part in enumerate(book.part_order)
    ]
    most = max(map(len, texts))
    return PartTexts(*_padded([values + [[]] * (most - len(values)) for values in texts]))


_LIKE_SIZED = 16  # batches whose rows are sorted by length together
_WIDTH = 8  # prompts of such batches are cut to a multiple of this


def batches(
    encoded: EncodedSplit, batch_size: int, seed: int, start: int = 0, by_length: bool = False
) -> Iterator[Batch]:
    """Training batches without end, each epoch in a new order and without its last incomplete batch.

    Batch k depends on the seed and k alone, so `start=k` goes on as if k batches had been taken. No row stands twice
    in a batch.

    Args:
      encoded: N pairs.
      batch_size: B.
      seed: of the order.
      start: number of the first batch.
      by_length: puts rows of like length into a batch, and cuts its prompts to the longest: less padding to compute,
        and one program for each of few widths.

    Raises:
      ValueError: the batch is larger than the split.
    """
    if not 0 < batch_size <= len(encoded):
        raise ValueError(f"batch_size={batch_size} should be from 1 to {len(encoded)}, the number of pairs")
    epoch = grain.MapDataset.range(len(encoded)).shuffle(seed=seed).batch(batch_size, drop_remainder=True)
    rows = epoch.repeat()
    if by_length:
        like_sized = partial(_like_sized, encoded.batch.prompt_len, rows, len(epoch), seed)
        return (_cut(encoded.take(like_sized(k))) for k in itertools.count(start))
    return (encoded.take(rows[k]) for k in itertools.count(start))


def _like_sized(prompt_len: np.ndarray, rows: Any, per_epoch: int, seed: int, k: int) -> np.ndarray:
    """The rows of batch k. Each group of batches of an epoch sorts its rows by length, and shuffles its batches."""
    epoch, of_epoch = divmod(k, per_epoch)
    group, place = divmod(of_epoch, _LIKE_SIZED)
    start = group * _LIKE_SIZED
    size = min(_LIKE_SIZED, per_epoch - start)
    mine = np.concatenate([rows[epoch * per_epoch + start + i] for i in range(size)])
    mine = mine[np.argsort(prompt_len[mine], kind="stable")].reshape(size, -1)
    number = epoch * -(-per_epoch // _LIKE_SIZED) + group
    return mine[np.random.default_rng([seed, number]).permutation(size)[place]]


def _cut(batch: Batch) -> Batch:
    """The batch with its prompts cut to the longest of them, rounded up to a multiple of _WIDTH."""
    width = -(-int(batch.prompt_len.max()) // _WIDTH) * _WIDTH
    return batch.replace(prompt=batch.prompt[:, :width])


def eval_batches(
    encoded: EncodedSplit, batch_size: int, indices: np.ndarray | None = None
) -> Iterator[tuple[Batch, np.ndarray]]:
    """The rows at `indices` (by default all) in order, with a mask [B] bool.

    All batches have the same shape: the last is filled up with its last row, where the mask is False.
    """
    indices = np.arange(len(encoded)) if indices is None else np.asarray(indices)
    for first in range(0, len(indices), batch_size):
        rows = indices[first : first + batch_size]
        padding = batch_size - len(rows)
        yield encoded.take(np.pad(rows, (0, padding), mode="edge")), np.arange(batch_size) < len(rows)


def stratified(encoded: EncodedSplit, count: int, seed: int) -> np.ndarray:
    """A fixed sample of `count` rows, ascending, in which every combination of family and tier has its share in the
    split, to within one row. All rows, if there are fewer or `count` is 0.
    """
    strata: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(encoded.batch.family.tolist(), encoded.batch.tier.tolist(), strict=True)):
        strata.setdefault(key, []).append(row)
    count = min(count or len(encoded), len(encoded))
    keys = sorted(strata)
    exact = np.array([count * len(strata[key]) / len(encoded) for key in keys])
    sizes = np.floor(exact).astype(int)
    rng = np.random.default_rng(seed)
    # The largest remainders are rounded up; a random order among equal ones favours no family.
    order = np.lexsort((rng.permutation(len(keys)), -(exact - sizes)))
    sizes[order[: count - sizes.sum()]] += 1
    chosen = [rng.permutation(strata[key])[:size] for key, size in zip(keys, sizes, strict=True)]
    return np.sort(np.concatenate(chosen))


# Prompts


class Prompt(NamedTuple):
    """A pair's prompt, after the instructions that all share."""

    tokens: list[int]  # over the limit where the query alone is: then `room` is below 1
    room: int  # tokens that the limit leaves for the item
    shortened: bool  # the item's text was cut


def prompt_pieces(book: RuleBook, tokenizer: Tokenizer, style: str) -> tuple[str, str, str]:
    """The fixed text before the query, between query and item, and after the item."""
    return chat.pieces(book, tokenizer) if style == "chat" else wording.prompt_pieces(book, style)


def instructions(book: RuleBook, tokenizer: Tokenizer, style: str) -> np.ndarray:
    """The tokens [I] int32 that every prompt begins with and `prompts` leaves out; none if there are fewer than 32."""
    head, _, _ = _fixed(book, tokenizer, style)
    return np.array(head if len(head) >= _WORTH else [], np.int32)


def prompts(pairs: Sequence[Pair], book: RuleBook, tokenizer: Tokenizer, limit: int, style: str) -> Iterator[Prompt]:
    """The prompt of each pair after the `instructions`; one over `limit` tokens loses the end of its item text."""
    head, (query_space, between, item_space), tail = _fixed(book, tokenizer, style)
    head = head if len(head) < _WORTH else []
    for first in range(0, len(pairs), _CHUNK):
        chunk = pairs[first : first + _CHUNK]
        queries = tokenizer.encode_batch([query_space + pair.query + between for pair in chunk])
        items = tokenizer.encode_batch([item_space + item_text(pair) for pair in chunk])
        for query, item in zip(queries, items, strict=True):
            room = limit - len(head) - len(query) - len(tail)
            yield Prompt(head + query + item[: max(room, 0)] + tail, room, len(item) > room)


def _fixed(
    book: RuleBook, tokenizer: Tokenizer, style: str
) -> tuple[list[int], tuple[str, str, str], list[int]]:
    """What all prompts have in common: the tokens before the query; the space before the query, the text between query
    and item, and the space before the item; the tokens after the item.

    The pieces are tokenised one by one. A space goes with the word that follows it, as in running text.
    """
    templated = style == "chat"  # only then does the fixed text hold special tokens
    before, between, after = prompt_pieces(book, tokenizer, style)
    before, query_space = _move_spaces(before)
    between, item_space = _move_spaces(between)
    bos = [] if templated or tokenizer.bos_token is None else [tokenizer.bos_token]
    head = bos + tokenizer.encode(before, parse_special=templated)
    return head, (query_space, between, item_space), tokenizer.encode(after, parse_special=templated)


def _prompts(
    pairs: Sequence[Pair], books: Sequence[RuleBook], tokenizer: Tokenizer, limit: int, style: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens [N, S], lengths [N], and how many prompts had to be shortened.

    With several books, each prompt begins with the instructions of its own, and S has room for the longest of them.
    """
    heads = [instructions(book, tokenizer, style) if len(books) > 1 else [] for book in books]
    tokens = np.zeros((len(pairs), limit + max(map(len, heads))), np.int32)
    lengths = np.zeros(len(pairs), np.int32)
    shortened, without_room = 0, []
    for index, (book, head) in enumerate(zip(books, heads, strict=True)):
        mine = [row for row, pair in enumerate(pairs) if len(books) == 1 or pair.variant == index]
        of_mine = prompts([pairs[row] for row in mine], book, tokenizer, limit, style)
        for row, prompt in zip(mine, of_mine, strict=True):
            if prompt.room < 1:
                without_room.append((pairs[row], limit - prompt.room))
                continue
            shortened += prompt.shortened
            lengths[row] = len(head) + len(prompt.tokens)
            tokens[row, : lengths[row]] = [*head, *prompt.tokens]
    if without_room:
        raise PairsError(_without_room(without_room, limit))
    return tokens, lengths, shortened


def _without_room(pairs: Sequence[tuple[Pair, int]], limit: int) -> str:
    """The message about (pair, tokens of its query and fixed text) that leave no room; it names their rows."""
    lines = [
        f"{f'row {pair.row}' if pair.row else f'pair {pair.id}'}: {needed} tokens: {pair.query[:80]!r}"
        for pair, needed in pairs[:MAX_LISTED]
    ]
    if len(pairs) > MAX_LISTED:
        rest = ", ".join(f"row {pair.row}" if pair.row else f"pair {pair.id}" for pair, _ in pairs[MAX_LISTED:])
        lines.append(f"and {rest}, of up to {max(needed for _, needed in pairs)} tokens")
    count = f"{len(pairs)} pair{'s' * (len(pairs) > 1)}"
    what = f"{count} whose query and fixed text take prompt_len={limit} tokens or more, and leave none for the item:"
    return "\n  ".join([what, *lines])


def _move_spaces(text: str) -> tuple[str, str]:
    """The text without the spaces at its end, and those spaces."""
    bare = text.rstrip(" ")
    return bare, text[len(bare) :]


# Gold responses


def _steps(pair: Pair, book: RuleBook) -> tuple[int, ...]:
    if pair.steps and len(pair.steps) != len(book.steps):
        raise PairsError(f"pair {pair.id}: has {len(pair.steps)} steps where the rule book has {len(book.steps)}")
    return pair.steps or (UNKNOWN,) * len(book.steps)


def _gold(
    pairs: Sequence[Pair],
    steps: Sequence[tuple[int, ...]],
    book: RuleBook,
    tokenizer: Tokenizer,
    limit: int,
    marks: tuple[str, str] | None = None,
) -> Mapping[str, Any]:
    """The fields of a batch that follow from the gold responses; without reasons, few are distinct.

    With the `marks` of a thought, the reason of the first part becomes one.
    """
    room = book.response.free_text != "none"
    keys = [(pair.tier, values, pair.reasons if room else ()) for pair, values in zip(pairs, steps, strict=True)]
    distinct = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    p = len(book.parts)
    gold = np.zeros((len(distinct), limit), np.int32)
    gold_len = np.zeros(len(distinct), np.int32)
    part_end = np.zeros((len(distinct), p), np.int32)
    known_parts = np.zeros(len(distinct), np.int32)
    pieces = [wording.gold_pieces(book, *key) for key in distinct]
    texts = list(dict.fromkeys(text for parts in pieces for piece in parts if piece for text in piece))
    spelt = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    reasons = [[spelt[piece.reason] if piece else [] for piece in parts] for parts in pieces]
    if marks:
        begin, end = (tokenizer.encode(mark, parse_special=True) for mark in marks)
        empty = tokenizer.encode("\n")
        reasons = [[begin + (first or empty) + end, *others] for first, *others in reasons]
    needed = 0
    for i, (said, before) in enumerate(zip(pieces, reasons, strict=True)):
        known = zip(itertools.takewhile(bool, said), before, strict=False)
        parts = [reason + spelt[piece.statement] for piece, reason in known]
        tokens = [token for part in parts for token in part]
        tokens += [tokenizer.end_token] if len(parts) == p else []
        needed = max(needed, len(tokens))
        ends = list(itertools.accumulate(map(len, parts)))
        known_parts[i] = len(parts)
        part_end[i] = ends + [ends[-1] if ends else 0] * (p - len(parts))
        gold_len[i] = len(tokens)
        gold[i, : len(tokens)] = tokens[:limit]
    if needed > limit:
        raise PairsError(f"the longest gold response has {needed} tokens: response_len={limit} should be at least that")
    fields = {"gold": gold, "gold_len": gold_len, "part_end": part_end, "known_parts": known_parts}
    if any(map(any, reasons)) and any(UNKNOWN in values for _, values, _ in distinct):
        fields["reason"], fields["reason_len"] = _padded(reasons)
    index = np.array([distinct[key] for key in keys])
    return {name: rows[index] for name, rows in fields.items()}


def thought(book: RuleBook, tokenizer: Tokenizer) -> Thought | None:
    """What the sampler needs to know of thoughts; None where the tokenizer is not `thinking`.

    Raises:
      TokenizerError: as `chat.thought`.
    """
    if not tokenizer.thinking:
        return None
    begin, end = (tokenizer.encode(mark, parse_special=True) for mark in chat.thought(book, tokenizer))
    return Thought(begin[0] if begin else None, tuple(end), tokenizer.thinking)


def _padded(texts: Sequence[Sequence[Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n, m, W] int32 of n x m texts, right-padded, and their lengths [n, m] int32."""
    length = np.array([[len(text) for text in row] for row in texts], np.int32)
    tokens = np.zeros((*length.shape, max(1, length.max())), np.int32)
    for place in np.ndindex(*length.shape):
        tokens[place][: length[place]] = texts[place[0]][place[1]]
    return tokens, length


def _family(pairs: Sequence[Pair], names: Sequence[str]) -> np.ndarray:
    """[N] int32 index of each pair's family."""
    index = {name: i for i, name in enumerate(names)}
    for pair in pairs:
        if pair.family not in index:
            raise PairsError(f"pair {pair.id}: unknown family {pair.family!r}; it should be one of: {', '.join(names)}")
    return np.array([index[pair.family] for pair in pairs], np.int32)
