"""The Shopping Queries Dataset ("ESCI", Reddy et al. 2022, arXiv 2206.06588; Apache-2.0), from its public release.

The release's folder `shopping_queries_dataset` has the two Parquet files that are read here.
"""

from __future__ import annotations

import html
import os
import re

import polars as pl
from etils import epath

from agrl_jax.data.pairs import Pair, PairsError, PairsFile, split_by_query
from agrl_jax.rulebook.book import RuleBook

EXAMPLES = "shopping_queries_dataset_examples.parquet"
PRODUCTS = "shopping_queries_dataset_products.parquet"
GRADES = {"E": 4, "S": 3, "C": 2, "I": 1}  # exact, substitute, complement, irrelevant
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
    tiers = tiers_by_grade(book, GRADES)
    rows = _rows(epath.Path(folder), locale, small_version)
    if not rows:
        raise PairsError(f"{folder}: has no pairs of the locale {locale!r}")
    titled = [row for row in rows if _clean(row["product_title"])]
    pairs = [_pair(row, tiers, book) for row in titled]
    splits = split_by_query((pair for pair in pairs if pair.split == "train"), seed, {"train": 0.9, "validation": 0.1})
    splits["test"] = [pair for pair in pairs if pair.split == "test"]
    return PairsFile(splits, dropped=len(rows) - len(titled))


def tiers_by_grade(book: RuleBook, grades: dict[str, int]) -> dict[str, int]:
    """For each label of a public data set the tier of the rule book that has its grade.

    Raises:
      PairsError: no tier has the grade of a label.
    """
    of_grade = {tier.grade: i for i, tier in enumerate(book.tiers)}
    for label, grade in grades.items():
        if grade not in of_grade:
            raise PairsError(f"rule book {book.name!r} has no tier of grade {grade}, which stands for label {label!r}")
    return {label: of_grade[grade] for label, grade in grades.items()}


def _rows(folder: epath.Path, locale: str, small_version: bool) -> list[dict[str, str | None]]:
    key = ["product_id", "product_locale"]
    try:
        examples = pl.scan_parquet(os.fspath(folder / EXAMPLES)).filter(pl.col("product_locale") == locale)
        if small_version:
            examples = examples.filter(pl.col("small_version") == 1)
        examples = examples.select("example_id", "query", *key, "esci_label", "split")
        products = pl.scan_parquet(os.fspath(folder / PRODUCTS)).select(
            *key, "product_title", "product_description", "product_bullet_point", "product_brand", "product_color"
        )
        joined = examples.join(products, on=key, how="left", maintain_order="left")
        return joined.with_columns(pl.col("example_id").cast(pl.String)).collect().to_dicts()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise PairsError(f"{folder}: not a readable ESCI release ({EXAMPLES}, {PRODUCTS}): {error}") from error


def _pair(row: dict[str, str | None], tiers: dict[str, int], book: RuleBook) -> Pair:
    label = row["esci_label"] or ""
    if label not in tiers:
        raise PairsError(f"{EXAMPLES}: example {row['example_id']}: unknown label {label!r}; it should be one of "
                         f"{', '.join(tiers)}")
    tier = tiers[label]
    return Pair(
        id=row["example_id"] or "",
        query=_clean(row["query"]),
        title=_clean(row["product_title"]),
        description=f"{_clean(row['product_bullet_point'])} {_clean(row['product_description'])}".strip(),
        brand=_clean(row["product_brand"]),
        color=_clean(row["product_color"]),
        tier=tier,
        steps=book.implied(tier),
        split=row["split"] or "",
    )


def _clean(text: str | None) -> str:
    """Without markup, on one line."""
    return " ".join(html.unescape(_TAG.sub(" ", text or "")).split())
