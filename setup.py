"""Packaging. `pip install -e .` installs what training, evaluation and judging need; extras add the rest."""

from setuptools import find_packages, setup

setup(
    name="agrl_jax",
    version="0.1.0",
    description="LLM judges of e-commerce search relevance, trained by rule-aware, guided reinforcement learning",
    python_requires=">=3.11",
    packages=find_packages(include=["agrl_jax", "agrl_jax.*"]),
    package_data={"agrl_jax": ["rulebook/*.yaml", "data/bundled/ontology/*.yaml", "evaluation/html/*"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "tensorflow-datasets>=4.9.9",
        "array_record>=0.8",  # TFDS reads and writes it without TensorFlow
        "importlib_resources",  # TFDS imports it without asking for it
        "grain>=0.2.12",
        "ml-collections>=1.1",
        "absl-py",
        "etils[epath]",
        "numpy>=2.0",
        "polars>=1.30",
        "pyarrow>=18",
        "pyyaml",
        "gguf>=0.17",
        "safetensors>=0.8",
        "jinja2",  # chat templates, the report
        "rich>=13",
        "tensorboardX>=2.6.4",
        "matplotlib>=3.9",
        "scikit-learn>=1.6",
    ],
    extras_require={
        "test": [
            "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.8", "selenium>=4.20", "nbclient>=0.10",
            "ipykernel>=6.29",
        ],  # fmt: skip
        "tpu": ["jax[tpu]>=0.10"],
        "preflight": ["jax[tpu]>=0.10"],  # the TPU compiler, libtpu, of the version that JAX names; it needs no TPU
        "cuda": ["jax[cuda13]>=0.10"],
        "cuda12": ["jax[cuda12]>=0.10"],  # for drivers that are older
    },
)
