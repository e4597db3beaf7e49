"""Where arrays live: one mesh, and one table from logical axis names to mesh axes.

The mesh has three axes: `data` splits the batch; `fsdp` splits the batch too, and the parameters along
their embedding axis; `tensor` splits heads, feed-forward and vocabulary. The same code runs on one
device, where all three have size 1, and on a pod.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agrl_jax.types import Axes, Placement

AXES = ("data", "fsdp", "tensor")
_AUTO = (jax.sharding.AxisType.Auto,) * 3  # the compiler decides what the shardings at the borders of a jit leave open

# The mesh axes that each logical axis of a parameter or an input is split over; () is replicated.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "data_batch": ("data",),  # the same, where another axis of the array is split over fsdp
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("tensor",),
    "expert_mlp": (),
    "layers": (),
    "rank": (),
}


class ShardingError(ValueError):
    """A mesh or a sharding that cannot be; the message says what does not fit."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (of all processes), or over those given.

    At most one size may be -1: all devices that the other axes leave. Raises ShardingError if the sizes do not
    multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ShardingError(f"{asked}: sizes are at least 1, and at most one of them is -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise ShardingError(f"{asked}: cannot be laid over {len(devices)} device{'s' * (len(devices) != 1)}")
    for axis in free:
        sizes[axis] = len(devices) // fixed
    shape = tuple(sizes[axis] for axis in AXES)
    # Neighbours on the interconnect stay neighbours; its axes may be split: 8 x 8 chips also hold 16 x 4.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=_AUTO)


def data_shards(mesh: Mesh) -> int:
    """The number of pieces that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; an axis that does not divide is replicated.

    Raises ShardingError for an axis that `RULES` does not know, for names that do not match the shape,
    and for two axes of one array that claim the same mesh axis.
    """
    if len(axes) != len(shape):
        raise ShardingError(f"axes {tuple(axes)} do not name the dimensions of shape {tuple(shape)}")
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ShardingError(f"unknown logical axis {unknown[0]!r} in {tuple(axes)}; known: {', '.join(RULES)}")
    wanted = [() if axis is None else RULES[axis] for axis in axes]
    claimed = [name for names in wanted for name in names]
    if len(set(claimed)) < len(claimed):
        raise ShardingError(f"two of the logical axes {tuple(axes)} are split over the same mesh axis")
    entries = []
    for names, size in zip(wanted, shape, strict=True):
        whole = size % math.prod(mesh.shape[name] for name in names) == 0
        entries.append((names if len(names) > 1 else names[0]) if names and whole else None)
    return PartitionSpec(*entries)


def placing(mesh: Mesh) -> Placement:
    """How the arrays inside a jitted function lie on a mesh.

    Without it the compiler may split the activations like the parameters and repeat the batch on every device, and on
    meshes with `fsdp` it does.
    """

    def place(x: jax.Array, axes: Axes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(mesh, axes, x.shape)))

    def split(function: Callable[..., jax.Array], inputs: Sequence[Axes], output: Axes) -> Callable[..., jax.Array]:
        def whole(*arrays: jax.Array) -> jax.Array:
            specs = tuple(spec(mesh, axes, x.shape) for axes, x in zip(inputs, arrays, strict=True))
            names = itertools.chain.from_iterable(inputs)
            taken = dict(zip(names, itertools.chain.from_iterable(specs), strict=True))
            result = PartitionSpec(*(None if name is None else taken[name] for name in output))
            return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)(*arrays)

        return whole

    return Placement(place, split)


def gathered(mesh: Mesh, axes: Any, params: Any) -> Any:
    """`params` inside a jitted function, whole along `fsdp` and still split over `tensor`; `axes` as in
    `param_shardings`."""
    place = placing(mesh).place

    def gather(names: Sequence[str | None], leaf: jax.Array) -> jax.Array:
        return place(leaf, tuple(None if "fsdp" in RULES.get(name, ()) else name for name in names))

    return jax.tree.map(gather, axes, params, is_leaf=lambda x: isinstance(x, tuple))


def param_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """A NamedSharding for each parameter.

    `axes` and `shapes` have the same tree structure; a leaf of `axes` is a tuple of logical axis names, a
    leaf of `shapes` has a `shape` (an array, or what `jax.eval_shape` gives).
    """

    def sharding(names: Sequence[str | None], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(mesh, names, leaf.shape))

    return jax.tree.map(sharding, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def state_shardings(mesh: Mesh, state: Any, params: Any) -> Any:
    """Shardings for a whole training state, given those of its parameters.

    An array of `state` takes the sharding of the parameter whose path its own path ends in, if it has
    as many dimensions: the parameters themselves, and the moments of an optimiser. All else, such as Adafactor's
    rows and columns, is replicated. `params` is the result of `param_shardings`.
    """
    of_path = {path: place for path, place in jax.tree_util.tree_leaves_with_path(params)}
    longest = max(len(path) for path in of_path)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        ends = (path[start:] for start in range(max(0, len(path) - longest), len(path)))
        found = next((of_path[end] for end in ends if end in of_path), None)
        if found is None or len(found.spec) != leaf.ndim or leaf.size <= 1:  # one number stands for no moment
            return replicated(mesh)
        return found

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over the mesh axes of a batch, the others whole. For any array of a batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: Any, shardings: Any) -> Any:
    """Places host arrays on the mesh; one sharding for all leaves, or a tree of them.

    Every process passes the whole array, and keeps the parts that its own devices hold.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree, shardings)
