"""Chooses pairs of a pool to label next, and labels to check, by the opinions of one judge or several.

A pair to label is scored by how much a label would tell. Each reason counts from 0 to 1:

    unsure        entropy of the tier's probabilities over log(tiers), mean over the judges
    disagreement  Jensen-Shannon divergence of the judges' probabilities over its largest value: how sure they are of
                  different tiers (the mutual information of BALD, Houlsby et al., arXiv 1112.5745)
    contradiction the share of judges whose steps do not imply their tier
    new rule      1 for the first few pairs, by the other reasons, of each row of the table that no label has met

A judge without probabilities counts as sure of its tier.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from etils import epath

from agrl_jax.data import coverage
from agrl_jax.data.cells import TEXTS, clean, plain
from agrl_jax.data.format import PairsFormat
from agrl_jax.data.judged import JudgedReader, judge_columns
from agrl_jax.data.pairs import AS_DESCRIBED, STEP_PREFIX, Pair, item_text
from agrl_jax.data.rows import KINDS, PairsError, RowFile, check_columns, listed, open_rows
from agrl_jax.judging import PREFIX, REASONS
from agrl_jax.judging.engine import Judge
from agrl_jax.judging.labelled import Scored
from agrl_jax.rulebook.schema import RuleBook, winners
from agrl_jax.rulebook.versions import condition
from agrl_jax.runtime.console import progress
from agrl_jax.runtime.files import OutputError, in_one_piece
from agrl_jax.types import UNKNOWN

_LEAST = 0.05  # a reason below this is not named


@dataclass(frozen=True)
class Opinions:
    """What a judge says of the N rows of a pool."""

    tier: np.ndarray  # [N] int index of the tier, UNKNOWN where it has none
    probs: np.ndarray  # [N, tiers] float64
    steps: np.ndarray  # [N, R] int, UNKNOWN where not stated


class Pool(NamedTuple):
    """The rows of a file to choose from."""

    file: RowFile
    columns: Mapping[str, str]  # from our names of columns to the file's
    keys: list[tuple[str, str]]  # one for each row, equal for the same pair
    open: np.ndarray  # [N] bool: the row can be labelled, and is not yet


class Suggestion(NamedTuple):
    """A row of a pool, or of a labelled file, and why it is worth a look."""

    row: int  # the first is 1
    score: float
    because: str


# ------------------------------------------------------------------------------------------ what to label


def open_pool(path: epath.PathLike, columns: Mapping[str, str], labelled: Iterable[Pair] = ()) -> Pool:
    """The rows of a file with `query` and `title`. Rows with a `label`, other rows of the same pairs, and pairs
    `labelled` elsewhere are closed, as are rows that cannot be read.

    Raises:
      PairsError: the file cannot be read, lacks a column, or has nothing left to label.
    """
    file = open_rows(path)
    columns = {"query": "query", "title": "title", "label": "label", **columns}
    if wrong := [name for name in columns if name not in (*TEXTS, "label")]:
        raise PairsError(f"columns: there is no column {wrong[0]!r}; there are {', '.join((*TEXTS, 'label'))}")
    check_columns(file, [column for name, column in columns.items() if name in TEXTS])
    label = columns["label"]
    known = {_key_of(pair) for pair in labelled}
    keys, whole = [], []
    for row in file.rows():
        keys.append(_key(row.record, columns))
        whole.append(not row.error and all(clean(row.record.get(columns[name])) for name in ("query", "title")))
        if clean(row.record.get(label)):
            known.add(keys[-1])
    left = [one and key not in known for one, key in zip(whole, keys, strict=True)]
    if not any(left):
        raise PairsError(f"{path}: has no pair that could be labelled and is not")
    return Pool(file, columns, keys, np.array(left))


def ask(judge: Judge, pool: Pool) -> Opinions:
    """Judges the open rows of a pool."""
    book = judge.book
    tiers, names = [tier.name for tier in book.tiers], [step.name for step in book.steps]
    found = _no_opinions(len(pool.keys), book)
    rows = ((i, row.record) for i, row in enumerate(pool.file.rows()) if pool.open[i])
    with progress("judge", int(pool.open.sum())) as bar:
        while chunk := list(itertools.islice(rows, judge.chunk)):
            asked = [{name: record.get(pool.columns.get(name, name)) for name in TEXTS} for _, record in chunk]
            for (i, _), judged in zip(chunk, judge.judge(asked, bar.advance), strict=True):
                if not judged.error:
                    found.tier[i] = tiers.index(judged.tier)
                    found.probs[i] = [judged.probs[name] for name in tiers]
                    found.steps[i] = [
                        step.values.index(judged.steps[name]) for step, name in zip(book.steps, names, strict=True)
                    ]
    return found


def read_opinions(path: epath.PathLike, pool: Pool, book: RuleBook, form: PairsFormat = AS_DESCRIBED) -> Opinions:
    """What a judged file, as `agrl_jax.judge` writes it, says of the rows of a pool. Both have the same rows.

    Raises:
      PairsError: the file cannot be read, lacks a column, has rows that cannot be used, or other rows than the pool.
    """
    file = open_rows(path)
    theirs = {name: form.columns.get(name, name) for name in judge_columns(book)}
    check_columns(file, [theirs[f"{PREFIX}tier"], *(pool.columns[name] for name in ("query", "title"))])
    if file.count != len(pool.keys):
        raise PairsError(f"{path}: has {file.count} rows, and {pool.file.path} has {len(pool.keys)}: it is of others")
    reader = JudgedReader(book, form, {name: column for name, column in theirs.items() if column in file.names})
    found = _no_opinions(len(pool.keys), book)
    for i, row in enumerate(file.rows()):
        if not pool.open[i]:
            continue
        query, title = (clean(row.record.get(pool.columns[name])) for name in ("query", "title"))
        if query.casefold() != pool.keys[i][0] or not pool.keys[i][1].startswith(title):
            raise PairsError(f"{path}: row {i + 1} is not the pair of row {i + 1} of {pool.file.path}")
        found.tier[i], found.probs[i], found.steps[i] = reader.read(i + 1, row.record)
    if reader.bad:
        raise PairsError(listed(f"{path}: {len(reader.bad)} rows cannot be used:", reader.bad))
    return found


def met_rows(paths: Iterable[epath.PathLike], book: RuleBook, form: PairsFormat = AS_DESCRIBED) -> np.ndarray:
    """[rows of the table] bool: whether the labelled pairs of files are known to meet the row."""
    groups = [group for path in paths for group in coverage.read_stated(path, [book], form)[0]]
    return np.array([row["pairs"] > 0 for row in coverage.meet(groups, book, form)["rows"]])


def without_judgements(form: PairsFormat) -> PairsFormat:
    """The form without the columns of judgements."""
    columns = {name: column for name, column in form.columns.items() if not name.startswith(PREFIX)}
    return dataclasses.replace(form, columns=columns)


def choose(
    opinions: Sequence[Opinions], pool: Pool, book: RuleBook, number: int, met: np.ndarray | None = None,
    by: Sequence[str] = REASONS, per_rule: int = 3, per_query: int = 0,
) -> list[Suggestion]:
    """The rows of a pool that are most worth a label, best first; each pair once.

    Args:
      opinions: of one judge or several.
      pool: the rows. Rows without a judge's tier are left out.
      book: gives tiers, steps and table.
      number: how many rows to choose at most.
      met: [rows of the table] bool: labels have met the row; by default none.
      by: the reasons that count, of REASONS.
      per_rule: pairs of each row of the table not yet met that count as new.
      per_query: how many of one query at most; 0: any number.
    """
    reasons = _reasons(opinions, book)
    base = sum((reasons[name] for name in by if name in reasons), np.zeros(len(pool.keys)))
    judged = pool.open & np.all([one.tier != UNKNOWN for one in opinions], axis=0)
    order = np.flatnonzero(judged)[np.argsort(-base[judged], kind="stable")]
    once = {pool.keys[i]: i for i in reversed(order.tolist())}  # the first row in order of each pair
    order = np.array([i for i in order.tolist() if once[pool.keys[i]] == i], int)
    rules = _rule(opinions, book)
    if "new rule" in by:
        reasons["new rule"] = np.zeros(len(base))
        for rule in range(len(book.rows)):
            if met is None or not met[rule]:
                reasons["new rule"][order[rules[order] == rule][:per_rule]] = 1
        base = base + reasons["new rule"]
        order = order[np.argsort(-base[order], kind="stable")]
    taken: Counter[str] = Counter()
    found = []
    for i in order.tolist():
        query = pool.keys[i][0]
        if len(found) == number:
            break
        if per_query and taken[query] == per_query:
            continue
        taken[query] += 1
        said = {name: float(reasons[name][i]) for name in by if reasons[name][i] >= _LEAST}
        because = [_because(name, i, opinions, book, rules) for name in sorted(said, key=lambda name: -said[name])]
        found.append(Suggestion(i + 1, float(base[i]), "; ".join(because) or "nothing speaks for it"))
    return found


def _reasons(opinions: Sequence[Opinions], book: RuleBook) -> dict[str, np.ndarray]:
    """[N] for each reason but `new rule`, which depends on the others."""
    each = np.stack([_entropy(one.probs) for one in opinions])
    mixed = _entropy(np.mean([one.probs for one in opinions], axis=0))
    most = math.log(min(len(opinions), len(book.tiers)))  # the largest divergence possible
    apart = (mixed - each.mean(axis=0)) / most if most else np.zeros(len(mixed))
    return {
        "unsure": each.mean(axis=0) / math.log(len(book.tiers)),
        "disagreement": np.maximum(apart, 0),
        "contradiction": np.mean([_contradicts(one, book) for one in opinions], axis=0),
    }


def _entropy(probs: np.ndarray) -> np.ndarray:
    return -np.sum(probs * np.log(np.where(probs > 0, probs, 1)), axis=1)


def _contradicts(one: Opinions, book: RuleBook) -> np.ndarray:
    """[N] bool: the steps are all stated, and give another tier."""
    stated = (one.steps != UNKNOWN).all(axis=1)
    return stated & (_at(book.tier_table().reshape(book.num_values), one.steps) != one.tier)


def _rule(opinions: Sequence[Opinions], book: RuleBook) -> np.ndarray:
    """[N] the row of the table that the steps of the first judge to state them all meet; UNKNOWN if no judge does."""
    found = np.full(len(opinions[0].tier), UNKNOWN)
    for one in opinions:
        stated = (one.steps != UNKNOWN).all(axis=1) & (found == UNKNOWN)
        found[stated] = _at(winners(book.rows, book.num_values), one.steps)[stated]
    return found


def _at(table: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The entries of a table at steps [N, R]."""
    return table[tuple(steps.T)]


def _because(name: str, i: int, opinions: Sequence[Opinions], book: RuleBook, rules: np.ndarray) -> str:
    names = [tier.name for tier in book.tiers]
    if name == "unsure":
        mixed = np.mean([one.probs[i] for one in opinions], axis=0)
        return "unsure: " + ", ".join(f"{names[k]} {mixed[k]:.2f}" for k in np.argsort(-mixed)[:2])
    if name == "disagreement":
        said = [f"{names[one.tier[i]]} {one.probs[i, one.tier[i]]:.2f}" for one in opinions]
        return f"judges disagree: {' and '.join(said)}"
    if name == "contradiction":
        one = next(one for one in opinions if _contradicts(one, book)[i])
        return f"contradiction: {names[one.tier[i]]}, by its steps {names[book.tier_for(one.steps[i].tolist())]}"
    row = book.rows[rules[i]]
    return f"new rule: no label has met {condition(book, row)} -> {names[row.tier]}"


def _no_opinions(count: int, book: RuleBook) -> Opinions:
    tiers, steps = len(book.tiers), len(book.steps)
    return Opinions(np.full(count, UNKNOWN), np.zeros((count, tiers)), np.full((count, steps), UNKNOWN))


def _key(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str]:
    """Query and item as a prompt shows them, upper and lower case of the query aside."""
    texts = {name: clean(record.get(columns.get(name, name)), cents=name == "price") for name in TEXTS}
    return _key_of(Pair(id="", **texts))


def _key_of(pair: Pair) -> tuple[str, str]:
    """The same of a pair that has been read."""
    return pair.query.casefold(), item_text(pair)


# ------------------------------------------------------------------------------------------ which to check


def doubts(scored: Sequence[Scored], contradicting: Iterable[int], book: RuleBook, number: int) -> list[Suggestion]:
    """The labels that are most likely errors, worst first.

    A label's score is how much likelier another tier is (the mean over the judges), plus 1 if its own steps contradict
    it by the table, plus 1 if the same pair stands elsewhere with another label.

    Args:
      scored: labelled pairs with the judgements of one judge or several, of the same pairs.
      contradicting: rows whose steps contradict their label.
      book: gives the tiers.
      number: how many at most.
    """
    names, contradicting = [tier.name for tier in book.tiers], set(contradicting)
    judged: dict[int, list[np.ndarray]] = defaultdict(list)
    for one in scored:
        for pair, probs in zip(one.pairs, one.judged.probs, strict=True):
            judged[pair.row].append(probs)
    pairs = {pair.row: pair for one in scored for pair in one.pairs}
    alike: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs.values():
        alike[_key_of(pair)].append(pair)
    found = []
    for row, pair in pairs.items():
        probs = np.mean(judged[row], axis=0)
        best, because = int(probs.argmax()), []
        score = float(probs[best] - probs[pair.tier])
        if score > 0:
            label, likeliest = (f"{names[tier]} {probs[tier]:.2f}" for tier in (pair.tier, best))
            because.append(f"labelled {label}, judged {likeliest}")
        if row in contradicting:
            because.append("its steps contradict the label")
        others = [o for o in alike[_key_of(pair)] if o.tier != pair.tier]
        if others:
            because.append(f"the same pair is {names[others[0].tier]} in row {others[0].row}")
        if because:
            found.append(Suggestion(row, score + (row in contradicting) + bool(others), "; ".join(because)))
    return sorted(found, key=lambda one: (-one.score, one.row))[:number]


# ------------------------------------------------------------------------------------------ the file


def check_kind(path: epath.PathLike) -> None:
    """Raises OutputError where `write` does not know the kind of file."""
    if epath.Path(path).suffix.lower() not in KINDS:
        raise OutputError(f"{path}: unknown kind of file; it should end in one of: {', '.join(KINDS)}")


def write(
    path: epath.PathLike, file: RowFile, chosen: Sequence[Suggestion], book: RuleBook,
    columns: Mapping[str, str] | None = None, keep_labels: bool = False,
) -> None:
    """Writes the chosen rows as a file to label, which `read_pairs` takes when it is labelled.

    They have the columns of `file` without judgements; then `label` and a column for each step, which are empty unless
    `keep_labels`; and `suggest_row` (the number in `file`), `suggest_score` and `suggest_because`. `columns` are the
    file's names of our columns, where they differ. In CSV and TSV, numbers among the texts of a pair are written as the
    judge reads them, since a price of 129.0 is shown as 129.00, and so its text has to be.
    """
    named = {name: (columns or {}).get(name, name) for name in (*TEXTS, "label")}
    label, kind = named.pop("label"), epath.Path(path).suffix.lower()
    steps = [STEP_PREFIX + step.name for step in book.steps]
    records = dict(_picked(file, {one.row for one in chosen}))
    rows = []
    for one in chosen:
        record = {name: value for name, value in records[one.row].items() if not name.startswith(PREFIX)}
        empty = dict.fromkeys([label, *steps], "")
        record = empty | record if keep_labels else record | empty
        record |= {"suggest_row": one.row, "suggest_score": round(one.score, 4), "suggest_because": one.because}
        if kind in (".csv", ".tsv"):
            for name, column in named.items():
                if isinstance(record.get(column), float):
                    record[column] = clean(record[column], cents=name == "price")
        rows.append(record)
    names = [name for name in file.names if not name.startswith(PREFIX)]
    names = list(dict.fromkeys([*names, label, *steps, "suggest_row", "suggest_score", "suggest_because"]))
    with in_one_piece(path) as half, half.open("wb") as out:
        if kind == ".jsonl":
            lines = (json.dumps({name: row.get(name) for name in names}, ensure_ascii=False) for row in rows)
            out.writelines(f"{line}\n".encode() for line in lines)
            return
        cells = {name: [row.get(name) for row in rows] for name in names}
        frame = pl.DataFrame({
            name: pl.Series([json.dumps(v) if isinstance(v, list | dict) else v for v in column], strict=False)
            for name, column in cells.items()
        })  # fmt: skip
        if kind == ".parquet":
            frame.write_parquet(out)
        else:
            frame.write_csv(out, separator="\t" if kind == ".tsv" else ",")


def check_rows(one: Scored, path: epath.PathLike, pairs: Sequence[Pair], source: epath.PathLike) -> None:
    """Raises PairsError where the judgements of a file at `path` are not of the `pairs` in the rows of `source`."""
    there = {pair.row: _key_of(pair) for pair in pairs}
    for pair in one.pairs:
        if there.get(pair.row) != _key_of(pair):
            raise PairsError(f"{path}: row {pair.row} is not the labelled pair of row {pair.row} of {source}")


def _picked(file: RowFile, numbers: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    return ((number, plain(row.record)) for number, row in enumerate(file.rows(), 1) if number in numbers)
