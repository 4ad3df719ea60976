"""Euler's method on the probability-flow ODE in σ (arXiv:2206.00364, algorithm 2)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

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
    check_inference_steps,
    expand,
    finish,
    next_index,
    require_timesteps,
    schedule_index,
    spaced_timesteps,
    step_noise,
    table_at,
    velocity,
    working,
)


class EulerDiscreteSchedulerState(struct.PyTreeNode):
    """State of `FlaxEulerDiscreteScheduler`.

    Args:
        common: the noise schedule.
        init_noise_sigma: standard deviation of the first sample.
        timesteps: fractional, largest first.
        sigmas: noise level at each of them and after the last.
        step_index: place of the next step; −1 before the first, which looks its timestep up.
        num_inference_steps: None before `set_timesteps`.
    """

    common: CommonSchedulerState
    init_noise_sigma: Array
    timesteps: Array
    sigmas: Array
    step_index: Array
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlaxEulerDiscreteScheduler(BetaScheduler):
    """Euler sampling in noise levels; the fields are the keys of PyTorch's `EulerDiscreteScheduler`.

    Samples are x0 + σ·ε; `scale_model_input` brings them to the variance the model was trained with.

    Args:
        beta_schedule: named noise schedule.
        prediction_type: what the model predicts; "original_sample" is an older name of "sample".
        interpolation_type: between training noise levels: "linear" in σ, or "log_linear" over the whole range.
        use_karras_sigmas: noise levels even in σ^(1/7).
        use_exponential_sigmas: noise levels even in log σ.
        use_beta_sigmas: noise levels at quantiles of a Beta distribution.
        sigma_min: smallest level of these three; that of the last timestep where None.
        sigma_max: largest level of these three; that of the first timestep where None.
        timestep_spacing: how inference timesteps are chosen.
        timestep_type: "continuous" tells a v-prediction model ¼·log σ in place of the timestep.
        rescale_betas_zero_snr: end the noise schedule in (almost) pure noise, ᾱ = 2⁻²⁴.
        final_sigmas_type: level after the last step, 0 or that of timestep 0.
    """

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction", "original_sample"] = "epsilon"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    torch_class_name = "EulerDiscreteScheduler"
    smallest_alpha_cumprod = 2**-24

    def _check_combination(self) -> None:
        names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        levels.check_one_spacing({name: getattr(self, name) for name in names})

    def create_state(self, common: CommonSchedulerState | None = None) -> EulerDiscreteSchedulerState:
        """Return the first state, over all training timesteps; `common` is a noise schedule to share."""
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
        """Return the state for a trajectory of so many steps; arguments and errors as `FlaxDDPMScheduler`."""
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
        """Return the timesteps and the float32 noise levels, one more, or two with "log_linear" as in PyTorch."""
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
        """Return the sample over √(σ² + 1), the model's input at one of `state.timesteps`."""
        sigma = table_at(state.sigmas, next_index(state.timesteps, state.step_index, timestep))
        (x,) = working(sample)
        return (x / jnp.sqrt(sigma**2 + 1)).astype(sample.dtype)

    def step(
        self,
        state: EulerDiscreteSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        key: Array | None = None,
        variance_noise: Array | None = None,
        return_dict: bool = True,
        *,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> FlaxSchedulerOutput[EulerDiscreteSchedulerState]:
        """Return the sample at the next noise level.

        Args:
            state: from `set_timesteps`.
            model_output: for the scaled input, (B, …).
            timestep: one of `state.timesteps`; may be traced. Read at the first step only, later ones are counted.
            sample: x0 + σ·ε, unscaled.
            key: PRNG key of this step's noise, needed where `s_churn` > 0; or
            variance_noise: the noise itself.
            return_dict: a named tuple; else a plain one.
            s_churn: amount of noise added back over the trajectory.
            s_tmin: smallest σ at which noise is added.
            s_tmax: largest σ at which noise is added.
            s_noise: standard deviation of that noise.

        Raises:
            ConfigError: `set_timesteps` not called, noise missing, or an unknown first timestep.

        Reference:
            arXiv:2206.00364, algorithm 2 without the second-order correction.
        """
        require_timesteps(state.num_inference_steps)
        x, output = working(sample, model_output)
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
        return finish(previous, sample, state.replace(step_index=index + 1), return_dict)

    def add_noise(
        self, state: EulerDiscreteSchedulerState, original_samples: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return x0 + σ·ε.

        Args:
            state: any state; its timesteps are those that may be asked for.
            original_samples: x0, (B, …).
            noise: ε, the same shape.
            timesteps: a scalar or (B,), entries of `state.timesteps`.

        Raises:
            ConfigError: a timestep (not traced) that is not in the schedule.
        """
        x0, epsilon = working(original_samples, noise)
        sigma = expand(table_at(state.sigmas, schedule_index(state.timesteps, timesteps)), x0)
        return (x0 + epsilon * sigma).astype(original_samples.dtype)

    def get_velocity(
        self, state: EulerDiscreteSchedulerState, sample: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return v = √ᾱ_t·ε − √(1 − ᾱ_t)·x0 at integer training timesteps.

        PyTorch's class indexes ᾱ, which rises in t, with the place in the schedule, which falls in t; not followed.
        """
        return velocity(state.common.alphas_cumprod, sample, noise, jnp.asarray(timesteps).astype(jnp.int32))
