"""Adam whose moments take 8 bits: float8 codes, with a float32 scale for every block of up to 256."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

CODE = jnp.float8_e4m3fn
LARGEST, SMALLEST = 448.0, 2.0**-9
"""Positive numbers that the code ends with."""

BLOCK = 256
FEWEST = 4096
"""Smaller arrays, of which there are many and which weigh little, keep float32 moments, as in bitsandbytes."""


class Quantized(struct.PyTreeNode):
    """An array as codes and scales.

    Attributes:
        codes: Of the array's shape, so that it is divided over devices as the array would be.
        absmax: The largest absolute value of each block; blocks lie along the second axis from the end.
    """

    codes: jax.Array
    absmax: jax.Array


class EightBitAdamState(struct.PyTreeNode):
    """As optax's `ScaleByAdamState`, large leaves quantized; `nu` holds square roots, whose range is half as wide."""

    count: jax.Array
    mu: Any
    nu: Any


def quantize(x: jax.Array) -> Quantized:
    """To the nearest codes; what is not zero does not become so, since a second moment must not."""
    blocks = x.reshape(*x.shape[:-2], -1, _block(x.shape[-2]), x.shape[-1])
    absmax = jnp.abs(blocks).max(axis=-2)
    scaled = blocks * (LARGEST / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny))[..., None, :]
    scaled = jnp.where(blocks == 0, 0.0, jnp.sign(scaled) * jnp.clip(jnp.abs(scaled), SMALLEST, LARGEST))
    return Quantized(codes=scaled.astype(CODE).reshape(x.shape), absmax=absmax.astype(jnp.float32))


def dequantize(x: Quantized) -> jax.Array:
    """The float32 array."""
    shape = x.codes.shape
    blocks = x.codes.astype(jnp.float32).reshape(*shape[:-2], -1, _block(shape[-2]), shape[-1])
    return (blocks * (x.absmax / LARGEST)[..., None, :]).reshape(shape)


def _block(length: int) -> int:
    """The longest block that divides an axis."""
    return next(size for size in range(min(length, BLOCK), 0, -1) if length % size == 0)


def scale_by_8bit_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's update up to the learning rate, with moments kept in 8 bits.

    Args:
        b1: Decay of the first moment.
        b2: Decay of the second.
        eps: Added to the root of the second.

    Reference: Kingma and Ba, https://arxiv.org/abs/1412.6980, algorithm 1; Dettmers et al.,
    https://arxiv.org/abs/2110.02861, for blocks and their size.
    """

    def init(params: Any) -> Any:
        def moment(p: jax.Array) -> Any:
            return quantize(jnp.zeros(p.shape, jnp.float32)) if p.ndim > 1 and p.size >= FEWEST else jnp.zeros_like(p)

        zeros = jax.tree.map(moment, params)
        return EightBitAdamState(count=jnp.int32(0), mu=zeros, nu=jax.tree.map(jnp.copy, zeros))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        first, second = (1 - jnp.float32(b) ** count for b in (b1, b2))

        def one(grad: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
            small = not isinstance(mu, Quantized)
            mean = b1 * (mu if small else dequantize(mu)) + (1 - b1) * grad
            root = jnp.sqrt(b2 * jnp.square(nu if small else dequantize(nu)) + (1 - b2) * jnp.square(grad))
            step = (mean / first) / (root / jnp.sqrt(second) + eps)
            return (step, mean, root) if small else (step, quantize(mean), quantize(root))

        leaves, tree = jax.tree.flatten(updates)
        steps, means, roots = zip(
            *map(one, leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)), strict=True
        )
        return tree.unflatten(steps), EightBitAdamState(count=count, mu=tree.unflatten(means), nu=tree.unflatten(roots))

    return optax.GradientTransformation(init, update)
