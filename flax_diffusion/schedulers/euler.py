"""Euler's method on the probability-flow ODE in σ (arXiv:2206.00364, algorithm 2)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.objectives.noise_schedule import linspace
from flax_diffusion.schedulers import sigmas as levels
from flax_diffusion.schedulers.common import (
    CommonSchedulerState,
    FlaxSchedulerOutput,
    at_least_float32,
    step_noise,
    step_result,
    table_at,
)
from flax_diffusion.schedulers.timesteps import check_inference_steps, next_index, require_timesteps
from flax_diffusion.schedulers.variance_exploding import VarianceExplodingScheduler


class EulerDiscreteSchedulerState(struct.PyTreeNode):
    """State of `FlaxEulerDiscreteScheduler`.

    Attributes:
        common: Noise schedule.
        init_noise_sigma: Standard deviation of the first sample, a scalar.
        timesteps: Fractional timesteps, largest first, (steps,).
        sigmas: Noise levels at the timesteps and after the last, (steps + 1,), or one more with "log_linear".
        step_index: Place of the next step, int32; −1 before the first, which looks its timestep up.
        num_inference_steps: Number of steps; None before `set_timesteps`.
    """

    common: CommonSchedulerState
    init_noise_sigma: Array
    timesteps: Array
    sigmas: Array
    step_index: Array
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class FlaxEulerDiscreteScheduler(VarianceExplodingScheduler):
    """Euler sampling in noise levels; the fields are the keys of PyTorch's `EulerDiscreteScheduler`.

    Samples are x0 + σ·ε; `scale_model_input` brings them to the variance the model was trained with. For fields not
    named here see `VarianceExplodingScheduler` and `BetaScheduler`.

    Args:
        interpolation_type: How training noise levels are interpolated: "linear" in σ, or "log_linear" over the whole
            range.
        sigma_min: Smallest level of the three spacings `use_…_sigmas`; None for that of the last timestep.
        sigma_max: Largest level of these; None for that of the first timestep.
        timestep_type: With "continuous", a v-prediction model is given ¼·log σ in place of the timestep.
    """

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    dtype: Any = jnp.float32
    _: dataclasses.KW_ONLY
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    torch_class_name = "EulerDiscreteScheduler"
    smallest_alpha_cumprod = 2**-24

    def create_state(self, common: CommonSchedulerState | None = None) -> EulerDiscreteSchedulerState:
        """Return the first state; see `BetaScheduler`."""
        training = levels.training_sigmas(self.numpy_alphas_cumprod())
        sigmas = np.append(training[::-1], np.float32(0))
        timesteps = np.arange(self.num_train_timesteps - 1, -1, -1)
        return EulerDiscreteSchedulerState(
            common=CommonSchedulerState.create(self) if common is None else common,
            init_noise_sigma=self._init_noise_sigma(sigmas),
            timesteps=self._model_timesteps(timesteps, sigmas[:-1]),
            sigmas=jnp.asarray(sigmas, self.dtype),
            step_index=jnp.asarray(-1, jnp.int32),
        )

    def set_timesteps(
        self, state: EulerDiscreteSchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> EulerDiscreteSchedulerState:
        """Return the state for a trajectory; see `FlaxScheduler`."""
        del shape
        check_inference_steps(num_inference_steps, self.num_train_timesteps)
        timesteps, sigmas = self._schedule(num_inference_steps)
        return state.replace(
            init_noise_sigma=self._init_noise_sigma(sigmas),
            timesteps=self._model_timesteps(timesteps, sigmas[: len(timesteps)]),
            sigmas=jnp.asarray(sigmas, self.dtype),
            step_index=jnp.asarray(-1, jnp.int32),
            num_inference_steps=num_inference_steps,
        )

    def _schedule(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return timesteps and float32 noise levels: one level more, or two with "log_linear", as in PyTorch."""
        training = levels.training_sigmas(self.numpy_alphas_cumprod())
        timesteps = self._spaced_timesteps(count)
        log_training = np.log(training)
        if self.interpolation_type == "linear":
            sigmas = np.interp(timesteps, np.arange(len(training)), training)
        else:
            sigmas = np.exp(linspace(float(log_training[-1]), float(log_training[0]), count + 1))
        low = float(sigmas[-1]) if self.sigma_min is None else self.sigma_min
        high = float(sigmas[0]) if self.sigma_max is None else self.sigma_max
        timesteps, sigmas = self._respaced(timesteps, sigmas, low, high, log_training)
        last = levels.sigma_after_last(self.final_sigmas_type, training)
        return timesteps, np.append(sigmas, last).astype(np.float32)

    def _model_timesteps(self, timesteps: np.ndarray, sigmas: np.ndarray) -> Array:
        if self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            timesteps = np.float32(0.25) * np.log(sigmas)
        return jnp.asarray(timesteps.astype(np.float32), self.dtype)

    def step(
        self,
        state: EulerDiscreteSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        variance_noise: Array | None = None,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> FlaxSchedulerOutput[EulerDiscreteSchedulerState]:
        """Return the sample at the next noise level; for arguments that are not named here see `FlaxScheduler`.

        Args:
            model_output: Output of the model for the scaled input, (B, C, …).
            timestep: One of `state.timesteps`; may be traced. Read at the first step only, later ones are counted.
            sample: Unscaled sample x0 + σ·ε, (B, C, …).
            key: PRNG key, needed if `s_churn` > 0 and `variance_noise` is not given.
            s_churn: Amount of noise added back over the trajectory.
            s_tmin: Smallest σ at which noise is added.
            s_tmax: Largest σ at which noise is added.
            s_noise: Standard deviation of that noise.

        Reference:
            arXiv:2206.00364, algorithm 2 without the second-order correction.
        """
        require_timesteps(state.num_inference_steps)
        x, output = at_least_float32(sample, model_output)
        index = next_index(state.timesteps, state.step_index, timestep)
        sigma, sigma_next = table_at(state.sigmas, index), table_at(state.sigmas, index + 1)
        sigma_hat = sigma
        if s_churn > 0:
            noise = step_noise(key, variance_noise, x, f"Euler sampling with s_churn={s_churn}")
            gamma = min(s_churn / (state.sigmas.shape[0] - 1), math.sqrt(2) - 1)
            sigma_hat = sigma * (1 + jnp.where((s_tmin <= sigma) & (sigma <= s_tmax), gamma, 0.0).astype(sigma.dtype))
            x = x + noise * s_noise * jnp.sqrt(sigma_hat**2 - sigma**2)
        previous = x + self._slope(output, x, sigma, sigma_hat) * (sigma_next - sigma_hat)
        return step_result(previous, sample, state.replace(step_index=index + 1), return_dict)
