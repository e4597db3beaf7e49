"""Trains a student that states the tier first from a judge that reasons before it answers.

    python -m agrl_jax.distill --checkpoint=runs/quickstart --workdir=runs/student
    python -m agrl_jax.judge --checkpoint=runs/student --steps=False --input=pairs.csv --output=judged.csv

The teacher judges pairs once: those that it was trained on, or those of a file, which need no labels (`--pairs`). The
student starts from the teacher's weights. It learns the teacher's tier probabilities through the rule book, and after
the tier the steps that the teacher states. Asked for the tier alone, it makes one decision a pair.

The teacher is a workdir, a folder that `agrl_jax.export` wrote, or the judge in the box. The student takes the
teacher's config; any field can be set: `--config.distill.steps=500`. A stopped command goes on where it was when it is
given again. At the end it shows the scorecards of teacher and student.
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import config_flags

from agrl_jax import recipes
from agrl_jax.judging import STAGES
from agrl_jax.runtime.config import exit_with, flatten, overrides_error, parse_flags
from agrl_jax.runtime.memory import with_huge_pages


def _define_flags(argv: list[str]) -> None:
    flags.DEFINE_string("checkpoint", None, "The teacher: a workdir, an export, a judge in the box.", required=True)
    flags.DEFINE_string("workdir", None, "The student's; an existing one is continued.", required=True)
    flags.DEFINE_enum("stage", "best", STAGES, "The stage of a teacher's workdir.")
    flags.DEFINE_string("pairs", "", "A file of pairs, labelled or not; by default the teacher's training pairs.")
    flags.DEFINE_integer("number", 0, "How many of its training pairs, drawn by the seed; 0: all.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 64, "Pairs that the teacher judges at once.", lower_bound=1)
    what = "Fields of the student that differ from the teacher's."
    config_flags.DEFINE_config_dict("config", recipes.base(), what, sys_argv=argv)


def main(argv: list[str]) -> None:
    """Exit codes: those of `agrl_jax.main`."""
    known = flatten(recipes.base())
    try:
        _define_flags(argv)
    except KeyError as error:  # of a field that is not known
        exit_with(overrides_error(error, argv, known=known))
    parse_flags(argv, known=known)
    values = flags.FLAGS
    from agrl_jax.judging import distillation
    from agrl_jax.runtime import processes
    from agrl_jax.training import run

    try:
        with run.exit_codes(distillation.USER_ERRORS):
            processes.require_one("distills")
            distillation.distill(
                values.checkpoint, values.workdir, stage=values.stage, pairs=values.pairs, number=values.number,
                batch_size=values.batch_size, changes=config_flags.get_override_values(values["config"]),
            )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    with_huge_pages()
    main(sys.argv)
