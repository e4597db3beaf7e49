"""Tunix's GRPO learner with its vanilla rollout.

Settings: `micro_batch` and `logps_batch`, the numbers of prompts that go through the gradient and the reference at once
(by default all, without accumulation).
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer
from tunix.models.llama3 import model, params
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.contenders.protocol import BETA, LEARNING_RATE, Report, Task, main


def run(task: Task, report: Report) -> None:
    logging.disable(logging.WARNING)
    shape = _shape(task)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    tokenizer.bos_token = None  # the other contenders put no beginning token before a prompt
    tokenizer.pad_token = tokenizer.eos_token
    number = len(task.texts)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(LEARNING_RATE, weight_decay=0.0),
        eval_every_n_steps=10**9,
        max_steps=task.warmup + task.steps,
        mini_batch_size=number,
        train_micro_batch_size=task.settings.get("micro_batch", number),
        rollout_micro_batch_size=number,
        compute_logps_micro_batch_size=task.settings.get("logps_batch", number),
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=task.response_len,
        max_prompt_length=task.prompt_len,
        kv_cache_size=task.prompt_len + task.response_len,
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[shape.vocab_size],  # a token that is never drawn: no answer ends early
    )
    roles = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=_load(task, shape, mesh),
        reference=_load(task, shape, mesh),
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT)},
            training_config=training,
            rollout_config=rollout,
        ),
    )
    learner = GRPOLearner(
        rl_cluster=cluster,
        algo_config=GRPOConfig(num_generations=task.group_size, beta=BETA, kl_loss_mode="low_var_kl"),
        reward_fns=_reward,
    )
    _time_parts(learner, report)
    report.begin()
    learner.train([{"prompts": np.array(task.texts)}] * training.max_steps)
    stats = jax.devices()[0].memory_stats() or {}
    report.end(
        versions={name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")},
        peak_device=stats.get("peak_bytes_in_use"),
    )


def _shape(task: Task) -> model.ModelConfig:
    config = json.loads((Path(task.folder) / "config.json").read_text())
    return model.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        weight_tying=config["tie_word_embeddings"],
    )


def _load(task: Task, shape: model.ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """A policy with weights of its own; Tunix computes in the dtype of its parameters."""
    return params.create_model_from_safe_tensors(task.folder, shape, mesh, dtype=jnp.dtype(task.dtype))


def _reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A number that differs between answers."""
    return [float(len(set(text))) for text in completions]


def _time_parts(learner: GRPOLearner, report: Report) -> None:
    """Times the parts that are functions in Tunix; loss, gradient and update are one of these parts."""
    cluster, tokens = learner.rl_cluster, [0, 0]
    generate, run_step = cluster.generate, learner._run_global_step

    def generating(*args: Any, **kwargs: Any) -> Any:
        with report.part("rollout"):
            output = generate(*args, **kwargs)
        pad = learner.rl_cluster.rollout.pad_id()
        tokens[:] = np.sum(output.left_padded_prompt_tokens != pad), sum(map(len, output.tokens))
        return output

    def stepping(*args: Any) -> None:
        run_step(*args)
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
        report.step(int(tokens[0]) // learner.algo_config.num_generations, tokens[1])

    def scoring(*args: Any, **kwargs: Any) -> Any:
        with report.part("reference"):
            return jax.block_until_ready(score(*args, **kwargs))

    def updating(*args: Any, **kwargs: Any) -> None:
        with report.part("gradient and update"):
            update(*args, **kwargs)
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))

    score, update = cluster.get_ref_per_token_logps, cluster.update_actor
    cluster.generate, cluster.get_ref_per_token_logps, cluster.update_actor = generating, scoring, updating
    learner._run_global_step = stepping


if __name__ == "__main__":
    main(run)
