"""Time of kernels written by hand, of which the compiler knows none, from their FLOPs and bytes."""

from __future__ import annotations

import math

from flax_diffusion.models import flash
from tpu.chips import Chip
from tpu.hlo import Kernel

PRODUCT_SHARE, COPY_SHARE = 0.88, 0.80
"""Of a chip's peaks, as the compiler estimates a large bfloat16 product and a large copy on v5e."""


def seconds(kernel: Kernel, chip: Chip, devices_per_chip: int = 1) -> float | None:
    """Of one execution on one device: the longer of its products and of its traffic.

    The exponentials run beside the products, and take less time than they.

    Args:
        kernel: Those of `flax_diffusion.models.flash` count with channels as many as matrix units have rows; others as
            their authors say.
        chip: The chip.
        devices_per_chip: Among which its units are divided.

    Returns:
        None of a kernel whose author says nothing.
    """
    if kernel.flops is None or kernel.bytes_accessed is None:
        return None
    flops = float(kernel.flops)
    if kernel.name in flash.PRODUCTS:
        channels = kernel.shapes[0][-2]
        flops *= math.ceil(channels / chip.matrix_side) * chip.matrix_side / channels
    computing = flops / (PRODUCT_SHARE * chip.flops)
    moving = kernel.bytes_accessed / (COPY_SHARE * chip.bandwidth)
    return max(computing, moving) * devices_per_chip
