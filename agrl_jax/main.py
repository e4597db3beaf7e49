"""Trains a judge.

    python -m agrl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

A config file has a function `get_config` that returns the fields of a run. `--config=FILE:grpo` hands it an argument,
such as the method. Any field can be set here too: `--config.rl.steps=500`. All fields, with default, range and meaning:

    python -m agrl_jax.fields
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import config_flags

from agrl_jax.runtime.config import define_distributed_flag, parse_flags
from agrl_jax.runtime.memory import with_huge_pages

config_flags.DEFINE_config_file("config", None, "A config file, such as configs/quickstart.py:grpo.")
flags.DEFINE_string("workdir", None, "The folder to write everything to, gs://... too; an existing run is continued.")
define_distributed_flag()
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Parses flags and trains.

    Exit codes: 2 for bad input, 3 for a run that diverged, 1 for one that lost a process, 128 + signal if stopped.
    """
    parse_flags(argv)
    from agrl_jax.runtime import processes
    from agrl_jax.training import run  # after the flags: a typo is answered at once, not after JAX has started

    try:
        with run.exit_codes():
            processes.connect(flags.FLAGS.distributed)
            run.train(flags.FLAGS.config, flags.FLAGS.workdir)
    except Exception as error:
        processes.leave(error)


if __name__ == "__main__":
    with_huge_pages()
    main(sys.argv)
