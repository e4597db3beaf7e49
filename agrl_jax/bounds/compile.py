"""Compiles a training step for devices that may be absent; gives its memory and a lower bound of its time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from agrl_jax import recipes
from agrl_jax.bounds.flops import matrix_flops
from agrl_jax.bounds.hlo import traffic
from agrl_jax.data.bundled.catalog import FAMILIES
from agrl_jax.rl.step import PHASES
from agrl_jax.runtime import sharding
from agrl_jax.runtime.config import ConfigError, last_branch, validate, validate_together
from agrl_jax.training import assemble, programs
from agrl_jax.types import Batch

_LONG = 0.5  # seconds of calls that are enough to measure one function
_TRIALS = 4  # programs compiled in search of one that fits
_ROWS = 64_000  # training pairs that guidance remembers, a byte or two each, as many as the bundled benchmark has
# With these settings the compiler does not ask the network what machine this is, does not take the lock of processes
# with a TPU, and does not log. Any existing accelerator type will do: the topology decides.
_LIBTPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3",
}  # fmt: skip
# The TPU compiler's message for a program that is too large states its whole memory, or its temporaries alone.
_MEMORY_EXCEEDED = re.compile(r"(Used|HLO temporaries) \(?([\d.]+)([KMGT])")
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The memory of one device and its peak rates."""

    name: str
    flops: float  # per second: bfloat16, dense
    memory: float  # bytes
    bandwidth: float  # bytes per second, of its memory
    link: float  # bytes per second that it can send to its peers


# By JAX's name of the device. TPUs: the system architecture pages of the Cloud TPU documentation
# (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e). GPUs: NVIDIA's data sheets of the SXM boards. `link` is half of the
# published bidirectional bandwidth of the interconnect or NVLink, since one device sends what another receives.
CHIPS: Mapping[str, Chip] = {
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9),
    "TPU v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1638e9, 400e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80e9, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9),
}


@dataclass(frozen=True)
class Phase:
    """What one device does in a phase of the step, and the least time that this takes."""

    flops: float
    bytes: float  # of its memory, read and written
    collectives: Mapping[str, float]  # bytes sent, by kind
    seconds: float
    bound_by: str  # compute, memory or links


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory at the peak of the step."""

    parameters: float
    optimiser: float
    inputs: float  # all other inputs of the step: the batch, a base or reference policy, guidance
    cache: float  # keys and values of prompts and responses, while they are decoded
    temporaries: float  # total less the step's arguments; the peak may be in decoding or elsewhere
    total: float


@dataclass(frozen=True)
class Report:
    """One compiled step."""

    chip: Chip
    devices: int
    mesh: Mapping[str, int]
    memory: Memory
    fits: bool
    phases: Mapping[str, Phase]  # empty if the program was too large to be compiled
    tokens: int  # of a step, as training counts them: sampled tokens, and prompts and responses in each epoch

    @property
    def seconds(self) -> float:
        """The least time that a step takes."""
        return sum(phase.seconds for phase in self.phases.values())

    def figures(self) -> dict[str, Any]:
        """All fields, and seconds and tokens per second, for JSON."""
        rate = self.tokens / self.seconds if self.phases else None
        return dataclasses.asdict(self) | {"seconds": self.seconds or None, "tokens_per_s": rate}


def compile_step(
    config: ConfigDict, devices: Sequence[Any], chip: Chip, shape: str = "", guided_share: float = 1.0
) -> Report:
    """Compiles the RL step of a config for `devices` and counts what it takes.

    `shape` names the config.json of a pretrained model that is not here. Raises ConfigError (or another ValueError) for
    a config that cannot be run on that many devices.
    """
    validate(config)
    if last_branch(config.method) != "rl" or not config.rl.steps:
        raise ConfigError(f"method={config.method} makes no step of RL, which is what preflight compiles")
    recipes.check(config)
    mesh = sharding.make_mesh(*(config.mesh[axis] for axis in sharding.AXES), devices=devices)
    checked = config.copy_and_resolve_references()
    checked.policy.pretrained = shape or config.policy.pretrained
    validate_together(checked, sharding.data_shards(mesh))
    stand_in = assemble.stand_in_model(config, mesh, shape)
    model = assemble.under_variants(config, stand_in)
    prompt_len = config.data.prompt_len + len(stand_in.instructions) - len(model.instructions)
    program = programs.rl_program(config, mesh, model, _warm_started(config, model, mesh), _ROWS, len(FAMILIES))
    batch = _batch(config, model, mesh, prompt_len)
    traced = program.step.trace(program.template, batch, *program.fixed)
    held = {
        "parameters": _shard_bytes(program.template.params),
        "optimiser": _shard_bytes(program.template.opt_state),
        "inputs": _shard_bytes((batch, program.template.guidance, program.fixed)),
    }
    arguments = sum(held.values())
    total, phases = _compile(traced, arguments, mesh, chip, guided_share)
    fits = bool(phases) and total <= chip.memory
    cache, temporaries = _cache_bytes(config, model, mesh, prompt_len), max(total - arguments, 0.0)
    memory = Memory(**held, cache=cache, temporaries=temporaries, total=total)
    b, g, s, t = config.rl.batch_size, config.rl.group_size, prompt_len, config.data.response_len
    updates = config.rl.epochs * config.rl.minibatches
    tokens = b * ((s + g * t) * config.rl.epochs + g * t) + len(model.instructions) * updates
    return Report(chip, mesh.size, dict(mesh.shape), memory, fits, phases, tokens)


def _compile(
    traced: Any, arguments: float, mesh: jax.sharding.Mesh, chip: Chip, guided_share: float
) -> tuple[float, dict[str, Phase]]:
    """Bytes of a device at the peak of a traced step, and its phases; no phases if the compiler finds it too large."""
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (found := _MEMORY_EXCEEDED.search(str(error))) is None:
            raise
        total = float(found[2]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[3]]
        return total + (0 if found[1] == "Used" else arguments), {}
    flops = matrix_flops(traced.jaxpr.jaxpr, PHASES, guided_share, sharding.data_shards(mesh))
    moved = traffic(compiled.as_text(), PHASES, guided_share)
    phases = {name: _phase(chip, flops.get(name, 0.0) / mesh.size, moved.get(name)) for name in (*PHASES, "other")}
    return _peak(compiled.memory_analysis()), {name: phase for name, phase in phases.items() if phase.seconds}


def _warm_started(config: ConfigDict, model: assemble.Model, mesh: jax.sharding.Mesh) -> programs.Weights:
    """The shapes of the weights that the warm start leaves."""
    whole = assemble.as_base(config, assemble.param_shapes(model.init, model.axes, mesh))
    base = whole if assemble.adapters_of(config, assemble.SFT) else None
    trained = assemble.param_shapes(*assemble.trained_part(config, model, assemble.SFT), mesh)
    return programs.left_to(config, programs.Weights(trained, base))


def _batch(config: ConfigDict, model: assemble.Model, mesh: jax.sharding.Mesh, prompt_len: int) -> Batch:
    """The shapes of a batch, with its sharding."""
    b, s, t = programs.examples_of_step(config), prompt_len, config.data.response_len
    parts = len(model.book.parts)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *shape), jnp.int32, sharding=sharding.batch_sharding(mesh))

    return Batch(
        prompt=array(s), prompt_len=array(), gold=array(t), gold_len=array(), part_end=array(parts),
        known_parts=array(), steps=array(parts - 1), tier=array(), row=array(), family=array(),
        book=array() if model.variants else None,
    )


def _shard_bytes(tree: Any) -> float:
    """Bytes that each device holds of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def _cache_bytes(config: ConfigDict, model: assemble.Model, mesh: jax.sharding.Mesh, prompt_len: int) -> float:
    """Bytes that each device holds of the keys and values of instructions, prompts and responses."""
    b, g, shape = config.rl.batch_size, config.rl.group_size, model.shape
    total = 0.0
    for rows, group, length in (
        (1, 1, len(model.instructions)), (b, 1, prompt_len),
        (b // config.rl.sample_batches, g, config.data.response_len),
    ):
        size = (shape.layers, rows, group, length, shape.kv_heads, shape.head_dim)
        place = sharding.spec(mesh, ("layers", "batch", None, None, "kv_heads", "head_dim"), size)
        shard = jax.sharding.NamedSharding(mesh, place).shard_shape(size)
        total += 2 * math.prod(shard) * jnp.dtype(shape.compute_dtype).itemsize
    return total


def _peak(memory: Any) -> float:
    """Bytes at the peak. TPUs include the program's own code; CPUs leave out code and temporaries."""
    allocated = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return float(max(memory.peak_memory_in_bytes, allocated + memory.temp_size_in_bytes))


def _phase(chip: Chip, flops: float, moved: Any) -> Phase:
    collectives = {} if moved is None else dict(moved.collectives)
    size = 0.0 if moved is None else moved.bytes
    seconds = {
        "compute": flops / chip.flops, "memory": size / chip.bandwidth, "links": sum(collectives.values()) / chip.link,
    }
    slowest = max(seconds, key=seconds.__getitem__)
    return Phase(flops, size, collectives, seconds[slowest], slowest)


def find_devices(topology: str) -> tuple[list[Any], Chip]:
    """The devices to compile for, and their peak rates; without a topology, those of this machine.

    Raises ConfigError for an impossible or unknown topology.
    """
    if not topology:
        devices = jax.devices()
        chip = CHIPS.get(devices[0].device_kind) or measured_chip(devices)
        # JAX takes three quarters of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
        limit = (devices[0].memory_stats() or {}).get("bytes_limit", chip.memory)
        return devices, dataclasses.replace(chip, memory=limit)
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    try:
        devices = list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # of many types: no compiler, no such chip, no such slice
        raise ConfigError(
            f"--topology={topology}: {str(error).splitlines()[0]}. It is CHIP:AxB or CHIP:AxBxC, such as v5e:4x4 or "
            "v5p:4x4x4, and needs the TPU compiler: pip install -e '.[preflight]'"
        ) from error
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise ConfigError(f"--topology={topology}: the peaks of {kind!r} are not known; known: {', '.join(CHIPS)}")
    return devices, CHIPS[kind]


def only_compile() -> None:
    """Restricts this process to CPUs, without the cache of programs: only the device of a program can load it."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


def measured_chip(devices: Sequence[Any]) -> Chip:
    """Measures the peak rates of devices that CHIPS does not have: the best rates of matrix products and copies of
    several sizes, on one device that works alone. Of products, in float32 or bfloat16, whichever is faster."""
    products, copies = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    kinds = itertools.product((512, 1024, 2048), (jnp.float32, jnp.bfloat16))
    flops = max(2 * n**3 / _seconds(products, jnp.ones((n, n), dtype)) for n, dtype in kinds)
    bandwidth = max(2 * 4 * n / _seconds(copies, jnp.ones(n)) for n in (2**16, 2**18, 2**20, 2**22, 2**24))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    return Chip(f"{devices[0].device_kind}, measured", flops, memory, bandwidth, bandwidth)


def _seconds(function: Any, x: jax.Array) -> float:
    """The time of the fastest of some calls."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < 20 and sum(times) < _LONG):
        began = time.perf_counter()
        function(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times)


def make_it_fit(config: ConfigDict, report: Report, compile_with: Any) -> tuple[dict[str, Any], Report]:
    """Changes fields of the config until the step fits. Returns these fields, and the last report.

    Fields that save the most come first, and fields that change what is learnt come last. Each trial changes as many
    fields as are estimated to close the gap. `compile_with(config)` gives a report.
    """
    config, changes = config.copy_and_resolve_references(), {}
    for _ in range(_TRIALS):
        missing, trial = report.memory.total - report.chip.memory, {}
        while missing > 0 and (found := next(_possible(config, report), None)):
            saved, fields = found
            missing -= saved
            trial |= fields
            config.update_from_flattened_dict(fields)
        if not trial:
            break
        changes |= trial
        report = compile_with(config)
        if report.fits:
            break
    return changes, report


def _possible(config: ConfigDict, report: Report) -> Iterator[tuple[float, dict[str, Any]]]:
    """Those of `_savings` that leave a valid config."""
    for saved, fields in _savings(config, report):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(fields)
        try:
            validate_together(changed, report.mesh["data"] * report.mesh["fsdp"])
        except ConfigError:
            continue
        yield saved, fields


def _savings(config: ConfigDict, report: Report) -> Iterator[tuple[float, dict[str, Any]]]:
    """Possible changes, each with an estimate of the bytes that it saves on a device."""
    memory, mesh, rl = report.memory, report.mesh, config.rl
    temporaries = max(memory.temporaries, memory.total / 2)
    same = []  # changes that leave what is learnt as it is
    spread = mesh["data"] > 1 and config.mesh.fsdp != -1
    if spread:
        state = memory.parameters + memory.optimiser
        same.append((2 * state * (1 - 1 / mesh["data"]), {"mesh.data": 1, "mesh.fsdp": -1}))
    if not config.policy.remat:
        same.append((0.7 * temporaries, {"policy.remat": True}))
    shards = mesh["data"] * mesh["fsdp"]
    if rl.batch_size % (shards * rl.minibatches * rl.micro_batches * 2) == 0:
        same.append((temporaries / (2 * math.sqrt(rl.micro_batches)), {"rl.micro_batches": 2 * rl.micro_batches}))
    if config.mesh.gather_decode and (mesh["fsdp"] > 1 or spread):
        same.append((memory.parameters * (mesh["fsdp"] - 1) / 2, {"mesh.gather_decode": False}))
    yield from sorted(same, key=lambda option: -option[0])
    replace = config.guidance.replace if config.guidance.enabled else 2
    if rl.group_size // 2 >= max(replace, 2):
        yield temporaries / 4, {"rl.group_size": rl.group_size // 2}
    # Shorter prompts are not offered: only the real model's tokenizer knows how long the rule book's text is.
    if rl.batch_size > 1:
        yield (memory.cache + temporaries) / 2, {"rl.batch_size": rl.batch_size // 2}
