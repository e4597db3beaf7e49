"""Training under variants of the rule book: each pair has the table, the tier and the prompt of its own book."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import test_reward
from ml_collections import ConfigDict
from test_fill import TEXTS
from test_main import without_times
from test_runs import config_of, labelled, pairs_file
from tiny import get_config

from agrl_jax import recipes
from agrl_jax.bounds.compile import compile_step, find_devices
from agrl_jax.data import pipeline
from agrl_jax.data.bundled import benchmark, catalog
from agrl_jax.data.pairs import Pair
from agrl_jax.data.relabel import all_known, spread
from agrl_jax.evaluation import intervals
from agrl_jax.rl.reward import is_model_answer, score
from agrl_jax.rulebook import book, variants, wording
from agrl_jax.rulebook.book import RuleBook, RuleBookError
from agrl_jax.rulebook.variants import training_variants, variant
from agrl_jax.runtime.config import ConfigError, validate_together
from agrl_jax.runtime.logs import MetricsWriter, read_jsonl
from agrl_jax.supervised import sft
from agrl_jax.supervised.fill import Blanks, possible_steps
from agrl_jax.supervised.marginal import forks
from agrl_jax.training import assemble, run
from agrl_jax.types import UNKNOWN, Reading, Rollout
from experiments import rulebook_variants

BOOK = book.load()
VARIANTS = training_variants(BOOK, 3)
FEW = catalog.splits(0, dict.fromkeys(catalog.SIZES, 32))


@pytest.fixture()
def few_pairs() -> Iterator[None]:
    """Some pairs of each split: building the whole benchmark takes longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "load_benchmark", lambda *_: FEW)
        yield


def config_under(number: int, method: str = "agrl", style: str = "full") -> ConfigDict:
    config = recipes.with_method(get_config(), method)
    config.rulebook.variants = number
    config.data.style = style
    return config


# -------------------------------------------------------------------------------------------- the variants


def tables_of(books: list[RuleBook]) -> set[bytes]:
    return {one.tier_table().tobytes() for one in books}


def test_no_table_of_training_is_one_that_measures_judges(small) -> None:
    """Not by luck: the small book has so few tables that seeds give each of them many times."""
    for rules, number in ((BOOK, 40), (small.book, 200)):
        trained = tables_of(training_variants(rules, number))
        held_out = tables_of([variant(rules, seed) for seed in range(number)])
        assert not trained & held_out and rules.tier_table().tobytes() not in trained | held_out
    assert len(held_out) < number / 4  # of the small book


def test_more_variants_begin_with_the_same_ones() -> None:
    assert training_variants(BOOK, 5)[:3] == VARIANTS
    assert len(tables_of(VARIANTS)) == 3


def test_a_book_without_other_tables_is_refused(small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "_TRIES", 20)
    monkeypatch.setattr(variants, "LEAST_CHANGED", 1.1)
    with pytest.raises(RuleBookError, match="rule book tiny: found no other table .* so it has no variants"):
        training_variants(small.book, 1)


# --------------------------------------------------------------------------------------------------- pairs


def test_a_pair_has_its_book_whatever_its_place_and_its_number() -> None:
    pairs = FEW["train"]
    found = spread(pairs, VARIANTS, seed=0)
    again = spread([dataclasses.replace(pair, id="other") for pair in pairs[::-1][:20]], VARIANTS, seed=0)
    assert [pair.variant for pair in again] == [pair.variant for pair in found[::-1][:20]]
    assert {pair.variant for pair in found} == {0, 1, 2, 3}
    assert [pair.variant for pair in spread(pairs, VARIANTS, seed=1)] != [pair.variant for pair in found]
    for pair, before in zip(found, pairs, strict=True):
        rules = [BOOK, *VARIANTS][pair.variant]
        assert pair == dataclasses.replace(before, variant=pair.variant, tier=rules.tier_for(before.steps),
                                           reasons=pair.reasons)
    assert any(pair.tier != before.tier for pair, before in zip(found, pairs, strict=True))


def test_a_pair_of_unknown_steps_keeps_label_and_book_and_a_changed_tier_loses_its_reason() -> None:
    pair = Pair(id="p", query="red shoes", title="Red shoes", tier=2, steps=(0, 2, 0, 3), reasons=tuple("abcde"))
    unknown = [dataclasses.replace(pair, query=f"{i}", steps=steps) for i in range(20) for steps in ((), (0, 2, 0, -1))]
    assert spread(unknown, VARIANTS, seed=0) == unknown and not any(map(all_known, unknown))
    many = spread([dataclasses.replace(pair, query=f"{i}") for i in range(20)], VARIANTS, seed=0)
    for found in many:  # the label contradicts the book itself, which keeps it
        assert found.reasons == (("a", "b", "c", "d", "") if found.variant else tuple("abcde"))
        assert found.tier == (VARIANTS[found.variant - 1].tier_for(pair.steps) if found.variant else 2)


# ------------------------------------------------------------------------------------- prompts and batches


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> assemble.Model:
    """The model of a run under three variants."""
    config, data = config_under(3), assemble.Data(FEW, FEW["sft"])
    own = assemble.load_model(config, tmp_path_factory.mktemp("model"), BOOK, data)
    assert assemble.under_variants(config_under(0), own) is own
    return assemble.under_variants(config, own)


def test_training_prompts_hold_the_rules_of_their_book_and_answers_its_tier(model: assemble.Model) -> None:
    config, data = config_under(3), assemble.Data(FEW, FEW["sft"])
    encoded = assemble.encode(config, model, data, ["sft", "train", "validation", "b_eval"])
    books, tokenizer = [BOOK, *VARIANTS], model.tokenizer
    assert model.variants == VARIANTS and not len(model.instructions)
    assert model.tables.tier_of.tolist() == [rules.tier_table().tolist() for rules in books]
    alone = pipeline.encode(data.sft, BOOK, tokenizer, config.data.prompt_len, config.data.response_len, "full").batch
    for name in assemble.TRAINED:
        batch = encoded[name].batch
        assert set(batch.book.tolist()) == {0, 1, 2, 3}
        for row, (index, pair) in enumerate(zip(batch.book, encoded[name].pairs, strict=True)):
            text = tokenizer.decode(batch.prompt[row, : batch.prompt_len[row]])
            assert text.startswith(wording.prompt_pieces(books[index], "full")[0].rstrip(" ")) and pair.query in text
            tier = books[index].tier_for(pair.steps)
            assert batch.tier[row] == tier == pair.tier
            gold = batch.gold[row, : batch.gold_len[row] - 1]
            assert tokenizer.decode(gold).endswith(f"Tier: {BOOK.tiers[tier].name}")
            if name == "sft":  # the instructions take nothing of the room for query and item
                rest = alone.prompt[row, : alone.prompt_len[row]].tolist()
                assert batch.prompt[row, : batch.prompt_len[row]].tolist()[-len(rest) :] == rest
    for name in ("validation", "b_eval"):  # evaluated: by the book itself, whose instructions are run once
        own = pipeline.encode(
            data.pairs(name), BOOK, tokenizer, config.data.prompt_len, config.data.response_len, "full",
            families=data.families,
        )  # fmt: skip
        assert encoded[name].pairs is data.pairs(name)
        jax.tree.map(np.testing.assert_array_equal, encoded[name].batch, own.batch)


# --------------------------------------------------------------------------------------- on the device

# Another table of the rule book of conftest: (yes, off) is bad there, and fair in the book itself.
OTHER = [0, 2, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def under_two(small):
    return small.tables.replace(tier_of=np.stack([small.book.tier_table(), np.array(OTHER, np.int32)]))


def test_the_reward_is_by_the_book_of_each_example(small, under_two) -> None:
    """One batch, the same true steps (yes, off) and the same answers: fair by the first book, bad by the second."""
    stated = np.array([[(0, 1, 1), (0, 1, 2)]] * 2, np.int32)
    shape = (2, 2, test_reward.T)
    yes = np.ones(shape, bool)
    rolled = Rollout(np.zeros(shape, np.int32), np.zeros(shape, np.float32), yes, yes, yes[..., 0])
    reading = Reading(stated, np.ones_like(stated), np.broadcast_to(np.arange(3), stated.shape), yes[..., 0])
    batch = small.batch([(0, 1)] * 2, tiers=[1, 2]).replace(book=np.array([0, 1], np.int32))
    cfg = dataclasses.replace(test_reward.SUM, composition="gated", overlong_weight=0.0)
    s = score(reading, rolled, batch, under_two, cfg)
    np.testing.assert_array_equal(s.raw[..., test_reward.CONSISTENT], [[1, 0], [0, 1]])
    np.testing.assert_array_equal(s.passed, [[True, False], [False, True]])
    right, wrong = 1 + 0.5 + 0.5 + 0.25 + 0.125, 0.125  # a wrong tier is inconsistent, so that right steps earn nothing
    np.testing.assert_allclose(s.total, [[right, wrong], [wrong, right]])
    np.testing.assert_array_equal(is_model_answer(s, reading, batch, under_two), [[True, False], [False, True]])


def test_unknown_steps_are_those_that_the_own_book_leaves_open(small, under_two) -> None:
    batch = small.batch([(0, 1), (0, 1), (UNKNOWN, 0)], tiers=[1, 2, 1]).replace(book=np.array([0, 1, 0], np.int32))
    possible = np.zeros((3, 3, 2), bool)
    possible[[0, 1], 0, 1] = True
    possible[2, 1, 0] = True  # brand is ok, and the tier is fair: fit is part
    np.testing.assert_array_equal(possible_steps(under_two, batch), possible)


def test_an_answer_that_the_own_book_excludes_does_not_spoil_the_loss_of_unknown_steps(small, under_two, close) -> None:
    """(yes, off) is bad by the second book alone; the other pair's label loss is what it is beside any answer."""
    batch = small.batch([(0, 1), (UNKNOWN, 0)], tiers=[2, 1])
    loss, figures = sft.gold_loss(
        small.policy, small.params, batch.replace(book=np.array([1, 0], np.int32)),
        blanks=Blanks(under_two, TEXTS, forks(TEXTS)),
    )  # fmt: skip
    alone, expected = sft.gold_loss(
        small.policy, small.params, small.batch([(0, 1), (UNKNOWN, 0)], tiers=[1, 1]),
        blanks=Blanks(small.tables, TEXTS, forks(TEXTS)),
    )  # fmt: skip
    assert np.isfinite(loss)
    close(figures["policy/label_loss"], expected["policy/label_loss"])


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "style", "said"),
    [
        ("agrl", "terse", "rulebook.variants=2 with data.style=terse: such prompts hold no rules to follow"),
        ("distill", "full", "rulebook.variants=2 with method=distill: the tiers of a teacher are by its own rule book"),
    ],
)
def test_what_variants_cannot_go_with_is_refused(method: str, style: str, said: str) -> None:
    config = config_under(2, method, style)
    config.distill.path = "judged.csv"
    with pytest.raises(ConfigError, match=said):
        validate_together(config)


def test_pairs_without_steps_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    rows = [row for split in ("train", "validation", "test") for row in labelled(split, 8)]
    path = pairs_file(tmp_path / "pairs.csv", rows)
    config = config_of(path, **{"rulebook.variants": 2, "data.style": "full", "data.prompt_len": 96})
    with pytest.raises(ConfigError, match="rulebook.variants=2: no training pair has all its steps known"):
        run.train(config, str(tmp_path / "run"), say=lambda *_: None)
    assert not (tmp_path / "run" / assemble.CONFIG_FILE).exists()


# ------------------------------------------------------------------------------------------------- a run


@pytest.mark.slow
def test_preflight_counts_the_instructions_of_every_prompt() -> None:
    config, (devices, chip) = config_under(2), find_devices("")
    report = compile_step(config, devices=devices[:1], chip=chip, shape="", guided_share=1.0)
    instructions = len(assemble.stand_in_model(config, None).instructions)
    assert instructions > 500
    # 8 prompts of 96 tokens after them, trained on with 4 answers of 40 tokens, which are sampled too
    assert report.tokens == 8 * (instructions + 96 + 4 * 40 + 4 * 40)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles", "few_pairs")
def test_a_run_under_variants_goes_on_where_it_was_stopped_and_is_judged_by_the_book_itself(tmp_path: Path) -> None:
    config, said = config_under(3), []
    config.sft.update(steps=3, batch_size=4)
    config.rl.update(steps=4, batch_size=4, group_size=4)
    config.eval.update(every=2, pairs=0, validation_pairs=8, pass_pairs=0, batch_size=8, bootstrap=2)
    config.checkpoint.every = 2
    config.log.samples_every = 1

    def train(workdir: Path) -> dict:
        return run.train(config, str(workdir), say=lambda *words: said.append(" ".join(map(str, words))))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cards = train(whole)
    assert any(line.startswith("train: ") and "under 3 variants of the rule book" in line for line in said)
    write = MetricsWriter.write_samples

    def stopped(self: MetricsWriter, stage: str, step: int, samples: list) -> None:
        write(self, stage, step, samples)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsWriter, "write_samples", stopped)
        with pytest.raises(run.Interrupted, match="rl step 3 of 4"):
            train(parts)
    train(parts)
    assert without_times(parts / "metrics.jsonl") == without_times(whole / "metrics.jsonl")
    for name in ("samples.jsonl", "scorecard.json", "judgements.parquet"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()

    samples = read_jsonl(whole / "samples.jsonl")
    assert any("variant" in row for row in samples)
    for row in samples:
        rules = [BOOK, *VARIANTS][row.get("variant", 0)]
        values = [step.values.index(row["truth"][step.name]) for step in rules.steps]
        assert row["truth"]["tier"] == rules.tiers[rules.tier_for(values)].name

    (_, own), _ = rulebook_variants.judge(str(whole), "rl", "b_eval", pairs=32, variants=1)
    metric = intervals.score(own, BOOK, 2)["step_accuracy"]["value"]
    assert metric == cards["agrl"]["b_eval"]["step_accuracy"]["value"]
