"""Lists the commands: `python -m agrl_jax`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import agrl_jax

COMMANDS = (
    "main", "evaluate", "judge", "serve", "export", "report", "distill", "side_by_side", "agree", "rank", "suggest",
    "lint", "preflight", "fields",
)  # fmt: skip


def summary(command: str) -> str:
    """The first line of a command's docstring, which is read without importing it."""
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].partition(": `")[0].rstrip(".:")


def main(argv: list[str]) -> None:
    """Exit code 2 for arguments: commands are modules."""
    print(f"agrl_jax {agrl_jax.__version__}: judges of search relevance, trained by reinforcement learning\n")
    for command in COMMANDS:
        print(f"  python -m agrl_jax.{command:13} {summary(command)}")
    print("\nEach says more with --help. The first one to try, from a checkout:\n")
    print("  python -m agrl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart")
    if argv[1:]:
        print(f"\nerror: commands are modules: python -m agrl_jax.{argv[1]}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv)
