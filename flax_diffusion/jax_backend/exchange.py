"""What the devices of a mesh exchange in a step: they gather weights, and sum gradients.

A step's loss and gradients are computed by each device for its own images, inside `jax.shard_map`. So every exchange,
and the precision of every sum, stands here; the compiler chooses neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, PartitionSpec

Paths = Mapping[tuple[str, ...], PartitionSpec]
"""How the parameters of a model are divided, by path."""


@dataclass(frozen=True)
class Exchange:
    """The exchanges among the devices of a mesh; all methods are traced inside `shard_map`.

    Attributes:
        mesh: Mesh with a data and an fsdp axis. With one device nothing is exchanged.
        sum_dtype: Dtype in which gradients are summed over devices; None sums in that of each weight.
    """

    mesh: Mesh
    sum_dtype: Any = None

    def gather(self, part: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Return an array whole.

        Args:
            part: This device's part.
            spec: How the array is divided.
        """
        for axis, over in self._divided(spec):
            part = jax.lax.all_gather(part, over, axis=axis, tiled=True)
        return part

    def sum(self, grad: jax.Array, spec: PartitionSpec, dtype: Any) -> jax.Array:
        """Sum the gradients of a weight, and return this device's part of the sum.

        Args:
            grad: What this device computed for its own images: the gradient of the whole weight.
            spec: How the sum is divided.
            dtype: Dtype of the weight and of the result.
        """
        if self.mesh.size == 1:
            return _widened(grad, dtype)
        grad = _widened(grad, self.sum_dtype or dtype)
        rest = [name for name in self.mesh.axis_names if self.mesh.shape[name] > 1]
        for axis, over in self._divided(spec):
            grad = jax.lax.psum_scatter(grad, over, scatter_dimension=axis, tiled=True)
            rest = [name for name in rest if name not in over]
        grad = jax.lax.psum(grad, tuple(rest)) if rest else grad
        return grad.astype(dtype)

    def mean(self, value: jax.Array) -> jax.Array:
        """Return the mean over the devices of a value that each has."""
        return value if self.mesh.size == 1 else jax.lax.pmean(value, self.mesh.axis_names)

    def divides(self, spec: PartitionSpec) -> bool:
        """Return whether a device has only a part of an array that is divided so."""
        return bool(self._divided(spec))

    def _divided(self, spec: PartitionSpec) -> list[tuple[int, tuple[str, ...]]]:
        """Return the axes of an array that are divided, each with the mesh's axes of more than one device."""
        found = []
        for axis, over in enumerate(spec):
            names = (over,) if isinstance(over, str) else over or ()
            names = tuple(name for name in names if self.mesh.shape[name] > 1)
            found += [(axis, names)] if names else []
        return found

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Return a function of whole arrays that runs on each device with its parts of them."""
        if self.mesh.size == 1:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _widened(grad: jax.Array, dtype: Any) -> jax.Array:
    """Convert a gradient; in memory it keeps its own precision, at half the bytes under bf16."""
    return grad if grad.dtype == dtype else jax.lax.optimization_barrier(grad).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(exchange: Exchange, spec: PartitionSpec, dtype: Any, part: jax.Array) -> jax.Array:
    """Return a whole weight in the dtype of its computation. Its gradient is divided as it is, in its own dtype."""
    return exchange.gather(part.astype(dtype), spec)


def _gathered_forward(exchange: Exchange, spec: PartitionSpec, dtype: Any, part: jax.Array) -> Any:
    return _gathered(exchange, spec, dtype, part), jnp.empty(0, part.dtype)


def _gathered_backward(exchange: Exchange, spec: PartitionSpec, dtype: Any, like: jax.Array, grad: jax.Array) -> Any:
    return (exchange.sum(grad, spec, like.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


@dataclass(frozen=True)
class BlockGather:
    """Weights that each layer gathers when it is called, forward and backward, so that few are whole at a time.

    Attributes:
        exchange: The devices.
        specs: How the weights are divided, by component and path.
    """

    exchange: Exchange
    specs: Mapping[str, Paths]

    def gathers(self, path: tuple[str, ...]) -> bool:
        """Return whether layers gather a weight, of the path that begins with the component's name."""
        return path[1:] in self.specs.get(path[0], {})

    def layers_of(self, name: str, dtype: Any) -> AbstractContextManager[Any]:
        """Return a context in which the layers of a component gather their weights.

        Args:
            name: Name of the component.
            dtype: Dtype that its weight matrices are gathered in.
        """
        if name not in self.specs:
            return nullcontext()
        specs, active = self.specs[name], False

        def call(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            nonlocal active
            layer = context.module
            if active or layer.scope is None:
                return next_call(*args, **kwargs)
            own = flatten_dict(layer.variables.get("params", {}))
            parts = {path: own[path] for path in own if (*layer.path, *path) in specs}
            if all(len(path) > 1 for path in parts):  # its weights are those of layers inside
                return next_call(*args, **kwargs)
            alone = layer.clone(parent=None, name=None)

            def with_whole(parts: Any, *inputs: Any) -> Any:
                whole = {
                    path: _gathered(self.exchange, specs[*layer.path, *path], dtype_of(path, part, dtype), part)
                    for path, part in parts.items()
                }
                return alone.apply({"params": unflatten_dict(whole)}, *inputs, **kwargs, method=context.method_name)

            gathers = any(self.exchange.divides(specs[*layer.path, *path]) for path in parts)
            active = True
            try:  # The backward pass of a layer needs its inputs and weights, and gathers the latter again.
                return (jax.checkpoint(with_whole) if gathers else with_whole)(parts, *args)
            finally:
                active = False

        return nn.intercept_methods(call)


def dtype_of(path: Sequence[str], weight: Any, dtype: Any) -> Any:
    """Return the dtype that a weight is computed with.

    Norms and biases stay as they are, because they enter sums in float32.

    Args:
        path: Path of the weight.
        weight: The weight.
        dtype: Dtype of the model's computation.
    """
    return jnp.dtype(dtype) if path[-1] in ("kernel", "embedding") else weight.dtype
