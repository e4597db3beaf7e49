"""The study of the language model with ten times the steps, for an accelerator.

    python -m experiments.language_model_long --minutes=9 [--config.data.test_path=PAIRS.csv]

The same command goes on where it was, so that pieces of ten minutes suffice. See `experiments/language_model.py`.
"""

from __future__ import annotations

import sys

from experiments import language_model

PLAN = language_model.Plan("language_model_long", __file__, times=10)
SWEEP = PLAN.sweep
get_config = PLAN.get_config

if __name__ == "__main__":
    language_model.main(sys.argv, PLAN)
