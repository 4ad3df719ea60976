"""TPU slices that need not exist: descriptions of their devices, for the compiler in `libtpu`."""

from __future__ import annotations

import math
import os
import re
from importlib.util import find_spec
from typing import Any, NamedTuple

from flax_diffusion.core.errors import ConfigError, nearest
from tpu.chips import CHIPS, Chip

KNOWN_TOPOLOGIES = tuple(
    f"{chip}:{shape}"
    for chip, shapes in {
        "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
        "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
        "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
        "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    }.items()
    for shape in shapes
)


def _accelerator_types(topology: str) -> list[str]:
    """Return Google Cloud's names of a slice: they count chips, or cores in generations with two cores per chip."""
    kind, _, shape = topology.partition(":")
    chips = math.prod(map(int, shape.split("x")))
    if kind in ("v4", "v5p"):
        return [f"{kind}-{2 * chips}"]
    return [f"{name}-{chips}" for name in (("v5e", "v5litepod") if kind == "v5e" else (kind,))]


TOPOLOGY_BY_TYPE = {name: topology for topology in KNOWN_TOPOLOGIES for name in _accelerator_types(topology)}
"""Slices by their accelerator type, the name that Google Cloud gives them."""


class Slice(NamedTuple):
    """Kind of chip and devices of a slice; each device is one chip."""

    chip: Chip
    devices: Any


def set_environment() -> None:
    """Set the environment that libtpu needs on a machine without a TPU. Call it before jax is imported.

    Raises:
        ConfigError: If libtpu is not installed.
    """
    if find_spec("libtpu") is None:
        raise ConfigError("libtpu, which compiles for TPUs, is not installed: pip install 'flax-diffusion[tpu]'")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop("XLA_FLAGS", None)  # devices made of a CPU's cores are of no use here
    # Nothing here touches a TPU, so several processes may compile at a time.
    variables = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    variables |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    variables |= {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def describe(topology: str) -> Slice:
    """Return the devices of a slice.

    Args:
        topology: Chip and arrangement, such as v5e:2x2.

    Raises:
        ConfigError: If there is no such slice.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        near = f"; it is {TOPOLOGY_BY_TYPE[topology]} here" if topology in TOPOLOGY_BY_TYPE else ""
        if not near and not re.fullmatch(r"\w+-\d+", topology):  # a near accelerator type would have other chips
            near = nearest(topology, KNOWN_TOPOLOGIES)
        raise ConfigError(f"--topology {topology}: not known{near}; known are {', '.join(KNOWN_TOPOLOGIES)}")
    from jax.experimental import topologies

    sizes = [int(size) for size in shape.split("x")]
    # Unless told otherwise, libtpu assumes four chips or more per host, and takes a v4 chip for two devices.
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    options |= {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # jax raises what libtpu reports, of several types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"--topology {topology}: {reason}; known are {', '.join(KNOWN_TOPOLOGIES)}") from error
    return Slice(CHIPS[kind], devices)
