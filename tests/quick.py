"""Settings for tests and the processes that they start: compile quickly, for programs that run for milliseconds."""

import jax

# These flags save a third of the time to compile for a CPU. Later versions of JAX do not start with the first.
_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_FLAGS = _FLAGS if jax.__version_info__ < (0, 11) else ""
COMPILING = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": _FLAGS}
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", **COMPILING}
