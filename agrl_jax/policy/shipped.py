"""Finds the models that installed packages contain, by name."""

from __future__ import annotations

from pathlib import Path

from agrl_jax.policy.families import LoadingError
from agrl_jax.policy.smollm2 import find_smollm2
from agrl_jax.runtime.files import is_remote

SMOLLM2 = "smollm2"  # the file in the wheel of SmolLM2
_BOXED = Path(__file__).parent / "boxed"  # folders of adapters, in this package


def boxed() -> list[str]:
    """The names of the judges in this package."""
    return sorted(folder.name for folder in _BOXED.glob("*") if folder.is_dir())


def is_boxed(path: Path) -> bool:
    """Whether a folder is one of this package's own."""
    return path.parent == _BOXED


def named(name: str | Path) -> Path | None:
    """The path of the model named `smollm2` or after a judge in the box; None for any other name.

    Raises:
      NotInstalledError: the package that contains it is missing.
    """
    if name == SMOLLM2:
        return find_smollm2()
    return _BOXED / name if str(name) in boxed() else None


def find(name: str | Path) -> Path:
    """The path of a model, from its name or path.

    Raises:
      NotInstalledError: as `named`.
      LoadingError: it is in a bucket.
    """
    if is_remote(name):
        raise LoadingError(f"{name}: should be a local folder or file; copy it from the bucket first")
    return named(name) or Path(name).expanduser()
