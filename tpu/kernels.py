"""Time of kernels written by hand, of which the compiler gives no estimate, from their FLOPs and bytes."""

from __future__ import annotations

import math

from flax_diffusion.models import flash
from tpu.chips import Chip
from tpu.hlo import Kernel

PRODUCT_SHARE, COPY_SHARE = 0.88, 0.80
"""Of a chip's peaks, as the compiler estimates a large bfloat16 product and a large copy on v5e."""

FLASH_SHARE, FLASH_STEP = 0.95, 700
"""Of the matrix units' peak in attention, and cycles around a step of its grid, as the compiler lays it out on v5e."""

PACKED = 16
"""Rows of bfloat16 that a matrix unit takes at a time."""


def seconds(kernel: Kernel, chip: Chip) -> float | None:
    """Of one execution on a chip: the longer of its products and of its traffic.

    In attention the exponentials run beside the products, and take less time than they.

    Args:
        kernel: Those of `flax_diffusion.models.flash` as they fill the matrix units: sums over channels take as long as
            those over a whole unit, sums over tokens count their rows. Others as their authors say.
        chip: The chip.

    Returns:
        None of a kernel whose author says nothing.
    """
    if kernel.flops is None or kernel.bytes_accessed is None:
        return None
    computing = kernel.flops / (PRODUCT_SHARE * chip.flops)
    if kernel.name in flash.PRODUCTS:
        over_channels, over_tokens = flash.PRODUCTS[kernel.name]
        channels = kernel.shapes[0][-2]
        done = over_channels * _filled(channels, chip.matrix_side) + over_tokens * _filled(channels, PACKED)
        flops = kernel.flops * done / ((over_channels + over_tokens) * channels)
        steps = math.prod(flash.grid_of(*kernel.shapes[:2]))
        computing = flops / (FLASH_SHARE * chip.flops) + steps * FLASH_STEP / chip.clock
    return max(computing, kernel.bytes_accessed / (COPY_SHARE * chip.bandwidth))


def _filled(channels: int, unit: int) -> int:
    return math.ceil(channels / unit) * unit
