"""Flow matching on straight paths: the model predicts the velocity from the clean sample to the noise.

Reference: Lipman et al., arXiv:2210.02747; Esser et al., arXiv:2403.03206, equations 13, 19 and 23, for how t is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import DTypeLike
from pydantic import BaseModel, Field, FiniteFloat

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.objectives.objective import OBJECTIVES, Mixture, Objective
from flax_diffusion.core.typed import Size, check_values


class FlowMatchingOptions(BaseModel):
    """Options of the objective."""

    weighting_scheme: Literal["none", "logit_normal"] = Field(
        "none", description="Flow matching: draw times uniformly, or more of those in the middle."
    )
    logit_mean: float = Field(0.0, description="Mean of log(t / (1 - t)) under logit_normal. Above 0: more noise.")
    logit_std: float = Field(1.0, gt=0, description="Standard deviation of log(t / (1 - t)) under logit_normal.")
    shift: float | None = Field(
        None, gt=0, description="Flow matching: shift of the times towards noise. None: that of the scheduler's config."
    )


class _Keys:
    num_train_timesteps: Size
    shift: FiniteFloat
    use_dynamic_shifting: bool
    invert_sigmas: bool


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Objective):
    """An objective whose time t is continuous: the input is (1 − t)·x + t·ε and the target ε − x.

    Attributes:
        num_train_timesteps: Factor on t in the time that the model is told.
        logit_normal: Mean and standard deviation of log(t / (1 − t)), which is normal; None for a uniform t.
        shift: Moves t towards noise, t' = shift·t / (1 + (shift − 1)·t).
        dtype: Dtype of the numbers.
    """

    num_train_timesteps: int = 1000
    logit_normal: tuple[float, float] | None = None
    shift: float = 1.0
    dtype: Any = np.float32

    name: ClassVar[str] = "flow_matching"
    options: ClassVar[type[BaseModel]] = FlowMatchingOptions
    schedulers: ClassVar[tuple[str, ...]] = ("FlowMatchEulerDiscreteScheduler",)

    @classmethod
    def scheduler(cls, options: FlowMatchingOptions) -> dict[str, Any]:
        """Return the config of a FlowMatchEulerDiscreteScheduler."""
        return {"_class_name": cls.schedulers[0], "num_train_timesteps": 1000, "shift": options.shift or 1.0}

    @classmethod
    def changed(cls, scheduler: Mapping[str, Any], options: FlowMatchingOptions) -> dict[str, Any]:
        """Return the config with the requested shift."""
        return dict(scheduler) | ({"shift": options.shift} if options.shift is not None else {})

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Mapping[str, Any],
        options: FlowMatchingOptions,
        dtype: DTypeLike = np.float32,
        *,
        conditional: bool = False,
    ) -> FlowMatching:
        """Make the objective of the scheduler's shift; one that depends on a picture's size shifts no training time."""
        check_values(_Keys, scheduler, "scheduler config")
        if scheduler.get("invert_sigmas"):
            raise ConfigError(
                "scheduler config: invert_sigmas counts time backwards, which does not train here: drop it"
            )
        shift = 1.0 if scheduler.get("use_dynamic_shifting") else float(scheduler.get("shift", 1.0))
        if not shift > 0:
            raise ConfigError(f"shift is {shift}; it must be greater than 0 (1 shifts nothing)")
        uniform = options.weighting_scheme == "none"
        default = FlowMatchingOptions.model_fields
        for name in ("logit_mean", "logit_std"):
            if uniform and getattr(options, name) != default[name].default:
                raise ConfigError(f"--{name} goes with --weighting_scheme logit_normal: add it, or drop the former")
        return cls(
            num_train_timesteps=int(scheduler.get("num_train_timesteps", 1000)),
            logit_normal=None if uniform else (options.logit_mean, options.logit_std),
            shift=shift,
            dtype=dtype,
        )

    def draw(self, rng: np.random.Generator) -> Mixture:
        """Draw one example's mixture."""
        if self.logit_normal is None:
            t = rng.random()
        else:
            mean, deviation = self.logit_normal
            t = 1 / (1 + math.exp(-(mean + deviation * rng.standard_normal())))
        return self.at(self.shift * t / (1 + (self.shift - 1) * t))

    def at(self, t: float) -> Mixture:
        """Return the mixture of a time in 0..1."""
        numbers = (t * self.num_train_timesteps, 1 - t, t, -1, 1)
        return Mixture.of(*numbers, dtype=self.dtype)


OBJECTIVES.register(FlowMatching.name, FlowMatching)
