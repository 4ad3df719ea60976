"""Adam with 8-bit moments: one byte per number, and a float32 scale for every block of up to 256 numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

MAX_VALUE, MAX_CODE = 1.875, 127
"""The largest code and the number that it stands for. A code is a sign, four bits of exponent and three of mantissa."""

_CODE_OFFSET = (0x3FF00000 >> 20) - MAX_CODE
"""Difference between the 12 leading bits of a float32 number and its code; 0x3FF00000 is 1.875."""

MAX_BLOCK_SIZE = 256
MIN_SIZE = 4096
"""Smaller arrays, of which there are many that take little memory, keep float32 moments, as in bitsandbytes."""

SUBLANES = 8
"""Rows of codes kept together: longer columns of bytes have another layout in a TPU's memory than in a host's."""


class Quantized(struct.PyTreeNode):
    """Array (…, R, C) as codes and scales, in blocks of S rows.

    Attributes:
        codes: Codes, uint8 (…, R / S, S / 8, 8, C).
        absmax: Largest absolute value of each block, float32 (…, R / S, 1, 1, C).
    """

    codes: jax.Array
    absmax: jax.Array


class EightBitAdamState(struct.PyTreeNode):
    """Optax's `ScaleByAdamState` with large leaves quantized.

    Attributes:
        count: Number of updates, int32.
        mu: First moments.
        nu: Square roots of the second moments; their range is half as wide on a logarithmic scale.
    """

    count: jax.Array
    mu: Any
    nu: Any


def split_into_blocks(x: jax.Array) -> jax.Array:
    """Return an array (…, R, C), with R a multiple of 8, as float32 (…, R / S, S / 8, 8, C)."""
    *leading, rows, columns = x.shape
    block = next(size for size in range(min(rows, MAX_BLOCK_SIZE), 0, -1) if rows % size == 0 and size % SUBLANES == 0)
    return x.astype(jnp.float32).reshape(*leading, rows // block, block // SUBLANES, SUBLANES, columns)


def quantize(blocks: jax.Array) -> Quantized:
    """Round numbers to the nearest codes, within a sixteenth; only zeros become zero, as second moments require.

    Args:
        blocks: Numbers from `split_into_blocks`, float32 (…, R / S, S / 8, 8, C).
    """
    absmax = jnp.abs(blocks).max(axis=(-3, -2), keepdims=True)
    scaled = blocks * (MAX_VALUE / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny))
    bits = jax.lax.bitcast_convert_type(scaled, jnp.int32)
    nearest = jnp.clip((((bits & 0x7FFFFFFF) + (1 << 19)) >> 20) - _CODE_OFFSET, 1, MAX_CODE)
    codes = jnp.where(blocks == 0, 0, nearest | jnp.where(bits < 0, 128, 0))
    return Quantized(codes=codes.astype(jnp.uint8), absmax=absmax)


def dequantize(x: Quantized) -> jax.Array:
    """Return the numbers that codes stand for, in blocks, float32 (…, R / S, S / 8, 8, C)."""
    codes = x.codes.astype(jnp.int32)
    magnitude, sign = codes & MAX_CODE, codes & 128
    numbers = jax.lax.bitcast_convert_type((magnitude + _CODE_OFFSET) << 20 | sign << 24, jnp.float32)
    return jnp.where(magnitude == 0, 0.0, numbers) * (x.absmax / MAX_VALUE)


def scale_by_8bit_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Return Adam's update without the learning rate, with moments kept in 8 bits.

    Args:
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Number added to the root of the second moment.

    Reference:
        Kingma and Ba, https://arxiv.org/abs/1412.6980, algorithm 1; Dettmers et al.,
        https://arxiv.org/abs/2110.02861, for blocks and their size.
    """

    def init(params: Any) -> Any:
        def moment(p: jax.Array) -> Any:
            small = p.ndim < 2 or p.size < MIN_SIZE or p.shape[-2] % SUBLANES
            return jnp.zeros_like(p) if small else quantize(split_into_blocks(jnp.zeros_like(p)))

        zeros = jax.tree.map(moment, params)
        return EightBitAdamState(count=jnp.int32(0), mu=zeros, nu=jax.tree.map(jnp.copy, zeros))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        first, second = (1 - jnp.float32(b) ** count for b in (b1, b2))

        def update_one(grad: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
            coded = isinstance(mu, Quantized)
            new, mean, root = (split_into_blocks(grad), dequantize(mu), dequantize(nu)) if coded else (grad, mu, nu)
            mean = b1 * mean + (1 - b1) * new
            root = jnp.sqrt(b2 * jnp.square(root) + (1 - b2) * jnp.square(new))
            step = ((mean / first) / (root / jnp.sqrt(second) + eps)).reshape(grad.shape)
            return (step, quantize(mean), quantize(root)) if coded else (step, mean, root)

        leaves, tree = jax.tree.flatten(updates)
        steps, means, roots = zip(
            *map(update_one, leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)), strict=True
        )
        return tree.unflatten(steps), EightBitAdamState(count=count, mu=tree.unflatten(means), nu=tree.unflatten(roots))

    return optax.GradientTransformation(init, update)
