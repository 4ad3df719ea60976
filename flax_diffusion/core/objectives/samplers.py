"""Schedulers that a model may have been trained with, and the schedulers here that draw images in their place.

Training needs a scheduler's betas and prediction type, or its shift. Drawing needs a class that both backends have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.objectives.noise_schedule import PREDICTION_TYPES
from flax_diffusion.core.objectives.objective import objective_of
from flax_diffusion.core.typed import check_values

log = logging.getLogger(__name__)

OF_BETAS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
"""Class names of the schedulers that draw from models with betas, by their names for `--scheduler`."""

_OF_FLOWS = {
    "flow_match": "FlowMatchEulerDiscreteScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "sde": "FlowMatchSDEScheduler",
}
_OF_EDM = {
    "edm": "EDMEulerScheduler",
    "euler": "EDMEulerScheduler",
    "heun": "EDMHeunScheduler",
    "dpm++": "EDMDPMSolverMultistepScheduler",
}
_BY_TRAINED = {"FlowMatchEulerDiscreteScheduler": _OF_FLOWS, "EDMEulerScheduler": _OF_EDM}
"""Schedulers that models are trained by without betas, and those that draw from such models."""

SAMPLERS = tuple(dict.fromkeys([*OF_BETAS, *_OF_FLOWS, *_OF_EDM]))
"""All names for `--scheduler`."""

DRAWING = tuple(dict.fromkeys([*OF_BETAS.values(), *_OF_FLOWS.values(), *_OF_EDM.values()]))
"""Classes of all schedulers that draw images here."""

OWN = ("FlowMatchSDEScheduler", "EDMHeunScheduler")
"""Those that Diffusers has no class for."""

BEGIN_ANYWHERE = ("ddim", "ddpm", "euler", "dpm++", "flow_match", "edm")
"""Names of those that can begin in the middle of a trajectory; the others need the steps before."""

_SPACED = ("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Keys of flow matching by which Euler's method alone chooses its noise levels."""

_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIMInverseScheduler": ("ddim", {}),
    "DDIMParallelScheduler": ("ddim", {}),
    "DDPMParallelScheduler": ("ddpm", {}),
    "DEISMultistepScheduler": ("dpm++", {}),
    "DPMSolverMultistepInverseScheduler": ("dpm++", {}),
    "DPMSolverSDEScheduler": ("dpm++", _STABLE_DIFFUSION),
    "DPMSolverSinglestepScheduler": ("dpm++", {}),
    "EulerAncestralDiscreteScheduler": ("euler", {}),
    "HeunDiscreteScheduler": ("euler", _STABLE_DIFFUSION),
    "KDPM2AncestralDiscreteScheduler": ("euler", _STABLE_DIFFUSION),
    "KDPM2DiscreteScheduler": ("euler", _STABLE_DIFFUSION),
    "LCMScheduler": ("ddim", _STABLE_DIFFUSION | {"beta_schedule": "scaled_linear"}),
    "RePaintScheduler": ("ddpm", {}),
    "SASolverScheduler": ("dpm++", {}),
    "TCDScheduler": ("ddim", _STABLE_DIFFUSION | {"beta_schedule": "scaled_linear"}),
    "UnCLIPScheduler": ("ddpm", {"beta_schedule": "squaredcos_cap_v2"}),
    "UniPCMultistepScheduler": ("dpm++", {}),
}
"""Diffusers' other schedulers with betas: the nearest one in `OF_BETAS`, and default betas that differ from DDPM's."""

WITH_BETAS = (*OF_BETAS.values(), *_OTHERS)
"""All schedulers whose models are trained by betas."""

_SHARED = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range",
    "use_karras_sigmas",
)  # fmt: skip
"""Keys of a scheduler's config that stay when another scheduler draws in its place."""


class _Choices:
    """Keys whose unknown values Diffusers treats as a known one, or refuses only in the middle of a run."""

    timestep_spacing: Literal["linspace", "leading", "trailing"]
    timestep_type: Literal["discrete", "continuous"]
    final_sigmas_type: Literal["zero", "sigma_min"]
    interpolation_type: Literal["linear", "log_linear"]
    lambda_min_clipped: float
    variance_type: (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"] | None
    )
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"]
    algorithm_type: Literal[
        "dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis", "data_prediction", "noise_prediction"
    ]


def class_name(config: Mapping[str, Any]) -> str:
    """Return the name of the PyTorch class of a scheduler config.

    Raises:
        ConfigError: For a config without one, or with a class that is not known here.
    """
    objective_of(config)
    return str(config["_class_name"]).removeprefix("Flax")


def prediction_type(config: Mapping[str, Any]) -> str:
    """Return the prediction type in a scheduler config: one of `PREDICTION_TYPES`.

    Raises:
        ConfigError: If it has any other value.
    """
    if config.get("predict_epsilon", True) is not True:
        raise ConfigError(
            "scheduler config: predict_epsilon is of an old release; put prediction_type sample in its place"
        )
    found = config.get("prediction_type", "epsilon")
    found = "sample" if found == "original_sample" else found  # Euler's older name
    if found not in PREDICTION_TYPES:
        raise unknown("prediction_type", found, PREDICTION_TYPES)
    return found


def noise_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler config, completed with its class's defaults where they differ from DDPM's.

    Raises:
        ConfigError: As `class_name`.
    """
    name = class_name(config)
    return (_OTHERS[name][1] if name in _OTHERS else {}) | dict(config)


def sampler_config(config: Mapping[str, Any], chosen: str | None = None) -> dict[str, Any]:
    """Return the config of the scheduler that draws images. A class that is not here is replaced by the nearest one.

    A replacement is logged as a warning.

    Args:
        config: Scheduler config of a pipeline.
        chosen: Name of the sampler that the user asks for instead, if any; the warning is then left out.

    Raises:
        ConfigError: As `class_name`, for values that no scheduler knows, and for a sampler of other models.
    """
    name = class_name(config)
    check_values(_Choices, config, "scheduler config")
    if chosen is not None:
        _check_chosen(chosen, config)
    if config.get("use_dynamic_shifting"):
        raise ConfigError(
            "scheduler config: use_dynamic_shifting needs a shift for each size of pictures, which is not known here: "
            "set it to false, and shift to one number"
        )
    if config.get("stochastic_sampling"):
        raise ConfigError("scheduler config: stochastic_sampling draws noise of its own in each step: set it to false")
    if name in _OTHERS:
        stand_in = OF_BETAS[_OTHERS[name][0]]
    elif name == OF_BETAS["pndm"] and prediction_type(config) == "sample":
        stand_in = OF_BETAS["ddim"]
    else:
        return dict(config)
    if chosen is None:
        log.warning("%s does not draw images here: they are drawn with %s on the same betas", name, stand_in)
    values = noise_config(config)
    return {"_class_name": stand_in} | {key: values[key] for key in _SHARED if key in values}


LEARNED_VARIANCES = ("learned", "learned_range")
"""Values of variance_type by which a step's variance is taken from the model's output."""


def takes_variance(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether the steps of a sampler take the model's variance beside its prediction.

    Args:
        name: PyTorch's class of the sampler.
        config: Its config.
    """
    return name == OF_BETAS["ddpm"] and config.get("variance_type") in LEARNED_VARIANCES


def beginning_in_the_middle(config: Mapping[str, Any], chosen: str | None) -> str | None:
    """Return the name of the sampler that draws from a picture that is partly noise.

    Args:
        config: Scheduler config of a pipeline.
        chosen: Name of the sampler that the user asks for, if any.

    Returns:
        `chosen`; or, where the pipeline's own cannot begin in the middle, the first of the same model's that can, of
        which a message is logged.

    Raises:
        ConfigError: If the one that is chosen, or the objective's own, cannot.
    """
    objective = objective_of(config)
    if objective.sample is not None:
        raise ConfigError(f"--init_image: {objective.name} draws by its own sample, which begins with noise; drop it")
    known = _drawing(config)
    able = [name for name in BEGIN_ANYWHERE if name in known]
    if chosen is not None:
        if chosen not in able:
            raise ConfigError(f"--scheduler {chosen}: cannot begin with --init_image; use {' or '.join(able)}")
        return chosen
    own = str(sampler_config(config)["_class_name"]).removeprefix("Flax")
    if own in {known[name] for name in able}:
        return None
    log.warning("--init_image: %s cannot begin in the middle; the pictures are drawn with %s", own, known[able[0]])
    return able[0]


def first_step(steps: int, strength: float) -> int:
    """Return the number of steps that are left out where a picture is drawn over.

    Args:
        steps: Number of denoising steps.
        strength: Share of them that is taken, above 0 and at most 1.

    Raises:
        ConfigError: If none is taken.

    Reference:
        `get_timesteps` of Diffusers' StableDiffusionImg2ImgPipeline.
    """
    taken = min(int(steps * strength), steps)
    if taken < 1:
        raise ConfigError(f"--strength {strength:g}: takes none of {steps} steps; raise one of them")
    return steps - taken


def _check_chosen(chosen: str, config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a sampler whose models are trained by another objective than this one."""
    known = _drawing(config)
    if objective_of(config).sample is not None:
        raise ConfigError(
            f"--scheduler {chosen}: this model was trained by {objective_of(config).name}, which draws by its own "
            "sample: drop it"
        )
    if chosen in SAMPLERS and chosen not in known:
        raise ConfigError(
            f"--scheduler {chosen}: this model was trained by {objective_of(config).name}, which is drawn from with "
            f"{' or '.join(known)}"
        )


def _drawing(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the classes of schedulers that draw from a model, by their names for `--scheduler`."""
    return _BY_TRAINED.get(str(config.get("_class_name")).removeprefix("Flax"), OF_BETAS)


def in_place(config: Mapping[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """Return the class of a sampler by its name, and a model's config in the keys of that class.

    Args:
        config: Scheduler config of a model; one without a class is of betas, where there is such a sampler.
        kind: One of `SAMPLERS`.

    Raises:
        ConfigError: For an unknown name, or one of other models.
    """
    if kind not in SAMPLERS:
        raise unknown("scheduler", kind, SAMPLERS)
    groups = [_drawing(config), OF_BETAS, _OF_FLOWS, _OF_EDM]
    known = groups[0] if config.get("_class_name") else next(group for group in groups if kind in group)
    if kind not in known:
        raise ConfigError(f"scheduler {kind!r}: does not draw from this model; use one of {', '.join(known)}")
    if kind == "dpm++" and known is OF_BETAS:
        return known[kind], with_signal(config)
    if known is not _OF_FLOWS or known[kind] == known["euler"]:
        return known[kind], dict(config)
    for key in _SPACED:
        if config.get(key):
            raise ConfigError(
                f"scheduler {kind!r} has no {key}, which the model's config sets: use 'euler', or drop it"
            )
    steps, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
    if kind == "dpm++":
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        return known[kind], flow | {"num_train_timesteps": steps, "flow_shift": shift}
    return known[kind], {"num_train_timesteps": steps, "shift": shift}


def with_signal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config for "dpm++" that starts a cosine schedule where there is some signal, at λ = −5.1.

    Noisier levels have almost no signal, and without clipping of x0 the solver divides by it. Diffusers' documentation
    gives the same advice. A `lambda_min_clipped` in the config itself has precedence.
    """
    first = {"lambda_min_clipped": -5.1} if config.get("beta_schedule") == "squaredcos_cap_v2" else {}
    return first | dict(config)
