"""Models by name: those that a package brings."""

from __future__ import annotations

from pathlib import Path

from agrl_jax.policy.smollm2 import find_smollm2

SMOLLM2 = "smollm2"  # the file that the wheel of SmolLM2 brings
_BOXED = Path(__file__).parent / "boxed"  # folders of adapters, in this package


def boxed() -> list[str]:
    """The names of the judges that this package brings."""
    return sorted(folder.name for folder in _BOXED.glob("*") if folder.is_dir())


def is_boxed(path: Path) -> bool:
    """Whether a folder is one of this package's own."""
    return path.parent == _BOXED


def named(name: str | Path) -> Path | None:
    """Where the model of a name lies, `smollm2` or a judge in the box; None for what is no such name.

    Raises:
      NotInstalledError: the package that brings it is missing.
    """
    if name == SMOLLM2:
        return find_smollm2()
    return _BOXED / name if str(name) in boxed() else None


def find(name: str | Path) -> Path:
    """Where a model lies, by its name or path. Raises NotInstalledError as `named`."""
    return named(name) or Path(name).expanduser()
