"""Comparisons of methods: sweeps over configs, a runner that resumes, and the tables made of its results."""
