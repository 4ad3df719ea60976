"""How a pipeline runs: one compiled program over all devices, whatever form its inputs have.

Code of Diffusers 0.39 gives a leading axis of devices to every input, and to every parameter, when it asks for
`jit=True`. Here the pictures of all devices are one batch, which is divided over a mesh; the leading axes are taken off
before and put back after. Each device's pictures are still drawn from that device's own key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_diffusion.core.errors import ConfigError, WeightsError

BATCH = "batch"
"""Axis of the mesh."""

_OTHER_PARAMETERS = (
    flax.errors.ScopeParamShapeError,
    flax.errors.ScopeParamNotFoundError,
    flax.errors.ScopeCollectionNotFound,
)


class Parts:
    """Parts of a pipeline as one static argument of a compiled program: equal if every part is the same object.

    Args:
        parts: The parts by name.
    """

    def __init__(self, parts: Mapping[str, Any]):
        self.parts = dict(parts)

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.parts.values())))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Parts)
            and self.parts.keys() == other.parts.keys()
            and all(part is other.parts[name] for name, part in self.parts.items())
        )


@dataclass(frozen=True)
class Layout:
    """How the inputs of a call lie: pictures in groups, one group for each key.

    Attributes:
        mesh: Devices over which the pictures are divided.
        groups: Number of keys.
        size: Pictures of each key.
        leading: Whether inputs have, and outputs get, a leading axis of devices.
    """

    mesh: Mesh
    groups: int
    size: int
    leading: bool

    @property
    def count(self) -> int:
        """Number of pictures."""
        return self.groups * self.size

    def flat(self, array: Any, what: str) -> Array:
        """Return an input with one batch axis, divided over the devices.

        Args:
            array: The input, (N, …), or (D, B, …) of D devices.
            what: Name of the argument, for the error.

        Raises:
            ConfigError: If it has another number of pictures.
        """
        wanted = (self.groups, self.size) if self.leading else (self.count,)
        if tuple(np.shape(array)[: len(wanted)]) != wanted:
            raise ConfigError(f"{what} has shape {np.shape(array)}; its first axes must be {wanted}, as prompt_ids has")
        array = array if isinstance(array, Array) else np.asarray(array)
        return self.put(array.reshape(self.count, *array.shape[len(wanted) :]), BATCH)

    def number(self, value: Any, what: str) -> Array:
        """Return a number of each picture, float32 (N,), from one for all, for each device or for each picture.

        Args:
            value: The number or numbers.
            what: Name of the argument, for the error.

        Raises:
            ConfigError: If there are as many numbers as neither devices nor pictures.
        """
        values = np.asarray(value, np.float32).reshape(-1)
        if values.size not in (1, self.groups, self.count):
            raise ConfigError(f"{what} has {values.size} values: give one, or one for each of {self.count} pictures")
        return self.put(np.repeat(values, self.count // values.size), BATCH)

    def keys(self, key: Any) -> Array:
        """Return the key of each group, (groups, …).

        Args:
            key: One key, or one for each device.

        Raises:
            ConfigError: If there are as many keys as neither groups nor one.
        """
        key = jnp.asarray(key)
        single = key.ndim == (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)
        if single == self.leading or (self.leading and key.shape[0] != self.groups):
            wanted = f"one for each of {self.groups} devices: jax.random.split(key, {self.groups})"
            raise ConfigError(
                f"prng_seed has shape {key.shape}; give {wanted if self.leading else 'one key for the whole batch'}"
            )
        return self.put(key[None] if single else key, BATCH if self.leading else None)

    def params(self, params: Any, leading: bool) -> Any:
        """Return parameters on all devices.

        Args:
            params: Parameter trees, with or without a leading axis of devices.
            leading: Whether they have one.
        """
        return jax.tree.map(lambda leaf: self.put(leaf, BATCH if leading else None), params)

    def put(self, array: Any, axis: str | None) -> Array:
        """Place an array on the devices, divided along its first axis, or a copy on each.

        Args:
            array: The array; one that is being traced stays as it is.
            axis: `BATCH` or None.
        """
        if isinstance(array, Tracer):
            return array
        spec = PartitionSpec() if axis is None else PartitionSpec(axis)
        return jax.device_put(array, NamedSharding(self.mesh, spec))

    def outputs(self, array: Array) -> np.ndarray:
        """Return an output on the host, with the leading axis of devices that the inputs had.

        Args:
            array: The output, (N, …).
        """
        host = np.asarray(array)
        return host.reshape(self.groups, self.size, *host.shape[1:]) if self.leading else host


def layout_of(prompt_ids: Any, axes: int, jit: bool) -> Layout:
    """Return how the inputs of a call lie.

    Args:
        prompt_ids: Token ids, (N, …) with `axes` axes, or (D, B, …).
        axes: Number of axes without one of devices.
        jit: Divide the pictures over all devices; False uses one.

    Raises:
        ConfigError: If the pictures do not divide over the devices, or there are not as many devices.
    """
    shape, devices = tuple(np.shape(prompt_ids)), jax.local_devices()
    if len(shape) not in (axes, axes + 1):
        raise ConfigError(f"prompt_ids has shape {shape}: give what prepare_inputs returns, or that of `shard`")
    leading = len(shape) == axes + 1
    if leading and not jit:
        raise ConfigError(f"prompt_ids has shape {shape}, with an axis of devices: pass jit=True, or do not shard it")
    if leading and shape[0] > len(devices):
        raise ConfigError(f"prompt_ids has shape {shape}, for {shape[0]} devices: there are {len(devices)}")
    if jit and not leading and shape[0] % len(devices):
        raise ConfigError(
            f"{shape[0]} prompts do not divide over {len(devices)} devices: give a multiple of {len(devices)}, "
            "or jit=False"
        )
    used = devices[: shape[0]] if leading else devices if jit else devices[:1]
    mesh = jax.make_mesh((len(used),), (BATCH,), devices=used, axis_types=(jax.sharding.AxisType.Auto,))
    groups, size = (shape[0], shape[1]) if leading else (1, shape[0])
    return Layout(mesh=mesh, groups=groups, size=size, leading=leading)


def have_leading_axis(params: Mapping[str, Any]) -> bool:
    """Return whether parameters have a leading axis of devices, as `flax.jax_utils.replicate` gives them."""
    biases = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "bias" in str(path[-1])]
    return bool(biases) and np.ndim(biases[0]) == 2


def run(
    parts: Mapping[str, Any],
    function: Callable[..., Array],
    layout: Layout,
    params: Mapping[str, Any],
    key: Any,
    arrays: Mapping[str, Any],
    **settings: Any,
) -> Array:
    """Run a function of a pipeline as one program.

    Args:
        parts: Parts of the pipeline by name; those that have parameters need them.
        function: Of `(parts, params, keys, arrays, **settings)`, to pictures (N, …); a plain function of a module.
        layout: How the inputs lie.
        params: Parameters by part, and the scheduler's state.
        key: The random key or keys; None for a function that draws nothing.
        arrays: Inputs with one batch axis.
        settings: What the program is compiled for: hashable values.

    Raises:
        WeightsError: If parameters are missing, or those of another model.
    """
    models = [name for name, part in parts.items() if hasattr(part, "params_shape_tree") or hasattr(part, "apply")]
    needed = [*models, *(name for name in parts if name == "scheduler")]
    missing = [name for name in needed if name not in params]
    if missing:
        raise WeightsError(
            f"params has no {', '.join(missing)} (it has {', '.join(params) or 'nothing'}): give what from_pretrained "
            "returned, with the state of a scheduler that was changed"
        )
    used = {name: params[name] for name in needed}
    leading = have_leading_axis({name: used[name] for name in models})
    if leading and not layout.leading:
        raise ConfigError("params have an axis of devices and prompt_ids has none: replicate both or neither")
    program = functools.partial(_program, Parts(parts), function, layout.mesh, leading, tuple(sorted(settings.items())))
    try:
        return program(layout.params(used, leading), None if key is None else layout.keys(key), dict(arrays))
    except _OTHER_PARAMETERS as error:
        raise WeightsError(
            f"params are not those of this pipeline's models ({str(error).splitlines()[0]}): give what from_pretrained "
            "returned"
        ) from error


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _program(
    parts: Parts,
    function: Callable[..., Array],
    mesh: Mesh,
    leading: bool,
    settings: tuple[tuple[str, Any], ...],
    params: Any,
    keys: Array | None,
    arrays: dict[str, Array],
) -> Array:
    if leading:
        # Each device has its own copy, so taking the axis off moves nothing.
        own, all_ = PartitionSpec(BATCH), PartitionSpec()
        strip = functools.partial(jax.tree.map, lambda leaf: leaf[0])
        params = jax.shard_map(strip, mesh=mesh, in_specs=own, out_specs=all_, check_vma=False)(params)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function(parts.parts, params, keys, arrays, **dict(settings))


def draw_normal(keys: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Draw standard normal noise, each group from its own key.

    Args:
        keys: Keys, (groups, …).
        shape: Shape of all noise, (N, …), N a multiple of the number of groups.
        dtype: Dtype of the noise.
    """
    groups = keys.shape[0]
    part = (shape[0] // groups, *shape[1:])
    return jax.vmap(lambda key: jax.random.normal(key, part, dtype))(keys).reshape(shape)


def of_each(value: Any, count: int) -> Array:
    """Return a number of each picture, float32 (N,), from one for all or one for each; it may be traced.

    Args:
        value: The number or numbers.
        count: Number of pictures N.
    """
    return jnp.broadcast_to(jnp.ravel(jnp.asarray(value, jnp.float32)), (count,))
