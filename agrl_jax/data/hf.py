"""Labelled pairs from a dataset of the `datasets` library that lies on this machine; nothing is downloaded.

Its columns are those of `agrl_jax.data.pairs`, or named by a `PairsFormat`. Class labels are read by their names. The
splits of a dataset are the splits of the pairs; a dataset without splits is split by query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from agrl_jax.data.cells import plain
from agrl_jax.data.pairs import SPLITS
from agrl_jax.data.rows import PairsError, Row, RowTable, dataset_row

_NAMES = {"dev": "validation", "valid": "validation", "val": "validation"}  # of splits, besides ours
_KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


@dataclasses.dataclass(frozen=True)
class Splits(RowTable):
    """The rows of datasets, one split after another, read as they are needed."""

    splits: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # datasets by our name of the split, or by ""

    @property
    def count(self) -> int:
        """The number of rows."""
        return sum(map(len, self.splits.values()))

    @property
    def names(self) -> list[str]:
        """The names of the columns, with `split` where the dataset has splits."""
        columns = [name for split in self.splits.values() for name in split.column_names]
        return list(dict.fromkeys([*columns, *(["split"] if "" not in self.splits else [])]))

    def rows(self) -> Iterator[Row]:
        """All rows in order; class labels by their names."""
        for name, split in self.splits.items():
            for record in split:
                yield Row(plain(dataset_row(record, split.features) | ({"split": name} if name else {})))


def open_dataset(path: epath.PathLike) -> Splits:
    """The rows of a dataset, which `read_pairs` takes.

    Args:
      path: a folder that `save_to_disk` wrote, a folder of data files as on the hub, or one data file.

    Raises:
      PairsError: the `datasets` library is missing, the path is no dataset, or its splits are not ours.
    """
    found = _load(epath.Path(path))
    if not isinstance(found, dict):
        return Splits((), str(path), splits={"": found})
    named = {_NAMES.get(name, name): split for name, split in found.items()}
    if list(named) == ["train"]:  # the library's name for data without splits
        return Splits((), str(path), splits={"": named["train"]})
    for name in found:
        if _NAMES.get(name, name) not in SPLITS or len(named) < len(found):
            raise PairsError(f"{path}: has the splits {', '.join(found)}; there should be {', '.join(SPLITS)}")
    where = f"{path} (rows of {', then '.join(found)})"
    return Splits((), where, splits=named)


def _load(path: epath.Path) -> Any:
    """The `Dataset`, or the `DatasetDict` of several splits, at a path."""
    try:
        import datasets  # here: an optional dependency
    except ImportError:
        raise PairsError(
            f"{path}: reading a dataset needs the library `datasets`: pip install 'agrl_jax[hf]'"
        ) from None
    if not path.exists():
        raise PairsError(
            f"{path}: there is no such folder or file; a dataset of the hub is first saved to one: "
            f"datasets.load_dataset({str(path)!r}).save_to_disk('FOLDER')"
        )
    kind = _KINDS.get(path.suffix.lower())
    if path.is_file() and kind is None:
        raise PairsError(f"{path}: unknown kind of file; it should end in one of: {', '.join(_KINDS)}")
    saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            return datasets.load_from_disk(str(path))
        if kind:
            more = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
            return datasets.load_dataset(kind, data_files=str(path), split="train", **more)
        return datasets.load_dataset(str(path))
    except Exception as error:  # the library's readers can raise anything
        reason = str(error).partition("\n")[0]
        raise PairsError(f"{path}: not a dataset that can be read: {reason}") from error
