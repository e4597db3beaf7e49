"""The flags by which commands name a judge, and the judge that they name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from agrl_jax.judging import STAGES
from agrl_jax.runtime.config import RULES

if TYPE_CHECKING:
    from agrl_jax.judging.engine import Judge

AXES = {"data": -1, "fsdp": 1, "tensor": 1}


def define(batch_size: int) -> None:
    """Defines the flags, with this default of --batch_size."""
    what = "The judge in the box, smollm2-four-tier, or a workdir, a Hugging Face folder or a GGUF file."
    flags.DEFINE_string("checkpoint", None, what, required=True)
    flags.DEFINE_enum("stage", "best", STAGES, "Of a workdir: the best or the last of RL, or its start.")
    flags.DEFINE_integer("batch_size", batch_size, "Pairs judged at once; fewer take as long.", lower_bound=1)
    flags.DEFINE_bool("use_cuts", False, "Choose the tier by the cut points that were kept.")
    flags.DEFINE_bool("steps", True, "False: the tier alone, of a judge that states it first.")
    flags.DEFINE_string("rulebook", None, "The rule book of a model not trained by agrl_jax; else where its own lies.")
    orders, styles = RULES["rulebook.order"].choices, RULES["data.style"].choices
    flags.DEFINE_enum("order", None, orders, "The order of its responses, likewise.")
    flags.DEFINE_enum("style", None, styles, "The prompt's style; full: with the rule book's instructions.")
    flags.DEFINE_integer("prompt_len", None, "Tokens of a prompt; longer item texts are shortened.", lower_bound=1)
    flags.DEFINE_integer("response_len", None, "Tokens of a response.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "The dtype of parameters and computation.")
    for axis, size in AXES.items():
        flags.DEFINE_integer(f"mesh.{axis}", size, f"Devices along this axis, as the field mesh.{axis} of a config.")


def load(values: flags.FlagValues, use_cuts: bool) -> Judge:
    """Loads the judge.

    Raises:
      ConfigError, TrainedError, ...: see `judging.files.USER_ERRORS`.
    """
    from agrl_jax.judging.engine import Judge  # after the flags: JAX takes seconds to start
    from agrl_jax.judging.trained import Settings
    from agrl_jax.runtime import sharding

    settings = Settings(
        values.rulebook, values.order, values.style, values.prompt_len, values.response_len, values.dtype
    )
    return Judge.from_checkpoint(
        values.checkpoint, stage=values.stage, settings=settings, batch_size=values.batch_size, use_cuts=use_cuts,
        mesh=sharding.make_mesh(*(values[f"mesh.{axis}"].value for axis in AXES)), steps=values.steps,
    )  # fmt: skip
