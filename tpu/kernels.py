"""Time of kernels written by hand, of which the compiler gives no estimate, from their FLOPs and bytes."""

from __future__ import annotations

import math

from flax_diffusion.models import flash
from tpu.chips import Chip
from tpu.hlo import Kernel

MATMUL_EFFICIENCY, COPY_EFFICIENCY = 0.88, 0.80
"""Shares of a chip's peaks that the compiler expects of a large bfloat16 product and of a large copy on v5e."""

FLASH_EFFICIENCY, FLASH_STEP_CYCLES = 0.95, 700
"""Share of the matrix units' peak in attention, and extra cycles of each step of its grid, as the compiler lays it out
on v5e.
"""

MATRIX_UNIT_ROWS = 16
"""Rows of bfloat16 that a matrix unit takes at a time."""


def seconds(kernel: Kernel, chip: Chip) -> float | None:
    """Return the time of one execution of a kernel: that of its products or of its memory traffic, the longer one.

    In attention the exponentials run beside the products, and take less time than they do.

    Args:
        kernel: The kernel. Those of `flax_diffusion.models.flash` count as they fill the matrix units: sums over
            channels take as long as those over a whole unit, sums over tokens count their rows. Others count as their
            authors say.
        chip: The chip that runs it.

    Returns:
        Seconds; None for a kernel whose author gives no estimate.
    """
    if kernel.flops is None or kernel.bytes_accessed is None:
        return None
    computing = kernel.flops / (MATMUL_EFFICIENCY * chip.flops)
    if kernel.name in flash.MATMULS_PER_KERNEL:
        over_channels, over_tokens = flash.MATMULS_PER_KERNEL[kernel.name]
        channels = kernel.shapes[0][-2]
        done = over_channels * _round_up(channels, chip.matrix_side) + over_tokens * _round_up(
            channels, MATRIX_UNIT_ROWS
        )
        flops = kernel.flops * done / ((over_channels + over_tokens) * channels)
        steps = math.prod(flash.grid_shape(*kernel.shapes[:2]))
        computing = flops / (FLASH_EFFICIENCY * chip.flops) + steps * FLASH_STEP_CYCLES / chip.clock
    return max(computing, kernel.bytes_accessed / (COPY_EFFICIENCY * chip.bandwidth))


def _round_up(channels: int, unit: int) -> int:
    return math.ceil(channels / unit) * unit
