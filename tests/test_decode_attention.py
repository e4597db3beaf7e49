"""The decoding kernel gives the same as plain products and sums. It is interpreted here, and compiled on a GPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrl_jax.policy import decode_attention
from agrl_jax.policy.attention import LayerPrefix, _attend
from agrl_jax.types import Instructions

GPU = jax.default_backend() == "gpu"


def drawn(index: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(index).normal(size=shape), jnp.bfloat16)


def both(
    b: int, g: int, kv_heads: int, heads: int, f: int, s: int, t: int, offset: int, lengths: list[int],
    instructions: int,
) -> tuple:
    q, k, v = drawn(0, b, g, kv_heads, heads, f), drawn(1, b, g, kv_heads, t, f), drawn(2, b, g, kv_heads, t, f)
    prefix = drawn(3, b, kv_heads, s, f), drawn(4, b, kv_heads, s, f), jnp.array(lengths)
    shared = [drawn(index, kv_heads, instructions, f) for index in (5, 6)] if instructions else []
    run = jax.jit(partial(decode_attention.decode_attention, interpret=not GPU))
    kernel = run(q, k, v, jnp.int32(offset), *prefix, *shared)
    q, k, v, *wide = (x.astype(jnp.float32) for x in (q[:, :, :, :, None], k, v, *prefix[:2], *shared))
    plain = jax.jit(_attend)(
        q, k, v, offset, LayerPrefix(*wide[:2], prefix[2]), Instructions(*wide[2:]) if instructions else None
    )
    return np.asarray(kernel, np.float32), np.asarray(plain[:, :, :, :, 0])


@pytest.mark.parametrize(
    "shape",
    [
        # Answers that do not fill a program, three heads for each key head, more than one block of prompt and answer.
        (2, 5, 2, 3, 16, 70, 80, 65, [70, 1], 0),
        # The same after more than a block of instructions.
        (2, 5, 2, 3, 16, 70, 80, 65, [70, 1], 75),
        # The first token of one answer, one head for each key head.
        (1, 1, 1, 1, 16, 3, 4, 0, [2], 0),
    ],
    ids=str,
)
def test_kernel_is_attention_over_instructions_prompt_and_answer(shape: tuple) -> None:
    kernel, plain = both(*shape)
    assert kernel.shape == plain.shape
    assert np.linalg.norm(kernel - plain) < 0.01 * np.linalg.norm(plain)  # bfloat16 has 8 bits


def test_kernel_is_for_bfloat16_and_heads_of_a_power_of_two() -> None:
    assert decode_attention.supports("bfloat16", 64)
    assert not any(decode_attention.supports(*what) for what in (("float32", 64), ("bfloat16", 80), ("bfloat16", 8)))
