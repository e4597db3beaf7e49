"""The environment of tests that start processes which mostly compile, and whose programs run for milliseconds."""

COMPILING = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",  # halves what is then left of the time
}
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", **COMPILING}
