"""Where labelled pairs come from besides the bundled benchmark: a user's file or dataset, or a public release."""

from __future__ import annotations

import dataclasses

from etils import epath

from agrl_jax.data.esci import read_esci
from agrl_jax.data.format import PairsFormat
from agrl_jax.data.hf import open_dataset
from agrl_jax.data.pairs import PairsFile, read_labelled, read_pairs
from agrl_jax.data.rows import Source
from agrl_jax.data.wands import read_wands
from agrl_jax.rulebook.book import RuleBook

_RELEASES = {"esci": read_esci, "wands": read_wands}


def read_source(
    kind: str, path: epath.PathLike, book: RuleBook, seed: int, form: PairsFormat, test: epath.PathLike = ""
) -> PairsFile:
    """The splits of a source.

    Args:
      kind: `pairs`, a file; `hf`, a dataset, see `open_dataset`; `esci` or `wands`, the folder of the release.
      path: the file or folder.
      book: gives the tiers and steps.
      seed: of the splits.
      form: how a file of `pairs`, or a dataset, and `test` differ from what `agrl_jax.data.pairs` describes.
      test: a file or dataset with the test pairs, where `path` has none; not for a release.

    Raises:
      PairsError: see `read_pairs`, `open_dataset`, `read_esci` and `read_wands`.
    """
    if kind in _RELEASES:
        return _RELEASES[kind](path, book, seed)
    return read_pairs(_opened(kind, path), book, seed, form, _opened(kind, test) if test else None)


def read_tests(path: epath.PathLike, book: RuleBook, form: PairsFormat) -> PairsFile:
    """All pairs of a file as the split `test`.

    Raises:
      PairsError: see `read_labelled`.
    """
    labelled = read_labelled(path, book, form)
    tests = [dataclasses.replace(pair, split="test") for pair in labelled.pairs]
    return PairsFile({"test": tests}, labelled.contradicting, skipped=labelled.skipped, unread=labelled.unread)


def read_training(kind: str, path: epath.PathLike, book: RuleBook, seed: int, form: PairsFormat) -> PairsFile:
    """The training pairs of a source, as its split `train`: all pairs of a file without a `split` column.

    Raises:
      PairsError: see `read_source`.
    """
    if kind in _RELEASES:
        found = _RELEASES[kind](path, book, seed)
        return dataclasses.replace(found, splits={"train": found.splits["train"]})
    labelled = read_labelled(_opened(kind, path), book, form)
    pairs = [pair for pair in labelled.pairs if pair.split in ("", "train")]
    return PairsFile({"train": pairs}, labelled.contradicting, skipped=labelled.skipped, unread=labelled.unread)


def _opened(kind: str, path: epath.PathLike) -> Source:
    return open_dataset(path) if kind == "hf" else path
