"""The sampler: its draws, forced tokens, the grammar; and no answer depends on other rows of the batch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrl_jax.policy.layers import PolicyConfig
from agrl_jax.policy.scoring import predicting_hidden, prefill, token_logprobs
from agrl_jax.policy.transformer import build
from agrl_jax.rl import reader
from agrl_jax.rl.rollout import PURPOSE_REPLAY, PURPOSE_ROLLOUT, choose, rollout, row_keys
from agrl_jax.rulebook import wording
from agrl_jax.rulebook.automaton import compile_tables
from agrl_jax.rulebook.book import load
from agrl_jax.types import Thought

G, T = 5, 10
KEY = jax.random.key_data(jax.random.key(7))
ROWS = [3, 1, 4, 5]


@pytest.fixture(scope="module")
def sample(small):
    """`sample(batch, forced, forced_len, ...)`: the jitted sampler of the small policy."""

    @partial(jax.jit, static_argnames=("temperature", "prefill_forced", "constrained", "thought", "other_ends"))
    def compiled(
        batch, forced, forced_len, purpose, step, key, temperature, prefill_forced, constrained, thought, other_ends
    ):
        return rollout(
            small.policy, small.params, prefill(small.policy, small.params, batch.prompt, batch.prompt_len),
            row_keys(key, purpose, step, batch.row, G), length=T, temperature=temperature,
            end_token=small.tables.end_token, forced=forced, forced_len=forced_len,
            grammar=small.tables if constrained else None, prefill_forced=prefill_forced, thought=thought,
            other_ends=other_ends,
        )

    def sample(
        batch, forced=None, forced_len=None, *, purpose=PURPOSE_ROLLOUT, step=0, key=KEY,
        temperature=0.8, prefill_forced=True, constrained=False, thought=None, other_ends=(),
    ):
        how = temperature, prefill_forced, constrained, thought, other_ends
        return compiled(batch, forced, forced_len, purpose, step, key, *how)

    return sample


@pytest.fixture(scope="module")
def batch(small):
    return small.batch([(0, 0)] * 4, rows=ROWS)


@pytest.fixture(scope="module")
def teacher(small, batch):
    """`teacher(tokens, temperature)`: the log-probabilities of tokens as in training, and the likeliest tokens."""

    @partial(jax.jit, static_argnames="constrained")
    def compiled(tokens, temperature, constrained):
        prefix = prefill(small.policy, small.params, batch.prompt, batch.prompt_len)
        hidden = predicting_hidden(small.policy, small.params, prefix, tokens)
        unembed = partial(small.policy.unembed, small.params)
        grammar = (partial(reader.choices, small.tables), reader.places(small.tables, tokens)) if constrained else ()
        logp, _ = token_logprobs(unembed, hidden, tokens, temperature, 7, *grammar)
        return logp, jnp.argmax(unembed(hidden), axis=-1)

    return lambda tokens, temperature=1.0, constrained=False: compiled(tokens, temperature, constrained)


@pytest.fixture(scope="module")
def prefixes():
    """Forced tokens [4, T] without an end token, and two sets of lengths: from 0, and from 2."""
    rng = np.random.default_rng(0)
    forced = rng.integers(0, 10, (4, T)).astype(np.int32)
    lengths = np.array([0, 1, T, 4], np.int32)
    return forced, (lengths, np.maximum(lengths, 2))


# ------------------------------------------------------------------------------------------ the draws


def test_an_answer_depends_on_its_own_example_alone(small, sample, batch):
    whole = sample(batch)
    for rows in ([9, 5, 8, 3], [4, 3]):  # other neighbours and places; another batch size
        other = sample(small.batch([(0, 0)] * len(rows), rows=rows))
        for place, row in enumerate(rows):
            if row in ROWS:
                was = ROWS.index(row)
                np.testing.assert_array_equal(other.tokens[place], whole.tokens[was])
                np.testing.assert_array_equal(other.valid[place], whole.valid[was])
                np.testing.assert_allclose(other.logp[place], whole.logp[was], atol=1e-5)


def test_every_sample_row_purpose_step_and_seed_has_draws_of_its_own(sample, batch):
    same_prompts = batch.replace(prompt=np.tile(batch.prompt[:1], (4, 1)), prompt_len=np.tile(batch.prompt_len[:1], 4))
    plain = sample(same_prompts)
    answers = np.asarray(plain.tokens).reshape(-1, T)
    assert len(np.unique(answers, axis=0)) > 15  # of 20: rows and samples differ, but short answers may agree
    np.testing.assert_array_equal(sample(same_prompts).tokens, plain.tokens)
    others = {"purpose": PURPOSE_REPLAY}, {"step": 1}, {"key": jax.random.key_data(jax.random.key(8))}
    for changed in others:
        again = sample(same_prompts, **changed)
        assert np.mean(np.all(again.tokens == plain.tokens, axis=-1)) < 0.3


def test_row_keys_are_told_apart_by_each_of_their_ingredients():
    rows = np.array([5, 6])
    base = jax.random.key_data(row_keys(KEY, 0, 1, rows, 3))
    other = jax.random.key_data(jax.random.key(8))
    variants = [row_keys(KEY, 1, 0, rows, 3), row_keys(KEY, 1, 1, rows, 3), row_keys(other, 0, 1, rows, 3)]
    keys = np.concatenate([np.reshape(jax.random.key_data(k), (-1, 2)) for k in variants] + [base.reshape(-1, 2)])
    assert len(np.unique(keys, axis=0)) == len(keys) == 4 * 2 * 3
    np.testing.assert_array_equal(jax.random.key_data(row_keys(KEY, 0, 1, rows[1:], 2))[0], base[1, :2])


def test_answers_end_at_any_of_several_end_tokens(small, sample, batch):
    """Up to the first of them, the sampler draws the same as without them."""
    free = sample(batch)
    tokens, valid = np.asarray(free.tokens), np.asarray(free.valid)
    other = int(tokens[0, 0, 2])
    cut = sample(batch, other_ends=(other,))
    before = (np.cumsum(tokens == other, axis=-1) - (tokens == other)) == 0  # up to the first, included
    np.testing.assert_array_equal(cut.valid, valid & before)
    np.testing.assert_array_equal(cut.tokens, np.where(valid & before, tokens, small.tables.end_token))
    assert (valid & ~before).any()


def test_answers_end_with_the_end_token_and_nothing_after_it_is_valid(small, sample, batch):
    rolled = jax.tree.map(np.asarray, sample(batch))
    end = small.tables.end_token
    assert rolled.finished.any() and not rolled.finished.all()  # both kinds are tested
    for tokens, logp, sampled, valid, finished in zip(
        *(x.reshape(-1, *x.shape[2:]) for x in jax.tree.leaves(rolled)), strict=True
    ):
        ends = np.flatnonzero(tokens == end)
        length = ends[0] + 1 if len(ends) else T
        assert finished == (len(ends) > 0)
        np.testing.assert_array_equal(valid, np.arange(T) < length)
        np.testing.assert_array_equal(sampled, valid)
        assert np.all(tokens[length:] == end) and np.all(logp[length:] == 0) and np.all(logp[:length] < 0)


def test_greedy_decoding_with_the_cache_equals_teacher_forced_argmax(sample, batch, teacher):
    rolled = sample(batch, temperature=0.0)
    logp, likeliest = teacher(rolled.tokens)
    valid = np.asarray(rolled.valid)
    np.testing.assert_array_equal(np.asarray(rolled.tokens)[valid], np.asarray(likeliest)[valid])
    np.testing.assert_allclose(rolled.logp, np.where(valid, logp, 0), atol=1e-5)  # at temperature 1


def test_sampler_and_trainer_agree_on_log_probabilities(sample, batch, teacher):
    rolled = sample(batch)
    logp, _ = teacher(rolled.tokens, temperature=0.8)
    np.testing.assert_allclose(rolled.logp, np.where(rolled.valid, logp, 0), atol=1e-5)
    other, _ = teacher(rolled.tokens)
    assert np.abs(rolled.logp - np.where(rolled.valid, other, 0)).max() > 0.01  # the temperature matters


# ------------------------------------------------------------------------------------- forced prefixes


@pytest.mark.parametrize("shortest", [0, 2])
def test_prefilled_prefixes_equal_those_fed_token_by_token(sample, batch, prefixes, shortest):
    forced, lengths = prefixes[0], prefixes[1][shortest // 2]
    assert lengths.min() == shortest
    fast = sample(batch, forced, lengths)
    slow = sample(batch, forced, lengths, prefill_forced=False)
    np.testing.assert_array_equal(fast.tokens, slow.tokens)
    np.testing.assert_allclose(fast.logp, slow.logp, atol=1e-5)
    for name in ("sampled", "valid", "finished"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name))


def test_forced_tokens_come_out_exactly_and_count_as_given(sample, batch, prefixes, teacher):
    forced, lengths = prefixes[0], prefixes[1][0]
    rolled = jax.tree.map(np.asarray, sample(batch, forced, lengths))
    given = np.broadcast_to(np.arange(T) < lengths[:, None, None], (4, G, T))
    np.testing.assert_array_equal(rolled.tokens[given], np.broadcast_to(forced[:, None], given.shape)[given])
    np.testing.assert_array_equal(rolled.forced, given)
    np.testing.assert_array_equal(rolled.sampled, rolled.valid & ~given)
    logp, _ = teacher(rolled.tokens, temperature=0.8)
    np.testing.assert_allclose(rolled.logp, np.where(rolled.sampled, logp, 0), atol=1e-5)


def test_a_forced_length_of_zero_is_plain_sampling(sample, batch, prefixes):
    plain = sample(batch)
    for prefill_forced in (True, False):
        none = sample(batch, prefixes[0], np.zeros(4, np.int32), prefill_forced=prefill_forced)
        np.testing.assert_allclose(none.logp, plain.logp, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, none.replace(logp=0), plain.replace(logp=0))


@pytest.mark.parametrize("shortest", [0, 4])
def test_the_policy_runs_once_for_each_token_but_the_last(small, batch, prefixes, shortest):
    """Counts the calls of the loop: rows go on from the end of their forced tokens, and nothing runs after the last."""
    calls = []

    def apply(params, tokens, **more):
        if more.get("cache") is not None:
            jax.debug.callback(lambda: calls.append(1))
        return small.policy.apply(params, tokens, **more)

    prefix = jax.jit(prefill, static_argnums=0)(small.policy, small.params, batch.prompt, batch.prompt_len)
    keys = row_keys(KEY, PURPOSE_ROLLOUT, 0, batch.row, G)
    lengths = np.maximum(prefixes[1][0], shortest)
    run = jax.jit(partial(rollout, small.policy._replace(apply=apply), length=T, temperature=1.0, end_token=-1))
    rolled = run(small.params, prefix, keys, forced=prefixes[0], forced_len=lengths)
    jax.effects_barrier()
    assert np.all(rolled.valid) and len(calls) == T - shortest - 1


# -------------------------------------------------------------------------------------------- grammar


def test_an_untrained_policy_under_the_grammar_is_always_well_formed(scanned):
    book = load("four_tier")
    vocabulary = [bytes([i]) for i in range(256)] + [None]
    tables = compile_tables(book, vocabulary, end_token=256)
    shortest = int(tables.grammar_distance[0])
    config = PolicyConfig(vocab_size=257, width=16, layers=3, heads=2, kv_heads=1, head_dim=8, mlp=16)
    policy, init, _ = build(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes)

    @jax.jit
    def answers(params):
        prefix = prefill(policy, params, jnp.zeros((2, 3), jnp.int32), jnp.array([3, 1]))
        keys = row_keys(KEY, 0, 0, jnp.arange(2), 16)
        rolled = rollout(
            policy, params, prefix, keys, length=shortest + 14, temperature=1.5, end_token=256, grammar=tables
        )
        return rolled, reader.read(tables, rolled.tokens, rolled.valid)

    rolled, reading = answers(params)
    assert rolled.finished.all() and reading.well_formed.all()
    texts = {bytes(t[v][:-1].tolist()) for t, v in zip(
        np.asarray(rolled.tokens).reshape(32, -1), np.asarray(rolled.valid).reshape(32, -1), strict=True
    )}
    assert len(texts) > 16 and all(wording.well_formed(book, text) for text in texts)
    assert max(map(len, texts)) > min(map(len, texts))


def test_grammar_and_forced_prefixes_go_together(small, sample, batch):
    """The first part or two are given, and the rest makes a whole response."""
    forced = np.pad(batch.gold, ((0, 0), (0, T - batch.gold.shape[1])))
    lengths = np.array([1, 2, 2, 1], np.int32)
    rolled = sample(batch, forced, lengths, constrained=True)
    reading = jax.jit(reader.read)(small.tables, rolled.tokens, rolled.valid)
    assert np.all(reading.well_formed) and np.all(reading.value[..., 0] == 0)
    # After the tier, the end token is the only choice, so its log-probability is 0, as if it were given.
    np.testing.assert_allclose(np.asarray(rolled.logp)[..., 3], 0, atol=1e-6)
    assert np.all(np.asarray(rolled.logp)[..., 2] < -0.01)


def test_sampler_and_trainer_agree_under_the_grammar(small, sample, batch, teacher):
    """Prefixes: none, the first part of the gold answer, all its parts, and tokens that begin no answer."""
    forced = np.pad(batch.gold, ((0, 0), (0, T - batch.gold.shape[1])))
    forced[3, :4] = [0, 8, 5, 9]
    lengths = np.array([0, 1, 3, 4], np.int32)
    rolled = jax.tree.map(np.asarray, sample(batch, forced, lengths, constrained=True))
    logp, _ = teacher(rolled.tokens, 0.8, constrained=True)
    np.testing.assert_allclose(rolled.logp, np.where(rolled.sampled, logp, 0), atol=1e-5)
    assert np.all(rolled.finished[:3]) and np.all(rolled.valid[:3] == (np.arange(T) < 4))
    assert np.all(logp[:3, :, 3] == 0)  # the end is the only choice
    free, _ = teacher(rolled.tokens, 0.8)
    np.testing.assert_allclose(logp[3, :, 1:], free[3, :, 1:], atol=1e-5)  # no token makes it whole: all are choices
    assert np.all((free < logp - 0.01)[:3, :, :3]) and np.all((free < logp - 0.01)[3, :, 0])


# --------------------------------------------------------------------------------------------- choose


@pytest.fixture(scope="module")
def draw():
    return jax.jit(choose, static_argnums=2)


def test_choose_by_hand(draw):
    logits = jnp.log(jnp.array([1.0, 3.0, 0.0, 4.0]))  # of 8: 0.125, 0.375, 0, 0.5
    tokens, logp = draw(jnp.tile(logits, (6, 1)), jnp.array([0.0, 0.12, 0.13, 0.49, 0.51, 0.9999999]), 1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3]
    np.testing.assert_allclose(np.exp(logp), [0.125, 0.125, 0.375, 0.375, 0.5, 0.5], rtol=1e-6)
    token, logp = draw(logits, jnp.float32(0.2), 0.5)  # squares: 1, 9, 0, 16 of 26
    assert token == 1 and np.isclose(np.exp(logp), 9 / 26)
    token, logp = draw(logits, jnp.float32(0.0), 0.0)  # the likeliest; its log-probability at temperature 1
    assert token == 3 and np.isclose(np.exp(logp), 0.5)


def test_choose_draws_each_token_as_often_as_its_probability_says(draw):
    """Tokens are chosen by blocks of 128. These tokens are at the ends of blocks and inside."""
    number, probability = 10_000, np.array([0.02, 0.0, 0.3, 0.08, 0.0, 0.25, 0.35, 0.0])
    at = np.array([0, 60, 127, 128, 129, 200, 256, 299])
    logits = np.full(300, -np.inf)
    with np.errstate(divide="ignore"):  # the log of 0 is intended
        logits[at] = np.log(probability)
    uniform = jax.random.uniform(jax.random.key(0), (number,))
    tokens, _ = draw(np.broadcast_to(logits, (number, 300)), uniform, 1.0)
    counts = np.bincount(tokens, minlength=300)[at]
    assert counts.sum() == number and counts[probability == 0].sum() == 0
    likely = probability > 0
    expected = number * probability[likely]
    chi_square = np.sum((counts[likely] - expected) ** 2 / expected)
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand


def test_choose_never_draws_an_impossible_token_where_rounding_would(draw):
    """By rounding, a parallel sum of 2,000 terms rises at terms of zero. The draws aim at exactly those places."""
    rng = np.random.default_rng(0)
    logits = np.where(rng.random(2000) < 0.5, -1e30, 3 * rng.normal(size=2000)).astype(np.float32)
    logits[-5:] = -1e30
    cumulative = np.asarray(jnp.cumsum(jax.nn.softmax(logits)))
    aimed = cumulative / cumulative[-1]
    uniform = np.concatenate([aimed, np.nextafter(aimed, np.float32(0)), np.linspace(0, 1, 500, dtype=np.float32)])
    uniform = uniform[uniform < 1]
    tokens, logp = draw(jnp.broadcast_to(logits, (len(uniform), 2000)), uniform, 1.0)
    assert np.all(logits[tokens] > -1e30) and np.all(logp > -100)


# ------------------------------------------------------------------------------------------ thoughts


@pytest.mark.parametrize("begin", [None, 7])
def test_a_thought_that_is_too_long_is_closed_by_force(small, sample, batch, teacher, begin):
    """It ends with token 8, or by force with 8 and 9 after four tokens. The policy samples all other tokens."""
    thought, end = Thought(begin, (8, 9), 4), small.tables.end_token
    forced = np.zeros((4, T), np.int32)
    forced[0, :2], forced[1, :2] = (7, 8), (7, 1)
    rolled = jax.tree.map(np.asarray, sample(batch, forced, np.array([2, 2, 0, 0]), thought=thought))
    expected = np.where(rolled.sampled, np.asarray(teacher(rolled.tokens, 0.8)[0]), 0)
    np.testing.assert_allclose(rolled.logp, expected, atol=1e-5)
    closed = 0
    for b in range(4):
        for g in range(G):
            tokens, closing = rolled.tokens[b, g].tolist(), rolled.closing[b, g]
            first = tokens[:4]
            thinks = begin is None or begin in first
            thinking = first if begin is None or not thinks else first[first.index(begin) + 1 :]
            late = thinks and 8 not in thinking and end not in first
            assert np.flatnonzero(closing).tolist() == ([4, 5] if late else [])
            assert not late or tokens[4:6] == [8, 9]
            closed += late
    assert not rolled.closing[0].any() and closed > 3
    np.testing.assert_array_equal(rolled.forced.sum(-1), [[2] * G, [2] * G, [0] * G, [0] * G])
    np.testing.assert_array_equal(rolled.sampled | rolled.forced | rolled.closing, rolled.valid)
    slow = sample(batch, forced, np.array([2, 2, 0, 0]), thought=thought, prefill_forced=False)
    np.testing.assert_array_equal(slow.tokens, rolled.tokens)
    np.testing.assert_array_equal(slow.closing, rolled.closing)
    assert sample(batch).closing is None
