"""Exports a trained judge as a Hugging Face folder, which `transformers`, vLLM, SGLang and `agrl_jax.judge` load.

    python -m agrl_jax.export --workdir=runs/quickstart --out=my_judge
    python -m agrl_jax.export --checkpoint=smollm2-four-tier --out=my_judge    the judge in the box, or another folder

The folder holds weights, tokenizer (with the chat template, if there is one) and generation config; the rule book,
and its grammar as EBNF and as a regular expression, for structured decoding; `agrl_jax.json`, which tells the judge
how prompts were written in training; and a model card, README.md. With `--adapters`, the folder has a run's low-rank
adapters in place of its weights, a few MB; it then needs the model that they were trained over.
"""

from __future__ import annotations

import sys

from absl import flags

from agrl_jax.judging import STAGES
from agrl_jax.runtime.config import ConfigError, exit_with, parse_flags


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The workdir of a training run.")
    flags.DEFINE_string("checkpoint", None, "The name or folder of a judge, in place of a workdir.")
    flags.DEFINE_bool("adapters", False, "Write only the low-rank adapters of the workdir.")
    flags.DEFINE_string("out", None, "The folder to write; empty, or not there.", required=True)
    flags.DEFINE_enum("stage", "best", STAGES, "The best or the last of RL, or its start.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of the weights; by default as trained.")


def main(argv: list[str]) -> None:
    """Exit code 2 for a workdir that is not there or an `out` that is not empty."""
    _define_flags()
    parse_flags(argv)
    values = flags.FLAGS
    if bool(values.workdir) == bool(values.checkpoint) or (values.adapters and not values.workdir):
        exit_with(ConfigError("one of --workdir and --checkpoint is needed; --adapters goes with --workdir"))
    from agrl_jax.judging.export import USER_ERRORS, export, export_model  # after the flags: JAX takes seconds to start
    from agrl_jax.runtime import processes
    from agrl_jax.runtime.console import say

    try:
        processes.require_one("exports")
        if values.workdir:
            done = export(values.workdir, values.out, values.stage, values.dtype, values.adapters)
        else:
            done = export_model(values.checkpoint, values.out, values.dtype)
        say(f"{done}: written to {values.out}")
    except USER_ERRORS as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv)
