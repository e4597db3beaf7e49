"""The flags by which commands name a judge, and the judge that they name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from agrl_jax.judging import STAGES
from agrl_jax.runtime.config import RULES

if TYPE_CHECKING:
    from agrl_jax.judging.engine import Judge

_AXES = {"data": -1, "fsdp": 1, "tensor": 1}


def define(batch_size: int) -> None:
    """Defines them, the size of a batch with this default."""
    what = "The judge in the box, smollm2-four-tier, or a workdir, a Hugging Face folder or a GGUF file."
    flags.DEFINE_string("checkpoint", None, what, required=True)
    flags.DEFINE_enum("stage", "best", STAGES, "Of a workdir: the best of RL, its end, or its start.")
    flags.DEFINE_integer("batch_size", batch_size, "Pairs judged at once; fewer take as long.", lower_bound=1)
    flags.DEFINE_bool("use_cuts", False, "Choose the tier by the cut points that were kept.")
    flags.DEFINE_string("rulebook", None, "Rule book of a model that is not ours; else where to find the trained one.")
    orders, styles = RULES["rulebook.order"].choices, RULES["data.style"].choices
    flags.DEFINE_enum("order", None, orders, "Order of the response of a model that is not ours.")
    flags.DEFINE_enum("style", None, styles, "Of the prompt: full with the rule book's instructions.")
    flags.DEFINE_integer("prompt_len", None, "Tokens of a prompt; longer item texts are shortened.", lower_bound=1)
    flags.DEFINE_integer("response_len", None, "Tokens of a response.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of parameters and computation.")
    for axis, size in _AXES.items():
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
        mesh=sharding.make_mesh(*(values[f"mesh.{axis}"].value for axis in _AXES)),
    )  # fmt: skip
