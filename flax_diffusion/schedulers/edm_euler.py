"""Euler's method in the noise level σ on the preconditioned denoiser of EDM (arXiv:2206.00364, algorithm 1)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.objectives.noise_schedule import linspace
from flax_diffusion.core.typed import Size
from flax_diffusion.schedulers.common import (
    FlaxScheduler,
    FlaxSchedulerOutput,
    at_least_float32,
    expand,
    step_result,
    table_at,
)
from flax_diffusion.schedulers.timesteps import next_index, require_timesteps, schedule_index


class EDMEulerSchedulerState(struct.PyTreeNode):
    """State of `FlaxEDMEulerScheduler`.

    Args:
        init_noise_sigma: Standard deviation of the first sample, √(σ_max² + 1).
        timesteps: What the model is told, ln(σ) / 4.
        sigmas: σ of each step and after the last.
        step_index: Place of the next step; −1 before the first, which looks its timestep up.
        num_inference_steps: None before `set_timesteps`.
    """

    init_noise_sigma: Array
    timesteps: Array
    sigmas: Array
    step_index: Array
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class FlaxEDMEulerScheduler(FlaxScheduler):
    """Deterministic sampling of EDM; the fields are the keys of PyTorch's `EDMEulerScheduler`.

    Samples are x0 + σ·ε with σ from `sigma_max` to 0. The model is given c_in·sample and returns F; the denoised
    sample is c_skip·sample + c_out·F (table 1 of the paper).

    Args:
        num_train_timesteps: Number of σ before `set_timesteps`.
        sigma_min: σ of the last step.
        sigma_max: σ of the first step.
        sigma_data: Standard deviation of the clean samples.
        sigma_schedule: "karras": σ even in σ^(1/rho). "exponential": σ even in log σ.
        prediction_type: "epsilon": the paper's F. "v_prediction": F with the other sign.
        rho: Exponent of "karras".
        final_sigmas_type: σ after the last step: "zero", or "sigma_min".
    """

    _: dataclasses.KW_ONLY
    num_train_timesteps: Size = 1000
    dtype: Any = jnp.float32
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rho: float = 7.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    torch_class_name = "EDMEulerScheduler"

    def _check_combination(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigError(
                f"sigma_min is {self.sigma_min} and sigma_max {self.sigma_max}; they must be above 0, and the first "
                "the smaller (0.002 and 80 are usual)"
            )
        if not self.sigma_data > 0:
            raise ConfigError(f"sigma_data is {self.sigma_data}; it must be greater than 0 (0.5 is usual)")

    def _levels(self, ramp: np.ndarray) -> np.ndarray:
        """Return float32 σ at places of 0..1, of which 0 is the noisiest."""
        if self.sigma_schedule == "karras":
            low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
            return ((high + ramp * (low - high)) ** self.rho).astype(np.float32)
        if self.sigma_schedule == "exponential":
            logs = linspace(math.log(self.sigma_min), math.log(self.sigma_max), len(ramp))
            return np.exp(logs.astype(np.float64)).astype(np.float32)[::-1].copy()
        raise unknown("sigma_schedule", self.sigma_schedule, ("karras", "exponential"))

    def create_state(self) -> EDMEulerSchedulerState:
        """Return the first state, over all training timesteps."""
        return self._state(self._levels(np.arange(self.num_train_timesteps + 1) / self.num_train_timesteps), None)

    def set_timesteps(
        self, state: EDMEulerSchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> EDMEulerSchedulerState:
        """Return the state for a trajectory.

        Args:
            state: Any state of this scheduler.
            num_inference_steps: Steps to take.
            shape: Of the samples; not needed.

        Raises:
            ConfigError: No steps.
        """
        del state, shape
        if num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
        return self._state(self._levels(np.linspace(0, 1, num_inference_steps)), num_inference_steps)

    def _state(self, sigmas: np.ndarray, count: int | None) -> EDMEulerSchedulerState:
        if self.final_sigmas_type not in ("zero", "sigma_min"):
            raise unknown("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        last = sigmas[-1] if self.final_sigmas_type == "sigma_min" else np.float32(0)
        return EDMEulerSchedulerState(
            init_noise_sigma=jnp.asarray((self.sigma_max**2 + 1) ** 0.5, self.dtype),
            timesteps=jnp.asarray(np.float32(0.25) * np.log(sigmas), self.dtype),
            sigmas=jnp.asarray(np.append(sigmas, last), self.dtype),
            step_index=jnp.asarray(-1, jnp.int32),
            num_inference_steps=count,
        )

    def scale_model_input(self, state: EDMEulerSchedulerState, sample: Array, timestep: ArrayLike) -> Array:
        """Return the sample as the model wants it, c_in·sample.

        Args:
            state: From `set_timesteps`.
            sample: x0 + σ·ε, (B, …).
            timestep: One of `state.timesteps`; may be traced.
        """
        (x,) = at_least_float32(sample)
        sigma = table_at(state.sigmas, next_index(state.timesteps, state.step_index, timestep))
        return (x / jnp.sqrt(sigma**2 + self.sigma_data**2)).astype(sample.dtype)

    def _denoised(self, sample: Array, output: Array, sigma: Array) -> Array:
        total = sigma**2 + self.sigma_data**2
        c_out = sigma * self.sigma_data / jnp.sqrt(total)
        if self.prediction_type == "epsilon":
            return self.sigma_data**2 / total * sample + c_out * output
        if self.prediction_type == "v_prediction":
            return self.sigma_data**2 / total * sample - c_out * output
        raise unknown("prediction_type", self.prediction_type, ("epsilon", "v_prediction"))

    def step(
        self,
        state: EDMEulerSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        variance_noise: Array | None = None,
    ) -> FlaxSchedulerOutput[EDMEulerSchedulerState]:
        """Return the sample at the next σ.

        Args:
            state: From `set_timesteps`.
            model_output: F, (B, …).
            timestep: One of `state.timesteps`; may be traced. Read at the first step only, later ones are counted.
            sample: x0 + σ·ε, (B, …), before it was scaled.
            return_dict: A named tuple; else a plain one.
            key: Not used: no noise is added.
            variance_noise: Not used.

        Raises:
            ConfigError: `set_timesteps` not called, or an unknown first timestep.
        """
        del key, variance_noise
        require_timesteps(state.num_inference_steps)
        x, output = at_least_float32(sample, model_output)
        index = next_index(state.timesteps, state.step_index, timestep)
        sigma, sigma_next = table_at(state.sigmas, index), table_at(state.sigmas, index + 1)
        slope = (x - self._denoised(x, output, sigma)) / sigma
        previous = x + slope * (sigma_next - sigma)
        return step_result(previous, sample, state.replace(step_index=index + 1), return_dict)

    def add_noise(
        self, state: EDMEulerSchedulerState, original_samples: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return x0 + σ·ε.

        Args:
            state: Any state; its timesteps are those that may be asked for.
            original_samples: x0, (B, …).
            noise: ε, the same shape.
            timesteps: A scalar or (B,), entries of `state.timesteps`.

        Raises:
            ConfigError: A timestep (not traced) that is not in the schedule.
        """
        x0, epsilon = at_least_float32(original_samples, noise)
        sigma = expand(table_at(state.sigmas, schedule_index(state.timesteps, timesteps)), x0)
        return (x0 + epsilon * sigma).astype(original_samples.dtype)

    def get_velocity(self, state: Any, sample: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return F of a perfect model with `prediction_type` "epsilon", (x0 − c_skip·(x0 + σ·ε)) / c_out.

        Args:
            state: Any state; its timesteps are those that may be asked for.
            sample: x0, (B, …).
            noise: ε, the same shape.
            timesteps: A scalar or (B,), entries of `state.timesteps`.
        """
        x0, epsilon = at_least_float32(sample, noise)
        sigma = expand(table_at(state.sigmas, schedule_index(state.timesteps, timesteps)), x0)
        root = jnp.sqrt(sigma**2 + self.sigma_data**2)
        return ((sigma * x0 - self.sigma_data**2 * epsilon) / (self.sigma_data * root)).astype(sample.dtype)
