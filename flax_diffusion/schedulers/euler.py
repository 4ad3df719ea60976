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

from flax_diffusion.core.errors import unknown
from flax_diffusion.core.objectives.noise_schedule import PREDICTION_TYPES, linspace
from flax_diffusion.schedulers import sigmas as levels
from flax_diffusion.schedulers.common import (
    BetaScheduler,
    CommonSchedulerState,
    FlaxSchedulerOutput,
    at_least_float32,
    expand,
    step_noise,
    step_result,
    table_at,
    velocity,
)
from flax_diffusion.schedulers.timesteps import (
    check_inference_steps,
    next_index,
    require_timesteps,
    schedule_index,
    spaced_timesteps,
)


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
class FlaxEulerDiscreteScheduler(BetaScheduler):
    """Euler sampling in noise levels; the fields are the keys of PyTorch's `EulerDiscreteScheduler`.

    Samples are x0 + σ·ε; `scale_model_input` brings them to the variance the model was trained with. For fields not
    named here see `BetaScheduler`.

    Args:
        prediction_type: What the model predicts; "original_sample" is an older name of "sample".
        interpolation_type: How training noise levels are interpolated: "linear" in σ, or "log_linear" over the whole
            range.
        sigma_min: Smallest level of the three spacings `use_…_sigmas`; None for that of the last timestep.
        sigma_max: Largest level of these; None for that of the first timestep.
        timestep_type: With "continuous", a v-prediction model is given ¼·log σ in place of the timestep.
    """

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction", "original_sample"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    dtype: Any = jnp.float32
    _: dataclasses.KW_ONLY
    steps_offset: int = 0
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    torch_class_name = "EulerDiscreteScheduler"
    smallest_alpha_cumprod = 2**-24

    def _check_combination(self) -> None:
        names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        levels.check_one_spacing({name: getattr(self, name) for name in names})

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
        total = self.num_train_timesteps
        training = levels.training_sigmas(self.numpy_alphas_cumprod())
        if self.timestep_spacing == "linspace":
            timesteps = np.linspace(0, total - 1, count, dtype=np.float32)[::-1]
        else:
            timesteps = spaced_timesteps(self.timestep_spacing, count, total, self.steps_offset)
        log_training = np.log(training)
        if self.interpolation_type == "linear":
            sigmas = np.interp(timesteps, np.arange(total), training)
        else:
            sigmas = np.exp(linspace(float(log_training[-1]), float(log_training[0]), count + 1))
        low = float(sigmas[-1]) if self.sigma_min is None else self.sigma_min
        high = float(sigmas[0]) if self.sigma_max is None else self.sigma_max
        respaced = None
        if self.use_karras_sigmas:
            respaced = levels.karras_sigmas(low, high, count)
        elif self.use_exponential_sigmas:
            respaced = levels.exponential_sigmas(low, high, count)
        elif self.use_beta_sigmas:
            respaced = levels.beta_sigmas(low, high, count)
        if respaced is not None:
            sigmas, timesteps = respaced, levels.sigma_to_timestep(respaced, log_training)
        last = levels.sigma_after_last(self.final_sigmas_type, training)
        return timesteps, np.append(sigmas, last).astype(np.float32)

    def _init_noise_sigma(self, sigmas: np.ndarray) -> Array:
        largest = jnp.asarray(sigmas.max(), self.dtype)
        return jnp.sqrt(largest**2 + 1) if self.timestep_spacing == "leading" else largest

    def _model_timesteps(self, timesteps: np.ndarray, sigmas: np.ndarray) -> Array:
        if self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            timesteps = np.float32(0.25) * np.log(sigmas)
        return jnp.asarray(timesteps.astype(np.float32), self.dtype)

    def scale_model_input(self, state: EulerDiscreteSchedulerState, sample: Array, timestep: ArrayLike) -> Array:
        """Return the sample divided by √(σ² + 1); see `FlaxScheduler`."""
        sigma = table_at(state.sigmas, next_index(state.timesteps, state.step_index, timestep))
        (x,) = at_least_float32(sample)
        return (x / jnp.sqrt(sigma**2 + 1)).astype(sample.dtype)

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

        if self.prediction_type == "epsilon":
            slope = output
        else:
            if self.prediction_type == "v_prediction":
                x0 = output * (-sigma / jnp.sqrt(sigma**2 + 1)) + x / (sigma**2 + 1)
            elif self.prediction_type in ("sample", "original_sample"):
                x0 = output
            else:
                raise unknown("prediction_type", self.prediction_type, (*PREDICTION_TYPES, "original_sample"))
            slope = (x - x0) / sigma_hat
        previous = x + slope * (sigma_next - sigma_hat)
        return step_result(previous, sample, state.replace(step_index=index + 1), return_dict)

    def add_noise(
        self, state: EulerDiscreteSchedulerState, original_samples: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return x0 + σ·ε for entries of `state.timesteps`; see `FlaxScheduler`."""
        x0, epsilon = at_least_float32(original_samples, noise)
        sigma = expand(table_at(state.sigmas, schedule_index(state.timesteps, timesteps)), x0)
        return (x0 + epsilon * sigma).astype(original_samples.dtype)

    def get_velocity(
        self, state: EulerDiscreteSchedulerState, sample: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return v = √ᾱ_t·ε − √(1 − ᾱ_t)·x0 at integer training timesteps; see `FlaxScheduler`.

        PyTorch's class indexes the table of ᾱ, which is in order of rising t, with the place in the schedule, which is
        in order of falling t. That is not followed here.
        """
        return velocity(state.common.alphas_cumprod, sample, noise, jnp.asarray(timesteps).astype(jnp.int32))
