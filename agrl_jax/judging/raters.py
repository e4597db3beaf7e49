"""Files of judged pairs that several people have rated, one row a pair or one row a rating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from agrl_jax.data.cells import clean
from agrl_jax.data.format import PairsFormat, judged_reader, label_reader
from agrl_jax.data.pairs import AS_DESCRIBED
from agrl_jax.data.rows import PairsError, check_columns, listed, open_rows
from agrl_jax.evaluation import agreement
from agrl_jax.judging import PREFIX
from agrl_jax.rulebook.book import RuleBook
from agrl_jax.types import UNKNOWN


@dataclass(frozen=True)
class Ratings:
    """The ratings of N pairs, as indices of tiers; UNKNOWN where a pair is not rated."""

    query: list[str]
    title: list[str]
    family: list[str]
    raters: tuple[str, ...]
    labels: np.ndarray  # [N, raters] int
    judged: np.ndarray  # [N] int, the judge's tier
    confidence: np.ndarray | None  # [N] the highest of the judge's tier probabilities, if all that it judged have them


def read_ratings(
    path: epath.PathLike, book: RuleBook, raters: Sequence[str] = (), rater: str = "",
    form: PairsFormat = AS_DESCRIBED,
) -> Ratings:
    """Reads a file with the columns `query`, `title`, `judge_tier`, optionally `family` and `judge_prob_TIER`, and
    ratings: a column for each of `raters`; or one row for each rating, with the rater's name in the column `rater` and
    the tier in `label`. Tiers are given by name or grade; an empty cell is no rating.

    Args:
      path: the file.
      book: gives the tiers.
      raters: columns that hold ratings, in a file with one row a pair.
      rater: the column that names the rater, in a file with one row a rating. Rows of one query and title are one pair.
      form: of the file: the names of its columns, its labels.

    Raises:
      PairsError: the file cannot be read, lacks a column, or has rows that cannot be used: all are counted.
    """
    if bool(raters) == bool(rater):
        raise PairsError("either the columns of the raters are needed, or the column that names the rater")
    file = open_rows(path)
    wanted = ["query", "title", f"{PREFIX}tier", *raters, *((rater, "label") if rater else ())]
    check_columns(file, [form.columns.get(name, name) for name in wanted])
    reader, pairs = _Reader(book, form), dict[Any, dict[str, Any]]()
    for number, row in enumerate(file.rows(), 1):
        if row.error:
            reader.bad.append(f"row {number}: {row.error}")
            continue
        cell = reader.cells(row.record)
        key = (cell("query"), cell("title")) if rater else number
        pair = pairs.setdefault(key, {"cell": cell, "number": number, "labels": {}})
        if said := cell(f"{PREFIX}tier"):
            before = pair["cell"](f"{PREFIX}tier")
            if not before:
                pair |= {"cell": cell, "number": number}  # the judgement may stand in any row of the pair
            elif said != before:
                reader.bad.append(f"row {number}: the judge gives this pair {said!r}, and {before!r} in row "
                                  f"{pair['number']}; items that differ need other titles")
        for name, column in [(cell(rater), "label")] if rater else [(name, name) for name in raters]:
            label = reader.tier(number, column, cell(column))
            if label == UNKNOWN:
                continue
            if not name:
                reader.bad.append(f"row {number}: {rater} is empty")
            elif pair["labels"].setdefault(name, label) != label:
                reader.bad.append(f"row {number}: {name!r} has rated this pair already, and otherwise")
    names = tuple(raters) if raters else tuple(sorted({name for pair in pairs.values() for name in pair["labels"]}))
    judged = [reader.tier(pair["number"], f"{PREFIX}tier", pair["cell"](f"{PREFIX}tier")) for pair in pairs.values()]
    confidence = [reader.confidence(pair["number"], pair["cell"]) for pair in pairs.values()]
    unsure = any(one is None and tier != UNKNOWN for one, tier in zip(confidence, judged, strict=True))
    if reader.bad:
        raise PairsError(listed(f"{path}: {len(reader.bad)} rows cannot be used:", reader.bad))
    cells = [pair["cell"] for pair in pairs.values()]
    return Ratings(
        query=[cell("query") for cell in cells],
        title=[cell("title") for cell in cells],
        family=[cell("family") or "all" for cell in cells],
        raters=names,
        labels=np.array([[pair["labels"].get(name, UNKNOWN) for name in names] for pair in pairs.values()]),
        judged=np.array(judged),
        confidence=None if unsure else np.array(confidence, float),
    )


class _Reader:
    """Reads cells, and notes what is wrong with them."""

    def __init__(self, book: RuleBook, form: PairsFormat) -> None:
        self.bad: list[str] = []
        self._columns, self._names = form.columns, [tier.name for tier in book.tiers]
        self._of_people, self._wanted = label_reader(book, form)
        self._of_judge, _ = judged_reader(book, form)

    def cells(self, record: Mapping[str, Any]) -> Any:
        """The function that gives a row's cell as text."""

        def cell(name: str) -> str:
            return clean(record.get(self._columns.get(name, name)))

        return cell

    def tier(self, number: int, name: str, text: str) -> int:
        tier_of = self._of_judge if name == f"{PREFIX}tier" else self._of_people
        tier = tier_of(text) if text else UNKNOWN
        if text and tier == UNKNOWN:
            self.bad.append(f"row {number}: {name} {text!r} should be {self._wanted}")
        return tier

    def confidence(self, number: int, cell: Any) -> float | None:
        texts = [cell(f"{PREFIX}prob_{name}") for name in self._names]
        try:
            return max(map(float, texts)) if all(texts) else None
        except ValueError:
            self.bad.append(f"row {number}: the probabilities of the tiers should be numbers, not {', '.join(texts)}")
            return None


def report(ratings: Ratings, book: RuleBook, wanted: float, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """All figures of how the judge agrees with people, JSON-able.

    `alpha` of the people, without and with the judge among them; `pairs` of raters (`compare`): the judge with each
    rater and with the majority, each rater with the majority of the others; `by_tier` and `by_family`: the judge with
    the majority, by tier without kappas, which are 0 where one of two is constant; and, where probabilities are known,
    `coverage`, the gain from abstaining, and `abstain`, the threshold for the `wanted` agreement with the majority.
    """
    grades, tiers = [tier.grade for tier in book.tiers], len(book.tiers)
    labels, judged, names = ratings.labels, ratings.judged, ratings.raters
    most = agreement.majority(labels, tiers)

    def compare(one: np.ndarray, other: np.ndarray, rows: np.ndarray | slice = slice(None)) -> dict[str, Any]:
        query = list(np.array(ratings.query, dtype=object)[rows])
        return agreement.compare(one[rows], other[rows], query, grades, bootstrap, seed)

    def alpha(of: np.ndarray) -> dict[str, Any]:
        return agreement.alpha_of(of, ratings.query, grades, bootstrap, seed)

    pairs = [{"one": "judge", "other": "majority"} | compare(judged, most)]
    pairs += [{"one": "judge", "other": name} | compare(judged, labels[:, i]) for i, name in enumerate(names)]
    for i, name in enumerate(names):
        others = agreement.majority(np.delete(labels, i, axis=1), tiers)
        pairs.append({"one": name, "other": "majority of the others"} | compare(labels[:, i], others))
    pairs += [
        {"one": names[i], "other": names[k]} | compare(labels[:, i], labels[:, k])
        for i in range(len(names)) for k in range(i + 1, len(names))
    ]  # fmt: skip
    families = np.array(ratings.family, dtype=object)
    found = {
        "pairs_rated": len(judged), "raters": list(names), "no_majority": int((most == UNKNOWN).sum()),
        "unjudged": int((judged == UNKNOWN).sum()),
        "alpha": {"people": alpha(labels), "people and judge": alpha(np.column_stack([labels, judged]))},
        "pairs": pairs,
        "by_tier": {
            tier.name: {name: of for name, of in compare(judged, most, most == i).items() if "kappa" not in name}
            for i, tier in enumerate(book.tiers)
        },
        "by_family": {name: compare(judged, most, families == name) for name in sorted(set(ratings.family))},
    }  # fmt: skip
    known = (most != UNKNOWN) & (judged != UNKNOWN)
    if ratings.confidence is not None and known.any():
        curve = agreement.risk_coverage(ratings.confidence[known], judged[known] == most[known])
        found |= {"coverage": curve, "wanted": wanted, "abstain": agreement.threshold(curve, wanted)}
    return found
