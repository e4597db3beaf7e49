"""The committed notebooks hold no outputs, and run from top to bottom in a fresh kernel, with small settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import quick

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
SMALL = {
    "policy.vocab_size": 600, "policy.width": 32, "policy.layers": 2, "policy.heads": 2, "policy.kv_heads": 1,
    "policy.head_dim": 16, "policy.mlp": 64, "data.prompt_len": 96, "data.response_len": 40, "sft.steps": 12,
    "sft.batch_size": 16, "rl.steps": 4, "rl.batch_size": 8, "reward.overlong_from": 32, "eval.every": 2,
    "eval.pairs": 24, "eval.validation_pairs": 24, "eval.pass_k": 2, "eval.pass_pairs": 8, "eval.batch_size": 8,
    "eval.bootstrap": 50, "log.samples_every": 2,
}  # fmt: skip


def test_they_are_committed_clean_and_install_alike() -> None:
    books = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    assert [path.stem for path in NOTEBOOKS] == ["quickstart", "your_rulebook"]
    for notebook in books:
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    first, second = ([cell for cell in notebook.cells if cell.cell_type == "code"][0] for notebook in books)
    assert first.source == second.source


def first_cell(folder: Path, path: str = "") -> subprocess.CompletedProcess:
    """Runs the first cell in `folder`, with a Python without installed packages, and prints the package it found."""
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    source = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return subprocess.run(
        [sys.executable, "-S", "-c", f"{source}\nimport agrl_jax; print(agrl_jax.__file__)"],
        cwd=folder, env={"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_first_cell_finds_a_checkout_and_an_installed_package(tmp_path: Path) -> None:
    mine = str(ROOT / "agrl_jax" / "__init__.py")
    assert first_cell(ROOT / "colab").stdout.strip() == mine  # a notebook in a checkout
    (tmp_path / "agrl_jax").symlink_to(ROOT)  # a checkout beside the notebook
    assert first_cell(tmp_path).stdout.strip() == str(tmp_path / "agrl_jax" / "agrl_jax" / "__init__.py")
    assert first_cell(tmp_path.parent, str(ROOT)).stdout.strip() == mine


def test_the_first_cell_says_what_to_do_where_there_is_no_package(tmp_path: Path) -> None:
    done = first_cell(tmp_path)
    assert done.returncode == 1 and "ModuleNotFoundError: agrl_jax is not here" in done.stderr
    assert "pip wheel" in done.stderr and "OWNER" not in done.stderr


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The outputs, as text, of a notebook in a fresh kernel of this Python; `small` settings follow its parameters."""
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "here", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for name, value in quick.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))

    def execute(name: str) -> str:
        notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
        (at,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
        small = nbformat.v4.new_code_cell(f"WORKDIR = {str(tmp_path / 'run')!r}\nCHANGES = {SMALL!r}")
        notebook.cells.insert(at + 1, small)
        client.NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)

    return execute


@pytest.mark.slow
def test_the_quickstart_trains_plots_reports_and_judges(run, tmp_path: Path) -> None:
    said = run("quickstart")
    assert "b_eval" in said and "Category: " in said and "'4-Excellent': 0." in said
    for file in ("scorecard.json", "curves.png", "report.html"):
        assert (tmp_path / "run" / file).exists()


@pytest.mark.slow
def test_a_rule_book_for_another_business_is_trained_and_its_reward_shown(run, tmp_path: Path) -> None:
    said = run("your_rulebook")
    assert "rule book jobs: 3 steps, 3 tiers" in said and "contradict" not in said
    assert "Role: " in said and "'1-Skip': 0." in said
    rows = {line.split("┆")[0].strip("│ "): line for line in said.splitlines() if "┆" in line}
    right, wrong = (float(rows[name].split("┆")[1]) for name in ("right", "no steps"))
    assert right > wrong
