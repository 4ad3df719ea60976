"""TPU slices that are only described: their devices, for the compiler that `libtpu` brings."""

from __future__ import annotations

import math
import os
import re
from importlib.util import find_spec
from typing import Any, NamedTuple

from flax_diffusion.core.errors import ConfigError, nearest
from tpu.chips import CHIPS, Chip

KNOWN = tuple(
    f"{chip}:{shape}"
    for chip, shapes in {
        "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
        "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
        "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
        "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    }.items()
    for shape in shapes
)


def _type_names(topology: str) -> list[str]:
    """What Google Cloud calls a slice: by its chips, and in generations of two cores a chip by those."""
    kind, _, shape = topology.partition(":")
    chips = math.prod(map(int, shape.split("x")))
    if kind in ("v4", "v5p"):
        return [f"{kind}-{2 * chips}"]
    return [f"{name}-{chips}" for name in (("v5e", "v5litepod") if kind == "v5e" else (kind,))]


TYPES = {name: topology for topology in KNOWN for name in _type_names(topology)}
"""Accelerator types of Google Cloud, and the slices that they are."""


class Slice(NamedTuple):
    """A slice's devices, of which each is a chip."""

    chip: Chip
    devices: Any


def prepare() -> None:
    """Sets what libtpu needs to know on a machine without a TPU. Call it before jax is imported.

    Raises:
        ConfigError: If libtpu is not installed.
    """
    if find_spec("libtpu") is None:
        raise ConfigError("libtpu, which compiles for TPUs, is not installed: pip install 'flax-diffusion[tpu]'")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop("XLA_FLAGS", None)  # devices made of a CPU's cores are of no use here
    # Nothing here touches a TPU, so that several may compile at a time.
    quiet = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    quiet |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    quiet |= {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def describe(topology: str) -> Slice:
    """The devices of a slice.

    Args:
        topology: Chip and its arrangement, such as v5e:2x2.

    Raises:
        ConfigError: If there is no such slice.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        near = f"; it is {TYPES[topology]} here" if topology in TYPES else ""
        if not near and not re.fullmatch(r"\w+-\d+", topology):  # the nearest name of a type has other chips
            near = nearest(topology, KNOWN)
        raise ConfigError(f"--topology {topology}: not known{near}; known are {', '.join(KNOWN)}")
    from jax.experimental import topologies

    sizes = [int(size) for size in shape.split("x")]
    # libtpu takes hosts of four chips or more, and a v4 chip for two devices, unless it is told better.
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    options |= {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # jax raises what libtpu reports, of several types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"--topology {topology}: {reason}; known are {', '.join(KNOWN)}") from error
    return Slice(CHIPS[kind], devices)
