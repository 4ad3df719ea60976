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

ROWS = 8
"""Codes come in as many rows: longer columns of bytes lie otherwise in a TPU's memory than in its host's."""


class Quantized(struct.PyTreeNode):
    """An array (…, R, C) as codes and scales; S is the length of a block.

    Attributes:
        codes: (…, R / S, S / 8, 8, C).
        absmax: The largest absolute value of each block, (…, R / S, 1, 1, C).
    """

    codes: jax.Array
    absmax: jax.Array


class EightBitAdamState(struct.PyTreeNode):
    """As optax's `ScaleByAdamState`, large leaves quantized; `nu` holds square roots, whose range is half as wide."""

    count: jax.Array
    mu: Any
    nu: Any


def in_blocks(x: jax.Array) -> jax.Array:
    """An array (…, R, C), whose rows come in eights, as float32 (…, R / S, S / 8, 8, C)."""
    *leading, rows, columns = x.shape
    block = next(size for size in range(min(rows, BLOCK), 0, -1) if rows % size == 0 and size % ROWS == 0)
    return x.astype(jnp.float32).reshape(*leading, rows // block, block // ROWS, ROWS, columns)


def quantize(blocks: jax.Array) -> Quantized:
    """To the nearest codes, within a sixteenth. What is not zero does not become so, since a second moment must not.

    Args:
        blocks: As of `in_blocks`.
    """
    absmax = jnp.abs(blocks).max(axis=(-3, -2), keepdims=True)
    scaled = blocks * (LARGEST / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny))
    bits = jax.lax.bitcast_convert_type(scaled, jnp.int32)
    nearest = jnp.clip((((bits & 0x7FFFFFFF) + (1 << 19)) >> 20) - _BELOW, 1, LAST)
    codes = jnp.where(blocks == 0, 0, nearest | jnp.where(bits < 0, 128, 0))
    return Quantized(codes=codes.astype(jnp.uint8), absmax=absmax)


def dequantize(x: Quantized) -> jax.Array:
    """The array in blocks, float32."""
    codes = x.codes.astype(jnp.int32)
    size, sign = codes & LAST, codes & 128
    numbers = jax.lax.bitcast_convert_type((size + _BELOW) << 20 | sign << 24, jnp.float32)
    return jnp.where(size == 0, 0.0, numbers) * (x.absmax / LARGEST)


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
            small = p.ndim < 2 or p.size < FEWEST or p.shape[-2] % ROWS
            return jnp.zeros_like(p) if small else quantize(in_blocks(jnp.zeros_like(p)))

        zeros = jax.tree.map(moment, params)
        return EightBitAdamState(count=jnp.int32(0), mu=zeros, nu=jax.tree.map(jnp.copy, zeros))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        first, second = (1 - jnp.float32(b) ** count for b in (b1, b2))

        def one(grad: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
            coded = isinstance(mu, Quantized)
            new, mean, root = (in_blocks(grad), dequantize(mu), dequantize(nu)) if coded else (grad, mu, nu)
            mean = b1 * mean + (1 - b1) * new
            root = jnp.sqrt(b2 * jnp.square(root) + (1 - b2) * jnp.square(new))
            step = ((mean / first) / (root / jnp.sqrt(second) + eps)).reshape(grad.shape)
            return (step, quantize(mean), quantize(root)) if coded else (step, mean, root)

        leaves, tree = jax.tree.flatten(updates)
        steps, means, roots = zip(
            *map(one, leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)), strict=True
        )
        return tree.unflatten(steps), EightBitAdamState(count=count, mu=tree.unflatten(means), nu=tree.unflatten(roots))

    return optax.GradientTransformation(init, update)
