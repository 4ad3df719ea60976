"""Base classes, mathematics and state of the schedulers.

Samples are (B, C, …) with any number of further axes; timesteps are scalars or (B,). Coefficients have the tables'
dtype. Samples in half precision are computed in float32 and rounded once, at the end, where PyTorch's classes round
after every operation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.objectives import noise_schedule
from flax_diffusion.core.objectives.noise_schedule import PREDICTION_TYPES
from flax_diffusion.schedulers.mixin import BetaScheduleConfig, FlaxKarrasDiffusionSchedulers, FlaxSchedulerMixin
from flax_diffusion.schedulers.outputs import FlaxSchedulerOutput

State = TypeVar("State")


class CommonSchedulerState(struct.PyTreeNode):
    """Noise schedule on the device.

    Attributes:
        alphas: α = 1 − β, (T,).
        betas: β, (T,).
        alphas_cumprod: ᾱ, (T,).
    """

    alphas: Array
    betas: Array
    alphas_cumprod: Array

    @classmethod
    def create(cls, scheduler: BetaScheduleConfig) -> CommonSchedulerState:
        """Return the tables of a scheduler: float32 values, in the scheduler's dtype."""
        betas = noise_schedule.betas_from_config(scheduler.config)
        tables = (np.float32(1) - betas, betas, scheduler.numpy_alphas_cumprod())
        alphas, betas, alpha_bar = (jnp.asarray(table, scheduler.dtype) for table in tables)
        return cls(alphas=alphas, betas=betas, alphas_cumprod=alpha_bar)


class FlaxScheduler(FlaxSchedulerMixin, ABC):
    """Base of all schedulers with one `step` from sample to sample.

    Its docstrings hold for every subclass; a subclass documents only what it adds.
    """

    @abstractmethod
    def create_state(self) -> Any:
        """Return the state before `set_timesteps`, over all training timesteps; each scheduler has its own class."""

    @abstractmethod
    def set_timesteps(self, state: Any, num_inference_steps: int, shape: tuple[int, ...] = ()) -> Any:
        """Return the state for a trajectory.

        Args:
            state: Any state of this scheduler.
            num_inference_steps: Number of steps; a Python int, since it is the length of `state.timesteps`.
            shape: Shape of the samples; needed only by schedulers whose state remembers model outputs.

        Raises:
            ConfigError: If there are more steps than the model has timesteps, or fewer than one.
        """

    @abstractmethod
    def scale_model_input(self, state: Any, sample: Array, timestep: ArrayLike) -> Array:
        """Return the sample as the model wants it.

        Args:
            state: State from `set_timesteps`.
            sample: Sample that `step` takes, (B, C, …).
            timestep: One of `state.timesteps`; may be traced.
        """

    @abstractmethod
    def step(
        self, state: Any, model_output: Array, timestep: ArrayLike, sample: Array, *args: Any, **kwargs: Any
    ) -> FlaxSchedulerOutput[Any]:
        """Return the next sample and state.

        All schedulers have the keywords `return_dict`, `key` and `variance_noise`. By position, the arguments after
        `sample` are those of Diffusers' Flax class.

        Args:
            state: State from `set_timesteps`.
            model_output: Output of the model for `sample`, (B, C, …); for `sample` from `scale_model_input` where that
                changes it.
            timestep: One of `state.timesteps`; may be traced.
            sample: Sample at this timestep, (B, C, …), not scaled.
            args: See above.
            kwargs: See above.
            return_dict: Return a named tuple; False returns a plain one.
            key: PRNG key for the noise of this step, a fresh one for every step. Steps that add noise need it, unless
                `variance_noise` is given.
            variance_noise: That noise itself, in the shape of `sample`, in place of `key`.

        Returns:
            The sample one step less noisy, in the shape and dtype of `sample`, and the state for the next step.

        Raises:
            ConfigError: If `set_timesteps` was not called, if a step that adds noise is given neither or both of `key`
                and `variance_noise`, or if the scheduler looks the timestep up in the schedule, where it is not; a
                traced one gives NaN instead.
        """

    @abstractmethod
    def add_noise(self, state: Any, original_samples: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return samples with the noise of given timesteps.

        Args:
            state: Any state of this scheduler; it holds the timesteps that may be asked for.
            original_samples: Clean samples x0, (B, …).
            noise: Noise ε in the shape of x0.
            timesteps: Timesteps, (B,) or a scalar.

        Returns:
            The noisy samples in the shape and dtype of `original_samples`.

        Raises:
            ConfigError: If the scheduler looks the timesteps up in the schedule, where one is not; traced ones give NaN
                instead.
        """

    @abstractmethod
    def get_velocity(self, state: Any, sample: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return the target of v-prediction.

        Args:
            state: Any state of this scheduler.
            sample: Clean samples x0, (B, …).
            noise: Noise ε in the shape of x0.
            timesteps: Timesteps, (B,) or a scalar.

        Returns:
            The target in the shape and dtype of `sample`.
        """


class BetaScheduler(BetaScheduleConfig, FlaxScheduler):
    """Scheduler of models that were trained with a schedule of β.

    Most subclasses have these fields besides those of `BetaScheduleConfig`; they mean the same in all of them:

    Args:
        steps_offset: Number added to the timesteps of "leading" spacing.
        prediction_type: What the model predicts.
        timestep_spacing: How inference timesteps are chosen.
        rescale_betas_zero_snr: End the noise schedule in pure noise, or in ᾱ = 2⁻²⁴ for solvers that divide by ᾱ.
        clip_sample: Clip the predicted x0 to ±`clip_sample_range`.
        clip_sample_range: See `clip_sample`.
        thresholding: Threshold the predicted x0 dynamically, in place of clipping.
        dynamic_thresholding_ratio: Quantile of the magnitudes that is the threshold.
        sample_max_value: Upper limit of the threshold.
        use_karras_sigmas: Space the noise levels evenly in σ^(1/7).
        use_exponential_sigmas: Space the noise levels evenly in log σ.
        use_beta_sigmas: Space the noise levels by quantiles of a Beta distribution.
        final_sigmas_type: Noise level after the last step: "zero", or "sigma_min" for that of timestep 0.
    """

    _compatibles: ClassVar[list[str]] = [scheduler.name for scheduler in FlaxKarrasDiffusionSchedulers]

    @abstractmethod
    def create_state(self, common: CommonSchedulerState | None = None) -> Any:
        """Return the state before `set_timesteps`, over all training timesteps.

        Args:
            common: Noise schedule to share; None makes one.
        """


class VariancePreservingScheduler(BetaScheduler):
    """Scheduler whose samples are x_t = √ᾱ_t·x0 + √(1 − ᾱ_t)·ε at the model's own timesteps."""

    def scale_model_input(self, state: Any, sample: Array, timestep: ArrayLike | None = None) -> Array:
        """Return the sample as the model wants it: unchanged."""
        del state, timestep
        return sample

    def add_noise(self, state: Any, original_samples: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return x_t = √ᾱ_t·x0 + √(1 − ᾱ_t)·ε.

        Args:
            state: Any state of this scheduler.
            original_samples: Clean samples x0, (B, …).
            noise: Noise ε in the shape of x0.
            timesteps: Training timesteps in [0, T), (B,) or a scalar; past the end, the result is NaN.

        Returns:
            x_t, (B, …), in the dtype of `original_samples`.

        Reference:
            DDPM (arXiv:2006.11239), equation 4.
        """
        x0, epsilon = at_least_float32(original_samples, noise)
        alpha_bar = expand(table_at(state.common.alphas_cumprod, timesteps), x0)
        return (jnp.sqrt(alpha_bar) * x0 + jnp.sqrt(1 - alpha_bar) * epsilon).astype(original_samples.dtype)

    def get_velocity(self, state: Any, sample: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return v = √ᾱ_t·ε − √(1 − ᾱ_t)·x0; see `FlaxScheduler`.

        Reference:
            arXiv:2202.00512, appendix D.
        """
        return velocity(state.common.alphas_cumprod, sample, noise, timesteps)


def step_result(prev_sample: Array, sample: Array, state: State, return_dict: bool) -> FlaxSchedulerOutput[State]:
    """Return the result of a step.

    Args:
        prev_sample: Sample one step less noisy, (B, …), in the dtype of the computation.
        sample: Sample that the step was given, whose dtype the result takes.
        state: State for the next step.
        return_dict: Return a named tuple; False returns a plain one.
    """
    output = FlaxSchedulerOutput(prev_sample.astype(sample.dtype), state)
    return output if return_dict else cast("FlaxSchedulerOutput[State]", tuple(output))


def at_least_float32(*arrays: ArrayLike) -> tuple[Array, ...]:
    """Return the arrays in float32, or in their own dtype where that is wider."""
    return tuple(jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32)) for a in arrays)


def expand(coefficient: Array, like: Array) -> Array:
    """Return a coefficient, scalar or (B,), with axes of length 1 added to multiply `like`, (B, …)."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def table_at(table: Array, index: ArrayLike) -> Array:
    """Return `table[index]`, and NaN past its end, where JAX would repeat the last entry and PyTorch raise."""
    return table.at[jnp.asarray(index)].get(mode="fill", fill_value=jnp.nan)


def previous_alpha_cumprod(alphas_cumprod: Array, previous: Array, final: ArrayLike) -> Array:
    """Return ᾱ at the timesteps `previous`, and `final` where these are below 0."""
    inside = table_at(alphas_cumprod, jnp.maximum(previous, 0))
    return jnp.where(previous >= 0, inside, jnp.asarray(final, alphas_cumprod.dtype))


def predict_original(prediction_type: str, output: Array, sample: Array, alpha_bar: Array) -> Array:
    """Return x0 from a model output.

    Args:
        prediction_type: "epsilon", "sample" or "v_prediction".
        output: Output of the model, (B, …).
        sample: Noisy sample x_t, (B, …).
        alpha_bar: ᾱ_t, in a shape that broadcasts to the sample's.

    Reference:
        DDPM (arXiv:2006.11239), equation 15; v: arXiv:2202.00512, appendix D.
    """
    if prediction_type == "epsilon":
        return (sample - jnp.sqrt(1 - alpha_bar) * output) / jnp.sqrt(alpha_bar)
    if prediction_type == "v_prediction":
        return jnp.sqrt(alpha_bar) * sample - jnp.sqrt(1 - alpha_bar) * output
    if prediction_type == "sample":
        return output
    raise unknown("prediction_type", prediction_type, PREDICTION_TYPES)


def predict_noise(prediction_type: str, output: Array, sample: Array, alpha_bar: Array) -> Array:
    """Return ε from a model output; for arguments and reference see `predict_original`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return jnp.sqrt(alpha_bar) * output + jnp.sqrt(1 - alpha_bar) * sample
    if prediction_type == "sample":
        return (sample - jnp.sqrt(alpha_bar) * output) / jnp.sqrt(1 - alpha_bar)
    raise unknown("prediction_type", prediction_type, PREDICTION_TYPES)


def limit_original(scheduler: Any, original: Array) -> Array:
    """Return x0 thresholded or clipped as the scheduler's configuration asks."""
    if scheduler.thresholding:
        return dynamic_threshold(original, scheduler.dynamic_thresholding_ratio, scheduler.sample_max_value)
    if scheduler.clip_sample:
        return jnp.clip(original, -scheduler.clip_sample_range, scheduler.clip_sample_range)
    return original


def dynamic_threshold(original: Array, ratio: float, max_value: float) -> Array:
    """Clip each example to the given quantile s of its magnitudes and divide by s.

    Args:
        original: Predicted x0, (B, …).
        ratio: The quantile, in [0, 1].
        max_value: Upper limit of s; its lower limit is 1.

    Returns:
        x0 within [−1, 1], (B, …).

    Reference:
        Imagen (arXiv:2205.11487), section 2.3.
    """
    magnitude = jnp.abs(original).reshape(original.shape[0], -1)
    limit = expand(jnp.clip(jnp.quantile(magnitude, ratio, axis=1), 1, max_value), original)
    return jnp.clip(original, -limit, limit) / limit


def velocity(alphas_cumprod: Array, sample: Array, noise: Array, timesteps: ArrayLike) -> Array:
    """Return v = √ᾱ_t·ε − √(1 − ᾱ_t)·x0 in the dtype of `sample`.

    Args:
        alphas_cumprod: ᾱ of every training timestep, (T,).
        sample: Clean samples x0, (B, …).
        noise: Noise ε in the shape of x0.
        timesteps: Training timesteps, (B,) or a scalar.

    Reference:
        arXiv:2202.00512, appendix D.
    """
    x0, epsilon = at_least_float32(sample, noise)
    alpha_bar = expand(table_at(alphas_cumprod, timesteps), x0)
    return (jnp.sqrt(alpha_bar) * epsilon - jnp.sqrt(1 - alpha_bar) * x0).astype(sample.dtype)


def step_noise(key: Array | None, variance_noise: Array | None, like: Array, purpose: str) -> Array:
    """Return the noise of a stochastic step: the one given, or drawn from the key.

    Args:
        key: JAX PRNG key, a fresh one for every step; or None.
        variance_noise: The noise itself, or None.
        like: Array whose shape and dtype the noise takes.
        purpose: What needs the noise, for the error message.

    Raises:
        ConfigError: If neither or both are given, or the noise has another shape.
    """
    if (key is None) == (variance_noise is None):
        given = "neither" if key is None else "both"
        raise ConfigError(f"{purpose} needs noise: {given} of key and variance_noise given; pass exactly one to step()")
    if variance_noise is not None:
        if variance_noise.shape != like.shape:
            raise ConfigError(f"variance_noise has shape {variance_noise.shape}; it must be the sample's, {like.shape}")
        return variance_noise.astype(like.dtype)
    assert key is not None
    return jax.random.normal(key, like.shape, like.dtype)
