"""A sweep that takes a minute, for tests of the machinery."""

from __future__ import annotations

from ml_collections import ConfigDict
from tiny import get_config as tiny

from experiments.study import Sweep


def base() -> ConfigDict:
    """The tiny policy, with steps that last long enough for a test to interrupt them."""
    c = tiny()
    c.sft.steps = 6
    c.rl.steps = 8
    c.eval.update(every=4, pairs=48, bootstrap=0, pass_pairs=0)
    return c


SWEEP = Sweep("mini", runs={"sft": {}, "sft_all": {}, "agrl": {}}, seeds=(0, 1), tuned=None, base=base)
get_config = SWEEP.get_config
