"""Denoising diffusion over T timesteps: the model predicts the noise, the velocity or the clean sample.

Reference: Ho et al., arXiv:2006.11239, equations 4 and 14; Salimans and Ho, arXiv:2202.00512, appendix D, for the
velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import BaseModel, Field, model_validator

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.objectives import noise_schedule, samplers
from flax_diffusion.core.objectives.objective import OBJECTIVES, Mixture, Objective
from flax_diffusion.core.objectives.variational_bound import MixtureWithVariance, VarianceTerms
from flax_diffusion.core.typed import BetaSchedule, PredictionType

Table = NDArray[Any]

_TARGETS: dict[str, Callable[[Table, Table], tuple[Table, Table]]] = {
    "epsilon": lambda signal, noise: (np.zeros_like(signal), np.ones_like(noise)),
    "v_prediction": lambda signal, noise: (-noise, signal),
    "sample": lambda signal, noise: (np.ones_like(signal), np.zeros_like(noise)),
}
"""target_clean and target_noise of √ᾱ and √(1−ᾱ), by prediction type."""


class DdpmOptions(BaseModel):
    """Options of the objective."""

    ddpm_num_steps: int = Field(1000, ge=1, description="DDPM's training timesteps, where no scheduler is given.")
    ddpm_beta_schedule: BetaSchedule = Field("linear", description="DDPM's beta schedule, where no scheduler is given.")
    prediction_type: PredictionType | None = Field(
        None, description="DDPM: what the denoiser predicts. None: that of the scheduler's config."
    )
    snr_gamma: float | None = Field(None, gt=0, description="DDPM: gamma of Min-SNR loss weights. The paper uses 5.")
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = Field(
        "none", description="DDPM: timesteps that are drawn more often: the earliest, the latest, or a range of them."
    )
    timestep_bias_multiplier: float = Field(
        1.0, gt=0, description="DDPM: how many times as often they are drawn as the others."
    )
    timestep_bias_portion: float = Field(
        0.25, gt=0, le=1, description="DDPM: their share of all timesteps, of the strategies earlier and later."
    )
    timestep_bias_begin: int = Field(0, ge=0, description="DDPM: first of them, of the strategy range.")
    timestep_bias_end: int = Field(1000, ge=1, description="DDPM: the one after the last, of the strategy range.")

    @model_validator(mode="after")
    def _check_bias(self) -> Self:
        used = {
            "none": (), "range": ("multiplier", "begin", "end"),
            "earlier": ("multiplier", "portion"), "later": ("multiplier", "portion"),
        }[self.timestep_bias_strategy]  # fmt: skip
        for name in ("multiplier", "portion", "begin", "end"):
            option = f"timestep_bias_{name}"
            if name not in used and getattr(self, option) != DdpmOptions.model_fields[option].default:
                raise ValueError(
                    f"--{option} changes nothing with --timestep_bias_strategy {self.timestep_bias_strategy}: drop it, "
                    "or choose another strategy"
                )
        if self.timestep_bias_begin >= self.timestep_bias_end:
            raise ValueError(
                f"--timestep_bias_begin {self.timestep_bias_begin} is not below --timestep_bias_end "
                f"{self.timestep_bias_end}: no timestep is between them"
            )
        return self


@dataclass(frozen=True)
class Ddpm(Objective):
    """An objective whose time is one of T timesteps.

    Attributes:
        tables: The mixtures of all timesteps, as arrays (T,).
        shares: Probability with which a timestep or an earlier one is drawn, float64 (T,); None where all are alike.
        variance: What the bound of a learned variance needs, as arrays (T,); None where none is learnt.
    """

    tables: Mixture = field(repr=False)
    shares: Table | None = field(default=None, repr=False)
    variance: VarianceTerms | None = field(default=None, repr=False)

    name: ClassVar[str] = "ddpm"
    options: ClassVar[type[BaseModel]] = DdpmOptions
    schedulers: ClassVar[tuple[str, ...]] = samplers.WITH_BETAS

    @classmethod
    def scheduler(cls, options: DdpmOptions) -> dict[str, Any]:
        """Return the config of a DDPMScheduler."""
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": options.ddpm_num_steps,
            "beta_schedule": options.ddpm_beta_schedule,
        }

    @classmethod
    def changed(cls, scheduler: Mapping[str, Any], options: DdpmOptions) -> dict[str, Any]:
        """Return the config with the requested prediction type."""
        return dict(scheduler) | ({"prediction_type": options.prediction_type} if options.prediction_type else {})

    @classmethod
    def prediction(cls, scheduler: Mapping[str, Any]) -> str:
        """Return epsilon, v_prediction or sample."""
        return samplers.prediction_type(scheduler)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Mapping[str, Any],
        options: DdpmOptions,
        dtype: DTypeLike = np.float32,
        *,
        conditional: bool = False,
    ) -> Ddpm:
        """Make the objective of the scheduler's betas.

        Without a condition, the clean sample weighs ᾱ/(1 − ᾱ), as in Diffusers' unconditional script.
        """
        bar = noise_schedule.alphas_cumprod_from_config(samplers.noise_config(scheduler))
        predicted = cls.prediction(scheduler)
        if predicted == "epsilon" and bar[-1] == 0:
            raise ConfigError(
                "rescale_betas_zero_snr with prediction_type epsilon: at the last timestep there is only noise to "
                "predict noise from; use v_prediction"
            )
        weights = None
        if options.snr_gamma is not None:
            weights = noise_schedule.min_snr_weights(bar, options.snr_gamma, predicted)
        elif predicted == "sample" and not conditional:
            weights = noise_schedule.sample_weights(bar)
        return replace(ddpm(bar, predicted, weights, dtype), shares=_shares(len(bar), options))

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw one example's mixture, with the terms of its variance where that is learnt."""
        if self.shares is None:
            timestep = int(rng.integers(len(self.tables.timesteps)))
        else:
            timestep = int(np.searchsorted(self.shares, rng.random(), side="right"))
        if self.variance is None:
            return self.at(timestep)
        return MixtureWithVariance(*self.at(timestep), *(table[timestep, ...] for table in self.variance))

    def at(self, timestep: int) -> Mixture:
        """Return the mixture of a timestep in 0..T-1."""
        return Mixture(*(table[timestep, ...] for table in self.tables))


def _shares(count: int, options: DdpmOptions) -> Table | None:
    """Return `Ddpm.shares` for a number of timesteps.

    Raises:
        ConfigError: For a range that has none of them.

    Reference:
        `generate_timestep_weights` of Diffusers' train_text_to_image_sdxl.py.
    """
    strategy = options.timestep_bias_strategy
    if strategy == "none" or options.timestep_bias_multiplier == 1:
        return None
    number = int(options.timestep_bias_portion * count)
    first, end = {
        "earlier": (0, number),
        "later": (count - number, count),
        "range": (options.timestep_bias_begin, min(options.timestep_bias_end, count)),
    }[strategy]
    if first >= end:
        raise ConfigError(
            f"--timestep_bias_strategy {strategy}: none of the {count} timesteps is drawn more often; give a larger "
            "portion, or a range that has some"
        )
    weights = np.ones(count)
    weights[first:end] *= options.timestep_bias_multiplier
    return np.cumsum(weights) / np.sum(weights)


OBJECTIVES.register(Ddpm.name, Ddpm)


def ddpm(
    alphas_cumprod: Table, prediction_type: str, loss_weights: Table | None = None, dtype: DTypeLike = np.float32
) -> Ddpm:
    """Make the objective of a noise schedule.

    Args:
        alphas_cumprod: ᾱ, (T,).
        prediction_type: epsilon, v_prediction or sample.
        loss_weights: Loss weight of every timestep, (T,); None for ones.
        dtype: Dtype of the numbers.

    Raises:
        ConfigError: If the prediction type is unknown.
        ValueError: If there are weights for another number of timesteps.
    """
    if prediction_type not in _TARGETS:
        raise unknown("prediction_type", prediction_type, _TARGETS)
    bar = np.asarray(alphas_cumprod, dtype)
    weights = np.ones(len(bar), np.float32) if loss_weights is None else np.asarray(loss_weights, np.float32)
    if weights.shape != bar.shape:
        raise ValueError(f"loss_weights has shape {weights.shape}; it must be {bar.shape}")
    signal, noise = np.sqrt(bar), np.sqrt(1 - bar)
    steps = np.arange(len(bar), dtype=np.int32)
    return Ddpm(Mixture(steps, signal, noise, *_TARGETS[prediction_type](signal, noise), weights))
