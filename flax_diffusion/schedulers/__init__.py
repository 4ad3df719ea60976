"""Noise schedulers and samplers, state-based: every method is a pure function of the state it is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError, nearest
from flax_diffusion.core.objectives.samplers import in_place
from flax_diffusion.schedulers.common import CommonSchedulerState, FlaxScheduler
from flax_diffusion.schedulers.config import SchedulerConfig, read_config
from flax_diffusion.schedulers.ddim import DDIMSchedulerState, FlaxDDIMScheduler
from flax_diffusion.schedulers.ddpm import DDPMSchedulerState, FlaxDDPMScheduler
from flax_diffusion.schedulers.dpm_solver import DPMSolverMultistepSchedulerState, FlaxDPMSolverMultistepScheduler
from flax_diffusion.schedulers.edm_dpm_solver import (
    EDMDPMSolverMultistepSchedulerState,
    FlaxEDMDPMSolverMultistepScheduler,
)
from flax_diffusion.schedulers.edm_euler import EDMEulerSchedulerState, FlaxEDMEulerScheduler
from flax_diffusion.schedulers.euler import EulerDiscreteSchedulerState, FlaxEulerDiscreteScheduler
from flax_diffusion.schedulers.flow_match import (
    FlaxFlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerState,
)
from flax_diffusion.schedulers.flow_match_sde import FlaxFlowMatchSDEScheduler
from flax_diffusion.schedulers.heun import FlaxEDMHeunScheduler, FlaxFlowMatchHeunDiscreteScheduler, HeunState
from flax_diffusion.schedulers.karras_ve import FlaxKarrasVeScheduler, KarrasVeSchedulerState
from flax_diffusion.schedulers.lms import FlaxLMSDiscreteScheduler, LMSDiscreteSchedulerState
from flax_diffusion.schedulers.mixin import FlaxKarrasDiffusionSchedulers, FlaxSchedulerMixin
from flax_diffusion.schedulers.outputs import (
    FlaxDDIMSchedulerOutput,
    FlaxDDPMSchedulerOutput,
    FlaxDPMSolverMultistepSchedulerOutput,
    FlaxEulerDiscreteSchedulerOutput,
    FlaxKarrasVeOutput,
    FlaxLMSSchedulerOutput,
    FlaxPNDMSchedulerOutput,
    FlaxSchedulerOutput,
    FlaxSdeVeOutput,
)
from flax_diffusion.schedulers.pndm import FlaxPNDMScheduler, PNDMSchedulerState
from flax_diffusion.schedulers.score_sde_ve import FlaxScoreSdeVeScheduler, ScoreSdeVeSchedulerState

SCHEDULERS: dict[str, type[FlaxScheduler]] = {
    "ddpm": FlaxDDPMScheduler,
    "ddim": FlaxDDIMScheduler,
    "pndm": FlaxPNDMScheduler,
    "euler": FlaxEulerDiscreteScheduler,
    "lms": FlaxLMSDiscreteScheduler,
    "dpm++": FlaxDPMSolverMultistepScheduler,
    "flow_match": FlaxFlowMatchEulerDiscreteScheduler,
    "edm": FlaxEDMEulerScheduler,
}
"""The first scheduler of each method, by its name for `--scheduler`; other models have others of the same name."""

_OTHERS = (
    FlaxFlowMatchHeunDiscreteScheduler,
    FlaxFlowMatchSDEScheduler,
    FlaxEDMHeunScheduler,
    FlaxEDMDPMSolverMultistepScheduler,
)
_SAMPLE_BY_PARTS = (FlaxKarrasVeScheduler, FlaxScoreSdeVeScheduler)


def scheduler_from_config(
    config: Mapping[str, Any] | str | Path, kind: str | None = None, dtype: Any = jnp.float32
) -> Any:
    """Return the scheduler that a configuration names, or another kind of scheduler with the same noise schedule.

    Args:
        config: The configuration as a mapping, or the folder or file that holds `scheduler_config.json`.
        kind: One of `samplers.SAMPLERS`: the class of this name that draws from models with the configuration; None for
            the class in `_class_name`. "dpm++" on a cosine schedule starts at λ = −5.1 unless the configuration says
            otherwise, as Diffusers' documentation advises.
        dtype: Dtype of the tables, float32 or float64.

    Returns:
        A `FlaxScheduler`; for the class names KarrasVeScheduler and ScoreSdeVeScheduler, one of these, whose steps have
        several parts.

    Raises:
        ConfigError: If the class name is missing or not supported, or a kind, key or value is unknown.
    """
    values = read_config(config) if isinstance(config, (str, Path)) else config
    classes = {cls.torch_class_name: cls for cls in (*SCHEDULERS.values(), *_OTHERS, *_SAMPLE_BY_PARTS)}
    if kind is not None:
        name, values = in_place(values, kind)
        return classes[name].from_config(values, dtype=dtype)
    name = values.get("_class_name")
    if name is None:
        raise ConfigError(f"the scheduler config has no _class_name; add one of {', '.join(classes)}")
    found = classes.get(str(name).removeprefix("Flax"))
    if found is None:
        raise ConfigError(
            f"scheduler class {name!r} is not supported; use one of {', '.join(classes)}{nearest(name, classes)}"
        )
    return found.from_config(values, dtype=dtype)


__all__ = [
    "SCHEDULERS",
    "CommonSchedulerState",
    "DDIMSchedulerState",
    "DDPMSchedulerState",
    "DPMSolverMultistepSchedulerState",
    "EDMDPMSolverMultistepSchedulerState",
    "EDMEulerSchedulerState",
    "EulerDiscreteSchedulerState",
    "FlaxDDIMScheduler",
    "FlaxDDIMSchedulerOutput",
    "FlaxDDPMScheduler",
    "FlaxDDPMSchedulerOutput",
    "FlaxDPMSolverMultistepScheduler",
    "FlaxDPMSolverMultistepSchedulerOutput",
    "FlaxEDMDPMSolverMultistepScheduler",
    "FlaxEDMEulerScheduler",
    "FlaxEDMHeunScheduler",
    "FlaxEulerDiscreteScheduler",
    "FlaxEulerDiscreteSchedulerOutput",
    "FlaxFlowMatchEulerDiscreteScheduler",
    "FlaxFlowMatchHeunDiscreteScheduler",
    "FlaxFlowMatchSDEScheduler",
    "FlaxKarrasDiffusionSchedulers",
    "FlaxKarrasVeOutput",
    "FlaxKarrasVeScheduler",
    "FlaxLMSDiscreteScheduler",
    "FlaxLMSSchedulerOutput",
    "FlaxPNDMScheduler",
    "FlaxPNDMSchedulerOutput",
    "FlaxScheduler",
    "FlaxSchedulerMixin",
    "FlaxSchedulerOutput",
    "FlaxScoreSdeVeScheduler",
    "FlaxSdeVeOutput",
    "FlowMatchEulerDiscreteSchedulerState",
    "HeunState",
    "KarrasVeSchedulerState",
    "LMSDiscreteSchedulerState",
    "PNDMSchedulerState",
    "SchedulerConfig",
    "ScoreSdeVeSchedulerState",
    "read_config",
    "scheduler_from_config",
]
