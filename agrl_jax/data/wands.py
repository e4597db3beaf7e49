"""WANDS, Wayfair's annotated search data (Chen et al. 2022; MIT licence), from its public release.

The release's folder `dataset` has the three tab-separated files that are read here.
"""

from __future__ import annotations

from collections.abc import Iterator

from etils import epath

from agrl_jax.data.cells import clean
from agrl_jax.data.esci import tiers_by_grade
from agrl_jax.data.pairs import SHARES, Pair, PairsError, PairsFile, split_by_query
from agrl_jax.data.rows import check_columns, open_rows
from agrl_jax.rulebook.book import RuleBook

QUERIES, PRODUCTS, LABELS = "query.csv", "product.csv", "label.csv"
_PRODUCT = ("product_id", "product_name", "product_class", "product_description")
GRADES = {"Exact": 4, "Partial": 3, "Irrelevant": 1}


def read_wands(folder: epath.PathLike, book: RuleBook, seed: int = 0) -> PairsFile:
    """Reads all pairs and splits them by query, 80/10/10.

    Args:
      folder: holds the three files.
      book: its tiers need the grades 4, 3 and 1. WANDS has no steps; those that a tier implies are filled in.
      seed: of the split.

    Raises:
      PairsError: a file is missing, lacks a column, or holds an unknown label; or the rule book lacks a grade.
    """
    tiers = tiers_by_grade(book, GRADES)
    root = epath.Path(folder)
    labels = list(_read(root / LABELS, "id", "query_id", "product_id", "label"))
    queries = {row["query_id"]: row["query"] for row in _read(root / QUERIES, "query_id", "query")}
    wanted = {label["product_id"] for label in labels}
    products = {row["product_id"]: row for row in _read(root / PRODUCTS, *_PRODUCT) if row["product_id"] in wanted}
    pairs = [
        _pair(label, queries[label["query_id"]], products[label["product_id"]], tiers, book)
        for label in labels
        if label["query_id"] in queries and label["product_id"] in products
    ]
    pairs = [pair for pair in pairs if pair.query and pair.title]
    if not pairs:
        raise PairsError(f"{root / LABELS}: has no pairs")
    splits = split_by_query(pairs, seed, SHARES)
    return PairsFile(splits, dropped=len(labels) - len(pairs))


def _read(file: epath.Path, *columns: str) -> Iterator[dict[str, str]]:
    """The columns of each row."""
    rows = open_rows(file, delimiter="\t")  # whatever the name says
    check_columns(rows, columns)
    for number, row in enumerate(rows.rows(), 1):
        if row.error:
            raise PairsError(f"{file}: row {number} (line {row.line}) {row.error}")
        yield {name: clean(row.record[name]) for name in columns}


def _pair(label: dict[str, str], query: str, product: dict[str, str], tiers: dict[str, int], book: RuleBook) -> Pair:
    if label["label"] not in tiers:
        known = ", ".join(tiers)
        raise PairsError(f"{LABELS}: id {label['id']}: unknown label {label['label']!r}; it should be one of {known}")
    tier = tiers[label["label"]]
    return Pair(
        id=label["id"],
        query=query,
        title=product["product_name"],
        description=product["product_description"],
        category=product["product_class"],
        tier=tier,
        steps=book.implied(tier),
    )
