"""Adam whose moments take 8 bits: codes of few digits, with a float32 scale for every block of up to 256."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

LARGEST, LAST = 1.875, 127
"""The number that the last code stands for, and that code: a sign, four bits of exponent, three of mantissa."""

_BELOW = (0x3FF00000 >> 20) - LAST
"""What lies under the codes of the 12 leading bits of float32 numbers, of which 0x3FF00000 is 1.875."""

BLOCK = 256
FEWEST = 4096
"""Smaller arrays, of which there are many and which weigh little, keep float32 moments, as in bitsandbytes."""

PACKED = 4
"""Codes in a word: TPUs lay out bytes in another way than their hosts, and XLA cannot move them between the two."""


class Quantized(struct.PyTreeNode):
    """An array as codes and scales.

    Attributes:
        codes: Of the array's shape, so that it is divided over devices as the array would be, but of a fourth of its
            rows (the second axis from the end): a word holds the codes of four, each a fourth of the axis further.
        absmax: The largest absolute value of each block; blocks lie along the same axis.
    """

    codes: jax.Array
    absmax: jax.Array


class EightBitAdamState(struct.PyTreeNode):
    """As optax's `ScaleByAdamState`, large leaves quantized; `nu` holds square roots, whose range is half as wide."""

    count: jax.Array
    mu: Any
    nu: Any


def quantize(x: jax.Array) -> Quantized:
    """To the nearest codes, within a sixteenth. What is not zero does not become so, since a second moment must not.

    Args:
        x: Of rows that come in fours.
    """
    x = x.astype(jnp.float32)
    blocks = x.reshape(*x.shape[:-2], -1, _block(x.shape[-2]), x.shape[-1])
    absmax = jnp.abs(blocks).max(axis=-2)
    scaled = blocks * (LARGEST / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny))[..., None, :]
    bits = jax.lax.bitcast_convert_type(scaled.reshape(x.shape), jnp.int32)
    nearest = jnp.clip((((bits & 0x7FFFFFFF) + (1 << 19)) >> 20) - _BELOW, 1, LAST)
    codes = jnp.where(x == 0, 0, nearest | jnp.where(bits < 0, 128, 0)).astype(jnp.uint32)
    quarters = codes.reshape(*x.shape[:-2], PACKED, -1, x.shape[-1])
    return Quantized(codes=(quarters << _places()).sum(axis=-3, dtype=jnp.uint32), absmax=absmax)


def dequantize(x: Quantized) -> jax.Array:
    """The float32 array."""
    shape = x.codes.shape
    codes = (x.codes[..., None, :, :] >> _places()).reshape(*shape[:-2], -1, shape[-1])
    size, sign = codes & LAST, codes & 128
    numbers = jax.lax.bitcast_convert_type((size + _BELOW) << 20 | sign << 24, jnp.float32)
    numbers = jnp.where(size == 0, 0.0, numbers)
    blocks = numbers.reshape(*codes.shape[:-2], -1, _block(codes.shape[-2]), codes.shape[-1])
    return (blocks * (x.absmax / LARGEST)[..., None, :]).reshape(codes.shape)


def _places() -> jax.Array:
    """By how many bits the codes of each quarter of the rows are shifted."""
    return 8 * jnp.arange(PACKED, dtype=jnp.uint32)[:, None, None]


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
            if p.ndim < 2 or p.size < FEWEST or p.shape[-2] % PACKED:
                return jnp.zeros_like(p)
            return quantize(jnp.zeros(p.shape, jnp.float32))

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
