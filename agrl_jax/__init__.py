"""LLM judges of e-commerce search relevance, trained by reinforcement learning in JAX."""

__version__ = "0.1.0"
