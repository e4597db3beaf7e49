"""Writes scorecards as a file, as a table on the console and in Markdown."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.table
import rich.text
from etils import epath

from agrl_jax.evaluation.intervals import FEW
from agrl_jax.evaluation.metrics import ScorecardError, Scorecards, Scores
from agrl_jax.runtime import markdown
from agrl_jax.runtime.files import read_json, write_json

SMALL = 50  # a support below this is flagged


def write(path: epath.PathLike, cards: Mapping[str, Mapping[str, Scores]]) -> None:
    """Writes scorecards `{stage: {split: scores}}` as JSON, in one piece.

    The file keeps other stages, and other splits of a stage that were scored at the same step. In a run of several
    processes, call it on one.

    Raises:
      ScorecardError: the file exists and is not a scorecard.
    """
    path = epath.Path(path)
    merged = kept(path)
    for stage, card in cards.items():
        steps = {_step(scores) for scores in card.values()}
        same = {split: scores for split, scores in merged.get(stage, {}).items() if {_step(scores)} == steps}
        merged[stage] = same | card
    write_json(path, merged, indent=1)


def _step(scores: Scores) -> int | None:
    return scores.get("settings", {}).get("step")


def read(path: epath.PathLike) -> Scorecards:
    """The scorecards `{stage: {split: scores}}` of a file.

    Raises:
      ScorecardError: the file is missing or not a scorecard.
    """
    cards = read_json(path, ScorecardError, "; move it away, or write to another file")
    if not all(isinstance(card, dict) for card in cards.values()):
        raise ScorecardError(f"{path}: not a scorecard, which is {{stage: {{split: {{metric: ...}}}}}}")
    return cards


def kept(path: epath.Path) -> Scorecards:
    """The scorecards of a file, as `read` gives them; none if there is no file."""
    return read(path) if path.exists() else {}


_SECTIONS = (  # of the table; a name that ends in / or @ stands for all names that begin with it
    ("accuracy", "macro_f1", "good_f1", "auc", "kappa", "mae"),
    ("f1/",),
    ("step_accuracy", "step_accuracy/", "all_right", "adherence"),
    ("format", "truncated", "response_tokens", "pass@", "majority@"),
    ("ece", "brier", "nll"),
    ("likeliest_accuracy", "likeliest_macro_f1", "disagreement"),
)
_LABELS = {
    "macro_f1": "macro-F1", "good_f1": "Good-F1", "auc": "AUC Good/Bad", "kappa": "kappa (quadr.)",
    "mae": "MAE [grades]", "step_accuracy": "step accuracy", "all_right": "all right",
    "adherence": "rule adherence", "format": "well-formed", "response_tokens": "answer [tokens]",
    "ece": "ECE", "brier": "Brier", "nll": "NLL [nats]", "likeliest_accuracy": "likeliest accuracy",
    "likeliest_macro_f1": "likeliest macro-F1",
}  # fmt: skip


class Sheet(NamedTuple):
    """The content of a table."""

    title: str
    columns: list[str]
    sections: list[list[list[str]]]  # rows of cells
    note: str


def table(cards: Mapping[str, Mapping[str, Scores]]) -> rich.console.Group:
    """Scorecards to print with rich: the stages side by side, split by split, and a short table by family.

    Two stages fit 80 columns, three fit 100. The difference is the last stage minus the first.
    """
    drawn = []
    for sheet in sheets(cards):
        grid = rich.table.Table(
            title=rich.text.Text(sheet.title, style="bold not italic"), title_justify="left", show_edge=False,
            caption=rich.text.Text(sheet.note, style="dim") if sheet.note else None, caption_justify="left",
            box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
        )  # fmt: skip
        for i, column in enumerate(sheet.columns):
            cells = [row[i] for rows in sheet.sections for row in rows]
            word = max((len(word) for cell in cells for word in cell.split()), default=0)  # a line breaks between words
            grid.add_column(rich.text.Text(column), justify="right" if i else "left", no_wrap=i == 0, min_width=word)
        for rows in sheet.sections:
            for row in rows:
                grid.add_row(*map(rich.text.Text, row))
            grid.add_section()
        drawn += [grid, ""]
    return rich.console.Group(*drawn[:-1])


def to_markdown(cards: Mapping[str, Mapping[str, Scores]]) -> str:
    """What `table` shows, as Markdown."""
    blocks = []
    for sheet in sheets(cards):
        rows = itertools.chain.from_iterable(sheet.sections)
        blocks += [f"**{sheet.title}**", markdown.table(sheet.columns, rows, figures=True)]
        blocks += [sheet.note.replace("*", r"\*")] if sheet.note else []
    return "\n\n".join(blocks) + "\n" if blocks else ""


def sheets(cards: Mapping[str, Mapping[str, Scores]]) -> Iterator[Sheet]:
    """For each split the metrics of every stage that has it, then the cuts."""
    for split in dict.fromkeys(split for card in cards.values() for split in card):
        stages = {stage: card[split] for stage, card in cards.items() if split in card}
        yield _metrics_sheet(split, stages)
        if any(_cut_names(stages, cut) for cut in ("by_family", "by_seen")):
            yield _cuts_sheet(split, stages)


def _metrics_sheet(split: str, stages: Mapping[str, Scores]) -> Sheet:
    names = list(dict.fromkeys(name for scores in stages.values() for name in scores))
    sections = []
    for members in _SECTIONS:
        shown = [n for n in names if n in members or any(m[-1] in "/@" and n.startswith(m) for m in members)]
        rows = [[_label(name), *_row(name, [scores.get(name) for scores in stages.values()])] for name in shown]
        sections += [rows] if rows else []
    differs = ["difference"] if len(stages) > 1 else []
    columns = ["", "n", *stages, *differs]
    note = "In brackets: 95% bootstrap intervals, by query.\nLower is better: MAE, truncated, ECE, Brier, NLL."
    if any(row[1].endswith("*") for rows in sections for row in rows):
        note += f" * fewer than {SMALL}."
    if tiers := dict.fromkeys(t for scores in stages.values() for t in scores.get("macro_f1", {}).get("tiers", ())):
        note += "\n" + textwrap.fill(f"macro-F1: the mean over the tiers with pairs: {', '.join(tiers)}.", 78)
    if any("too few" in cell for rows in sections for row in rows for cell in row):
        note += f"\ntoo few: pairs of a tier, fewer than {FEW}, for an interval."
    return Sheet(split, columns, sections, note)


def _row(name: str, measures: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Support, each stage's value with interval, and the last minus the first."""
    cells = [_support(measures)]
    for measure in measures:
        cell = _short(measure and measure["value"])
        if measure and measure["low"] is not None:
            cell += f" [{_short(measure['low'])},{_short(measure['high'])}]"
        elif measure and _too_few(name, measure):
            cell += " too few"
        cells.append(cell)
    if len(measures) > 1:
        first, last = (measure and measure["value"] for measure in (measures[0], measures[-1]))
        cells.append("-" if first is None or last is None else _short(last - first, sign="+"))
    return cells


def _too_few(name: str, measure: Mapping[str, Any]) -> bool:
    """Whether a tier that the F1 rests on has too few pairs for an interval."""
    pairs = measure.get("tiers", {}).values() if name == "macro_f1" else [measure["n"]] * name.startswith("f1/")
    return any(0 < n < FEW for n in pairs)


def _cuts_sheet(split: str, stages: Mapping[str, Scores]) -> Sheet:
    """Families, and seen and unseen: the first stage's value and the last one's, two decimals."""
    shown = ("accuracy", "macro_f1", "step_accuracy", "adherence")
    ends = [*stages.values()] if len(stages) == 1 else [[*stages.values()][0], [*stages.values()][-1]]
    sections = []
    for cut in ("by_family", "by_seen"):
        rows = []
        for name in _cut_names(stages, cut):
            found = [scores.get(cut, {}).get(name, {}) for scores in ends]
            cells = ["→".join(_two(scores.get(metric)) for scores in found) for metric in shown]
            rows.append([name, _support([scores.get("accuracy") for scores in found]), *cells])
        sections += [rows] if rows else []
    names = list(stages)
    title = f"{split} by family: {names[0]}" + (f" → {names[-1]}" if len(names) > 1 else "")
    note = f"* fewer than {SMALL}." if any(row[1].endswith("*") for rows in sections for row in rows) else ""
    return Sheet(title, ["", "n", "accuracy", "macro-F1", "steps", "adherence"], sections, note)


def _cut_names(stages: Mapping[str, Scores], cut: str) -> list[str]:
    """The parts of a cut that have pairs; none if there is only one."""
    names = [
        name
        for scores in stages.values()
        for name, measures in scores.get(cut, {}).items()
        if measures.get("accuracy", {}).get("n")
    ]
    names = list(dict.fromkeys(names))
    return names if len(names) > 1 else []


def _label(name: str) -> str:
    if name.startswith("f1/"):
        return f"F1 {name[3:]}"
    if name.startswith("step_accuracy/"):
        return f"  {name.split('/', 1)[1]}"
    return _LABELS.get(name, name)


def _support(measures: Sequence[Mapping[str, Any] | None]) -> str:
    """The support, flagged if small; several if the stages differ."""
    supports = list(dict.fromkeys(measure["n"] for measure in measures if measure))
    return "/".join(f"{n:,}" for n in supports) + ("*" if any(n < SMALL for n in supports) else "")


def _short(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return format(value, f"{sign}.3f" if abs(value) < 10 else f"{sign}.1f")


def _two(measure: Mapping[str, Any] | None) -> str:
    return "-" if not measure or measure["value"] is None else f"{measure['value']:.2f}"
