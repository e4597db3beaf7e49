"""The arrays that travel between the parts, each field with its shape.

Shape letters, used in names (`logp_bgt`), einsum strings and docstrings throughout:

    B  examples (query-product pairs) in a batch     G  sampled responses of one example
    I  tokens of the instructions that all prompts   S  prompt length after these, padded
       begin with                                    T  response length, padded
    V  vocabulary                                    D  model width
    H  query heads                                   K  key/value heads
    L  layers                                        R  reasoning steps of the rule book
    P  parts of a response: the R steps and the tier, so P = R + 1
    N  training rows

Part indices: part r < R is step r of the rule book, part R is the tier, whatever the order of the response.
Arrays in the order of the response (the part stated first comes first) say so.

No mask is ever derived from pad ids: lengths and masks are fields of their own.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from flax import struct

Array = jax.Array
Params = Any  # a pytree of arrays

UNKNOWN = -1  # a step value, tier or phrase that is not known or not stated


@struct.dataclass
class Batch:
    """Labelled pairs, encoded. All int32. Host (numpy) or device arrays."""

    prompt: Array  # [B, S] tokens after the instructions that all prompts share, right-padded
    prompt_len: Array  # [B] tokens of each
    gold: Array  # [B, T] canonical response up to its first unknown part; with the end token if whole
    gold_len: Array  # [B] tokens of `gold`
    part_end: Array  # [B, P] in response order: tokens of `gold` up to the end of each part
    known_parts: Array  # [B] how many leading parts of the response are known (P: all of them)
    steps: Array  # [B, R] true value of each step, or UNKNOWN
    tier: Array  # [B] index of the true tier
    row: Array  # [B] index of the pair in its split: identifies the example for random numbers and guidance
    family: Array  # [B] index of the query family
    book: Array | None = None  # [B] index of the rule book that gives the tier; None: the tables' first one for all
    # Reasons, of W tokens at most, for pairs with unknown steps; parts in response order. See `supervised.fill`.
    reason: Array | None = None  # [B, P, W] tokens that stand before the statement of each part, right-padded
    reason_len: Array | None = None  # [B, P] tokens of each


class Thought(NamedTuple):
    """How a thought at the beginning of a response is recognised, and when it is closed by force."""

    begin: int | None  # the token that opens it; None where the prompt has opened it
    end: tuple[int, ...]  # tokens that are written to close it; the first one is the mark of its end
    limit: int  # tokens of a response after which a thought that is still open is closed


@struct.dataclass
class RuleTables:
    """A rule book compiled for one vocabulary. `rl` knows nothing else of rule book and vocabulary.

    Here S is the number of states, C of token classes, E of phrases completed within one token.
    """

    # The reader: a multi-pattern automaton lifted from bytes to tokens.
    token_class: Array  # [V] int32
    next_state: Array  # [S, C] int32; state 0 is the start
    emits: Array  # [S, C, E] int32 phrase ids in order of completion, padded with UNKNOWN
    phrase_part: Array  # [phrases] int32 part that the phrase states (R: the tier)
    phrase_value: Array  # [phrases] int32 value that it states
    # The recogniser of whole well-formed responses.
    grammar_class: Array  # [V] int32
    grammar_next: Array  # [S', C'] int32; state 0 is the start, state 1 is dead
    grammar_distance: Array  # [S'] int32 fewest tokens (end token included) to a whole response; DEAD_DISTANCE if none
    # The decision tables: that of the rule book, and of the variants of it that training uses.
    tier_of: Array  # [books, product of num_values] int32 tier for each combination, mixed radix, first step slowest
    end_token: int = struct.field(pytree_node=False)  # ends the responses that we write
    num_values: tuple[int, ...] = struct.field(pytree_node=False)  # values of each step
    num_tiers: int = struct.field(pytree_node=False)
    order: tuple[int, ...] = struct.field(pytree_node=False)  # parts in the order a response states them
    thought: Thought | None = struct.field(pytree_node=False, default=None)  # of a policy that thinks before it answers
    other_ends: tuple[int, ...] = struct.field(pytree_node=False, default=())  # other tokens that end a response

    @property
    def num_steps(self) -> int:
        return len(self.num_values)

    @property
    def shortest(self) -> int:
        """The fewest tokens of a whole response after the longest thought, end token included."""
        thought = 0 if self.thought is None else self.thought.limit + len(self.thought.end)
        return thought + int(self.grammar_distance[0])


def is_end(tokens: Array, end_token: int, other_ends: tuple[int, ...] = ()) -> Array:
    """Which tokens end a response, bool in the shape of `tokens`."""
    return functools.reduce(operator.or_, (tokens == end for end in (end_token, *other_ends)))


DEAD_DISTANCE = 1 << 20  # `grammar_distance` of a state from which no response can be finished


@struct.dataclass
class Reading:
    """What the responses state, part by part (the tier is part R)."""

    value: Array  # [B, G, P] int32 value stated, UNKNOWN if none or if repeats conflict
    count: Array  # [B, G, P] int32 how often a value of the part was stated
    position: Array  # [B, G, P] int32 index of the token that first completed it; T if never
    well_formed: Array  # [B, G] bool the whole response is in the grammar, end token included


@struct.dataclass
class Instructions:
    """Keys and values of the tokens that all prompts begin with, computed once and shared by all examples."""

    k: Array  # [L, K, I, D/H] compute dtype; or L arrays, where the layers' weights are not stacked
    v: Array  # [L, K, I, D/H]

    @property
    def number(self) -> int:
        """I, the number of tokens."""
        return jax.tree.leaves(self.k)[0].shape[-2]


@struct.dataclass
class Instructed:
    """The parameters of an `instructed` policy: those of the policy, and the instructions' keys and values."""

    params: Params
    instructions: Instructions


@struct.dataclass
class Prefix:
    """Keys and values of the prompts, computed once per example and shared by its group."""

    k: Array  # [L, B, K, S, D/H] compute dtype; or L arrays, where the layers' weights are not stacked
    v: Array  # [L, B, K, S, D/H]
    length: Array  # [B] int32 valid entries
    last_hidden: Array  # [B, D] final hidden state at the last prompt token


@struct.dataclass
class Cache:
    """Keys and values of the responses themselves."""

    k: Array  # [L, B, G, K, T, D/H]; or L arrays, where the layers' weights are not stacked
    v: Array  # [L, B, G, K, T, D/H]


@struct.dataclass
class Rollout:
    """G responses to each of B prompts."""

    tokens: Array  # [B, G, T] int32; after the end: the end token, masked by `valid`
    logp: Array  # [B, G, T] float32 log-probability of each token under the distribution sampled from; 0 where invalid
    sampled: Array  # [B, G, T] bool the policy chose this token (valid, neither forced nor closing a thought)
    valid: Array  # [B, G, T] bool the token is part of the response, end token included
    finished: Array  # [B, G] bool the end token was reached
    closing: Array | None = None  # [B, G, T] bool the token closes a thought by force; None where none can

    @property
    def forced(self) -> Array:
        """[B, G, T] bool: tokens of a true prefix, given and not chosen."""
        given = self.valid & ~self.sampled
        return given if self.closing is None else given & ~self.closing


Axes = tuple[str | None, ...]  # a logical name, or None, for each axis of an array


class Placement(NamedTuple):
    """How arrays are spread over the devices, by their logical axes. By default the compiler decides."""

    place: Callable[[Array, Axes], Array] = lambda x, axes: x  # constrains an array to its place
    # (function, axes of its arguments, axes of its result) -> the function of whole arrays that runs it on each
    # device's part of them. An axis of the result is split where an argument's axis of that name is.
    split: Callable[[Callable[..., Array], tuple[Axes, ...], Axes], Callable[..., Array]] = (
        lambda function, inputs, output: function
    )


ANYWHERE = Placement()


class ApplyFn(Protocol):
    """The policy as a pure function; see `policy.transformer.apply`."""

    def __call__(
        self, params: Params, tokens: Array, *, offset: Array | int = 0, prefix: Prefix | None = None,
        cache: Cache | None = None, instructions: Instructions | None = None,
    ) -> tuple[Array, Cache]: ...


class Policy(NamedTuple):
    """The pure functions that sampling and training need of a model."""

    apply: ApplyFn  # (params, tokens [B, G, n], offset, prefix, cache, instructions) -> hidden [B, G, n, D], cache
    unembed: Any  # (params, hidden [..., D]) -> logits [..., V] float32
    init_cache: Any  # (params, batch, group, length) -> Cache of zeros
    # (params, prompt [B, S], prompt_len [B], tokens [B, G, n], instructions) -> hidden of both; for the loss
    apply_groups: Any


@struct.dataclass
class OwnAnswers:
    """For each training row, the policy's latest answer that is worth showing to it again."""

    tokens: Array  # [N, T] int32
    part_end: Array  # [N, P] int32, as in `Batch`; all 0 where there is no such answer yet


@struct.dataclass
class GuidanceState:
    """What guided replay remembers between steps."""

    level: Array  # [families] float32 parts revealed, before the offset of the row
    offset: Array  # [N] int8 correction of the level for each training row
    memory: Array  # [N] int8 guided pass rate [%] if the row was guided, not to its tier, when last met; or UNKNOWN
    own: OwnAnswers | None = None  # where guidance reveals the policy's own answers


@struct.dataclass
class DifficultyState:
    """What sampling by difficulty remembers between steps."""

    rate: Array  # [N] float32 pass rate of the row's unguided answers, later groups counting more; UNKNOWN before any
    met: Array  # [N] int32 the step in which the row was last rolled; 0 before any


@struct.dataclass
class TrainState:
    """All that a run carries from step to step, and all that a checkpoint holds."""

    params: Params
    opt_state: Any
    step: Array  # [] int32 steps made so far, those with skipped updates included
    key: Array  # [2] uint32 the root of all random numbers; never changes
    guidance: GuidanceState | None
    skipped: Array  # [] int32 consecutive updates skipped for non-finite gradients
    difficulty: DifficultyState | None = None  # where examples are chosen by their difficulty
