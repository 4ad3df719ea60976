"""How fast chips compute at best, to say how well a run uses them."""

from __future__ import annotations

TPU_FLOPS = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
"""Peak of bfloat16 FLOP/s of a TPU chip, by generation.

Reference:
    the system architecture pages of https://cloud.google.com/tpu/docs.
"""
_GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e", "TPU v5e": "v5e",
    "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e",
}  # fmt: skip
"""Generation of a TPU by what JAX calls its devices."""
_GPU_FLOPS = {
    "A100": 312e12, "A10G": 70e12, "L4": 121e12, "L40S": 362e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
}  # fmt: skip
"""The same of a GPU's matrix units without sparsity, by words of its name, the longer ones first.

Reference:
    NVIDIA's data sheets, whose figures with sparsity are twice these.
"""


def peak_flops(device: str) -> float | None:
    """Return a device's peak of bfloat16 FLOP/s; None where it is not known.

    Args:
        device: What its framework calls it, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """
    if device in _GENERATIONS:
        return TPU_FLOPS[_GENERATIONS[device]]
    words = f" {device.replace('-', ' ')} "
    return next((flops for name, flops in _GPU_FLOPS.items() if f" {name} " in words), None)
