"""The step on many devices gives the same numbers as on one. Large arrays are split, and nothing is gathered in vain.

Each test starts new processes, with eight CPU devices in all, which run one of the functions below.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from conftest import END, RESPONSE_LEN, VOCABULARY, Small, lenient, make_small

from agrl_jax import recipes
from agrl_jax.policy import blockwise_attention, decode_attention, decoding, layers, transformer
from agrl_jax.policy.scoring import instructed, predicting_hidden, prefill, token_logprobs
from agrl_jax.rl import difficulty, guidance
from agrl_jax.rl.difficulty import DifficultyConfig
from agrl_jax.rl.rollout import PURPOSE_ROLLOUT, row_keys
from agrl_jax.rl.step import make_step
from agrl_jax.rulebook.automaton import compile_tables
from agrl_jax.runtime import processes, sharding
from agrl_jax.training import assemble, programs
from agrl_jax.types import Batch, TrainState

MESHES = ("8x1x1", "1x8x1", "2x2x2", "1x2x4")


def run_on_eight(function: str, *args: str, number: int = 1) -> str:
    """Runs a function of this file in `number` processes with eight devices in all, and returns their output."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"{quick.ENVIRONMENT['XLA_FLAGS']} --xla_force_host_platform_device_count={8 // number}"
    environment = os.environ | quick.ENVIRONMENT | {
        "XLA_FLAGS": flags, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, __file__, function, *args], env=environment | {"JAX_PROCESS_ID": str(index)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index in range(number)
    ]  # fmt: skip
    said = [process.communicate(timeout=550)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)
    return "\n".join(said)


def mesh_of(sizes: str) -> jax.sharding.Mesh:
    return sharding.make_mesh(*map(int, sizes.split("x")))


# ---------------------------------------------------------------------------------------- the same as on one


@pytest.mark.slow
def test_eight_devices_take_the_same_steps_as_one():
    assert "compared: 8x1x1 1x8x1 2x2x2 1x2x4; flipped tokens: 0" in run_on_eight("compare", *MESHES)


@pytest.mark.slow
def test_so_do_several_processes():
    """Each process has two devices, so that both data and fsdp span processes."""
    said = run_on_eight("compare", "2x2x2", number=4)
    assert said.count("compared: 2x2x2; flipped tokens: 0") == 4


@pytest.mark.slow
def test_so_do_experts_that_are_spread_over_devices():
    assert "compared: 1x2x4; flipped tokens: 0" in run_on_eight("compare_experts", "1x2x4")


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "mesh"), [("cpu", "2x2x2"), ("gpu", "1x2x4")])
def test_so_does_decoding_as_a_platform_does_it(platform, mesh):
    assert f"compared: {mesh}; flipped tokens: 0" in run_on_eight("compare_as_on", platform, mesh)


@pytest.mark.slow
def test_so_do_answers_sampled_under_the_grammar():
    assert "compared: 2x2x2; flipped tokens: 0" in run_on_eight("compare_constrained", "2x2x2")


@pytest.mark.slow
def test_so_does_attention_in_blocks():
    assert "compared: 2x2x2; flipped tokens: 0" in run_on_eight("compare_blockwise", "2x2x2")


@pytest.mark.slow
def test_attention_in_blocks_is_attention():
    assert "compared: 8x1x1 2x2x2 1x2x4" in run_on_eight("compare_attention", "8x1x1", "2x2x2", "1x2x4")


def compare_attention(*meshes: str) -> None:
    """Values and gradients of attention in blocks on each mesh are those of all scores on one device."""
    from test_blockwise_attention import LENGTHS, arrays, blockwise, dense, values_and_gradients

    blockwise_attention.BLOCK = 4
    given = arrays(examples=8, kv_heads=4)
    expected = jax.device_get(values_and_gradients(dense, given, None, jnp.int32(17), jnp.tile(LENGTHS, 4)))
    for sizes in meshes:
        attend = partial(blockwise, placement=sharding.placing(mesh_of(sizes)))
        found = jax.device_get(values_and_gradients(attend, given, None, jnp.int32(17), jnp.tile(LENGTHS, 4)))
        jax.tree_util.tree_map_with_path(partial(close, sizes), found, expected)
    print(f"compared: {' '.join(meshes)}")


RATE = 0.5  # of plain gradient descent
EXAMPLES, GROUP = 8, 4
INSTRUCTIONS = np.array([1, 4, 8, 2, 9], np.int32)  # before all prompts


class Found(NamedTuple):
    """The arrays that are compared, on the host."""

    draws: np.ndarray  # [B, G, T] uniform numbers of the first rollout
    steps: list[Any]  # of each step: parameters, gradient, guidance state, metrics, rollout
    logp: np.ndarray  # [B, G, T] of the expected tokens


def descend(grads, params, opt_state, skipped):
    """Plain gradient descent. It returns the gradient in place of an optimiser's state."""
    return jax.tree.map(lambda p, g: p - RATE * g, params, grads), grads, skipped, {}


def take_steps(small: Small, mesh: jax.sharding.Mesh, tokens: np.ndarray | None = None) -> Found:
    """Three steps on a mesh, with inputs and outputs sharded as in training; also scores `tokens` [B, G, T]."""
    from test_step import CONFIG, KEY

    # All failing groups are guided, and one of every two examples is chosen, however the batch is split.
    band = DifficultyConfig(pool=2, low=0.3, high=0.7, again=100)
    cfg = dataclasses.replace(CONFIG, shards=EXAMPLES, difficulty=band)
    policy, _, axes = transformer.build(small.config, sharding.placing(mesh))
    memory = guidance.initial_state(40, 2, cfg.guidance)
    start = TrainState(
        small.params, jax.tree.map(np.zeros_like, small.params), np.int32(0), KEY, jax.device_get(memory), np.int32(0),
        jax.device_get(difficulty.initial_state(40)),
    )
    params = sharding.param_shardings(mesh, axes, small.params)
    places, whole = sharding.state_shardings(mesh, start, params), sharding.replicated(mesh)
    by_batch = sharding.batch_sharding(mesh)

    def sampler(params):
        return policy, sharding.gathered(mesh, axes, params)

    step = jax.jit(
        make_step(policy, lenient(small.tables), ("fit", "brand"), descend, cfg, sampler, INSTRUCTIONS),
        in_shardings=(places, by_batch, params), out_shardings=(places, whole, whole), donate_argnums=0,
    )
    to_host = jax.jit(lambda x: x, out_shardings=whole)
    pool = small.batch([truth for truth in ((0, 0), (1, 0), (2, 1), (2, 0)) * 2 for _ in range(2)])
    batch = sharding.put(jax.tree.map(lambda x: x[::2], pool), by_batch)  # chosen first, since none was met before
    pool = sharding.put(pool, by_batch)
    state = sharding.put(start, places)
    reference = sharding.put(jax.tree.map(lambda x: 0.9 * x, small.params), params)

    @partial(jax.jit, out_shardings=whole)
    def draw(row):
        keys = row_keys(KEY, PURPOSE_ROLLOUT, 0, row, GROUP)
        at = jax.vmap(jax.vmap(lambda k: jax.vmap(partial(jax.random.fold_in, k))(jnp.arange(RESPONSE_LEN))))(keys)
        return jax.vmap(jax.vmap(jax.vmap(jax.random.uniform)))(at)

    @partial(jax.jit, out_shardings=whole)
    def logprobs(params, batch, tokens):
        after, instruct = instructed(policy, INSTRUCTIONS)
        params = instruct(params)
        hidden = predicting_hidden(after, params, prefill(after, params, batch.prompt, batch.prompt_len), tokens)
        return token_logprobs(partial(after.unembed, params), hidden, tokens, cfg.temperature, 16)[0]

    taken = []
    for _ in range(3):
        state, metrics, seen = step(state, pool, reference)
        kept = to_host((state.params, state.opt_state, (state.guidance, state.difficulty)))
        taken.append(jax.device_get((*kept, metrics, seen.rolled)))
    assert step._cache_size() == 1
    tokens = taken[0][-1].tokens if tokens is None else tokens
    given = sharding.put((small.params, tokens), (params, by_batch))
    return Found(*jax.device_get((draw(batch.row), None)), None)._replace(
        steps=taken, logp=jax.device_get(logprobs(given[0], batch, given[1]))
    )


def compare(*meshes: str, **shape: int) -> None:
    """Three steps on each mesh equal those on one device."""
    processes.connect(os.environ["JAX_NUM_PROCESSES"] != "1")
    assert jax.device_count() == 8
    with tempfile.TemporaryDirectory() as folder:
        small = make_small(Path(folder), **shape)
    small = small._replace(params=jax.device_get(small.params))
    expected = take_steps(small, sharding.make_mesh(1, 1, 1, jax.local_devices()[:1]))
    assert expected.steps[0][3]["guide/share"] > 0
    flipped = 0
    for sizes in meshes:
        found = take_steps(small, mesh_of(sizes), expected.steps[0][-1].tokens)
        np.testing.assert_array_equal(found.draws, expected.draws)
        np.testing.assert_allclose(found.logp, expected.logp, atol=1e-4)
        for (*numbers, rolled), (*by_one, rolled_by_one) in zip(found.steps, expected.steps, strict=True):
            flipped += int(np.sum(rolled.tokens != rolled_by_one.tokens))
            for params, other in zip(numbers[:2], by_one[:2], strict=True):  # parameters and gradients
                jax.tree_util.tree_map_with_path(partial(close, sizes), params, other)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), numbers[2:], by_one[2:])
    print(f"compared: {' '.join(meshes)}; flipped tokens: {flipped}")


def compare_experts(*meshes: str) -> None:
    compare(*meshes, experts=4, experts_per_token=2)


def compare_blockwise(*meshes: str) -> None:
    blockwise_attention.BLOCK = 4
    compare(*meshes, attention="blockwise")


def compare_constrained(*meshes: str) -> None:
    import test_step

    guide = dataclasses.replace(test_step.CONFIG.guidance, threshold=0.25)
    test_step.CONFIG = dataclasses.replace(test_step.CONFIG, constrained=True, guidance=guide)
    compare(*meshes)


def compare_as_on(platform: str, *meshes: str) -> None:
    """`compare` with weights laid out for decoding on a platform. For "gpu", the attention of each device is also a
    function of its own, as it is where the kernel runs."""
    gathered = sharding.gathered
    sharding.gathered = lambda *args: decoding.for_decoding(gathered(*args), platform)
    decode_attention.supports = lambda *_: platform == "gpu"
    compare(*meshes)


def close(sizes: str, path: Any, found: np.ndarray, expected: np.ndarray) -> None:
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert distance <= 1e-5, f"{sizes} {jax.tree_util.keystr(path)}: {distance}"


# ------------------------------------------------------------------------- what the compiler makes of it


class Sizes(NamedTuple):
    """The sizes of the step that is compiled. They are chosen so that large arrays differ in size."""

    batch: int = 64
    group: int = 4
    prompt: int = 24
    response: int = 12
    vocab: int = 640
    width: int = 96
    layers: int = 3
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 24
    mlp: int = 160
    chunk: int = 16  # positions of one device whose logits are held at once
    experts: int = 0


def compile_step(mesh: jax.sharding.Mesh, sizes: Sizes) -> jax.stages.Compiled:
    """The RL program that training would run, with two micro-batches and a KL term."""
    config = recipes.base()
    config.rl.update(batch_size=sizes.batch, group_size=sizes.group, micro_batches=2, matrix_rate=0.0)
    config.data.update(prompt_len=sizes.prompt, response_len=sizes.response)
    config.objective.update(logprob_chunk=sizes.chunk, kl="k3", kl_weight=0.1)
    config.log.samples = 1
    config.mesh.update(mesh.shape)
    with tempfile.TemporaryDirectory() as folder:
        small = make_small(Path(folder))
    words = [*VOCABULARY[:END], *(b"w%d" % i for i in range(sizes.vocab - len(VOCABULARY))), None]
    tables = jax.tree.map(np.asarray, compile_tables(small.book, words, sizes.vocab - 1))
    shape = layers.PolicyConfig(
        vocab_size=sizes.vocab, width=sizes.width, layers=sizes.layers, heads=sizes.heads, kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim, mlp=sizes.mlp, tied=False, remat=True, experts=sizes.experts,
        experts_per_token=2 if sizes.experts else 0,
    )  # fmt: skip
    policy, init, axes = transformer.build(shape, sharding.placing(mesh))
    model = assemble.Model(small.book, None, tables, shape, policy, init, axes, np.zeros(0, np.int32))
    start = assemble.param_shapes(init, axes, mesh)
    program = programs.rl_program(config, mesh, model, programs.Weights(start), rows=1000, families=2)
    example = small.batch([(0, 0)])
    widths = {"prompt": sizes.prompt, "gold": sizes.response}

    def of_batch(name: str) -> jax.ShapeDtypeStruct:
        rest = (widths[name],) if name in widths else getattr(example, name).shape[1:]
        return jax.ShapeDtypeStruct((sizes.batch, *rest), jnp.int32, sharding=sharding.batch_sharding(mesh))

    names = [field.name for field in dataclasses.fields(Batch) if getattr(example, field.name) is not None]
    batch = Batch(**{name: of_batch(name) for name in names})
    return program.step.lower(program.template, batch, *program.fixed).compile()


class Operation(NamedTuple):
    """One line of a compiled module; shapes are those of one device."""

    kind: str
    scope: str  # the part of the program that it comes from
    shapes: list[tuple[str, tuple[int, ...]]]  # dtype and dimensions of its results
    line: str

    @property
    def bytes(self) -> int:
        """Bytes of its largest result."""
        return max((_BYTES[dtype] * int(np.prod(dims)) for dtype, dims in self.shapes), default=0)


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def operations(compiled: jax.stages.Compiled) -> Iterator[Operation]:
    for line in compiled.as_text().splitlines():
        found = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(", line)
        if found:
            shapes = [
                (dtype, tuple(int(size) for size in dims.split(",") if size))
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", found[1]) if dtype in _BYTES
            ]
            scope = re.search(r'op_name="([^"]*)"', line)
            yield Operation(found[2].removesuffix("-start"), scope[1] if scope else "", shapes, line.strip()[:300])


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "kv_heads"), [("8x1x1", 4), ("1x8x1", 4), ("2x2x2", 4), ("2x2x2", 3), ("1x2x4", 4)])
def test_nothing_large_is_whole_and_nothing_is_gathered_in_vain(sizes, kv_heads):
    run_on_eight("look_at_program", sizes, str(kv_heads))


def look_at_program(sizes: str, kv_heads: str) -> None:
    mesh, shape = mesh_of(sizes), Sizes(kv_heads=int(kv_heads), heads=2 * int(kv_heads))
    found = list(operations(compile_step(mesh, shape)))
    check_arrays(found, mesh, shape)
    check_decoding(found, mesh, shape)
    if mesh.shape["data"] == 8:
        check_data_axis(found, shape)


def check_arrays(found: list[Operation], mesh: jax.sharding.Mesh, shape: Sizes) -> None:
    """No array on a device is larger than the largest of the expected ones, which are all split."""
    rows, tensor = shape.batch // sharding.data_shards(mesh), mesh.shape["tensor"]
    heads, kv = (size // tensor if size % tensor == 0 else size for size in (shape.heads, shape.kv_heads))
    positions = max(shape.prompt, shape.group * shape.response)
    expected = {
        "one matrix of all layers, gathered": shape.layers * shape.width * max(
            shape.mlp // tensor, heads * shape.head_dim),
        "embedding, gathered": shape.vocab // tensor * shape.width,
        "hidden states": rows * positions * shape.width,
        "feed-forward": rows * positions * shape.mlp // tensor,
        "cache": shape.layers * rows * shape.group * shape.response * kv * shape.head_dim,
        "keys of the prompts": shape.layers * rows * shape.prompt * kv * shape.head_dim,
        "attention": rows * heads * max(
            shape.prompt**2, shape.group * shape.response * (shape.prompt + shape.response)),
        "logits of a step of decoding, padded for their running sum": 2 * rows * shape.group * shape.vocab,
        "logits of a chunk": max(shape.chunk, rows) * shape.vocab // tensor,
    }  # fmt: skip
    limit = 4 * max(expected.values())
    assert limit < 4 * shape.batch * positions * shape.width, "a batch that is whole would go unnoticed"
    # The inputs of all layers, from which the backward pass recomputes them: of a micro-batch, split as the batch is.
    kept = (shape.layers, rows // 2, 1, shape.prompt + shape.group * (shape.response - 1), shape.width)
    large = sorted(
        {(op.bytes, op.kind, str(op.shapes), op.scope) for op in found
         if op.kind not in ("tuple", "while", "conditional", "parameter")
         and all(dims != kept for _, dims in op.shapes)},
        reverse=True,
    )  # fmt: skip
    assert large[0][0] <= limit, "\n".join(map(str, [f"at most {limit} bytes", *large[:25]]))


def check_decoding(found: list[Operation], mesh: jax.sharding.Mesh, shape: Sizes) -> None:
    """Weights are gathered once, before the loop. In the loop, a gather has only rows of this device's own batch."""
    rows = shape.batch // sharding.data_shards(mesh)
    for scope in ("decode", "replay"):
        inside = [op for op in found if re.search(rf"/{scope}/.*while/body", op.scope)]
        assert any(op.kind in ("dot", "fusion", "custom-call") for op in inside)
        for op in inside:
            if op.kind in ("all-gather", "all-to-all", "collective-permute"):
                assert all(dims[0] <= rows for _, dims in op.shapes), op
                assert op.bytes <= rows * shape.group * shape.vocab * 4, op


def check_data_axis(found: list[Operation], shape: Sizes) -> None:
    """Only gradients, figures, shown examples, and the ids and passes of guided replay go between data shards."""
    per_layer = (
        shape.width, shape.head_dim, shape.width * shape.mlp, shape.width * shape.heads * shape.head_dim,
        shape.width * shape.kv_heads * shape.head_dim,
    )  # fmt: skip
    gradients = {shape.vocab * shape.width, *per_layer, *(shape.layers * size for size in per_layer)}
    small = max(shape.batch * 4, shape.group * shape.response * 4)  # ids of a batch, or an array of a shown example
    crossing = [op for op in found if op.kind in _COLLECTIVES]
    for op in crossing:
        for dtype, dims in op.shapes:
            size = int(np.prod(dims))
            gradient = op.kind in ("all-reduce", "reduce-scatter") and dtype == "f32" and size in gradients
            assert gradient or size * _BYTES[dtype] <= small, op
    # All devices decide together whether any group is replayed.
    assert any(op.kind == "all-reduce" and op.shapes == [("pred", ())] and "reduce_or" in op.scope for op in crossing)


@pytest.mark.slow
def test_memory_does_not_grow_with_vocabulary_times_length():
    """The logits of a whole batch are never held: the costs of doubled vocabulary and doubled length only add up."""
    small = Sizes(batch=8, layers=1, vocab=2000, response=16)
    large = small._replace(vocab=4000, response=32)

    def peak(sizes: Sizes) -> int:
        return compile_step(sharding.make_mesh(1, 1, 1), sizes).memory_analysis().temp_size_in_bytes

    both = peak(large)
    more = both - peak(large._replace(vocab=small.vocab)) - peak(large._replace(response=small.response)) + peak(small)
    logits = 4 * small.batch * small.group * small.response * small.vocab // 2  # of a micro-batch
    assert abs(more) < 0.2 * logits
    assert peak(large._replace(chunk=0)) > both + logits


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
