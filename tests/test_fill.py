"""Unknown steps: the policy fills them in, and only what is known is learnt."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import END, RESPONSE_LEN, WORDS

from agrl_jax.data.pipeline import PartTexts
from agrl_jax.policy.scoring import predicting_hidden, prefill
from agrl_jax.supervised import sft
from agrl_jax.supervised.fill import Blanks, filled_responses, tokens_scored
from agrl_jax.supervised.marginal import forks
from agrl_jax.types import UNKNOWN

# One token each: fit (yes 0, part 1, no 2), brand (ok 3, off 4), tier (good 5, fair 6, bad 7).
TEXTS = PartTexts(
    np.array([[[0], [1], [2]], [[3], [4], [0]], [[5], [6], [7]]], np.int32),
    np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], np.int32),
)


@pytest.fixture(scope="module")
def batch(small):
    """Pairs of which this is known: all; fair; bad, which implies fit no; fair and brand off; good, which implies both
    steps; fair and fit part."""
    steps = [(1, 1), (UNKNOWN, UNKNOWN), (2, UNKNOWN), (UNKNOWN, 1), (0, 0), (1, UNKNOWN)]
    return small.batch(steps, tiers=[1, 1, 2, 1, 0, 1])


def fill(small, batch):
    """The responses of a batch with unknown steps filled in by the policy."""

    @jax.jit
    def run(params, batch):
        prefix = prefill(small.policy, params, batch.prompt, batch.prompt_len)
        return filled_responses(small.policy, params, small.tables, TEXTS, prefix, batch)

    return [np.asarray(x) for x in run(small.params, batch)]


@pytest.fixture(scope="module")
def filled(small, batch):
    return fill(small, batch)


def test_the_texts_of_all_values_of_an_unknown_step_are_scored(small, batch):
    assert tokens_scored(small.tables, TEXTS, batch) == 3 + 2 + 2 + 3 + 2  # three fits or two brands, of one token each


def own_choice(small, batch, row):
    """The likeliest fit and then the likeliest brand that the table allows, by scores of whole sequences."""
    prompt = batch.prompt[row, : batch.prompt_len[row]].tolist()

    def likeliest(response, values):
        logits = small.logits(prompt + response)[-1]
        return max(values, key=lambda value: logits[value])

    agree = [
        (fit, 3 + brand, 5 + int(batch.tier[row]))
        for fit, brand in itertools.product(range(3), range(2))
        if small.book.tier_for((fit, brand)) == batch.tier[row]
        and batch.steps[row, 0] in (fit, UNKNOWN) and batch.steps[row, 1] in (brand, UNKNOWN)
    ]  # fmt: skip
    fit = likeliest([], {combination[0] for combination in agree})
    brand = likeliest([fit], {combination[1] for combination in agree if combination[0] == fit})
    return [fit, brand, 5 + int(batch.tier[row])]


def test_the_policy_fills_in_its_likeliest_values_that_agree_with_the_label(small, batch, filled):
    tokens, *_ = filled
    for row in range(len(tokens)):
        assert tokens[row].tolist() == own_choice(small, batch, row) + [END] * (RESPONSE_LEN - 3), WORDS
        fit, brand, tier = tokens[row, :3] - [0, 3, 5]
        assert small.book.tier_for((fit, brand)) == tier == batch.tier[row]


def test_what_is_known_counts_and_nothing_else(batch, filled):
    counted = [[True, True], [False, False], [True, False], [False, True], [True, True], [True, False]]
    expected = [[*steps, True, True] + [False] * (RESPONSE_LEN - 4) for steps in counted]  # the tier and the end
    np.testing.assert_array_equal(filled[1], expected)


def test_where_each_part_begins(filled):
    np.testing.assert_array_equal(filled[2], [[0, 1, 2]] * len(filled[2]))


def test_the_loss_falls_on_what_is_known(small, batch, filled):
    tokens, known, *_ = filled
    whole = batch.replace(gold=tokens, gold_len=np.full(len(tokens), 4, np.int32))

    @jax.jit
    def losses(params):
        loss, _ = sft.gold_loss(small.policy, params, batch, blanks=Blanks(small.tables, TEXTS))
        hidden = [small.policy.apply(params, jnp.asarray(row)[None, None])[0][0, 0] for row in sequences]
        logp = [jax.nn.log_softmax(small.policy.unembed(params, h)) for h in hidden]
        return loss, logp

    sequences = [
        np.concatenate([batch.prompt[row, :n], whole.gold[row, :4]]) for row, n in enumerate(batch.prompt_len)
    ]
    loss, logp = losses(small.params)
    parts = [
        -logp[row][n - 1 + t, tokens[row, t]]
        for row, n in enumerate(batch.prompt_len) for t in range(4) if known[row, t]
    ]  # fmt: skip
    np.testing.assert_allclose(loss, np.mean(parts), rtol=1e-5)


def test_the_label_of_a_pair_with_unknown_steps_has_the_sum_over_all_that_agree_with_it(small, batch, filled):
    """By hand: the sum of each combination's product. The tokens of the tier count too, those of the steps do not."""
    tokens, known, *_ = (jnp.asarray(x) for x in filled)
    unknown = np.any(batch.steps == UNKNOWN, axis=1)

    @jax.jit
    def losses(params):
        loss, metrics = sft.gold_loss(small.policy, params, batch, blanks=Blanks(small.tables, TEXTS, forks(TEXTS)))
        prefix = prefill(small.policy, params, batch.prompt, batch.prompt_len)
        logp = jax.nn.log_softmax(small.policy.unembed(params, predicting_hidden(
            small.policy, params, prefix, tokens[:, None])[:, 0]))  # fmt: skip
        return loss, metrics["policy/label_loss"], logp

    loss, of_labels, logp = losses(small.params)
    counted = known & (~unknown[:, None] | (jnp.arange(tokens.shape[1]) >= 2))
    stated = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    labels = []
    for row in np.flatnonzero(unknown):
        fit, brand = jax.nn.softmax(logp[row, 0, :3]), jax.nn.softmax(logp[row, 1, 3:5])
        agree = [
            fit[i] * brand[j]
            for i, j in itertools.product(range(3), range(2))
            if small.book.tier_for((i, j)) == batch.tier[row]
            and batch.steps[row, 0] in (i, UNKNOWN) and batch.steps[row, 1] in (j, UNKNOWN)
        ]  # fmt: skip
        labels.append(-np.log(sum(agree)))
    np.testing.assert_allclose(of_labels, np.mean(labels), rtol=1e-5)
    expected = (sum(labels) - np.sum(stated * counted)) / np.sum(counted)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_values_that_no_single_token_tells_apart_have_no_fork():
    words = np.array([[[1, 2, 3], [1, 2, 4], [1, 5, 0]], [[6, 0, 0], [7, 0, 0], [0, 0, 0]]], np.int32)
    assert forks(PartTexts(words, np.array([[3, 3, 2], [1, 1, 0]], np.int32))) is None  # 2 stands for two values
    found = forks(PartTexts(np.stack([words[0, ::2], words[1, :2]]), np.array([[3, 2], [1, 1]], np.int32)))
    np.testing.assert_array_equal(found.place, [1, 0])
    np.testing.assert_array_equal(found.token, [[2, 5], [6, 7]])


@pytest.mark.parametrize("summed", [False, True])
def test_losses_and_figures_of_pieces_add_up_to_those_of_the_batch(small, batch, close, summed):
    blanks = Blanks(small.tables, TEXTS, forks(TEXTS) if summed else None)

    @jax.jit
    def losses(params):
        pieces = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
        found = [sft.gold_loss(small.policy, params, piece, 0.5, 0, blanks, batch) for piece in pieces]
        return sft.gold_loss(small.policy, params, batch, 0.5, 0, blanks), jax.tree.map(jnp.add, *found)

    whole, added = losses(small.params)
    close(added, whole)
    assert ("policy/label_loss" in whole[1]) == summed


def test_no_gradient_goes_through_the_choice(small, batch, filled, close):
    tokens, known, *_ = filled
    gradient = jax.jit(jax.grad(lambda p: sft.gold_loss(small.policy, p, batch, blanks=Blanks(small.tables, TEXTS))[0]))
    weights = jnp.asarray(known)

    @jax.jit
    @jax.grad
    def fixed(params):
        prefix = prefill(small.policy, params, batch.prompt, batch.prompt_len)
        hidden, _ = small.policy.apply(params, jnp.asarray(tokens)[:, None, :-1], prefix=prefix)
        hidden = jnp.concatenate([prefix.last_hidden[:, None], hidden[:, 0]], axis=1)
        logp = jax.nn.log_softmax(small.policy.unembed(params, hidden))
        return -jnp.sum(jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0] * weights) / weights.sum()

    close(gradient(small.params), fixed(small.params))
