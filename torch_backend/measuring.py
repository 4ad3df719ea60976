"""FLOPs and memory of a step on a GPU, for the logs; the twin of what the JAX side asks its compiler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flax_diffusion.core.tracking.peaks import peak_flops


class Measured:
    """What steps cost a device, by the shapes of their batches.

    Args:
        device: Name of the device.
        counts: Whether FLOPs can be counted; what torch.compile makes does not show its products.
    """

    def __init__(self, device: str, *, counts: bool):
        self._peak = peak_flops(device) if counts else None
        self._flops: dict[tuple[torch.Size, ...], int] = {}

    @contextmanager
    def counting(self, micro_batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Count the FLOPs of a pass over a micro-batch inside of a `with` block, unless they are known.

        Args:
            micro_batch: Its tensors.
        """
        shapes = tuple(tensor.shape for tensor in micro_batch.values())
        if self._peak is None or shapes in self._flops:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops[shapes] = counter.get_total_flops()

    def peak_seconds(self, micro_batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return the seconds in which the FLOPs of a step would be done at the device's peak, for the metrics.

        Args:
            micro_batches: Those of the step, each counted before.

        Returns:
            `peak_seconds`; nothing where the peak is not known.
        """
        if self._peak is None:
            return {}
        flops = sum(self._flops[tuple(tensor.shape for tensor in micro.values())] for micro in micro_batches)
        return {"peak_seconds": flops / self._peak}


def device_memory(device: torch.device) -> dict[str, float]:
    """Return the most that was in use of a device's memory so far, `device_memory_gib`; nothing for a CPU.

    Args:
        device: The device.
    """
    if device.type != "cuda":
        return {}
    return {"device_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
