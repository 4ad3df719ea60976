"""Placement of arrays: a mesh with a data and an fsdp axis, and an ordered table of rules by parameter path.

On a CPU whose cores divide batches among themselves, the mesh has an axis of cores besides, over which only images are
divided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from flax_diffusion.core.errors import ConfigError

DATA, FSDP, CORES = "data", "fsdp", "cores"

RULES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"/embedding$", (0, 1)),  # (rows, features): rows first, the vocabulary is the large side
    (r"/kernel$", (-1, -2)),  # (…, in, out): output features, else input features
    (r"/(codes|absmax)$", (-1,)),  # 8-bit moments of both; their rows are in blocks
    (r"", ()),  # norms, biases and scalars are small: a copy on every device
)
"""Pairs of a path regex and the axes to try in order: the first rule that matches decides, and of its axes the first
that the devices divide evenly is sharded.

The paths of optimizer moments and of the moving average end in those of their parameters, so the same rules place them.
But since only the update needs them, they are divided over all devices, not over the fsdp axis alone.
"""

UPDATE_ONLY = re.compile(r"^(opt_state|ema)/")
"""Paths of the parts of a train state that the forward and backward passes do not read."""


def make_mesh(data: int, fsdp: int, devices: Sequence[Any] | None = None, cores: int = 1) -> Mesh:
    """Return a mesh of the devices, with axes (data, fsdp), or (data, fsdp, cores) for several cores.

    Args:
        data: Size of the data axis; -1 takes the devices that fsdp leaves.
        fsdp: Size of the fsdp axis.
        devices: Devices of the mesh, or the cores that they consist of; None takes all devices.
        cores: Cores of each device that divide its images among themselves.

    Raises:
        ConfigError: If the sizes do not multiply out to the number of devices.
    """
    devices = devices or jax.devices()
    count = len(devices) // cores
    if data == -1 and count % fsdp == 0:
        data = count // fsdp
    if data * fsdp != count:
        wanted = f"data {data} x fsdp {fsdp}" if data != -1 else f"fsdp {fsdp}"
        sizes = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"a mesh of {wanted} does not fit {count} devices: --fsdp_parallelism must be one of "
            f"{', '.join(map(str, sizes))}, and --data_parallelism -1 takes the rest"
        )
    sizes, names = ((data, fsdp), (DATA, FSDP)) if cores == 1 else ((data, fsdp, cores), (DATA, FSDP, CORES))
    return jax.make_mesh(sizes, names, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


def partition_of(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return the partition of one array, by the first rule that matches its path.

    Args:
        path: Path in the train state, such as params/unet/conv_in/kernel.
        shape: Shape of the array.
        mesh: Mesh with a data and an fsdp axis.
    """
    axes = next(axes for pattern, axes in RULES if re.search(pattern, path))
    for over in ((DATA, FSDP), FSDP) if UPDATE_ONLY.search(path) else (FSDP,):
        for axis in axes:
            if len(shape) >= 2 and shape[axis] % math.prod(mesh.shape[name] for name in np.atleast_1d(over)) == 0:
                parts: list[Any] = [None] * len(shape)
                parts[axis] = over
                return PartitionSpec(*parts)
    return PartitionSpec()


def partitions(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return the partition of every leaf of a train state, which may be abstract."""

    def place(path: Any, leaf: Any) -> PartitionSpec:
        return partition_of(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def update_partitions(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return the partitions of gradients, which are divided as the moments and the average are.

    Args:
        params: Tree of the weights, which may be abstract.
        mesh: Mesh with a data and an fsdp axis.
    """
    return partitions({"ema": params}, mesh)["ema"]


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Return the sharding on a mesh of every leaf of a train state, which may be abstract."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partitions(state, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts a copy on every device of a mesh."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 1) -> NamedSharding:
    """Return the sharding that splits images over all devices of a mesh.

    Args:
        mesh: Mesh with a data and an fsdp axis.
        leading: Number of axes before that of the images, such as accumulation's.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, mesh.axis_names))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, leading: int = 1) -> dict[str, jax.Array]:
    """Start the copy of this process's part of a batch to its devices.

    Args:
        batch: Arrays with axes (accumulation, images, …).
        mesh: Mesh with a data and an fsdp axis.
        leading: Number of axes before that of the images.
    """
    sharding = batch_sharding(mesh, leading)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def put(tree: Any, shardings: Any) -> Any:
    """Place host arrays, the same in every process, on the devices by a tree of shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]),
        tree,
        shardings,
    )


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Place a copy of host arrays, the same in every process, on every device of a mesh."""
    return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))
