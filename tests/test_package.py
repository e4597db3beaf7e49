"""The installed package: the wheel alone, its commands, its version, and the page of all fields."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import quick

import agrl_jax
from agrl_jax import __main__ as listing
from agrl_jax import fields, recipes
from agrl_jax.runtime.config import RULES, flatten

ROOT = Path(__file__).parent.parent
CONFIG = """\
from agrl_jax import recipes

def get_config():
    c = recipes.base()
    c.policy.update(vocab_size=600, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64)
    c.data.update(prompt_len=96, response_len=40)
    c.sft.update(steps=4, batch_size=8)
    c.rl.update(steps=2, batch_size=4)
    c.eval.update(every=0, pairs=8, validation_pairs=8, pass_pairs=0, batch_size=8, bootstrap=20)
    return c
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel and nothing else."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    shutil.copytree(ROOT / "agrl_jax", source / "agrl_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", "."]
    subprocess.run([sys.executable, "-m", *build], cwd=source, check=True)
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name.startswith(f"agrl_jax-{agrl_jax.__version__}-")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def python(site: Path, folder: Path, *arguments: str) -> str:
    """Runs Python in `folder` with the files of the wheel and without the checkout, and returns its output."""
    path = [str(site), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p) != ROOT)]
    environment = os.environ | quick.ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}

    assert files(installed / "agrl_jax") == files(ROOT / "agrl_jax")
    (licence,) = installed.glob("*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()


def test_the_wheel_lists_its_commands_without_jax(installed: Path, tmp_path: Path) -> None:
    said = python(installed, tmp_path, "-m", "agrl_jax")
    assert f"agrl_jax {agrl_jax.__version__}" in said
    for command in listing.COMMANDS:
        assert re.search(rf"python -m agrl_jax\.{command} +\w", said)
    modules = ", ".join(f"agrl_jax.{command}" for command in listing.COMMANDS)
    heavy = "{'jax', 'flax', 'orbax', 'tensorflow_datasets'}"
    check = f"import sys, {modules}; assert not {heavy} & set(sys.modules); print(agrl_jax.__file__)"
    assert python(installed, tmp_path, "-c", check).startswith(str(installed))


def test_help_says_what_there_is_and_is_no_mistake(installed: Path, tmp_path: Path) -> None:
    said = python(installed, tmp_path, "-m", "agrl_jax.main", "--help")
    assert "python -m agrl_jax.fields" in said and "--config.rl.steps=500" in said and "--[no]distributed" in said


def test_every_command_is_listed() -> None:
    runnable = (p for p in (ROOT / "agrl_jax").glob("*.py") if 'if __name__ == "__main__"' in p.read_text())
    assert {p.stem for p in runnable} - {"__main__"} == set(listing.COMMANDS)
    assert all(len(listing.summary(command)) > 10 for command in listing.COMMANDS)


@pytest.mark.slow
def test_the_wheel_trains_evaluates_judges_exports_and_reports(installed: Path, tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "my_config.py").write_text(CONFIG)
    (tmp_path / "pairs.csv").write_text("query,title\nred shoes,Nike running shoes\n")

    def command(name: str, *arguments: str) -> str:
        return python(installed, tmp_path, "-m", f"agrl_jax.{name}", *arguments)

    command("main", "--config=my_config.py", "--workdir=run", f"--config.data.dir={data_dir}")
    card = json.loads((tmp_path / "run" / "scorecard.json").read_text())
    assert set(card) == {"sft", "agrl"}
    command("evaluate", "--workdir=run", "--pairs=8", "--stages=rl", "--splits=b_eval")
    again = json.loads((tmp_path / "run" / "scorecard_full.json").read_text())
    assert again["agrl"]["b_eval"]["accuracy"]["value"] == card["agrl"]["b_eval"]["accuracy"]["value"]
    command("judge", "--checkpoint=run", "--input=pairs.csv", "--output=judged.csv")
    command("export", "--workdir=run", "--out=mine")
    command("judge", "--checkpoint=mine", "--input=pairs.csv", "--output=again.csv")
    assert (tmp_path / "judged.csv").read_bytes() == (tmp_path / "again.csv").read_bytes()
    assert "judge_tier" in (tmp_path / "judged.csv").read_text()
    command("report", "--workdir=run", "--out=report.html")
    assert "Category" in (tmp_path / "report.html").read_text()


# ------------------------------------------------------------------------------------------------ fields


def test_a_meaning_is_the_comment_behind_the_assignment_or_above_it() -> None:
    source = (
        "def f():\n"
        '    c.a = "#"  # of a\n'
        "    # Of b, which\n"
        "    # is long.\n"
        "    c.g.b = 2\n"
        "    c.g.c = 3\n"
        "    return c\n"
    )
    assert fields.meanings(source) == {"a": "of a", "g.b": "Of b, which is long.", "g.c": ""}


def test_every_field_and_method_has_a_meaning_and_a_range() -> None:
    known = fields.fields()
    assert {field.name: field.value for field in known} == flatten(recipes.base())
    assert [field.name for field in known if not field.meaning] == []
    assert {field.name: field.may_be for field in known} == {name: rule.expected() for name, rule in RULES.items()}
    means = fields.method_meanings()
    assert set(means) == set(recipes.METHODS) and all(means.values())


def test_the_page_of_fields_is_up_to_date() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == fields.markdown(), "python -m agrl_jax.fields --markdown > docs/config.md"
    assert "| `rl.group_size` | `4` | a whole number >= 2 |" in page


def test_fields_are_shown_by_name_by_group_and_with_the_values_of_a_config(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "my_config.py").write_text(CONFIG)
    said = python(installed, tmp_path, "-m", "agrl_jax.fields", "--config=my_config.py", "rl.steps", "sft")
    lines = [line for line in said.splitlines() if line.startswith("--config")]
    assert "--config.rl.steps=2" in lines and "--config.sft.steps=4" in lines
    assert all(line.startswith(("--config.rl.steps=", "--config.sft.")) for line in lines)
