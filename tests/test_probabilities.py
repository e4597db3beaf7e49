"""Probabilities through the decision table: by hand, by all combinations, and by plain scoring of texts."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import END, RESPONSE_LEN, WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scorecard import judgements

from agrl_jax.evaluation import probabilities
from agrl_jax.evaluation.probabilities import (
    CalibrationError,
    Statements,
    likeliest_parts,
    stated_logprobs,
    tier_probabilities,
)
from agrl_jax.policy.scoring import prefill, score_parts
from agrl_jax.rl import reader
from agrl_jax.rl.rollout import rollout, row_keys
from agrl_jax.rulebook.book import load

FOUR_TIER = load("four_tier")
# One token each: fit (yes 0, part 1, no 2), brand (ok 3, off 4), tier (good 5, fair 6, bad 7), words x 8 and y 9.
TOKEN_SIZE = np.array([len(word) for word in WORDS] + [0, 0])
TEXTS = Statements(
    tokens=np.array([[[0], [1], [2]], [[3], [4], [0]], [[5], [6], [7]]], np.int32),
    length=np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], np.int32),
    size=np.array([[5, 6, 4], [5, 6, 0], [7, 7, 6]], np.int32),
    token_size=TOKEN_SIZE,
    order=(0, 1, 2),
    scored=(0, 1),
)


def log(probs):
    with np.errstate(divide="ignore"):
        return np.log(probs)


# --------------------------------------------------------------------------------------- through the table


def test_a_table_by_hand(small):
    """P(yes, part, no) = .5, .3, .2 and P(ok, off) = .6, .4. Bad is no, good is yes and ok (.3), fair is the rest."""
    parts = log([[[0.5, 0.3, 0.2], [0.6, 0.4, 0]]])
    np.testing.assert_allclose(tier_probabilities(parts, small.book), [[0.3, 0.5, 0.2]])
    # At temperature 1/2 the squares count: .25, .09, .04 of .38, and .36, .16 of .52.
    good, bad = 0.25 / 0.38 * 0.36 / 0.52, 0.04 / 0.38
    np.testing.assert_allclose(tier_probabilities(parts, small.book, 0.5), [[good, 1 - good - bad, bad]])


def test_where_the_tier_comes_first_its_probabilities_are_its_own(small):
    book = dataclasses.replace(small.book, order="respond_then_think")
    np.testing.assert_allclose(tier_probabilities(log([[[0.2, 0.7, 0.1]]]), book), [[0.2, 0.7, 0.1]])


def test_a_malformed_answer_has_equal_probabilities(small):
    parts = log([[[0.5, 0.3, 0.2], [0.6, 0.4, 0]]] * 2)
    probs = tier_probabilities(parts, small.book, formed=np.array([True, False]))
    np.testing.assert_allclose(probs, [[0.3, 0.5, 0.2], [1 / 3, 1 / 3, 1 / 3]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(0.1, 10), st.floats(0.1, 8))
def test_the_sum_over_all_combinations(seed, pairs, spread, temperature):
    rng = np.random.default_rng(seed)
    counts = FOUR_TIER.num_values
    parts = np.full((pairs, len(counts), max(counts)), -np.inf)
    for step, count in enumerate(counts):
        parts[:, step, :count] = spread * rng.normal(size=(pairs, count))
    found = tier_probabilities(parts, FOUR_TIER, temperature)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    weights = np.exp(parts / temperature)
    weights /= weights.sum(axis=2, keepdims=True)
    expected = np.zeros((pairs, 4))
    for values in itertools.product(*map(range, counts)):
        expected[:, FOUR_TIER.tier_for(values)] += np.prod([weights[:, i, v] for i, v in enumerate(values)], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_large_batches_are_worked_through_in_pieces(monkeypatch):
    parts = np.random.default_rng(0).normal(size=(7, 4, 5))
    parts[:, 0, 4:] = parts[:, 1, 3:] = parts[:, 3, 4:] = -np.inf
    whole = tier_probabilities(parts, FOUR_TIER)
    monkeypatch.setattr(probabilities, "_CELLS", 500)  # two pairs of 240 combinations
    np.testing.assert_allclose(tier_probabilities(parts, FOUR_TIER), whole, rtol=1e-12)
    assert tier_probabilities(parts[:0], FOUR_TIER).shape == (0, 4)


# ------------------------------------------------------------------------------------------- on the device


@pytest.fixture(scope="module")
def batch(small):
    return small.batch([(0, 0)] * 6)


def whole_logprobs(small, prompt, texts):
    """The log-probability of each text after a prompt, scored as whole sequences, one by one."""
    found = []
    for text in texts:
        logp = jax.nn.log_softmax(small.logits([*prompt, *text]))
        found.append(sum(float(logp[len(prompt) + i - 1, token]) for i, token in enumerate(text)))
    return np.array(found)


def prompt_of(batch, row):
    return batch.prompt[row, : batch.prompt_len[row]].tolist()


@pytest.mark.slow
def test_texts_of_several_tokens_are_scored_as_whole_sequences(small, batch):
    """Parts whose texts begin with the same tokens, with different ones, and have different lengths."""
    parts = [[[8, 9, 0], [8, 9, 1, 2], [8, 4]], [[3], [4, 8, 9]], [[9, 8, 5], [9, 8, 6]]]
    length = np.array([[3, 4, 2], [1, 3, 0], [3, 3, 0]], np.int32)
    tokens = np.zeros((3, 3, 4), np.int32)
    for (part, value), size in np.ndenumerate(length):
        tokens[part, value, :size] = parts[part][value] if size else []
    taken = np.array([[1, 2, 0, 1, 2, 0], [0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1]])

    @jax.jit
    def score(params, prompt, prompt_len):
        prefix = prefill(small.policy, params, prompt, prompt_len)
        return score_parts(small.policy, params, prefix, tokens, length, lambda part, logp: jnp.asarray(taken)[part])

    scored = score(small.params, batch.prompt, batch.prompt_len)
    for row in range(6):
        before = prompt_of(batch, row)
        for part, (logp, chosen) in enumerate(scored):
            # Scores are given the tokens that all texts begin with. After normalising, nothing else differs.
            expected = whole_logprobs(small, before, parts[part])
            np.testing.assert_allclose(jax.nn.log_softmax(logp[row]), jax.nn.log_softmax(expected), atol=2e-5)
            assert chosen[row] == taken[part, row]
            before += parts[part][taken[part, row]]


@pytest.mark.slow
def test_answers_without_a_decoding_loop_are_those_of_the_sampler(small, batch):
    """Here each value is one token, so the likeliest text is the likeliest token."""

    @jax.jit
    def both(params, prompt, prompt_len):
        prefix = prefill(small.policy, params, prompt, prompt_len)
        keys = row_keys(jnp.zeros(2, jnp.uint32), 0, 0, prompt_len, 1)
        rolled = rollout(
            small.policy, params, prefix, keys, length=RESPONSE_LEN, temperature=0.0, end_token=END,
            grammar=small.tables,
        )
        reading = reader.read(small.tables, rolled.tokens, rolled.valid)
        stated = stated_logprobs(small.policy, params, prefix, rolled.tokens[:, 0], reading, TEXTS)
        return reading.value[:, 0], stated, *likeliest_parts(small.policy, params, prefix, TEXTS)

    sampled, stated, values, parts = both(small.params, batch.prompt, batch.prompt_len)
    np.testing.assert_array_equal(values, sampled)
    assert len({tuple(row) for row in np.asarray(values).tolist()}) > 1
    np.testing.assert_allclose(parts, stated, atol=1e-5)
    for row in range(6):
        expected = jax.nn.log_softmax(whole_logprobs(small, [*prompt_of(batch, row), int(values[row, 0])], [[3], [4]]))
        np.testing.assert_allclose(parts[row, 1], [*expected, -np.inf], atol=1e-5)


@pytest.mark.slow
def test_reasoning_that_was_written_stays_in_front(small, batch):
    """In x F:yes y x ,B:off y ,T:fair, fit is scored after `x`, brand after `x F:yes y x`. The tier is not scored."""
    own = np.full((6, 1, 9), END, np.int32)
    own[:, 0, :7] = [8, 0, 9, 8, 4, 9, 6]
    own[1, 0, :4] = [2, 3, 7, END]  # another answer, without free text
    valid = np.arange(9) < np.where(np.arange(6) == 1, 4, 8)[:, None, None]
    reading = reader.read(small.tables, jnp.asarray(own), jnp.asarray(valid))

    @jax.jit
    def score(params, prompt, prompt_len):
        prefix = prefill(small.policy, params, prompt, prompt_len)
        return stated_logprobs(small.policy, params, prefix, jnp.asarray(own[:, 0]), reading, TEXTS)

    found = np.asarray(score(small.params, batch.prompt, batch.prompt_len))
    for row in range(6):
        prompt = prompt_of(batch, row)
        written = ([], [2]) if row == 1 else ([8], [8, 0, 9, 8])
        for place, texts in enumerate(([[0], [1], [2]], [[3], [4]])):
            expected = jax.nn.log_softmax(whole_logprobs(small, prompt + written[place], texts))
            np.testing.assert_allclose(found[row, place, : len(texts)], expected, atol=1e-5)


def test_tokens_that_hold_any_of_the_phrase_are_left_out(small, batch):
    """The policy may spell a phrase by other tokens than gold answers do, and begin it inside a token."""
    sizes = dataclasses.replace(TEXTS, token_size=np.array([2, 2, 1, 5, 6, 7, 7, 6, 3, 3, 0, 0]))
    # x has 3 bytes; three tokens of 2, 1 and 2 bytes spell F:yes; then y, y spells `,B:off`.
    own = jnp.asarray(np.broadcast_to(np.array([[8, 0, 2, 1, 9, 9, 6]], np.int32), (6, 7)))
    position = jnp.broadcast_to(jnp.array([3, 5, 6]), (6, 1, 3))
    reading = reader.Reading(jnp.broadcast_to(jnp.array([0, 1, 1]), (6, 1, 3)), None, position, None)

    @jax.jit
    def score(params, prompt, prompt_len):
        prefix = prefill(small.policy, params, prompt, prompt_len)
        return stated_logprobs(small.policy, params, prefix, own, reading, sizes)

    found = np.asarray(score(small.params, batch.prompt, batch.prompt_len))
    for written, place, texts in (([8], 0, [[0], [1], [2]]), ([8, 0, 2, 1], 1, [[3], [4]])):
        expected = jax.nn.log_softmax(whole_logprobs(small, prompt_of(batch, 0) + written, texts))
        np.testing.assert_allclose(found[0, place, : len(texts)], expected, atol=1e-5)


# ------------------------------------------------------------------------------------------ the temperature


def overconfident(pairs: int, factor: float, seed: int = 0):
    """Judgements whose log-probabilities of steps are `factor` times those that the truth was drawn from."""
    rng = np.random.default_rng(seed)
    parts = np.full((pairs, 4, 5), -np.inf)
    steps = np.zeros((pairs, 4), int)
    for step, count in enumerate(FOUR_TIER.num_values):
        logits = 2 * rng.normal(size=(pairs, count))
        parts[:, step, :count] = factor * logits
        steps[:, step] = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
    tier = np.array([FOUR_TIER.tier_for(values) for values in steps])
    stated = np.array([FOUR_TIER.tier_for(values) for values in parts.argmax(axis=2)])
    return judgements(tier, stated, part_logprobs=parts)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_the_fit_recovers_a_known_temperature(factor):
    fitted = probabilities.fit(overconfident(3000, factor), FOUR_TIER)
    assert fitted.temperature == pytest.approx(factor, rel=0.07)
    assert fitted.nll <= fitted.nll_before and fitted.pairs == 3000
    if factor == 2.5:
        assert fitted.nll < fitted.nll_before - 0.1


def test_the_better_tier_is_named():
    judged = overconfident(500, 2.0)
    wrong = dataclasses.replace(judged, predicted=(judged.tier + 1) % 4)
    fitted = probabilities.fit(wrong, FOUR_TIER)
    assert fitted.macro_f1_answer == 0 and fitted.macro_f1_probabilities > 0.4
    assert fitted.tier_from == "probabilities"
    right = dataclasses.replace(judged, predicted=judged.tier)
    assert probabilities.fit(right, FOUR_TIER).tier_from == "answer"
    probs = tier_probabilities(judged.part_logprobs, FOUR_TIER, fitted.temperature)
    same = dataclasses.replace(judged, predicted=probs.argmax(axis=1))  # equally good: the stated tier is kept
    assert probabilities.fit(same, FOUR_TIER).tier_from == "answer"


def test_malformed_answers_alone_leave_the_temperature_at_1():
    judged = dataclasses.replace(overconfident(20, 2.0), well_formed=np.zeros(20, bool))
    fitted = probabilities.fit(judged, FOUR_TIER)
    assert fitted.temperature == 1 and fitted.nll == pytest.approx(np.log(4))


def test_what_is_kept_is_found_for_the_same_checkpoint_and_rules_alone(tmp_path, small):
    file = tmp_path / "calibration.json"
    assert probabilities.load(file, "step 3 of RL", FOUR_TIER) is None
    first = probabilities.Calibration(2.0, "probabilities", 256, 0.9, 5.0, 0.58, 0.6)
    probabilities.keep(file, "step 3 of RL", first, FOUR_TIER)
    probabilities.keep(file, "step 6 of RL", first._replace(temperature=3.0), FOUR_TIER)
    assert probabilities.load(file, "step 3 of RL", FOUR_TIER) == first
    assert probabilities.load(file, "step 6 of RL", FOUR_TIER).temperature == 3.0
    assert probabilities.load(file, "step 9 of RL", FOUR_TIER) is None
    assert probabilities.load(file, "step 3 of RL", small.book) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"rulebook": "DIGEST", "temperature": 1}}'])
def test_a_damaged_calibration_is_refused_by_name(tmp_path, content):
    file = tmp_path / "calibration.json"
    file.write_text(content.replace("DIGEST", FOUR_TIER.digest))
    with pytest.raises(CalibrationError, match=r"calibration\.json.*move it away"):
        probabilities.load(file, "a", FOUR_TIER)


# ------------------------------------------------------------------------------------------- the scorecard


def test_the_likeliest_tier_beside_the_stated_one():
    """Three pairs: the stated tier wrong and the likeliest right, both right, and a malformed answer."""
    from agrl_jax.evaluation.intervals import score

    judged = judgements([0, 1, 2], [1, 1, -1], probs=np.array([[0.6, 0.4, 0, 0], [0.2, 0.5, 0.3, 0], [0.25] * 4]))
    scores = {name: partial_value["value"] for name, partial_value in score(judged, FOUR_TIER, bootstrap=0).items()
              if "value" in partial_value}  # fmt: skip
    assert scores["accuracy"] == pytest.approx(1 / 3) and scores["likeliest_accuracy"] == pytest.approx(2 / 3)
    assert scores["disagreement"] == pytest.approx(1 / 3)
    # By the likeliest tier, tiers 0 and 1 have an F1 of 1, tier 2 has 0.
    assert scores["likeliest_macro_f1"] == pytest.approx(2 / 3)
