"""The Shopping Queries Dataset ("ESCI", Reddy et al. 2022, arXiv 2206.06588; Apache-2.0), from its public release.

The release's folder `shopping_queries_dataset` has the two Parquet files that are read here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

from agrl_jax.data.cells import clean
from agrl_jax.data.pairs import TRAIN_SHARES, Pair, PairsError, PairsFile, split_by_query
from agrl_jax.rulebook.book import RuleBook

EXAMPLES = "shopping_queries_dataset_examples.parquet"
PRODUCTS = "shopping_queries_dataset_products.parquet"
GRADES = {"E": 4, "S": 3, "C": 2, "I": 1}  # exact, substitute, complement, irrelevant
_BATCH = 8192  # rows of a file in memory at once
_TAG = re.compile(r"<[^<>]{1,200}>")


def read_esci(
    folder: epath.PathLike, book: RuleBook, seed: int = 0, locale: str = "us", small_version: bool = True
) -> PairsFile:
    """Reads the pairs of one locale: the release's `train` and `test`, a tenth of train's queries as validation.

    Args:
      folder: where the two files are.
      book: its tiers need the grades 4, 3, 2 and 1. ESCI has no steps; those that a tier implies are filled in.
      seed: of the split into train and validation.
      locale: us, es or jp.
      small_version: the smaller set of harder queries (task 1 of the challenge), or all.

    Raises:
      PairsError: a file is missing or lacks a column, the locale has no pairs, or the rule book lacks a grade.
    """
    tiers, root = tiers_by_grade(book, GRADES), epath.Path(folder)
    examples = list(_examples(root, locale, small_version))
    if not examples:
        raise PairsError(f"{folder}: has no pairs of the locale {locale!r}")
    products = _products(root, locale, {example.product for example in examples})
    titled = [example for example in examples if example.product in products]
    pairs = [_pair(example, products[example.product], tiers, book) for example in titled]
    splits = split_by_query((pair for pair in pairs if pair.split == "train"), seed, TRAIN_SHARES)
    splits["test"] = [pair for pair in pairs if pair.split == "test"]
    return PairsFile(splits, dropped=len(examples) - len(titled))


def tiers_by_grade(book: RuleBook, grades: dict[str, int]) -> dict[str, int]:
    """By label of a public data set, the tier of the rule book that has its grade.

    Raises:
      PairsError: no tier has the grade of a label.
    """
    of_grade = {tier.grade: i for i, tier in enumerate(book.tiers)}
    for label, grade in grades.items():
        if grade not in of_grade:
            raise PairsError(f"rule book {book.name!r} has no tier of grade {grade}, which stands for label {label!r}")
    return {label: of_grade[grade] for label, grade in grades.items()}


class _Example(NamedTuple):
    id: str
    query: str
    product: str
    label: str
    split: str


def _examples(folder: epath.Path, locale: str, small_version: bool) -> Iterator[_Example]:
    columns = ["example_id", "query", "product_id", "esci_label", "split"]
    queries: dict[str, str] = {}  # one text for all examples of a query
    for batch in _batches(folder / EXAMPLES, [*columns, "product_locale", "small_version"]):
        wanted = pc.equal(batch["product_locale"], locale)
        if small_version:
            wanted = pc.and_(wanted, pc.equal(batch["small_version"], 1))
        for example, query, *others in _rows(batch.filter(wanted), columns):
            yield _Example(str(example), queries.setdefault(query, _clean(query)), *others)


def _products(folder: epath.Path, locale: str, wanted: set[str]) -> dict[str, dict[str, str]]:
    """The texts of the wanted products that have a title; the others are never in memory together."""
    texts = ["title", "description", "bullet_point", "brand", "color"]
    columns = ["product_id", *(f"product_{name}" for name in texts)]
    found = {}
    for batch in _batches(folder / PRODUCTS, [*columns, "product_locale"]):
        batch = batch.filter(pc.equal(batch["product_locale"], locale))
        places = [place for place, product in enumerate(batch["product_id"].to_pylist()) if product in wanted]
        for product, *cells in _rows(batch.take(pa.array(places, pa.int64())), columns):
            title, description, bullets, brand, color = map(_clean, cells)
            if title:
                description = f"{bullets} {description}".strip()
                found[product] = {"title": title, "description": description, "brand": brand, "color": color}
    return found


def _batches(path: epath.Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    try:
        with path.open("rb") as stream, pq.ParquetFile(stream) as file:
            if lacking := set(columns) - set(file.schema_arrow.names):
                raise PairsError(f"{path}: not of the ESCI release: it lacks {', '.join(sorted(lacking))}")
            yield from file.iter_batches(_BATCH, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise PairsError(f"{path}: not a readable ESCI release: {error}") from error


def _rows(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterable[tuple]:
    return zip(*(batch[name].to_pylist() for name in columns), strict=True)


def _pair(example: _Example, texts: dict[str, str], tiers: dict[str, int], book: RuleBook) -> Pair:
    if example.label not in tiers:
        raise PairsError(
            f"{EXAMPLES}: example {example.id}: unknown label {example.label!r}; it should be one of {', '.join(tiers)}"
        )
    tier = tiers[example.label]
    return Pair(
        id=example.id, query=example.query, tier=tier, steps=book.implied(tier), split=example.split or "", **texts
    )


def _clean(text: str | None) -> str:
    """The text without markup, on one line."""
    return clean(html.unescape(_TAG.sub(" ", text or "")))
