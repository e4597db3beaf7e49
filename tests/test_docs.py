"""The README and the documents name files, commands and fields that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from agrl_jax import recipes
from agrl_jax.runtime.config import flatten

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FIELDS = flatten(recipes.base())


def anchors(page: Path) -> set[str]:
    """The names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_field_exists(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ((?:agrl_jax|benchmarks|experiments)[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, f"{page.name}: {module}"
    for path in re.findall(r"(?:configs|experiments|examples|tests)/\w+\.\w+", text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"
    for field in re.findall(r"--config\.([a-z_]+\.[a-z_0-9]+)", text):
        assert field in FIELDS, f"{page.name}: {field}"
    groups = {name.partition(".")[0] for name in FIELDS if "." in name}
    for group, name in re.findall(r"`([a-z]+)\.([a-z_]+)[=`]", text):
        if group in groups and name not in ("json", "jsonl", "py", "yaml"):  # a file
            assert f"{group}.{name}" in FIELDS, f"{page.name}: {group}.{name}"


def test_the_readme_is_short_and_the_architecture_names_every_module() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    page = (ROOT / "docs" / "architecture.md").read_text()
    modules = [p.relative_to(ROOT / "agrl_jax") for p in (ROOT / "agrl_jax").rglob("*.py") if p.name != "__init__.py"]
    assert [str(path) for path in modules if not re.search(rf"`(?:[\w/]*/)?{re.escape(path.name)}`", page)] == []
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", page)
    assert [path for path in named if not (ROOT / "agrl_jax" / path).exists() and not (ROOT / path).exists()] == []
