"""What the samplers that walk in the noise level σ have in common: samples x0 + σ·ε, their scale and their σ."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import unknown
from flax_diffusion.core.objectives.noise_schedule import PREDICTION_TYPES
from flax_diffusion.schedulers import sigmas as levels
from flax_diffusion.schedulers.common import BetaScheduler, at_least_float32, expand, table_at, velocity
from flax_diffusion.schedulers.timesteps import next_index, schedule_index, spaced_timesteps


@dataclasses.dataclass(frozen=True)
class VarianceExplodingScheduler(BetaScheduler):
    """Scheduler whose samples are x0 + σ·ε; `scale_model_input` gives them the variance of the model's inputs.

    Its states have `timesteps`, `sigmas` and `step_index`. For fields that are not named here see `BetaScheduler`.

    Args:
        prediction_type: What the model predicts; "original_sample" is an older name of "sample" in the Euler class.
    """

    prediction_type: Literal["epsilon", "sample", "v_prediction", "original_sample"] = "epsilon"
    _: dataclasses.KW_ONLY
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    steps_offset: int = 0

    def _check_combination(self) -> None:
        levels.check_one_spacing(self._spacings())

    def _spacings(self) -> dict[str, bool | None]:
        names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        return {name: getattr(self, name) for name in names}

    def _spaced_timesteps(self, count: int) -> np.ndarray:
        """Return the timesteps before any other spacing of σ, largest first, float32 or int64 (count,)."""
        if self.timestep_spacing == "linspace":
            return np.linspace(0, self.num_train_timesteps - 1, count, dtype=np.float32)[::-1]
        return spaced_timesteps(self.timestep_spacing, count, self.num_train_timesteps, self.steps_offset)

    def _respaced(
        self, timesteps: np.ndarray, sigmas: np.ndarray, low: float, high: float, log_training: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return timesteps and noise levels, spaced anew from `high` to `low` where a field asks for it."""
        chosen = next((name for name, value in self._spacings().items() if value), None)
        if chosen is None:
            return timesteps, sigmas
        spacing = {
            "use_karras_sigmas": levels.karras_sigmas,
            "use_exponential_sigmas": levels.exponential_sigmas,
            "use_beta_sigmas": levels.beta_sigmas,
        }[chosen]
        sigmas = spacing(low, high, len(timesteps))
        return levels.sigma_to_timestep(sigmas, log_training), sigmas

    def _init_noise_sigma(self, sigmas: np.ndarray) -> Array:
        largest = jnp.asarray(sigmas.max(), self.dtype)
        return jnp.sqrt(largest**2 + 1) if self.timestep_spacing == "leading" else largest

    def _slope(self, output: Array, x: Array, sigma: Array, sigma_hat: Array) -> Array:
        """Return the derivative of the sample by σ, (B, …).

        Args:
            output: Output of the model for the scaled sample, (B, …).
            x: The sample, (B, …), at the level `sigma_hat`.
            sigma: Level for which the model was asked, a scalar.
            sigma_hat: Level of the sample; above `sigma` where noise was added.

        Reference:
            arXiv:2206.00364, equation 3.
        """
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            x0 = output * (-sigma / jnp.sqrt(sigma**2 + 1)) + x / (sigma**2 + 1)
        elif self.prediction_type in ("sample", "original_sample"):
            x0 = output
        else:
            raise unknown("prediction_type", self.prediction_type, (*PREDICTION_TYPES, "original_sample"))
        return (x - x0) / sigma_hat

    def scale_model_input(self, state: Any, sample: Array, timestep: ArrayLike) -> Array:
        """Return the sample divided by √(σ² + 1); see `FlaxScheduler`."""
        sigma = table_at(state.sigmas, next_index(state.timesteps, state.step_index, timestep))
        (x,) = at_least_float32(sample)
        return (x / jnp.sqrt(sigma**2 + 1)).astype(sample.dtype)

    def add_noise(self, state: Any, original_samples: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return x0 + σ·ε for entries of `state.timesteps`; see `FlaxScheduler`."""
        x0, epsilon = at_least_float32(original_samples, noise)
        sigma = expand(table_at(state.sigmas, schedule_index(state.timesteps, timesteps)), x0)
        return (x0 + epsilon * sigma).astype(original_samples.dtype)

    def get_velocity(self, state: Any, sample: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return v = √ᾱ_t·ε − √(1 − ᾱ_t)·x0 at integer training timesteps; see `FlaxScheduler`.

        PyTorch's Euler class indexes the table of ᾱ, which is in order of rising t, with the place in the schedule,
        which is in order of falling t. That is not followed here.
        """
        return velocity(state.common.alphas_cumprod, sample, noise, jnp.asarray(timesteps).astype(jnp.int32))
