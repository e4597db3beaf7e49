"""The bundled benchmark as a TFDS dataset: built once, kept as ArrayRecord files, read without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from agrl_jax.data.bundled import catalog, world
from agrl_jax.data.pairs import Pair, PairsError
from agrl_jax.rulebook import book, wording
from agrl_jax.rulebook.book import RuleBook

_TEXTS = ("id", "query", "title", "description", "brand", "color", "category", "price", "family")
_CHUNK = 4096  # rows read at once


@dataclasses.dataclass(kw_only=True)
class BenchmarkConfig(tfds.core.BuilderConfig):
    """One benchmark; the name stands for all that its pairs depend on."""

    seed: int = 0


class Benchmark(tfds.core.GeneratorBasedBuilder):
    """The splits of `catalog.splits` for the seed of the config, each in its own order."""

    VERSION = tfds.core.Version(catalog.VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in _TEXTS} | {
            "tier": tfds.features.Scalar(np.int32),
            "steps": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "seen": tfds.features.Scalar(np.bool_),
            "reasons": tfds.features.Sequence(tfds.features.Text()),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=catalog.__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        splits = catalog.splits(self.builder_config.seed)
        return {name: self._generate_examples(pairs) for name, pairs in splits.items()}

    def _generate_examples(self, pairs: list[Pair]) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, pair in enumerate(pairs):
            row = {name: getattr(pair, name) for name in self.info.features}
            yield i, row | {"steps": np.array(pair.steps, np.int32)}


def load_benchmark(data_dir: epath.PathLike, seed: int = 0, rules: RuleBook | None = None) -> dict[str, list[Pair]]:
    """The splits of the benchmark, from `data_dir`; built there first unless they are there already.

    Another ontology, rule book or generator makes another dataset, beside this one. A build that was killed leaves
    nothing that would be read. Pairs have reasons where the rule book has free text.

    Raises:
      PairsError: `rules` have other steps or another table than the rule book by which the pairs are labelled, or a
        wording that would take a reason for an answer.
    """
    if rules is not None:
        _check_rules(rules)
    room = rules is not None and rules.response.free_text != "none"
    made = builder(data_dir, seed)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES  # TFDS would make a dozen NumPy arrays of each row: 6 times slower
    with _quiet():
        sources = {name: made.as_data_source(name, deserialize_method=raw) for name in made.info.splits}
    splits = {name: list(_pairs(name, source, room)) for name, source in sources.items()}
    if room and rules.phrases != book.load().phrases:
        _check_reasons(splits, rules)
    return splits


def _check_rules(rules: RuleBook) -> None:
    """Another rule book may have other words than the benchmark's, but must judge as it does."""
    own = book.load()
    same = rules.num_values == own.num_values and np.array_equal(rules.tier_table(), own.tier_table())
    if not same or [step.name for step in rules.steps] != [step.name for step in own.steps]:
        raise PairsError(
            f"the bundled benchmark is labelled by the rule book {own.name}, and {rules.name} has other steps or "
            "another table; train on pairs of your own: data.source=pairs, data.path=FILE and sft.source=train"
        )


def builder(data_dir: epath.PathLike, seed: int = 0) -> Benchmark:
    """The TFDS builder of the benchmark, its files in place: `builder(...).as_data_source("train")` reads a split."""
    config = BenchmarkConfig(name=f"seed{seed}_{_digest()[:16]}", seed=seed)
    with _quiet(), tempfile.TemporaryDirectory() as downloads:  # nothing is downloaded, but TFDS asks for a folder
        made = Benchmark(data_dir=data_dir, config=config, file_format="array_record")
        try:
            made.download_and_prepare(download_dir=downloads)
        except OSError:
            # Another process may have put the same files in place first.
            made = Benchmark(data_dir=data_dir, config=config, file_format="array_record")
            if not made.is_prepared():
                raise
    return made


def _digest() -> str:
    """sha256 of all that the pairs depend on besides the seed."""
    parts = (catalog.VERSION, repr(catalog.SIZES), world.load().digest, book.load().digest)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _check_reasons(splits: Mapping[str, Sequence[Pair]], rules: RuleBook) -> None:
    """Raises PairsError where a reason would be read as an answer. In the benchmark's own wording none is."""
    for pair in itertools.chain.from_iterable(splits.values()):
        for part, (value, reason) in enumerate(zip((*pair.steps, pair.tier), pair.reasons, strict=True)):
            if phrase := wording.misread_reason(rules, part, value, reason):
                raise PairsError(
                    f"the bundled benchmark's reason {reason!r} would be read as the answer {phrase!r} of the rule "
                    f"book {rules.name}; word its responses differently, or set rulebook.free_text=none"
                )


def _pairs(split: str, source: Any, reasons: bool) -> Iterator[Pair]:
    for first in range(0, len(source), _CHUNK):
        for record in source.__getitems__(range(first, min(first + _CHUNK, len(source)))):
            row = tf_example_pb2.Example.FromString(record).features.feature
            texts = {name: row[name].bytes_list.value[0].decode() for name in _TEXTS}
            tier, seen = (row[name].int64_list.value[0] for name in ("tier", "seen"))
            pair = Pair(**texts, split=split, tier=tier, steps=tuple(row["steps"].int64_list.value), seen=bool(seen))
            if reasons:
                why = tuple(reason.decode() for reason in row["reasons"].bytes_list.value)
                pair = dataclasses.replace(pair, reasons=why)
            yield pair


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what TFDS says of downloads, shuffling and custom configs."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logger.setLevel(level)
