"""The mesh and the table of logical axes; eight virtual devices in a process of their own."""

import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from agrl_jax.runtime import optim, sharding
from agrl_jax.runtime.sharding import ShardingError


def abstract(data=2, fsdp=2, tensor=2):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("vocab", "embed"), (8, 4), P("tensor", "fsdp")),
        (("layers", "embed", "heads", "head_dim"), (3, 4, 2, 8), P(None, "fsdp", "tensor", None)),
        (("vocab", "embed"), (7, 4), P(None, "fsdp")),  # 7 is not a multiple of 2: whole on every device
        (("embed", "kv_heads"), (5, 1), P(None, None)),
        (("batch", None), (8, 3), P(("data", "fsdp"), None)),
        (("batch", None), (6, 3), P(None, None)),  # 6 is not a multiple of 2 x 2
        ((), (), P()),
    ],
)
def test_spec(axes, shape, expected):
    assert sharding.spec(abstract(), axes, shape) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("vocabulary",), (8,), "unknown logical axis 'vocabulary'"),
        (("embed",), (8, 4), "do not name the dimensions"),
        (("heads", "mlp"), (4, 4), "split over the same mesh axis"),
        (("batch", "embed"), (4, 4), "split over the same mesh axis"),
    ],
)
def test_axes_that_cannot_be_are_refused(axes, shape, message):
    with pytest.raises(ShardingError, match=message):
        sharding.spec(abstract(), axes, shape)


@dataclass(frozen=True)
class Device:
    """Stands in for one of several devices on a machine with one device."""

    id: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_mesh_takes_what_is_left():
    devices = [Device(number) for number in range(8)]
    shapes = {(-1, 1, 1): (8, 1, 1), (2, -1, 2): (2, 2, 2), (1, 2, -1): (1, 2, 4), (4, 2, 1): (4, 2, 1)}
    for asked, expected in shapes.items():
        mesh = sharding.make_mesh(*asked, devices=devices)
        assert tuple(mesh.shape.values()) == expected
    assert sharding.data_shards(abstract(2, 4, 1)) == 8


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "mesh.data=3, mesh.fsdp=1, mesh.tensor=1: cannot be laid over 8 devices"),
        ((-1, 3, 1), "cannot be laid over 8 devices"),
        ((4, 1, 1), "cannot be laid over 8 devices"),
        ((-1, -1, 1), "at most one of them is -1"),
        ((0, 1, 1), "sizes are at least 1"),
    ],
)
def test_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(ShardingError, match=message):
        sharding.make_mesh(*sizes, devices=list(range(8)))


def test_the_state_follows_its_parameters():
    mesh = abstract()
    axes = {"w": ("embed", "mlp"), "norm": ("embed",)}
    shapes = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32), "norm": jax.ShapeDtypeStruct((4,), jnp.float32)}
    params = sharding.param_shardings(mesh, axes, shapes)
    assert {name: s.spec for name, s in params.items()} == {"w": P("fsdp", "tensor"), "norm": P("fsdp")}
    state = {"params": shapes, "opt": jax.eval_shape(optax.adam(1e-3).init, shapes), "step": 0, "none": None}
    found = sharding.state_shardings(mesh, state, params)
    assert found["params"] == found["opt"][0].mu == found["opt"][0].nu == params
    assert found["step"].spec == found["opt"][0].count.spec == P()
    assert found["none"] is None


def test_the_state_follows_its_parameters_where_two_optimisers_share_them():
    mesh = abstract()
    axes = {"w": ("layers", "embed", "mlp"), "norm": ("layers", "embed")}
    shapes = {"w": jax.ShapeDtypeStruct((2, 4, 4), jnp.float32), "norm": jax.ShapeDtypeStruct((2, 4), jnp.float32)}
    params = sharding.param_shardings(mesh, axes, shapes)
    state = jax.eval_shape(optim.make(1e-3, 0, 1, matrix_rate=0.1, axes=axes).init, shapes)
    large = [
        (leaf.shape, place.spec)
        for leaf, place in zip(
            jax.tree.leaves(state), jax.tree.leaves(sharding.state_shardings(mesh, state, params)), strict=True
        )
        if leaf.ndim > 1
    ]
    # Muon's momentum of the matrix, Adam's two moments of the norm.
    assert sorted(large) == [((2, 4), P(None, "fsdp"))] * 2 + [((2, 4, 4), P(None, "fsdp", "tensor"))]


def test_adafactors_rows_columns_and_stand_ins_are_replicated():
    mesh = abstract()
    axes = {"w": ("layers", "embed", "mlp"), "norm": ("embed",)}
    shapes = {"w": jax.ShapeDtypeStruct((2, 128, 256), jnp.float32), "norm": jax.ShapeDtypeStruct((4,), jnp.float32)}
    params = sharding.param_shardings(mesh, axes, shapes)
    state = jax.eval_shape(optim.make(1e-3, 0, 1, kind="adafactor").init, shapes)
    places = sharding.state_shardings(mesh, state, params)
    jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), state, places)  # raises if a size is not a multiple
    split = [leaf.shape for leaf, place in zip(*map(jax.tree.leaves, (state, places)), strict=True) if any(place.spec)]
    assert split == [(4,)]  # mean squares of the norm are kept whole


ON_EIGHT = """
import sys
from dataclasses import dataclass
import jax, jax.numpy as jnp, numpy as np
from agrl_jax.runtime import sharding
from agrl_jax.runtime.checkpoint import Checkpointer

assert jax.device_count() == 8
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=-1)
axes = {"w": ("embed", "mlp"), "norm": ("embed",), "odd": ("vocab", "embed")}
host = {"w": np.arange(32.0).reshape(4, 8), "norm": np.ones(4), "odd": np.ones((7, 4))}
places = sharding.param_shardings(mesh, axes, host)
params = sharding.put(host, places)
assert params["w"].addressable_shards[0].data.shape == (2, 4)
assert params["odd"].addressable_shards[0].data.shape == (7, 2)
batch = sharding.put({"x": np.arange(16.0).reshape(8, 2)}, sharding.batch_sharding(mesh))
assert batch["x"].addressable_shards[0].data.shape == (2, 2)

step = jax.jit(lambda p, b: (jax.tree.map(lambda w: w + b["x"].sum(), p), b["x"].sum()), donate_argnums=0,
               in_shardings=(places, sharding.batch_sharding(mesh)), out_shardings=(places, sharding.replicated(mesh)))
for _ in range(3):
    params, total = step(params, batch)
assert step._cache_size() == 1
np.testing.assert_array_equal(params["w"], host["w"] + 3 * 120)

with Checkpointer(sys.argv[1], identity={}) as checkpoints:  # onto another mesh
    checkpoints.save("rl", 1, params)
    other = sharding.param_shardings(sharding.make_mesh(data=1, fsdp=4, tensor=2), axes, host)
    template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, other)
    found = checkpoints.restore(template).state
for name, leaf in found.items():
    assert leaf.sharding == other[name]
    np.testing.assert_array_equal(leaf, params[name])
"""


def test_eight_devices_place_step_and_restore_onto_another_mesh(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_one_device_is_the_same_code():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    placed = sharding.put({"x": np.ones((3, 2))}, sharding.batch_sharding(mesh))
    assert placed["x"].sharding.is_fully_replicated and tuple(mesh.shape.values()) == (1, 1, 1)
