"""Flags that several benchmarks share."""

from __future__ import annotations

from absl import flags

from benchmarks import workload

WORK = flags.DEFINE_enum("work", "A", list(workload.WORKS), "how much a step samples and learns from")
MODEL = flags.DEFINE_enum("model", "smollm2", list(workload.SHAPES), "the policy's shape")
DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "of the arithmetic; auto: float32 on a CPU, else bfloat16"
)
REPEATS = flags.DEFINE_integer("repeats", 3, "times each figure is taken", lower_bound=1)
CHUNK = flags.DEFINE_integer("logprob_chunk", 0, "positions whose logits are held at once; 0: all", lower_bound=0)
OUT = flags.DEFINE_string("out", "", "results file; by default a name in benchmarks/results")
