"""Pages that load nothing: template, style, script and data in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2


def render(name: str, data: Any, **context: Any) -> str:
    """The page of the template `name`.html with its style and its script, if any, which reads the JSON-able `data`."""
    folder = Path(__file__).parent
    script = folder / f"{name}.js"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((folder / f"{name}.html").read_text()).render(
        context, data=json.dumps(data, allow_nan=False).replace("<", r"\u003c"),
        style=(folder / "base.css").read_text() + (folder / f"{name}.css").read_text(),
        script=script.read_text() if script.exists() else "",
    )  # fmt: skip
