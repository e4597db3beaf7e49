"""Attention in blocks is attention: the same values and gradients, and no array of all scores."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import BASE, PROMPT_LEN, drawn, tokens, variants

from agrl_jax.policy import blockwise_attention, tpu_attention
from agrl_jax.policy.attention import LayerPrefix, _attend, _attend_blockwise
from agrl_jax.policy.scoring import instructed, predicting_hidden, prefill, run_groups
from agrl_jax.policy.transformer import build
from agrl_jax.types import ANYWHERE, Instructions

pytestmark = pytest.mark.usefixtures("scanned")

B, G, K, Q, N, S, SHARED, F = 2, 3, 2, 2, 13, 11, 9, 8  # no length is a multiple of a block
LENGTHS = jnp.array([11, 4])  # of the prompts
FAR = jnp.int32(jnp.iinfo(jnp.int32).max)  # the reach of a global layer of a policy that has a window


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise_attention, "BLOCK", 4)


def arrays(
    dtype: str = "float32", slots: int = N, f: int = F, examples: int = B, kv_heads: int = K
) -> dict[str, jax.Array]:
    b, k = examples, kv_heads
    sizes = {
        "q": (b, G, k, Q, N, f), "k": (b, G, k, slots, f), "v": (b, G, k, slots, f), "prompt_k": (b, k, S, f),
        "prompt_v": (b, k, S, f), "shared_k": (k, SHARED, f), "shared_v": (k, SHARED, f),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=size), dtype) for name, size in sizes.items()}


def values_and_gradients(attend, given, offset=None, reach=None, lengths=LENGTHS):
    """Of attention, and of all its inputs with a different slope at each output."""
    into = np.random.default_rng(1).normal(size=given["q"].shape)

    def run(given):
        prefix = LayerPrefix(given["prompt_k"], given["prompt_v"], lengths) if "prompt_k" in given else None
        shared = Instructions(given["shared_k"], given["shared_v"]) if "shared_k" in given else None
        mixed = attend(given["q"], given["k"], given["v"], offset, prefix, shared, reach)
        return jnp.sum(mixed * into), mixed

    gradients, mixed = jax.jit(jax.grad(run, has_aux=True))(given)
    return mixed, gradients


def dense(q, k, v, offset, *more):
    return _attend(q, k, v, 0 if offset is None else offset, *more)


blockwise = partial(_attend_blockwise, placement=ANYWHERE)


@pytest.mark.parametrize(
    ("without", "reach"),
    [((), None), (("prompt",), None), (("shared",), None), (("prompt", "shared"), 3), ((), 17), ((), FAR)], ids=str,
)
def test_values_and_gradients_are_those_of_all_scores(close, without, reach):
    given = {name: x for name, x in arrays().items() if not without or not name.startswith(without)}
    reach = None if reach is None else jnp.int32(reach)
    found, expected = (values_and_gradients(attend, given, reach=reach) for attend in (blockwise, dense))
    close(found, expected)


def test_so_are_those_of_queries_amid_a_cache(close):
    given = arrays(slots=N + 7)
    found, expected = (values_and_gradients(attend, given, offset=jnp.int32(5)) for attend in (blockwise, dense))
    close(found, expected)


def test_instructions_of_no_tokens_are_none(close):
    given = arrays()
    empty = given | {name: given[name][:, :0] for name in ("shared_k", "shared_v")}
    found, _ = values_and_gradients(blockwise, empty)
    expected, _ = values_and_gradients(blockwise, {k: x for k, x in given.items() if not k.startswith("shared")})
    close(found, expected)


def test_in_bfloat16_it_is_as_exact_as_all_scores(close):
    """Which are summed in float32, and rounded where they are multiplied."""
    rounded = arrays("bfloat16")
    exact = values_and_gradients(dense, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    mixed, gradients = values_and_gradients(blockwise, rounded)
    assert mixed.dtype == jnp.bfloat16 and all(x.dtype == jnp.bfloat16 for x in gradients.values())
    close((mixed, gradients), exact, 0.01)


def test_the_kernel_of_tpus_takes_the_place_of_the_forward_loop(close, monkeypatch):
    """Interpreted. The gradient is in blocks, from what the kernel leaves."""
    monkeypatch.setattr(blockwise_attention, "BLOCK", 128)
    rounded = arrays("bfloat16", f=128)
    rounded["q"] /= 12  # scaled, as queries are
    exact = values_and_gradients(dense, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    close(values_and_gradients(partial(blockwise, kernel=True), rounded), exact, 0.01)  # not on this platform
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    monkeypatch.setattr(tpu_attention, "forward", partial(tpu_attention.forward, interpret=True))
    close(values_and_gradients(partial(blockwise, kernel=True), rounded), exact, 0.01)


def test_the_kernel_is_for_bfloat16_and_whole_registers():
    assert tpu_attention.supports("bfloat16", 128)
    assert not any(tpu_attention.supports(*what) for what in (("float32", 128), ("bfloat16", 64)))


@pytest.mark.slow
@variants
def test_a_policy_learns_with_it_what_it_learns_without(variant, close):
    """With instructions, prompts that are padded, answers; rematerialised or not."""
    _, params, _ = drawn(dataclasses.replace(BASE, **variant))
    shared, prompt, response = tokens((6,), seed=3), tokens((2, 7)), tokens((2, 3, 5), seed=1)

    def gradient(attention: str, remat: bool):
        policy = build(dataclasses.replace(BASE, **variant, attention=attention, remat=remat))[0]
        after, instruct = instructed(policy, shared)

        def loss(params):
            params = instruct(params)
            together = run_groups(after, params, prompt, PROMPT_LEN, response)[1]
            apart = predicting_hidden(after, params, prefill(after, params, prompt, PROMPT_LEN), response)
            return jnp.sum(after.unembed(params, together) ** 2) + jnp.sum(apart**2)

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradient("dense", remat=False)
    for remat in (False, True):
        close(gradient("blockwise", remat), expected)
    np.testing.assert_array_equal(PROMPT_LEN, (4, 2))  # an array of numpy, which none may change


def largest(policy, params, length: int) -> int:
    """Elements of the largest array in the compiled gradient of a policy's loss."""
    prompt, lengths, answers = jnp.ones((1, length), jnp.int32), jnp.array([length]), jnp.ones((1, 2, 8), jnp.int32)

    def loss(params):
        of_prompt, of_answers = run_groups(policy, params, prompt, lengths, answers)
        return jnp.sum(of_prompt**2) + jnp.sum(of_answers**2)

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    shapes = re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", compiled.as_text())
    return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


def test_at_4096_tokens_no_array_holds_a_number_for_each_two_of_them(monkeypatch):
    monkeypatch.setattr(blockwise_attention, "BLOCK", 512)
    length, shape = 4096, dataclasses.replace(BASE, heads=1, kv_heads=1)
    params = drawn(shape)[1]
    found = {name: largest(build(dataclasses.replace(shape, attention=name))[0], params, length)
             for name in ("dense", "blockwise")}  # fmt: skip
    assert found["dense"] >= length**2
    assert found["blockwise"] <= length**2 / 32  # a block has a 64th; hidden states have less


def test_by_itself_it_is_taken_for_many_keys_on_accelerators(monkeypatch):
    monkeypatch.setattr(blockwise_attention, "LONG", 64)
    shape = dataclasses.replace(BASE, heads=1, kv_heads=1, attention="auto")
    params = drawn(shape)[1]
    assert shape.on("cpu").attention == "dense" and shape.on("gpu") == shape.on("tpu") == shape
    assert largest(build(shape)[0], params, 60) >= 60**2
    assert largest(build(shape)[0], params, 300) < 300**2
