"""Where arrays live: a mesh with a data and an fsdp axis, and an ordered table of rules by parameter path."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from flax_diffusion.core.errors import ConfigError

DATA, FSDP = "data", "fsdp"

RULES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"/embedding$", (0, 1)),  # (rows, features): rows first, the vocabulary is the large side
    (r"/kernel$", (-1, -2)),  # (…, in, out): output features, else input features
    (r"/(codes|absmax)$", (-1,)),  # 8-bit moments of either; their rows come in blocks
    (r"", ()),  # norms, biases and scalars are small: a copy on every device
)
"""(path regex, axes to try in order): the first rule that matches decides, its first axis that divides is sharded.

Optimizer moments and the moving average have the paths of their parameters as suffix, so the same rules place them;
but since only the update needs them, they are divided over all devices, not over the fsdp axis alone.
"""

UPDATED = re.compile(r"^(opt_state|ema)/")
"""Paths of the parts of a train state that the forward and backward passes do not read."""


def make_mesh(data: int, fsdp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices as (data, fsdp).

    Args:
        data: Size of the data axis; -1 takes what fsdp leaves.
        fsdp: Size of the fsdp axis.
        devices: By default all of them.

    Raises:
        ConfigError: If the sizes do not multiply out to the number of devices.
    """
    devices = devices or jax.devices()
    count = len(devices)
    if data == -1 and count % fsdp == 0:
        data = count // fsdp
    if data * fsdp != count:
        wanted = f"data {data} x fsdp {fsdp}" if data != -1 else f"fsdp {fsdp}"
        sizes = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"a mesh of {wanted} does not fit {count} devices: --fsdp_parallelism must be one of "
            f"{', '.join(map(str, sizes))}, and --data_parallelism -1 takes the rest"
        )
    return jax.make_mesh((data, fsdp), (DATA, FSDP), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of one array by the first rule that matches its path."""
    axes = next(axes for pattern, axes in RULES if re.search(pattern, path))
    for over in ((DATA, FSDP), FSDP) if UPDATED.search(path) else (FSDP,):
        for axis in axes:
            if len(shape) >= 2 and shape[axis] % math.prod(mesh.shape[name] for name in np.atleast_1d(over)) == 0:
                parts: list[Any] = [None] * len(shape)
                parts[axis] = over
                return PartitionSpec(*parts)
    return PartitionSpec()


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a (possibly abstract) train state."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 1) -> NamedSharding:
    """Splits the images over all devices; `leading` axes (accumulation) come before them."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, (DATA, FSDP)))


def gathered(tree: Any, mesh: Mesh | None) -> Any:
    """Inside jit: whole on every device.

    Left to choose, the compiler would now and then gather the images of a layer rather than its weights.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, replicated(mesh))


def scattered(tree: Any, mesh: Mesh | None) -> Any:
    """Inside jit: gradients divided as the moments are, so that of their sum over devices each gets its part alone."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, state_shardings({"ema": tree}, mesh)["ema"])


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, leading: int = 1) -> dict[str, jax.Array]:
    """Starts the copy of this process's part of a batch (accumulation, images, …) to its devices."""
    sharding = batch_sharding(mesh, leading)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def put(tree: Any, shardings: Any) -> Any:
    """Places host arrays, the same on every process, onto their shards."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]),
        tree,
        shardings,
    )


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Places a copy of host arrays on every device."""
    return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))
