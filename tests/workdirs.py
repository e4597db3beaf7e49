"""Workdirs as training leaves them, made in a second without training, with a small and confident policy."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from tiny import get_config

from agrl_jax.policy.tokenizer import train_bpe
from agrl_jax.runtime.checkpoint import Checkpointer
from agrl_jax.training import assemble
from agrl_jax.types import Params

ITEMS = ["Query: red shoes", "Item: Nike running shoes, red"]


def make_workdir(folder: Path, **rulebook: str) -> Path:
    """A workdir with the end of a warm start and two checkpoints of RL; the first one is the best."""
    config = get_config()
    config.policy.layers = 1  # which compiles sooner
    config.rulebook.update(rulebook)
    assemble.write_config(config, epath.Path(folder))
    assemble.keep_rules(config, epath.Path(folder))
    phrases = [f"\n{phrase.text}" for phrase in assemble.load_rules(config).phrases]
    train_bpe([*ITEMS, *phrases], 400).save(folder)
    model = assemble.load_model(config, folder)
    identity = {"config": config.to_dict(), "rulebook": model.book.digest, "versions": {}}
    with Checkpointer(folder, identity=identity) as checkpoints:
        checkpoints.save_sft(draw(model, 0))
        checkpoints.save("rl", 3, {"params": draw(model, 3)}, metrics={"macro_f1": 0.5})
        checkpoints.save("rl", 6, {"params": draw(model, 6)}, metrics={"macro_f1": 0.4})
    return folder


def draw(model: assemble.Model, seed: int) -> Params:
    """Parameters that are larger than untrained ones, whose logits are almost equal."""
    params = model.init(jax.random.key(seed))
    return jax.tree.map(lambda x: jnp.asarray(3 * x) if x.ndim > 1 else x, params)
