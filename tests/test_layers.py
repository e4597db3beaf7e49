"""The imports of every module keep to the layers of the package.

The lowest layer has `types`, `hints`, `policy`, `runtime` and `rulebook`. They do not import each other, except
`types`, `hints`, and `runtime.files`, which writes all files. `rl` knows jax, `types` and how tokens are scored; `data`
knows the rule book and the tokenizer. Above them are supervised training and evaluation, then training, then judging
and bounds. The other files at the top are commands: they may use all of these, but not `main`. Only configuration,
recipes, training and the layers above training see a ConfigDict.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "agrl_jax"

MAY_IMPORT = {
    "types": set(),
    "hints": set(),
    "policy": {"types", "runtime.files"},
    "runtime": {"types", "hints"},
    "rulebook": {"types", "hints"},
    "rl": {"types", "policy.scoring"},
    "data": {"types", "hints", "rulebook", "runtime.files", "policy.tokenizer"},
    "recipes": {"runtime.config"},
}
BELOW_TRAINING = {"types", "hints", "policy", "runtime", "rulebook", "rl", "data"}
MAY_IMPORT["supervised"] = MAY_IMPORT["evaluation"] = BELOW_TRAINING
MAY_IMPORT["training"] = BELOW_TRAINING | {"supervised", "evaluation", "recipes"}
MAY_IMPORT["judging"] = MAY_IMPORT["bounds"] = MAY_IMPORT["training"] | {"training"}

RL_LIBRARIES = {"jax", "flax", "optax", "numpy"}  # arrays, their containers, and the update; no files, flags or text
CONFIG_DICT = {"runtime.config", "recipes", "training", "judging", "bounds"}  # besides the commands and configs/


def modules() -> list[str]:
    """Dotted names below the package, such as `rl.step`."""
    paths = (p.relative_to(ROOT).with_suffix("") for p in sorted(ROOT.rglob("*.py")))
    return [".".join(p.parts) for p in paths if p.parts != ("__init__",)]


def imports(source: str, module: str) -> set[str]:
    """Absolute dotted names that the source of `agrl_jax.{module}` imports, also inside functions."""
    package = ["agrl_jax", *module.split(".")][:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}" for alias in node.names}
    return found


def violations(source: str, module: str) -> list[str]:
    """The names that the source of `agrl_jax.{module}` imports against the layers."""
    part = module.split(".")[0]
    allowed = MAY_IMPORT.get(part)
    found = []
    for name in sorted(imports(source, module)):
        top, _, inside = name.partition(".")
        if top == "agrl_jax":
            to = inside.split(".")[0]
            fine = (
                to == part
                or to == ""
                or (allowed is None and to != "main")
                or (allowed is not None and any((inside + ".").startswith(a + ".") for a in allowed))
            )
        elif top == "ml_collections":
            fine = module in CONFIG_DICT or part in CONFIG_DICT or allowed is None
        else:
            fine = part != "rl" or top in RL_LIBRARIES or top in sys.stdlib_module_names - {"os", "pathlib", "io"}
        if not fine:
            found.append(name)
    return found


@pytest.mark.parametrize("module", modules())
def test_module_imports_only_what_lies_below_it(module):
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert violations(path.read_text(), module) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("rl.step", "from agrl_jax.policy import transformer", "agrl_jax.policy.transformer"),
        ("rl.step", "def f():\n    import agrl_jax.rulebook.book", "agrl_jax.rulebook.book"),
        ("rl.step", "from ..data import pairs", "agrl_jax.data.pairs"),
        ("rl.step", "import ml_collections", "ml_collections"),
        ("rl.step", "import pathlib", "pathlib"),
        ("policy.loading", "from agrl_jax.runtime.sharding import put", "agrl_jax.runtime.sharding.put"),
        ("data.pipeline", "from agrl_jax.policy.transformer import build", "agrl_jax.policy.transformer.build"),
        ("supervised.sft", "from agrl_jax.training import run", "agrl_jax.training.run"),
        ("evaluation.evaluator", "from agrl_jax.training.assemble import Model", "agrl_jax.training.assemble.Model"),
        ("training.assemble", "from agrl_jax import evaluate", "agrl_jax.evaluate"),
        ("supervised.sft", "from ml_collections import ConfigDict", "ml_collections.ConfigDict"),
        ("training.run", "from agrl_jax.main import main", "agrl_jax.main.main"),
        ("report", "import agrl_jax.main", "agrl_jax.main"),
    ],
)
def test_an_import_from_above_is_found(module, source, wrong):
    assert violations(source, module) == [wrong]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rl.step", "from agrl_jax.rl import reward\nfrom agrl_jax.types import Batch\nimport jax.numpy as jnp"),
        ("data.pipeline", "from agrl_jax.policy.tokenizer import Tokenizer\nfrom agrl_jax.rulebook import wording"),
        ("training.run", "from agrl_jax.rl import step\nfrom agrl_jax.runtime import config\nimport ml_collections"),
        ("evaluate", "import polars\nfrom agrl_jax.training.run import train\nimport ml_collections"),
    ],
)
def test_an_import_from_below_is_fine(module, source):
    assert violations(source, module) == []


def test_no_two_files_import_each_other():
    known = set(modules())

    def below(module):
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        found = {name.removeprefix("agrl_jax.") for name in imports(path.read_text(), module)}
        return {name if name in known else name.rpartition(".")[0] for name in found} & known

    graph = {module: below(module) for module in known}
    assert [(a, b) for a in known for b in graph[a] if a in graph[b]] == []
