"""WANDS, Wayfair's annotated search data (Chen et al. 2022; MIT licence), from its public release.

The release's folder `dataset` has the three tab-separated files that are read here.
"""

from __future__ import annotations

import polars as pl
from etils import epath

from agrl_jax.data.esci import tiers_by_grade
from agrl_jax.data.pairs import SHARES, Pair, PairsError, PairsFile, split_by_query
from agrl_jax.rulebook.book import RuleBook

QUERIES, PRODUCTS, LABELS = "query.csv", "product.csv", "label.csv"
GRADES = {"Exact": 4, "Partial": 3, "Irrelevant": 1}


def read_wands(folder: epath.PathLike, book: RuleBook, seed: int = 0) -> PairsFile:
    """Reads all pairs and splits them by query, 80/10/10.

    Args:
      folder: where the three files are.
      book: its tiers need the grades 4, 3 and 1. WANDS has no steps; those that a tier implies are filled in.
      seed: of the split.

    Raises:
      PairsError: a file is missing, lacks a column, or holds an unknown label; or the rule book lacks a grade.
    """
    tiers = tiers_by_grade(book, GRADES)
    root = epath.Path(folder)
    labels = _read(root / LABELS, "id", "query_id", "product_id", "label")
    queries = _read(root / QUERIES, "query_id", "query")
    products = _read(root / PRODUCTS, "product_id", "product_name", "product_class", "product_description")
    rows = (
        labels.join(queries, on="query_id", how="left", maintain_order="left")
        .join(products, on="product_id", how="left", maintain_order="left")
        .to_dicts()
    )
    titled = [row for row in rows if row["query"] and row["product_name"]]
    pairs = [_pair(row, tiers, book) for row in titled]
    if not pairs:
        raise PairsError(f"{root / LABELS}: has no pairs")
    splits = split_by_query(pairs, seed, SHARES)
    return PairsFile(splits, dropped=len(rows) - len(pairs))


def _read(file: epath.Path, *columns: str) -> pl.DataFrame:
    try:
        frame = pl.read_csv(file.read_bytes(), separator="\t", infer_schema=False)
        return frame.select(columns)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise PairsError(f"{file}: not a readable file of WANDS with {', '.join(columns)}: {error}") from error


def _pair(row: dict[str, str | None], tiers: dict[str, int], book: RuleBook) -> Pair:
    if row["label"] not in tiers:
        known = ", ".join(tiers)
        raise PairsError(f"{LABELS}: id {row['id']}: unknown label {row['label']!r}; it should be one of {known}")
    tier = tiers[row["label"]]
    return Pair(
        id=row["id"] or "",
        query=_clean(row["query"]),
        title=_clean(row["product_name"]),
        description=_clean(row["product_description"]),
        category=_clean(row["product_class"]),
        tier=tier,
        steps=book.implied(tier),
    )


def _clean(text: str | None) -> str:
    return " ".join((text or "").split())
