"""Comparisons of methods: sweeps over configs, a runner that resumes, and tables of its results."""
