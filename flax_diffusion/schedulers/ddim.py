"""DDIM: implicit sampling (arXiv:2010.02502)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.schedulers.common import (
    CommonSchedulerState,
    FlaxSchedulerOutput,
    VariancePreservingScheduler,
    at_least_float32,
    limit_original,
    predict_noise,
    predict_original,
    previous_alpha_cumprod,
    step_noise,
    step_result,
    table_at,
)
from flax_diffusion.schedulers.timesteps import check_inference_steps, require_timesteps, spaced_timesteps


class DDIMSchedulerState(struct.PyTreeNode):
    """State of `FlaxDDIMScheduler`.

    Attributes:
        common: Noise schedule.
        final_alpha_cumprod: ᾱ after the last step, a scalar.
        init_noise_sigma: Standard deviation of the first sample, a scalar.
        timesteps: Timesteps, largest first, int32 (steps,).
        num_inference_steps: Number of steps; None before `set_timesteps`.
    """

    common: CommonSchedulerState
    final_alpha_cumprod: Array
    init_noise_sigma: Array
    timesteps: Array
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class FlaxDDIMScheduler(VariancePreservingScheduler):
    """Denoising diffusion implicit models; the fields are the keys of PyTorch's `DDIMScheduler`.

    For fields that are not named here see `BetaScheduler`.

    Args:
        set_alpha_to_one: Use 1 as ᾱ after the last step; else ᾱ_0.
    """

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    dtype: Any = jnp.float32
    _: dataclasses.KW_ONLY
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    rescale_betas_zero_snr: bool = False

    torch_class_name = "DDIMScheduler"

    def create_state(self, common: CommonSchedulerState | None = None) -> DDIMSchedulerState:
        """Return the first state; see `BetaScheduler`."""
        common = CommonSchedulerState.create(self) if common is None else common
        return DDIMSchedulerState(
            common=common,
            final_alpha_cumprod=jnp.asarray(1.0, self.dtype) if self.set_alpha_to_one else common.alphas_cumprod[0],
            init_noise_sigma=jnp.asarray(1.0, self.dtype),
            timesteps=jnp.arange(self.num_train_timesteps - 1, -1, -1, dtype=jnp.int32),
        )

    def set_timesteps(
        self, state: DDIMSchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> DDIMSchedulerState:
        """Return the state for a trajectory; see `FlaxScheduler`."""
        del shape
        check_inference_steps(num_inference_steps, self.num_train_timesteps)
        timesteps = spaced_timesteps(
            self.timestep_spacing, num_inference_steps, self.num_train_timesteps, self.steps_offset
        )
        return state.replace(timesteps=jnp.asarray(timesteps, jnp.int32), num_inference_steps=num_inference_steps)

    def step(
        self,
        state: DDIMSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        eta: float = 0.0,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        variance_noise: Array | None = None,
        use_clipped_model_output: bool = False,
    ) -> FlaxSchedulerOutput[DDIMSchedulerState]:
        """Return the sample one inference step less noisy; for arguments that are not named here see `FlaxScheduler`.

        Args:
            eta: Share η of DDPM's noise: 0 is deterministic, 1 is DDPM.
            key: PRNG key, needed if `eta` > 0 and `variance_noise` is not given.
            use_clipped_model_output: Derive ε from the clipped x0.

        Reference:
            DDIM, equations 12 and 16.
        """
        stride = self.num_train_timesteps // require_timesteps(state.num_inference_steps)
        x_t, output = at_least_float32(sample, model_output)
        t = jnp.asarray(timestep)
        alpha_bar = table_at(state.common.alphas_cumprod, t)
        alpha_bar_previous = previous_alpha_cumprod(state.common.alphas_cumprod, t - stride, state.final_alpha_cumprod)

        x0 = limit_original(self, predict_original(self.prediction_type, output, x_t, alpha_bar))
        if use_clipped_model_output:
            epsilon = predict_noise("sample", x0, x_t, alpha_bar)
        else:
            epsilon = predict_noise(self.prediction_type, output, x_t, alpha_bar)
        deviation = eta * jnp.sqrt((1 - alpha_bar_previous) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_previous))
        previous = jnp.sqrt(alpha_bar_previous) * x0 + jnp.sqrt(1 - alpha_bar_previous - deviation**2) * epsilon
        if eta > 0:
            previous = previous + deviation * step_noise(key, variance_noise, x_t, f"DDIM sampling with eta={eta}")
        return step_result(previous, sample, state, return_dict)
