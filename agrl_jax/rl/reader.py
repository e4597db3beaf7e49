"""Reads responses on the device: what they state, and whether they are well formed.

The tables are a rule book compiled for one vocabulary. Reading with them equals parsing the text, which is the
concatenated bytes of the tokens, whatever its tokenisation. The same tables constrain sampling.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from agrl_jax.types import UNKNOWN, Array, Reading, RuleTables, is_end

DEAD = 1  # the recogniser's state that leads nowhere


def read(tables: RuleTables, tokens: Array, valid: Array) -> Reading:
    """Reads every response at once.

    The scan only follows the states of the automata, with two small gathers for each token. What is stated is then
    gathered for all positions together.

    Args:
      tables: the compiled rule book.
      tokens: [B, G, T] int32.
      valid: [B, G, T] bool; other tokens are skipped. Nothing is read after the end token.

    Returns:
      The reading, parts in the order of part indices (the tier last).
    """
    length = tokens.shape[-1]
    before, final = _follow(tables, tokens, valid)
    ends = valid & is_end(tokens, tables.end_token, tables.other_ends)
    heard = valid & (jnp.cumsum(ends, axis=-1) == 0)
    token_class = jnp.asarray(tables.token_class)[tokens]
    phrase = jnp.asarray(tables.emits)[before, token_class]  # [B, G, T, E]
    phrase = jnp.where(heard[..., None], phrase, UNKNOWN)

    num_parts = tables.num_steps + 1
    part = jnp.where(phrase == UNKNOWN, UNKNOWN, jnp.asarray(tables.phrase_part)[phrase])
    value = jnp.asarray(tables.phrase_value)[phrase]
    stated = part[..., None] == jnp.arange(num_parts)  # [B, G, T, E, P]
    count = stated.sum((-3, -2), dtype=jnp.int32)
    large = jnp.iinfo(jnp.int32).max
    lowest = jnp.where(stated, value[..., None], large).min((-3, -2))
    highest = jnp.where(stated, value[..., None], UNKNOWN).max((-3, -2))
    index = jnp.arange(length, dtype=jnp.int32)[:, None]
    position = jnp.where(stated.any(-2), index, length).min(-2)
    return Reading(
        value=jnp.where(lowest == highest, highest, UNKNOWN),
        count=count,
        position=position.astype(jnp.int32),
        well_formed=jnp.asarray(tables.grammar_distance)[final] == 0,
    )


def _follow(tables: RuleTables, tokens: Array, valid: Array) -> tuple[Array, Array]:
    """The reader's state before each token [B, G, T], and the recogniser's after the last [B, G]."""
    next_state, grammar_next = jnp.asarray(tables.next_state), jnp.asarray(tables.grammar_next)
    classes = jnp.asarray(tables.token_class)[tokens], jnp.asarray(tables.grammar_class)[tokens]

    def step(states: tuple[Array, Array], inputs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        state, grammar = states
        token_class, grammar_class, take = inputs
        after = jnp.where(take, next_state[state, token_class], state)
        grammar = jnp.where(take, grammar_next[grammar, grammar_class], grammar)
        return (after, grammar), state

    start = jnp.zeros_like(tokens[..., 0])
    along_time = [jnp.moveaxis(array, -1, 0) for array in (*classes, valid)]
    (_, final), before = jax.lax.scan(step, (start, start), tuple(along_time))
    return jnp.moveaxis(before, 0, -1), final


def allowed(tables: RuleTables, state: Array, remaining: Array | int) -> Array:
    """Which tokens may come next so that a response can still become whole in the tokens that are left.

    Args:
      tables: the compiled rule book.
      state: [...] int32 state of the recogniser; 0 at the start of a response, then as `advance` gives it.
      remaining: [] or [...] tokens that are left, this one and the end token included.

    Returns:
      [..., V] bool. No token is allowed once the response has ended, or where `remaining` is too short.
    """
    return _allowed_classes(tables, state, remaining)[..., jnp.asarray(tables.grammar_class)]


def _allowed_classes(tables: RuleTables, state: Array, remaining: Array | int) -> Array:
    """[..., C] bool: the classes of the tokens that are `allowed`."""
    following = jnp.asarray(tables.grammar_next)[state]
    in_time = jnp.asarray(tables.grammar_distance)[following] <= jnp.asarray(remaining)[..., None] - 1
    return (following != DEAD) & in_time


def choices(tables: RuleTables, state: Array, remaining: Array | int, token: Array | None = None) -> Array:
    """The tokens [..., V] bool among which a constrained policy chooses: those `allowed`, or all where none is.

    For a finished response, `token` [...] is the token at that place. If the grammar does not allow it, it was not
    sampled under the grammar (no token was allowed, or it was forced), and all tokens are choices.
    """
    classes = _allowed_classes(tables, state, remaining)
    if token is None:
        held = jnp.any(classes, axis=-1, keepdims=True)
    else:
        held = jnp.take_along_axis(classes, jnp.asarray(tables.grammar_class)[token][..., None], axis=-1)
    return (classes | ~held)[..., jnp.asarray(tables.grammar_class)]


def places(tables: RuleTables, tokens: Array) -> tuple[Array, Array, Array]:
    """The arguments of `choices` for each of the tokens [B, G, T] of responses: states, tokens left, the tokens."""
    length = tokens.shape[-1]

    def step(state: Array, token: Array) -> tuple[Array, Array]:
        return advance(tables, state, token), state

    _, states = jax.lax.scan(step, jnp.zeros_like(tokens[..., 0]), jnp.moveaxis(tokens, -1, 0))
    return jnp.moveaxis(states, 0, -1), jnp.broadcast_to(length - jnp.arange(length), tokens.shape), tokens


def advance(tables: RuleTables, state: Array, token: Array) -> Array:
    """The recogniser's state [...] after a token [...]; state 0 is the start of a response."""
    return jnp.asarray(tables.grammar_next)[state, jnp.asarray(tables.grammar_class)[token]]
