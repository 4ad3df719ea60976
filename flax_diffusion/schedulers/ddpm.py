"""DDPM: ancestral sampling (arXiv:2006.11239)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.schedulers.common import (
    CommonSchedulerState,
    FlaxSchedulerOutput,
    VariancePreservingScheduler,
    at_least_float32,
    limit_original,
    predict_original,
    previous_alpha_cumprod,
    step_noise,
    step_result,
    table_at,
)
from flax_diffusion.schedulers.timesteps import check_inference_steps, schedule_index, spaced_timesteps

VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]


class DDPMSchedulerState(struct.PyTreeNode):
    """State of `FlaxDDPMScheduler`.

    Attributes:
        common: Noise schedule.
        init_noise_sigma: Standard deviation of the first sample, a scalar.
        timesteps: Timesteps, largest first, int32 (steps,).
        num_inference_steps: Number of steps; None before `set_timesteps`.
    """

    common: CommonSchedulerState
    init_noise_sigma: Array
    timesteps: Array
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class FlaxDDPMScheduler(VariancePreservingScheduler):
    """Denoising diffusion probabilistic models; the fields are the keys of PyTorch's `DDPMScheduler`.

    For fields that are not named here see `BetaScheduler`.

    Args:
        variance_type: Variance of a step. "learned" and "learned_range" take it from the second half of the model's
            output channels. "fixed_large_log" equals "fixed_large": PyTorch's class takes the square root of a negative
            logarithm there and returns NaN.
    """

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = "linear"
    variance_type: VarianceType = "fixed_small"
    clip_sample: bool = True
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    dtype: Any = jnp.float32
    _: dataclasses.KW_ONLY
    steps_offset: int = 0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    rescale_betas_zero_snr: bool = False

    torch_class_name = "DDPMScheduler"

    def create_state(self, common: CommonSchedulerState | None = None) -> DDPMSchedulerState:
        """Return the first state; see `BetaScheduler`."""
        return DDPMSchedulerState(
            common=CommonSchedulerState.create(self) if common is None else common,
            init_noise_sigma=jnp.asarray(1.0, self.dtype),
            timesteps=jnp.arange(self.num_train_timesteps - 1, -1, -1, dtype=jnp.int32),
        )

    def set_timesteps(
        self, state: DDPMSchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> DDPMSchedulerState:
        """Return the state for a trajectory; see `FlaxScheduler`."""
        del shape
        check_inference_steps(num_inference_steps, self.num_train_timesteps)
        timesteps = spaced_timesteps(
            self.timestep_spacing, num_inference_steps, self.num_train_timesteps, self.steps_offset
        )
        return state.replace(timesteps=jnp.asarray(timesteps, jnp.int32), num_inference_steps=num_inference_steps)

    def step(
        self,
        state: DDPMSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        key: Array | None = None,
        return_dict: bool = True,
        *,
        variance_noise: Array | None = None,
    ) -> FlaxSchedulerOutput[DDPMSchedulerState]:
        """Return x_{t−1}, drawn from the posterior of the predicted x0; for other arguments see `FlaxScheduler`.

        Args:
            state: State from `set_timesteps`, or from `create_state` to walk every training timestep.
            model_output: Output of the model, (B, C, …), with twice the channels for a learned variance.
            key: PRNG key, needed if `variance_noise` is not given; the noise is not used at timestep 0.

        Raises:
            ConfigError: If no noise is given, a timestep that is not traced is not in the schedule, or the channels of
                the model output do not fit `variance_type`.

        Reference:
            DDPM, equations 6, 7 and 15; learned_range: arXiv:2102.09672, equation 15.
        """
        learned = self.variance_type in ("learned", "learned_range")
        expected = (sample.shape[0], sample.shape[1] * (2 if learned else 1), *sample.shape[2:])
        if model_output.shape != expected:
            raise ConfigError(
                f"model_output has shape {model_output.shape}; with variance_type {self.variance_type!r} and a "
                f"sample of shape {sample.shape} it must be {expected}"
            )
        x_t, output = at_least_float32(sample, model_output)
        output, predicted_variance = output[:, : sample.shape[1]], output[:, sample.shape[1] :]
        t = jnp.asarray(timestep)
        key = None if key is None else jax.random.split(key, 1)[0]  # as Diffusers 0.39 draws it
        noise = step_noise(key, variance_noise, x_t, "DDPM sampling")

        alpha_bar = table_at(state.common.alphas_cumprod, t)
        alpha_bar_previous = previous_alpha_cumprod(state.common.alphas_cumprod, self._previous_timestep(state, t), 1.0)
        alpha = alpha_bar / alpha_bar_previous
        beta = 1 - alpha
        x0 = limit_original(self, predict_original(self.prediction_type, output, x_t, alpha_bar))
        mean = (jnp.sqrt(alpha_bar_previous) * beta / (1 - alpha_bar)) * x0
        mean = mean + (jnp.sqrt(alpha) * (1 - alpha_bar_previous) / (1 - alpha_bar)) * x_t
        deviation = self._standard_deviation(alpha_bar, alpha_bar_previous, beta, predicted_variance)
        return step_result(jnp.where(t > 0, mean + deviation * noise, mean), sample, state, return_dict)

    def _previous_timestep(self, state: DDPMSchedulerState, t: Array) -> Array:
        """Return the entry after t in `state.timesteps`, −1 after the last."""
        if state.num_inference_steps is None:
            return t - 1
        after = jnp.append(state.timesteps, -1)[1:]
        unknown = self.num_train_timesteps  # past the table's end: NaN
        return after.at[schedule_index(state.timesteps, t)].get(mode="fill", fill_value=unknown)

    def _standard_deviation(self, alpha_bar: Array, alpha_bar_previous: Array, beta: Array, predicted: Array) -> Array:
        if self.variance_type == "learned":
            return jnp.sqrt(predicted)
        if self.variance_type in ("fixed_large", "fixed_large_log"):
            return jnp.sqrt(beta)
        # The floor keeps the logarithm finite at t = 0, where the posterior has no variance.
        small = jnp.maximum((1 - alpha_bar_previous) / (1 - alpha_bar) * beta, np.float32(1e-20))
        if self.variance_type == "learned_range":
            fraction = (predicted + 1) / 2
            return jnp.exp(0.5 * (fraction * jnp.log(beta) + (1 - fraction) * jnp.log(small)))
        if self.variance_type in ("fixed_small", "fixed_small_log"):
            return jnp.sqrt(small)
        raise unknown("variance_type", self.variance_type, get_args(VarianceType))
