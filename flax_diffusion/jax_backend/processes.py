"""Several processes as one run, one for each host of a pod: how they connect, and what they exchange."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_diffusion.core.errors import ConfigError

COORDINATOR_ADDRESS, PROCESS_COUNT, PROCESS_INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables by which processes connect where the machine does not say how."""

HEARTBEAT_TIMEOUT = "JAX_HEARTBEAT_TIMEOUT_SECONDS"
"""Environment variable: seconds of silence after which a process counts as dead and the others end; 100 if unset."""


def connect() -> None:
    """Connect to the other processes of this run, if it has any. Call it before anything asks for a device.

    On a TPU VM or a GKE node pool the machine itself says which they are; elsewhere the environment variables do.

    Raises:
        ConfigError: If some of the variables are missing or hold no numbers, or if this is one host of several and they
            cannot connect.
    """
    if jax.distributed.is_initialized():
        return
    heartbeat = _number(HEARTBEAT_TIMEOUT) if HEARTBEAT_TIMEOUT in os.environ else 100
    if COORDINATOR_ADDRESS in os.environ:
        jax.distributed.initialize(
            os.environ[COORDINATOR_ADDRESS],
            _number(PROCESS_COUNT),
            _number(PROCESS_INDEX),
            heartbeat_timeout_seconds=heartbeat,
        )
    elif find_spec("libtpu") is not None and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu"):
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
        except (ValueError, RuntimeError) as error:  # not on a TPU, or JAX is already in use
            if jax.process_count() > 1:
                raise ConfigError(
                    f"the {jax.process_count()} hosts of this slice cannot connect to each other: {error}"
                ) from error


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        others = f"{COORDINATOR_ADDRESS} is set and " if name != HEARTBEAT_TIMEOUT else ""
        fix = (
            "give whole seconds"
            if name == HEARTBEAT_TIMEOUT
            else f"set {PROCESS_COUNT}, and in each process its own {PROCESS_INDEX}"
        )
        raise ConfigError(f"{others}{name} is {value!r}: {fix}")
    return int(value)


def all_processes(condition: bool) -> bool:
    """Return whether a condition is true in every process; waits for all of them."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.asarray(condition)).all())


def broadcast_from_first(value: int) -> int:
    """Return the first process's value in all processes; waits for all of them."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def to_host(tree: Any) -> Any:
    """Return a tree of JAX arrays as NumPy arrays, each whole in every process. All processes must call it."""

    def gather(array: jax.Array) -> Any:
        if array.is_fully_addressable or array.is_fully_replicated:
            return array
        on_device = jax.device_put(array, array.sharding.with_memory_kind("device"))
        return multihost_utils.process_allgather(on_device, tiled=True)

    return jax.device_get(jax.tree.map(gather, tree))
