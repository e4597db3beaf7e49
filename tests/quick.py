"""Settings for tests and the processes that they start: compile quickly, for programs that run for milliseconds."""

import jax

# This flag saves a quarter of the time to compile for a CPU. Later versions of JAX do not start with it.
_FLAGS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
COMPILING = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": _FLAGS}
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", **COMPILING}
