"""Prints the oldest versions that pyproject.toml allows, as constraints for pip: `numpy>=2.0` is `numpy==2.0`."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    name, floor = re.match(r"([\w-]+)(?:\[\w+\])?(?:>=([\d.]+))?", requirement).groups()
    if floor:
        print(f"{name}=={floor}")
