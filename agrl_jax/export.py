"""Exports a trained judge as a Hugging Face folder, which `transformers`, vLLM, SGLang and `agrl_jax.judge` load.

    python -m agrl_jax.export --workdir=runs/quickstart --out=my_judge

The folder holds weights, tokenizer (with the chat template, if there is one) and generation config; the rule book,
and its grammar as EBNF and as a regular expression, for structured decoding; `agrl_jax.json`, by which the judge asks
the policy as it was trained to be asked; and a model card, README.md.
"""

from __future__ import annotations

import sys

from absl import flags

from agrl_jax.judging import STAGES
from agrl_jax.runtime.config import exit_with, parse_flags


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_string("out", None, "The folder to write, empty or not there.", required=True)
    flags.DEFINE_enum("stage", "best", STAGES, "The best of RL, its end, or its start.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of the weights; by default as trained.")


def main(argv: list[str]) -> None:
    """Exit code 2 for a workdir that is not there or an `out` that is not empty."""
    _define_flags()
    parse_flags(argv)
    values = flags.FLAGS
    from agrl_jax.judging.export import USER_ERRORS, export  # after the flags: JAX takes seconds to start
    from agrl_jax.runtime import processes
    from agrl_jax.runtime.console import say

    try:
        processes.require_one("exports")
        say(f"{export(values.workdir, values.out, values.stage, values.dtype)}: written to {values.out}")
    except USER_ERRORS as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv)
