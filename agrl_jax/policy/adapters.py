"""Low-rank adapters in a file of their own, small enough to ship and without their base model.

The file's header names the base (a path, or a name that `shipped.find` knows), and rank, alpha and modules; the tensors
have the paths of the adapted matrices, with `a` and `b`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agrl_jax.policy import lora
from agrl_jax.policy.families import LoadingError
from agrl_jax.policy.lora import LoraConfig
from agrl_jax.types import Params

FILE = "adapters.safetensors"


@dataclass(frozen=True)
class Adapters:
    """What a folder of adapters holds."""

    base: str  # the model that they adapt
    base_dtype: str  # its dtype in training
    cfg: LoraConfig
    params: Params  # numpy, as written


def save(folder: Path, found: Adapters, dtype: str) -> None:
    """Writes the adapters into a folder, in a dtype."""
    cfg, flat = found.cfg, flatten_dict(found.params)
    tensors = {"/".join(path): np.asarray(x).astype(jax.numpy.dtype(dtype)) for path, x in flat.items()}
    about = {"base": found.base, "base_dtype": found.base_dtype}
    about |= {"rank": str(cfg.rank), "alpha": str(cfg.alpha), "modules": ",".join(cfg.modules)}
    save_file(tensors, folder / FILE, metadata=about)


def read(folder: Path, tensors: bool = True) -> Adapters:
    """Reads what `save` has written; without `tensors`, the header alone. Raises LoadingError."""
    file = folder / FILE
    try:
        with safe_open(file, framework="np", backend="pread") as handle:
            about = handle.metadata() or {}
            names = handle.keys() if tensors else ()
            params = {tuple(name.split("/")): handle.get_tensor(name) for name in names}
        cfg = LoraConfig(int(about["rank"]), float(about["alpha"]), tuple(about["modules"].split(",")))
        return Adapters(about["base"], about["base_dtype"], cfg, unflatten_dict(params))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise LoadingError(f"{file}: no adapters that agrl_jax.export wrote ({error!r}); export them again") from error


def digest(folder: Path) -> str:
    """A short name for the adapters of a folder. A name of the merged parameters would depend on the machine."""
    return hashlib.sha256((folder / FILE).read_bytes()).hexdigest()[:16]


def check(folder: Path, found: Adapters, shapes: Params, axes: Params) -> None:
    """Raises LoadingError where adapters do not fit a base with these shapes and logical axes."""
    wanted = flatten_dict(jax.eval_shape(lambda key: lora.init(key, shapes, axes, found.cfg), jax.random.key(0)))
    there = flatten_dict(found.params)
    for path in sorted(wanted.keys() | there.keys()):
        sizes = [x[path].shape if path in x else None for x in (there, wanted)]
        if sizes[0] != sizes[1]:
            raise LoadingError(
                f"{folder / FILE}: {'/'.join(path)} has shape {sizes[0]}, where {found.base} has {sizes[1]}: "
                "the adapters are of another model"
            )
