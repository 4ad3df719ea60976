"""The preconditioned denoiser of EDM, whose noise levels are drawn log-normally.

Reference: Karras et al., arXiv:2206.00364, equations 7 and 8 and table 1, by which the network's own error
weighs 1 at every level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike
from pydantic import BaseModel, Field, FiniteFloat

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.objectives.objective import OBJECTIVES, Mixture, Objective
from flax_diffusion.core.typed import check_values


class EdmOptions(BaseModel):
    """Options of the objective."""

    edm_log_mean: float = Field(-1.2, description="EDM: mean of the logarithm of the noise levels.")
    edm_log_std: float = Field(1.2, gt=0, description="EDM: standard deviation of that logarithm.")


class _Keys:
    sigma_data: FiniteFloat
    prediction_type: str


@dataclass(frozen=True, kw_only=True)
class Edm(Objective):
    """An objective over noise levels σ: the input is c_in·(x + σ·ε) and the target (x − c_skip·(x + σ·ε)) / c_out.

    Attributes:
        log_mean: P_mean, mean of ln σ.
        log_std: P_std, standard deviation of ln σ.
        sigma_data: Standard deviation of the clean samples.
        dtype: Dtype of the numbers.
    """

    log_mean: float = -1.2
    log_std: float = 1.2
    sigma_data: float = 0.5
    dtype: Any = np.float32

    name: ClassVar[str] = "edm"
    options: ClassVar[type[BaseModel]] = EdmOptions
    schedulers: ClassVar[tuple[str, ...]] = ("EDMEulerScheduler",)

    @classmethod
    def scheduler(cls, options: EdmOptions) -> dict[str, Any]:
        """Return the config of an EDMEulerScheduler."""
        return {"_class_name": cls.schedulers[0], "sigma_data": 0.5, "prediction_type": "epsilon"}

    @classmethod
    def prediction(cls, scheduler: Mapping[str, Any]) -> str:
        """Return edm. Of Diffusers' two prediction types only epsilon, that of the paper, is known here."""
        found = scheduler.get("prediction_type", "epsilon")
        if found != "epsilon":
            raise unknown("prediction_type of an EDMEulerScheduler", found, ["epsilon"])
        return cls.name

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Mapping[str, Any],
        options: EdmOptions,
        dtype: DTypeLike = np.float32,
        *,
        conditional: bool = False,
    ) -> Edm:
        """Make the objective of the scheduler's sigma_data."""
        check_values(_Keys, scheduler, "scheduler config")
        cls.prediction(scheduler)
        sigma_data = float(scheduler.get("sigma_data", 0.5))
        if not sigma_data > 0:
            raise ConfigError(f"sigma_data is {sigma_data}; it must be greater than 0 (0.5 is usual)")
        return cls(
            log_mean=options.edm_log_mean, log_std=options.edm_log_std, sigma_data=sigma_data, dtype=dtype
        )  # fmt: skip

    @classmethod
    def noise_levels(cls, timesteps: np.ndarray, scheduler: Mapping[str, Any]) -> np.ndarray:
        """Return σ of a sampler's steps, float64 (steps,), of the ln(σ) / 4 that the model is told."""
        return np.exp(4 * np.asarray(timesteps, np.float64))

    def draw(self, rng: np.random.Generator) -> Mixture:
        """Draw one example's mixture."""
        return self.at(math.exp(self.log_mean + self.log_std * rng.standard_normal()))

    def at(self, sigma: float) -> Mixture:
        """Return the mixture of a noise level above 0; the model is told ln(σ) / 4."""
        total = math.hypot(sigma, self.sigma_data)
        c_in, c_out, c_skip = 1 / total, sigma * self.sigma_data / total, (self.sigma_data / total) ** 2
        numbers = (math.log(sigma) / 4, c_in, c_in * sigma, (1 - c_skip) / c_out, -c_skip * sigma / c_out)
        return Mixture.of(*numbers, dtype=self.dtype)


OBJECTIVES.register(Edm.name, Edm)
