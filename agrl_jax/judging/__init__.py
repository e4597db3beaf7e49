"""Trained policies as judges of pairs, of files of any length and over HTTP, and their export."""

STAGES = ("best", "rl", "sft_end")  # of a workdir: the best of RL by validation, its end, and its start
REASONS = ("unsure", "disagreement", "contradiction", "new rule")  # why a pair is worth a label; see `suggest`
PREFIX = "judge_"  # of the columns that judging adds to a file
