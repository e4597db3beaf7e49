"""Compiles phrases to token tables, by which `rl.reader` reads responses on the device.

Two automata over bytes, each then lifted to tokens by running every token's bytes from every state:

- the reader finds every phrase wherever it stands (Aho and Corasick, "Efficient string matching", 1975);
- the recogniser accepts whole well-formed responses and nothing else.

Tokens that do the same from every state share a class, which keeps the tables small.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from agrl_jax.rulebook import wording
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import DEAD_DISTANCE, UNKNOWN, RuleTables, Thought

START, DEAD = 0, 1  # states of the recogniser; the reader starts in state 0 too and has no dead state


class ByteAutomaton(NamedTuple):
    """A deterministic automaton over bytes."""

    next: np.ndarray  # [S, 256] int32
    emit: np.ndarray  # [S] int32 what is completed on entering the state (a phrase), or UNKNOWN


class TokenAutomaton(NamedTuple):
    """The same automaton over tokens."""

    token_class: np.ndarray  # [V] int32
    next: np.ndarray  # [S, C] int32
    emits: np.ndarray  # [S, C, E] int32 in order of completion, padded with UNKNOWN; E >= 1


def compile_tables(
    book: RuleBook, token_bytes: Sequence[bytes | None], end_token: int, marks: Collection[int] = (),
    thought: Thought | None = None, other_ends: Sequence[int] = (),
) -> RuleTables:
    """Compiles a rule book for one vocabulary.

    Args:
      book: the rule book.
      token_bytes: the bytes of each token; None for special tokens, which have no text and reset the reader.
      end_token: the token that ends a response; special whatever its bytes.
      marks: special tokens that may stand in free text, such as those around a thought.
      thought: of a policy that thinks before it answers; the tables keep it for the sampler.
      other_ends: more tokens that end a response.

    Returns:
      The tables, numpy int32.

    Raises:
      ValueError: an end token is outside the vocabulary, or no whole response can be spelt with its tokens.
    """
    ends = [end_token, *other_ends]
    for end in ends:
        if not 0 <= end < len(token_bytes):
            raise ValueError(f"end token {end} is outside the vocabulary of {len(token_bytes)} tokens")
    tokens = [None if i in ends else data for i, data in enumerate(token_bytes)]
    phrases = [phrase.text.encode() for phrase in book.phrases]
    reader = lift(find_phrases(phrases), tokens, special=START)
    grammar, restart, final = recognise(book)
    recogniser = _with_marks(lift(grammar, tokens, special=DEAD), restart, set(marks) - set(ends))
    recogniser, done = _with_end(recogniser, final, ends)
    distance = _distance(recogniser.next, done)
    if distance[START] == DEAD_DISTANCE:
        raise ValueError(f"no whole response of rule book {book.name!r} can be spelt with this vocabulary")
    return RuleTables(
        token_class=reader.token_class,
        next_state=reader.next,
        emits=reader.emits,
        phrase_part=np.array([phrase.part for phrase in book.phrases], np.int32),
        phrase_value=np.array([phrase.value for phrase in book.phrases], np.int32),
        grammar_class=recogniser.token_class,
        grammar_next=recogniser.next,
        grammar_distance=distance,
        tier_of=book.tier_table()[None],
        end_token=end_token,
        num_values=book.num_values,
        num_tiers=len(book.tiers),
        order=book.part_order,
        thought=thought,
        other_ends=tuple(other_ends),
    )


# Automata over bytes


def find_phrases(phrases: Sequence[bytes]) -> ByteAutomaton:
    """The Aho-Corasick automaton of phrases. No phrase stands inside another, so no two end together."""
    children: list[dict[int, int]] = [{}]
    emit = [UNKNOWN]
    for index, phrase in enumerate(phrases):
        state = 0
        for byte in phrase:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                emit.append(UNKNOWN)
            state = children[state][byte]
        emit[state] = index
    table = np.zeros((len(children), 256), np.int32)
    queue = [(0, 0)]  # states by depth, each with its fallback: the longest proper suffix of its text that is a state
    for state, fallback in queue:
        table[state] = table[fallback]
        for byte, child in children[state].items():
            queue.append((child, int(table[state, byte])))
            table[state, byte] = child
    return ByteAutomaton(table, np.array(emit, np.int32))


def recognise(book: RuleBook) -> tuple[ByteAutomaton, np.ndarray, int]:
    """The automaton of whole well-formed responses; for each state [S] the state after a token without text in free
    text, which interrupts every phrase; and the one accepting state."""
    if book.response.free_text == "between":
        table, restart, final = _recognise_amid_text(book)
    else:
        table, final = _recognise_exact(book)
        restart = np.full(len(table), DEAD, np.int32)
    return ByteAutomaton(table, np.full(len(table), UNKNOWN, np.int32)), restart, final


def _recognise_exact(book: RuleBook) -> tuple[np.ndarray, int]:
    """One small tree of texts for each part; all of its leaves are the root of the next."""
    rows = [np.full(256, DEAD, np.int32) for _ in range(2)]
    root = START
    for place, part in enumerate(book.part_order):
        leaf = len(rows)
        rows.append(np.full(256, DEAD, np.int32))
        for phrase in book.phrases:
            if phrase.part != part:
                continue
            data = wording.part_text(book, part, phrase.value, first=place == 0).encode()
            state = root
            for byte in data[:-1]:
                if rows[state][byte] == DEAD:
                    rows[state][byte] = len(rows)
                    rows.append(np.full(256, DEAD, np.int32))
                state = rows[state][byte]
            rows[state][data[-1]] = leaf
        root = leaf
    return np.stack(rows), root


def _recognise_amid_text(book: RuleBook) -> tuple[np.ndarray, np.ndarray, int]:
    """A phrase finder for each part still expected: a phrase of this part leads to the next part, any other to DEAD."""
    finder = find_phrases([phrase.text.encode() for phrase in book.phrases])
    part_of = np.array([phrase.part for phrase in book.phrases] + [UNKNOWN])[finder.emit]  # UNKNOWN is the last
    num_states, num_parts = len(finder.next), len(book.part_order)
    ids = np.arange(num_parts * num_states, dtype=np.int32).reshape(num_parts, num_states) + 1
    ids[0, 0] = START
    final = num_parts * num_states + 1
    table = np.full((final + 1, 257), DEAD, np.int32)  # the last column: tokens without text
    for place, part in enumerate(book.part_order):
        onward = ids[place + 1] if place + 1 < num_parts else np.full(num_states, final)
        entered = part_of[finder.next]  # [S, 256]
        table[ids[place], :256] = np.select(
            [entered == UNKNOWN, entered == part], [ids[place][finder.next], onward[finder.next]], DEAD
        )
        table[ids[place], 256] = ids[place, 0]
    table, final = _reachable(table, final)
    return table[:, :256], table[:, 256], final


def _reachable(table: np.ndarray, final: int) -> tuple[np.ndarray, int]:
    """Drops the states that no text leads to, except START and DEAD."""
    kept = {START: None, DEAD: None}
    queue = [START]
    for state in queue:
        fresh = [int(other) for other in np.unique(table[state]) if int(other) not in kept]
        kept.update(dict.fromkeys(fresh))
        queue += fresh
    states = np.array(list(kept))
    renamed = np.full(len(table), DEAD, np.int32)
    renamed[states] = np.arange(len(states))
    return renamed[table[states]], int(renamed[final])


# From bytes to tokens


def lift(automaton: ByteAutomaton, token_bytes: Sequence[bytes | None], special: int) -> TokenAutomaton:
    """Runs each token's bytes from each state; special tokens (None) lead to the state `special` and emit nothing.

    All tokens advance together, byte by byte. Tokens whose first bytes do the same from every state share a
    class from then on, so each class is extended by each next byte only once.
    """
    num_states = len(automaton.next)
    lengths = np.array([-1 if data is None else len(data) for data in token_bytes])
    token_class = np.where(lengths < 0, 1, 0)
    # Columns: for each class the state after, and the phrases completed on the way. Class 0: nothing read yet.
    after = np.stack([np.arange(num_states), np.full(num_states, special)]).astype(np.int32)  # [C, S]
    emits = np.full((2, num_states, 1), UNKNOWN, np.int32)  # [C, S, E]
    for depth in range(max(lengths.max(), 0)):
        active = np.flatnonzero(lengths > depth)
        byte = np.array([token_bytes[i][depth] for i in active])
        pairs, pair_of = np.unique(token_class[active] * 256 + byte, return_inverse=True)
        prefix, byte = np.divmod(pairs, 256)
        new_after = automaton.next[after[prefix], byte[:, None]]
        new_emits = _append(emits[prefix], automaton.emit[new_after])
        new_after, new_emits, merged = _merge(new_after, new_emits)
        token_class[active] = len(after) + merged[pair_of]
        after = np.concatenate([after, new_after])
        width = max(emits.shape[-1], new_emits.shape[-1])
        emits = np.concatenate([_widen(emits, width), _widen(new_emits, width)])
    used, token_class = np.unique(token_class, return_inverse=True)
    after, emits, merged = _merge(after[used], emits[used])
    return TokenAutomaton(
        merged[token_class].astype(np.int32),
        np.ascontiguousarray(after.T),
        np.ascontiguousarray(emits.transpose(1, 0, 2)),
    )


def _append(emits: np.ndarray, phrase: np.ndarray) -> np.ndarray:
    """Adds one phrase (or UNKNOWN: none) to each list; [C, S, E] and [C, S] to [C, S, E or E + 1]."""
    length = (emits != UNKNOWN).sum(-1, keepdims=True)
    emits = _widen(emits, emits.shape[-1] + 1)
    np.put_along_axis(emits, length, phrase[..., None], axis=-1)
    return emits if (emits[..., -1] != UNKNOWN).any() else emits[..., :-1]


def _widen(emits: np.ndarray, width: int) -> np.ndarray:
    missing = width - emits.shape[-1]
    return np.pad(emits, ((0, 0), (0, 0), (0, missing)), constant_values=UNKNOWN)


def _merge(after: np.ndarray, emits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unites equal columns; also returns the index of each column's united one."""
    columns = np.concatenate([after, emits.reshape(len(emits), -1)], axis=1)
    keys: dict[bytes, int] = {}
    merged = np.array([keys.setdefault(column.tobytes(), len(keys)) for column in columns])
    first = np.unique(merged, return_index=True)[1]
    return after[first], emits[first], merged


# The end of a response


def _with_marks(automaton: TokenAutomaton, restart: np.ndarray, marks: Collection[int]) -> TokenAutomaton:
    """Gives these tokens a class of their own, which leads from each state to its entry in `restart` [S]."""
    if not marks:
        return automaton
    token_class = automaton.token_class.copy()
    token_class[list(marks)] = automaton.next.shape[1]
    return automaton._replace(token_class=token_class, next=np.column_stack([automaton.next, restart]))


def _with_end(automaton: TokenAutomaton, final: int, ends: Sequence[int]) -> tuple[TokenAutomaton, int]:
    """Gives the end tokens their own class, which leads from `final` to a new state, `done`, and elsewhere to DEAD."""
    num_states, num_classes = automaton.next.shape
    done = num_states
    table = np.full((num_states + 1, num_classes + 1), DEAD, np.int32)
    table[:num_states, :num_classes] = automaton.next
    table[final, num_classes] = done
    token_class = automaton.token_class.copy()
    token_class[list(ends)] = num_classes
    return automaton._replace(token_class=token_class, next=table), done


def _distance(table: np.ndarray, done: int) -> np.ndarray:
    """[S] int32 fewest tokens from each state to `done`."""
    distance = np.full(len(table), DEAD_DISTANCE, np.int32)
    distance[done] = 0
    while True:
        closer = np.minimum(distance, distance[table].min(axis=1) + 1)
        if (closer == distance).all():
            return distance
        distance = closer
