"""What a TPU chip can do, by Google's published figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip.

    Reference: the system architecture pages of https://cloud.google.com/tpu/docs. The clock is that at which the
    chip's matrix units do the published FLOP/s: peak / (2 · units · side²).
    """

    name: str
    hbm_bytes: float
    flops: float  # bfloat16, a second
    bandwidth: float  # bytes of HBM a second
    matrix_units: int
    matrix_side: int

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.flops / (2 * self.matrix_units * self.matrix_side**2)


GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(name="v4", hbm_bytes=32 * GIB, flops=275e12, bandwidth=1228e9, matrix_units=8, matrix_side=128),
        Chip(name="v5e", hbm_bytes=16 * GIB, flops=197e12, bandwidth=819e9, matrix_units=4, matrix_side=128),
        Chip(name="v5p", hbm_bytes=95 * GIB, flops=459e12, bandwidth=2765e9, matrix_units=8, matrix_side=128),
        Chip(name="v6e", hbm_bytes=32 * GIB, flops=918e12, bandwidth=1640e9, matrix_units=4, matrix_side=256),
    )
}
