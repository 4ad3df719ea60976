"""Mathematics and state that the schedulers share.

Shapes: samples are (B, C, …) with any number of further axes; timesteps are scalars or (B,).
Precision: coefficients are in the tables' dtype; samples in half precision are computed in float32 and rounded once,
at the end, where PyTorch's classes round after every operation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.objectives import noise_schedule
from flax_diffusion.core.objectives.noise_schedule import PREDICTION_TYPES
from flax_diffusion.schedulers.config import BetaScheduleConfig, FlaxSchedulerConfig, read_config

State = TypeVar("State")


class CommonSchedulerState(struct.PyTreeNode):
    """The noise schedule on the device: β, α = 1 − β and ᾱ, each (T,)."""

    alphas: Array
    betas: Array
    alphas_cumprod: Array

    @classmethod
    def create(cls, scheduler: BetaScheduleConfig) -> CommonSchedulerState:
        """Return the tables of a scheduler, float32 values in the scheduler's dtype."""
        betas = noise_schedule.betas_from_config(scheduler.config)
        tables = (np.float32(1) - betas, betas, scheduler.numpy_alphas_cumprod())
        alphas, betas, bar = (jnp.asarray(table, scheduler.dtype) for table in tables)
        return cls(alphas=alphas, betas=betas, alphas_cumprod=bar)


class FlaxSchedulerOutput(NamedTuple, Generic[State]):
    """Result of a step.

    Args:
        prev_sample: the sample one step less noisy, the shape and dtype of the sample that went in.
        state: the scheduler state for the next step.
    """

    prev_sample: Array
    state: State


class FlaxScheduler(FlaxSchedulerConfig, ABC):
    """What can be done with every scheduler; the subclasses document their own arguments."""

    @abstractmethod
    def create_state(self) -> Any:
        """Return the state before `set_timesteps`; each scheduler has its own class."""

    @abstractmethod
    def set_timesteps(self, state: Any, num_inference_steps: int, shape: tuple[int, ...] = ()) -> Any:
        """Return the state for a trajectory of so many steps over samples of a shape."""

    @abstractmethod
    def scale_model_input(self, state: Any, sample: Array, timestep: ArrayLike) -> Array:
        """Return the sample as the model wants it."""

    @abstractmethod
    def step(
        self,
        state: Any,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        key: Array | None = None,
        variance_noise: Array | None = None,
        return_dict: bool = True,
    ) -> FlaxSchedulerOutput[Any]:
        """Return the next sample and state."""

    @abstractmethod
    def add_noise(self, state: Any, original_samples: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return samples with the noise of given timesteps."""

    @abstractmethod
    def get_velocity(self, state: Any, sample: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return the target of v-prediction."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: Any = jnp.float32,
    ) -> tuple[Self, Any]:
        """Return the scheduler of a saved configuration and its first state.

        Args:
            pretrained_model_name_or_path: folder, `scheduler_config.json` or Hub id.
            subfolder: folder inside it, "scheduler" in a pipeline.
            revision: branch, tag or commit of a Hub id.
            dtype: precision of the tables.

        Returns:
            (scheduler, state).

        Raises:
            ConfigError: as `read_config` and `from_config`.
        """
        scheduler = cls.from_config(read_config(pretrained_model_name_or_path, subfolder, revision), dtype)
        return scheduler, scheduler.create_state()


class BetaScheduler(BetaScheduleConfig, FlaxScheduler):
    """A scheduler of models that were trained by betas."""

    @abstractmethod
    def create_state(self, common: CommonSchedulerState | None = None) -> Any:
        """Return the state before `set_timesteps`; `common` is a noise schedule to share."""


class VariancePreservingScheduler(BetaScheduler):
    """A scheduler whose samples are x_t = √ᾱ_t·x0 + √(1 − ᾱ_t)·ε at the model's own timesteps."""

    def scale_model_input(self, state: Any, sample: Array, timestep: ArrayLike | None = None) -> Array:
        """Return the sample as the model wants it: unchanged."""
        del state, timestep
        return sample

    def add_noise(self, state: Any, original_samples: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return x_t = √ᾱ_t·x0 + √(1 − ᾱ_t)·ε.

        Args:
            state: any state of this scheduler.
            original_samples: x0, (B, …).
            noise: ε, the same shape.
            timesteps: (B,) or a scalar, in [0, T); the result is NaN past the end.

        Returns:
            x_t in the dtype of `original_samples`.

        Reference:
            DDPM equation 4.
        """
        x0, epsilon = working(original_samples, noise)
        bar = expand(table_at(state.common.alphas_cumprod, timesteps), x0)
        return (jnp.sqrt(bar) * x0 + jnp.sqrt(1 - bar) * epsilon).astype(original_samples.dtype)

    def get_velocity(self, state: Any, sample: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return v = √ᾱ_t·ε − √(1 − ᾱ_t)·x0; arguments as `add_noise` (arXiv:2202.00512, appendix D)."""
        return velocity(state.common.alphas_cumprod, sample, noise, timesteps)


def finish(prev_sample: Array, sample: Array, state: State, return_dict: bool) -> FlaxSchedulerOutput[State]:
    """Return the step's result in the sample's dtype, as a named or (`return_dict` false) a plain tuple."""
    output = FlaxSchedulerOutput(prev_sample.astype(sample.dtype), state)
    return output if return_dict else cast("FlaxSchedulerOutput[State]", tuple(output))


def working(*arrays: ArrayLike) -> tuple[Array, ...]:
    """Return the arrays in at least float32."""
    return tuple(jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32)) for a in arrays)


def expand(coefficient: Array, like: Array) -> Array:
    """Return a scalar or (B,) coefficient with axes of length 1 behind it, to multiply (B, …) with."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def table_at(table: Array, index: ArrayLike) -> Array:
    """Return `table[index]`, NaN past its end, where JAX would repeat the last entry and PyTorch raise."""
    return table.at[jnp.asarray(index)].get(mode="fill", fill_value=jnp.nan)


def previous_alpha_cumprod(alphas_cumprod: Array, previous: Array, final: ArrayLike) -> Array:
    """Return ᾱ at the previous timestep, `final` where that is below 0."""
    inside = table_at(alphas_cumprod, jnp.maximum(previous, 0))
    return jnp.where(previous >= 0, inside, jnp.asarray(final, alphas_cumprod.dtype))


def predict_original(prediction_type: str, output: Array, sample: Array, bar: Array) -> Array:
    """Return x0 from a model output.

    Args:
        prediction_type: "epsilon", "sample" or "v_prediction".
        output: what the model returned.
        sample: x_t.
        bar: ᾱ_t, broadcastable.

    Reference:
        DDPM equation 15; v: arXiv:2202.00512, appendix D.
    """
    if prediction_type == "epsilon":
        return (sample - jnp.sqrt(1 - bar) * output) / jnp.sqrt(bar)
    if prediction_type == "v_prediction":
        return jnp.sqrt(bar) * sample - jnp.sqrt(1 - bar) * output
    if prediction_type == "sample":
        return output
    raise unknown("prediction_type", prediction_type, PREDICTION_TYPES)


def predict_noise(prediction_type: str, output: Array, sample: Array, bar: Array) -> Array:
    """Return ε from a model output; arguments and reference as `predict_original`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return jnp.sqrt(bar) * output + jnp.sqrt(1 - bar) * sample
    if prediction_type == "sample":
        return (sample - jnp.sqrt(bar) * output) / jnp.sqrt(1 - bar)
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
        original: x0, (B, …).
        ratio: the quantile, in [0, 1].
        max_value: upper limit of s; 1 is its lower limit.

    Returns:
        x0 within [−1, 1].

    Reference:
        Imagen (arXiv:2205.11487), section 2.3.
    """
    magnitude = jnp.abs(original).reshape(original.shape[0], -1)
    limit = expand(jnp.clip(jnp.quantile(magnitude, ratio, axis=1), 1, max_value), original)
    return jnp.clip(original, -limit, limit) / limit


def velocity(alphas_cumprod: Array, sample: Array, noise: Array, timesteps: ArrayLike) -> Array:
    """Return v = √ᾱ_t·ε − √(1 − ᾱ_t)·x0 (arXiv:2202.00512, appendix D) in the dtype of `sample`."""
    x0, epsilon = working(sample, noise)
    bar = expand(table_at(alphas_cumprod, timesteps), x0)
    return (jnp.sqrt(bar) * epsilon - jnp.sqrt(1 - bar) * x0).astype(sample.dtype)


def step_noise(key: Array | None, variance_noise: Array | None, like: Array, why: str) -> Array:
    """Return the noise of a stochastic step: the one given, or drawn from the key.

    Args:
        key: JAX PRNG key, a fresh one for every step.
        variance_noise: the noise itself.
        like: array whose shape and dtype the noise has.
        why: what needs the noise, for the error message.

    Raises:
        ConfigError: neither or both given, or noise of another shape.
    """
    if (key is None) == (variance_noise is None):
        given = "neither" if key is None else "both"
        raise ConfigError(f"{why} needs noise: {given} of key and variance_noise given; pass exactly one to step()")
    if variance_noise is not None:
        if variance_noise.shape != like.shape:
            raise ConfigError(f"variance_noise has shape {variance_noise.shape}; it must be the sample's, {like.shape}")
        return variance_noise.astype(like.dtype)
    assert key is not None
    return jax.random.normal(key, like.shape, like.dtype)


def require_timesteps(prepared: State | None) -> State:
    """Return what `set_timesteps` prepares, or raise ConfigError where it has not been called."""
    if prepared is None:
        raise ConfigError("no timesteps are set; call set_timesteps(state, num_inference_steps, shape) before step()")
    return prepared


def check_shape(remembered: Array, sample: Array) -> None:
    """Raise ConfigError where the state was made for samples of another shape."""
    if remembered.shape != sample.shape:
        raise ConfigError(
            f"sample has shape {sample.shape} but set_timesteps was given {remembered.shape}; "
            "call set_timesteps(state, num_inference_steps, shape=sample.shape)"
        )


def schedule_index(schedule: Array, timestep: ArrayLike) -> Array:
    """Return where timesteps stand in a schedule.

    Args:
        schedule: (steps,), `state.timesteps`.
        timestep: a scalar or (B,), each an entry of `schedule`.

    Returns:
        int32, the shape of `timestep`. Where a timestep stands twice, the second place, so that a trajectory begun
        in the middle skips no level; but 0 for the first timestep, from which PyTorch's schedulers would run past
        their end. A place past the end, which `table_at` reads as NaN, where a traced timestep is not found.

    Raises:
        ConfigError: a timestep that is not traced is not in the schedule.

    Reference:
        `index_for_timestep` of the PyTorch schedulers.
    """
    t = jnp.asarray(timestep)
    match = schedule == t[..., None]
    again = match & (jnp.cumsum(match, axis=-1) == 2)
    place = jnp.where(again.any(-1) & ~match[..., 0], again.argmax(-1), match.argmax(-1))
    found = match.any(-1)
    if not isinstance(found, Tracer) and not bool(found.all()):
        raise ConfigError(f"timestep {np.asarray(t)} is not in the schedule; pass entries of state.timesteps")
    return jnp.where(found, place, np.iinfo(np.int32).max // 2).astype(jnp.int32)


def next_index(schedule: Array, step_index: Array, timestep: ArrayLike) -> Array:
    """Return the place of the coming step: looked up for the first step (`step_index` −1), counted after it."""
    if not isinstance(step_index, Tracer) and int(step_index) >= 0:
        return step_index
    return jnp.where(step_index < 0, schedule_index(schedule, timestep), step_index)


def check_inference_steps(num_inference_steps: int, num_train_timesteps: int) -> None:
    """Raise ConfigError unless 1 ≤ num_inference_steps ≤ num_train_timesteps."""
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ConfigError(
            f"num_inference_steps is {num_inference_steps}; it must lie between 1 and the model's "
            f"num_train_timesteps={num_train_timesteps}"
        )


def spaced_timesteps(spacing: str, count: int, num_train_timesteps: int, steps_offset: int) -> np.ndarray:
    """Return inference timesteps, largest first.

    Args:
        spacing: "linspace", "leading" or "trailing".
        count: number of inference steps.
        num_train_timesteps: T.
        steps_offset: added in "leading" spacing.

    Returns:
        int64 array (count,).

    Reference:
        arXiv:2305.08891, table 2.
    """
    if spacing == "linspace":
        ascending = np.linspace(0, num_train_timesteps - 1, count).round()
    elif spacing == "leading":
        ascending = np.arange(count) * (num_train_timesteps // count) + steps_offset
    elif spacing == "trailing":
        ascending = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / count))[::-1] - 1
    else:
        raise unknown("timestep_spacing", spacing, ("linspace", "leading", "trailing"))
    return ascending[::-1].astype(np.int64)
