"""Training of the variance that a model predicts beside the noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike
from pydantic import BaseModel, Field

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.dit import learns_variance
from flax_diffusion.core.objectives import noise_schedule, samplers
from flax_diffusion.core.objectives.ddpm import Ddpm
from flax_diffusion.core.objectives.objective import Objective
from flax_diffusion.core.objectives.variational_bound import variance_terms
from flax_diffusion.core.spec.pipeline import PipelineSpec


class VarianceConfig(BaseModel):
    """Options of tasks whose models may learn their variance."""

    variance_loss_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the variational bound, which trains the variance of a model with twice the channels; "
        "0.001 in the papers. 0: the variance is not trained.",
    )


def with_variance(objective: Objective, spec: PipelineSpec, weight: float, dtype: DTypeLike) -> Objective:
    """Return an objective that trains the variance too.

    Args:
        objective: What the denoiser learns.
        spec: The pipeline.
        weight: Weight of the variational bound; 0 for the objective as it is.
        dtype: Dtype of the objective's numbers.

    Raises:
        ConfigError: If the model has no variance, or is not trained by timesteps.
    """
    if not weight:
        return objective
    if not isinstance(objective, Ddpm):
        raise ConfigError(
            f"--variance_loss_weight {weight:g} goes with --objective ddpm, and this model is trained by "
            f"{objective.name}: drop one of them"
        )
    denoiser = spec.denoiser
    if not learns_variance(denoiser):
        raise ConfigError(
            f"--variance_loss_weight {weight:g}: the {denoiser.model.noun} learns no variance, its out_channels are "
            f"not twice its in_channels {denoiser['in_channels']}; drop it"
        )
    bar = noise_schedule.alphas_cumprod_from_config(samplers.noise_config(spec.scheduler))
    targets = np.asarray(objective.tables.target_clean), np.asarray(objective.tables.target_noise)
    return replace(objective, variance=variance_terms(bar, *targets, weight, dtype))
