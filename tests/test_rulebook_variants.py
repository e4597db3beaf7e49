"""Rule books that training never saw, and judges that are given them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import get_config

from agrl_jax import recipes
from agrl_jax.data.bundled import benchmark, catalog
from agrl_jax.data.pairs import Pair
from agrl_jax.rulebook import book, wording
from agrl_jax.rulebook.schema import winners
from agrl_jax.rulebook.variants import variant
from agrl_jax.runtime.config import ConfigError
from agrl_jax.training import assemble
from agrl_jax.training.run import train
from agrl_jax.types import UNKNOWN
from experiments import rulebook_variants

BOOK = book.load()
VARIANTS = [variant(BOOK, seed) for seed in range(8)]


def test_a_variant_is_the_same_by_the_same_seed_and_no_two_are_alike() -> None:
    assert variant(BOOK, 3) == VARIANTS[3]
    tables = {tuple(variant.tier_table().tolist()) for variant in [BOOK, *VARIANTS]}
    assert len(tables) == 1 + len(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_keeps_steps_and_answers_and_changes_what_follows_from_them(variant: book.RuleBook) -> None:
    assert (variant.steps, variant.tiers, variant.phrases) == (BOOK.steps, BOOK.tiers, BOOK.phrases)
    assert wording.ambiguity(variant) is None
    assert np.unique(winners(variant.rows, variant.num_values)).tolist() == list(range(len(variant.rows)))
    tiers = [variant.tier_for(values) for values in np.ndindex(*variant.num_values)]
    assert set(tiers) == set(range(len(BOOK.tiers)))
    changed = np.mean([tier != BOOK.tier_for(v) for tier, v in zip(tiers, np.ndindex(*BOOK.num_values), strict=True)])
    assert changed >= 0.1
    assert wording.turns(variant)[0] != wording.turns(BOOK)[0]


def test_pairs_have_the_tier_of_the_variant_where_their_steps_are_known() -> None:
    variant, known = VARIANTS[0], list(itertools.islice(np.ndindex(*BOOK.num_values), 5))
    pairs = [Pair(id=str(i), query="q", title="t", tier=BOOK.tier_for(v), steps=v) for i, v in enumerate(known)]
    unknown = [Pair(id="u", query="q", title="t", tier=0, steps=steps) for steps in ((), (0, 0, 0, -1))]
    found = rulebook_variants.relabelled([*pairs, *unknown], variant)
    assert [(pair.id, pair.steps, pair.tier) for pair in found] == [
        (str(i), values, variant.tier_for(values)) for i, values in enumerate(known)
    ]


def test_the_mean_over_variants_by_hand() -> None:
    assert rulebook_variants._over([0.2, 0.4, 0.6], 500)["value"] == pytest.approx(0.4)
    assert rulebook_variants._over([0.5], 10) == {"value": 0.5, "low": 0.5, "high": 0.5}


@pytest.fixture()
def few_pairs() -> Iterator[None]:
    """Some pairs of each split: building the whole benchmark takes longer than the rest."""
    few = catalog.splits(0, dict.fromkeys(catalog.SIZES, 32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "load_benchmark", lambda *_: few)
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles", "few_pairs")
def test_a_judge_is_asked_by_its_own_book_and_by_others(tmp_path: Path) -> None:
    config = recipes.with_method(get_config(), "sft")
    config.data.style = "full"
    config.sft.steps = 0
    config.eval.update(pairs=4, validation_pairs=4, pass_pairs=0, batch_size=4, bootstrap=2)
    train(config, str(tmp_path), say=lambda *_: None)
    judged = rulebook_variants.judge(str(tmp_path), "sft_end", "b_eval", pairs=8, variants=1)
    assert [rules.name for rules, _ in judged] == ["four_tier", "four_tier-0"]
    (_, own), (rules, other) = judged
    assert list(own.query) == list(other.query) and np.array_equal(own.steps, other.steps)
    assert other.tier.tolist() == [rules.tier_for(values) for values in other.steps]
    stated = zip(other.predicted_steps, other.predicted, strict=True)
    follows = [UNKNOWN not in (*values, tier) and rules.tier_for(values) == tier for values, tier in stated]
    assert other.consistent.tolist() == follows
    found = rulebook_variants.scores(judged, bootstrap=10)
    assert found["variants"]["adherence"]["value"] == pytest.approx(other.consistent.mean())
    with pytest.raises(ConfigError, match="--split=b: not a split"):
        rulebook_variants.judge(str(tmp_path), "sft_end", "b", pairs=8, variants=0)


def test_a_judge_whose_prompts_hold_no_rules_is_refused(tmp_path: Path) -> None:
    assemble.write_config(get_config(), tmp_path)
    with pytest.raises(ConfigError, match="trained with data.style=terse, whose prompts hold no rules"):
        rulebook_variants.judge(str(tmp_path), "rl", "b_eval", pairs=8, variants=1)
