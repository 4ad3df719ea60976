"""Euler and Maruyama's method on the reverse SDE of flow matching, as SiT samples (arXiv:2401.08740, equation 5).

A sample is x = (1 − σ)·x0 + σ·ε and the model predicts the velocity u = ε − x0. So the noise that it implies is
x + (1 − σ)·u, and with it the score s = −(x + (1 − σ)·u) / σ. With any w(σ) ≥ 0 the samples of

    dx = (u − w·s)·dσ + √(2·w)·dW̄        σ from 1 to 0

have the same distribution at every σ as those of dx = u·dσ; w is half of the paper's diffusion coefficient, and what
its code calls the diffusion.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.typed import Size
from flax_diffusion.schedulers.common import (
    FlaxScheduler,
    FlaxSchedulerOutput,
    at_least_float32,
    expand,
    step_noise,
    step_result,
    table_at,
)
from flax_diffusion.schedulers.flow_match import FlowMatchEulerDiscreteSchedulerState
from flax_diffusion.schedulers.timesteps import next_index, require_timesteps, schedule_index


@dataclasses.dataclass(frozen=True)
class FlaxFlowMatchSDEScheduler(FlaxScheduler):
    """Stochastic sampling of flow matching. Diffusers has no class for it; the twin is in `torch_backend.schedulers`.

    The last step, from `last_step_size` to 0, adds no noise.

    Args:
        num_train_timesteps: Number T of timesteps that the model was trained with.
        shift: Shift of σ towards noise, σ' = shift·σ / (1 + (shift − 1)·σ).
        diffusion_form: w(σ): "sigma" is `diffusion_norm`·σ, "constant" is `diffusion_norm` itself.
        diffusion_norm: Factor on w. 0 adds no noise and leaves Euler's method.
        last_step_size: σ at which the last step begins, before the shift.

    Reference:
        SiT's `Sampler.sample_sde`, whose defaults these are, but for the form "SBDM", which is not defined at σ = 1.
    """

    num_train_timesteps: Size = 1000
    _: dataclasses.KW_ONLY
    dtype: Any = jnp.float32
    shift: float = 1.0
    diffusion_form: Literal["sigma", "constant"] = "sigma"
    diffusion_norm: float = 1.0
    last_step_size: float = 0.04

    torch_class_name = "FlowMatchSDEScheduler"
    has_compatibles = False

    def _check_combination(self) -> None:
        if not self.shift > 0:
            raise ConfigError(f"shift is {self.shift}; it must be greater than 0 (1 shifts nothing)")
        if not self.diffusion_norm >= 0:
            raise ConfigError(f"diffusion_norm is {self.diffusion_norm}; it must be at least 0 (1 is usual)")
        if not 0 < self.last_step_size < 1:
            raise ConfigError(f"last_step_size is {self.last_step_size}; it must lie between 0 and 1 (0.04 is usual)")

    def create_state(self) -> FlowMatchEulerDiscreteSchedulerState:
        """Return the first state; see `FlaxScheduler`."""
        return self._state(np.arange(self.num_train_timesteps, 0, -1) / self.num_train_timesteps, None)

    def set_timesteps(
        self, state: FlowMatchEulerDiscreteSchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> FlowMatchEulerDiscreteSchedulerState:
        """Return the state for a trajectory; see `FlaxScheduler`."""
        del state, shape
        if num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
        return self._state(np.linspace(1, self.last_step_size, num_inference_steps), num_inference_steps)

    def _state(self, plain: np.ndarray, count: int | None) -> FlowMatchEulerDiscreteSchedulerState:
        sigmas = (self.shift * plain / (1 + (self.shift - 1) * plain)).astype(np.float32)
        return FlowMatchEulerDiscreteSchedulerState(
            init_noise_sigma=jnp.ones((), self.dtype),
            timesteps=jnp.asarray(sigmas * np.float32(self.num_train_timesteps), self.dtype),
            sigmas=jnp.asarray(np.append(sigmas, np.float32(0)), self.dtype),
            step_index=jnp.asarray(-1, jnp.int32),
            num_inference_steps=count,
        )

    def scale_model_input(
        self, state: FlowMatchEulerDiscreteSchedulerState, sample: Array, timestep: ArrayLike | None = None
    ) -> Array:
        """Return the sample unchanged; see `FlaxScheduler`."""
        del state, timestep
        return sample

    def _diffusion(self, sigma: Array) -> Array:
        """Return w(σ)."""
        if self.diffusion_form == "sigma":
            return self.diffusion_norm * sigma
        if self.diffusion_form == "constant":
            return jnp.full_like(sigma, self.diffusion_norm)
        raise unknown("diffusion_form", self.diffusion_form, ("sigma", "constant"))

    def step(
        self,
        state: FlowMatchEulerDiscreteSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        variance_noise: Array | None = None,
    ) -> FlaxSchedulerOutput[FlowMatchEulerDiscreteSchedulerState]:
        """Return the sample at the next σ; for arguments that are not named here see `FlaxScheduler`.

        Args:
            model_output: Velocity that the model predicts, (B, C, …).
            timestep: One of `state.timesteps`; may be traced. Read at the first step only, later ones are counted.
            sample: (1 − σ)·x0 + σ·ε, (B, C, …).
            key: PRNG key, needed if `variance_noise` is not given.
        """
        require_timesteps(state.num_inference_steps)
        x, output = at_least_float32(sample, model_output)
        index = next_index(state.timesteps, state.step_index, timestep)
        sigma, sigma_next = table_at(state.sigmas, index), table_at(state.sigmas, index + 1)
        noise = step_noise(key, variance_noise, x, "SDE sampling")
        step, width = sigma - sigma_next, self._diffusion(sigma)
        score = -(x + (1 - sigma) * output) / sigma
        spread = jnp.where(sigma_next > 0, jnp.sqrt(2 * width * step), 0)
        previous = x + (width * score - output) * step + spread * noise
        return step_result(previous, sample, state.replace(step_index=index + 1), return_dict)

    def add_noise(
        self, state: FlowMatchEulerDiscreteSchedulerState, original_samples: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return (1 − σ)·x0 + σ·ε for entries of `state.timesteps`; see `FlaxScheduler`."""
        x0, epsilon = at_least_float32(original_samples, noise)
        sigma = expand(table_at(state.sigmas, schedule_index(state.timesteps, timesteps)), x0)
        return (sigma * epsilon + (1 - sigma) * x0).astype(original_samples.dtype)

    def get_velocity(
        self, state: FlowMatchEulerDiscreteSchedulerState, sample: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return ε − x0, which is the same at all times; see `FlaxScheduler`."""
        del state, timesteps
        return noise - sample
