"""Memory and speed of TPU chips, from Google's published figures."""

from __future__ import annotations

from dataclasses import dataclass

from flax_diffusion.core.tracking.peaks import TPU_FLOPS


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Figures of one chip.

    Attributes:
        name: Generation, such as v5e.
        hbm_bytes: Bytes of memory.
        flops: Peak of bfloat16 FLOP/s.
        bandwidth: Bytes of memory read or written per second.
        matrix_units: Number of matrix units.
        matrix_side: Rows and columns of one.

    Reference:
        the system architecture pages of https://cloud.google.com/tpu/docs.
    """

    name: str
    hbm_bytes: float
    flops: float
    bandwidth: float
    matrix_units: int
    matrix_side: int

    @property
    def clock(self) -> float:
        """Cycles per second at which the matrix units reach the published FLOP/s: peak / (2 · units · side²)."""
        return self.flops / (2 * self.matrix_units * self.matrix_side**2)


GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(name="v4", hbm_bytes=32 * GIB, flops=TPU_FLOPS["v4"], bandwidth=1228e9, matrix_units=8, matrix_side=128),
        Chip(name="v5e", hbm_bytes=16 * GIB, flops=TPU_FLOPS["v5e"], bandwidth=819e9, matrix_units=4, matrix_side=128),
        Chip(name="v5p", hbm_bytes=95 * GIB, flops=TPU_FLOPS["v5p"], bandwidth=2765e9, matrix_units=8, matrix_side=128),
        Chip(name="v6e", hbm_bytes=32 * GIB, flops=TPU_FLOPS["v6e"], bandwidth=1640e9, matrix_units=4, matrix_side=256),
    )
}
