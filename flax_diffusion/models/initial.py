"""Parameters of a new model, drawn in few operations each.

A UNet has hundreds of parameters, and compiling JAX's threefry for every one of them takes XLA minutes on a CPU. A
counter-based hash is as good for this purpose, compiles in milliseconds, and its values depend neither on the number
of devices nor on how the parameters are sharded.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp


def mix(bits: jax.Array) -> jax.Array:
    """Return a bijective scrambling of 32-bit words.

    Reference: the finalizer of MurmurHash3 (Appleby 2011).
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def uniform(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return float32 values in the open interval (-1, 1), a function of two 32-bit words and the position."""
    position = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):  # iotas by axis, not one reshaped, so that a shard makes only its part
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    # Mixing a second word in after the first round keeps tensors from being shifted copies of one sequence.
    bits = mix(mix(position + words[0]) ^ words[1])
    return (bits >> 8).astype(jnp.float32) * 2.0**-23 + (2.0**-24 - 1.0)


def draw(
    rng: jax.Array, shapes: Mapping[str, Any], normal_std: Callable[[tuple[str, ...]], float | None]
) -> dict[str, Any]:
    """Return new parameters: PyTorch's default distributions for kernels and embeddings, zero biases.

    Args:
        rng: a JAX random key.
        shapes: the tree of shapes and dtypes.
        normal_std: standard deviation of the parameter at a path, where it is normal; None: the default.

    Returns:
        Arrays of these shapes and dtypes.

    Reference: torch.nn.Linear and Conv2d (uniform within ±1/sqrt(fan_in)), torch.nn.Embedding (standard normal).
    """
    seed = jax.random.bits(rng, (2,), "uint32")
    params = {}
    flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(shapes)  # pyright: ignore[reportAssignmentType]
    for path, leaf in flat.items():
        kind, std = path[-1], normal_std(path)
        if kind in ("scale", "bias"):
            params[path] = jnp.full(leaf.shape, float(kind == "scale"), leaf.dtype)
            continue
        values = uniform(mix(seed ^ jnp.uint32(zlib.crc32("/".join(path).encode()))), leaf.shape)
        if std is not None or kind == "embedding":
            values = jax.lax.erf_inv(values) * (math.sqrt(2.0) * (1.0 if std is None else std))
        else:
            values = values / math.sqrt(math.prod(leaf.shape[:-1]))
        params[path] = values.astype(leaf.dtype)
    return flax.traverse_util.unflatten_dict(params)
