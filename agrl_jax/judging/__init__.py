"""Trained policies as judges of pairs, of files of any length and over HTTP, and their export."""

from agrl_jax.data.cells import PREFIX as PREFIX

STAGES = ("best", "rl", "sft_end")  # of a workdir: the best of RL by validation, its end, and its start
REASONS = ("unsure", "disagreement", "contradiction", "new rule")  # why a pair is worth a label; see `suggest`
