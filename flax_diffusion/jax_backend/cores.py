"""The cores of a CPU, which divide each batch among themselves.

Inside of one operation XLA keeps two cores less than three quarters busy. With a part of the batch for each core, as
for the chips of a TPU, both work all the time, and the step of a small model takes a third less.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from flax_diffusion.jax_backend.processes import COORDINATOR_ADDRESS

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""File of Linux that says how much processor time a container has: microseconds, or "max", in a period of as many."""

COPIED = 200_000_000
"""Most weights in the copies of all cores together: 4 GB with gradients, Adam's moments and an average in float32."""


def allowed() -> int:
    """Return how many cores this process may keep busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        time, period = QUOTA.read_text().split()
    except (OSError, ValueError):  # no Linux, or no such container
        return cores
    return cores if time == "max" else max(1, min(cores, int(time) // int(period)))


@functools.cache
def offered() -> int:
    """Have JAX offer each core of this machine as a device, and return their number. Call it before JAX is used.

    The number is 1, and JAX is left as it is, in a run of several processes, where JAX is in use already, and where the
    environment variable JAX_NUM_CPU_DEVICES or XLA_FLAGS says how many devices there are.
    """
    cores = allowed()
    chosen = jax.config.values["jax_num_cpu_devices"] > 0 or "device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or COORDINATOR_ADDRESS in os.environ:
        return 1
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:  # JAX is in use
        return 1
    return cores


def available() -> int:
    """Return how many of JAX's devices are cores of one CPU; 1 where they are devices of another kind."""
    return offered() if jax.default_backend() == "cpu" else 1


def devices() -> Sequence[Any]:
    """Return JAX's devices; where they are cores of a CPU, one of them, which computes with the others' help."""
    return jax.devices()[:1] if available() > 1 else jax.devices()


def sharing(images: int, weights: int) -> int:
    """Return how many of the available cores divide the batches of a run among themselves.

    Args:
        images: Images per micro-batch, which are divided evenly.
        weights: Weights of the models, of which each core has a copy.
    """
    most = min(available(), max(1, COPIED // weights))
    return max(count for count in range(1, most + 1) if images % count == 0)
