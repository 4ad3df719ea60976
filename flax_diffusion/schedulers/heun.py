"""Heun's second-order method, for flow matching and for EDM (arXiv:2206.00364, algorithm 1).

A step from σ to σ' takes Euler's step, evaluates the model at its end, and repeats it with the mean of both slopes:

    x' = x + (σ' − σ)·d(x, σ)        x'' = x + (σ' − σ)·½·(d(x, σ) + d(x', σ'))

The last step, to σ = 0, is Euler's. So N steps evaluate the model 2·N − 1 times, and `step` is called as often: at even
places it takes the first half of a step, at odd ones the second.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError
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
from flax_diffusion.schedulers.edm_euler import FlaxEDMEulerScheduler
from flax_diffusion.schedulers.flow_match import FlaxFlowMatchEulerDiscreteScheduler
from flax_diffusion.schedulers.timesteps import check_shape, next_index, require_timesteps, schedule_index


class HeunState(struct.PyTreeNode):
    """State of a scheduler of Heun's method.

    Attributes:
        init_noise_sigma: Standard deviation of the first sample, a scalar.
        timesteps: Times that the model is given at each evaluation, (2·steps − 1,).
        sigmas: σ, where every level between the first and the last stands twice, (2·steps,).
        step_index: Place of the next evaluation, int32; −1 before the first, which looks its timestep up.
        sample: Sample that the step began with, (B, C, …); None before `set_timesteps`.
        slope: Slope there, in the same shape; None likewise.
        interval: Change of σ in the step, a scalar; None likewise.
        num_inference_steps: Number of steps; None before `set_timesteps`.
    """

    init_noise_sigma: Array
    timesteps: Array
    sigmas: Array
    step_index: Array
    sample: Array | None = None
    slope: Array | None = None
    interval: Array | None = None
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


def _evaluations(sigmas: Array, timesteps: Array) -> tuple[Array, Array]:
    """Return σ and timesteps of every evaluation.

    Args:
        sigmas: σ at the steps and after the last, (steps + 1,).
        timesteps: Timesteps of the steps, (steps,).
    """
    inner, later = jnp.repeat(sigmas[1:-1], 2), jnp.repeat(timesteps[1:], 2)
    return jnp.concatenate([sigmas[:1], inner, sigmas[-1:]]), jnp.concatenate([timesteps[:1], later])


def _levels(state: HeunState, index: Array) -> tuple[Array, Array, Array]:
    """Return whether an evaluation is the second of its step, and σ at the step's begin and end."""
    second = index % 2 == 1
    begin = index - second
    return second, table_at(state.sigmas, begin), table_at(state.sigmas, begin + 1)


def _advance(state: HeunState, index: Array, x: Array, slope: Array, interval: Array) -> tuple[Array, HeunState]:
    """Return the sample after an evaluation, and the state for the next one.

    Args:
        state: State from `set_timesteps`.
        index: Place of the evaluation.
        x: Sample, (B, C, …).
        slope: dx/dσ there, (B, C, …).
        interval: Change of σ that a first evaluation begins, a scalar.
    """
    assert state.sample is not None
    assert state.slope is not None
    assert state.interval is not None
    second = index % 2 == 1
    first_sample = jnp.where(second, state.sample.astype(x.dtype), x)
    used = jnp.where(second, 0.5 * (state.slope.astype(x.dtype) + slope), slope)
    over = jnp.where(second, state.interval, interval)
    state = state.replace(
        step_index=index + 1,
        sample=first_sample.astype(state.sample.dtype),
        slope=slope.astype(state.slope.dtype),
        interval=over.astype(state.interval.dtype),
    )
    return first_sample + over * used, state


@dataclasses.dataclass(frozen=True)
class FlaxFlowMatchHeunDiscreteScheduler(FlaxScheduler):
    """Heun sampling of flow matching; the fields are the keys of PyTorch's `FlowMatchHeunDiscreteScheduler`.

    Samples are (1 − σ)·x0 + σ·ε with σ from 1 to 0, and the model predicts the velocity ε − x0.

    Args:
        num_train_timesteps: Number T of timesteps that the model was trained with.
        shift: Shift of σ towards noise, σ' = shift·σ / (1 + (shift − 1)·σ).
    """

    num_train_timesteps: Size = 1000
    _: dataclasses.KW_ONLY
    dtype: Any = jnp.float32
    shift: float = 1.0

    torch_class_name = "FlowMatchHeunDiscreteScheduler"

    def _check_combination(self) -> None:
        if not self.shift > 0:
            raise ConfigError(f"shift is {self.shift}; it must be greater than 0 (1 shifts nothing)")

    @property
    def _euler(self) -> FlaxFlowMatchEulerDiscreteScheduler:
        """The method of first order with the same σ."""
        return FlaxFlowMatchEulerDiscreteScheduler(
            num_train_timesteps=self.num_train_timesteps, shift=self.shift, dtype=self.dtype
        )

    def create_state(self) -> HeunState:
        """Return the first state; see `FlaxScheduler`."""
        first = self._euler.create_state()
        return HeunState(
            init_noise_sigma=first.init_noise_sigma,
            timesteps=first.timesteps,
            sigmas=first.sigmas,
            step_index=first.step_index,
        )

    def set_timesteps(self, state: HeunState, num_inference_steps: int, shape: tuple[int, ...] = ()) -> HeunState:
        """Return the state for a trajectory; for arguments and errors that are not named here see `FlaxScheduler`.

        Args:
            num_inference_steps: Number of steps, of which each but the last evaluates the model twice.
            shape: Shape of the samples, of which the state remembers one and its slope.
        """
        euler = self._euler
        plain = euler.set_timesteps(euler.create_state(), num_inference_steps)
        return _set(state, plain.sigmas, plain.timesteps, shape, num_inference_steps, self.dtype)

    def scale_model_input(self, state: HeunState, sample: Array, timestep: ArrayLike | None = None) -> Array:
        """Return the sample unchanged; see `FlaxScheduler`."""
        del state, timestep
        return sample

    def step(
        self,
        state: HeunState,
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
    ) -> FlaxSchedulerOutput[HeunState]:
        """Return the sample after an evaluation; for arguments that are not named here see `FlaxScheduler`.

        Args:
            state: State from `set_timesteps` with the sample's shape.
            model_output: Velocity that the model predicts, (B, C, …).
            timestep: One of `state.timesteps`; may be traced. Read at the first step only, later ones are counted.
            sample: (1 − σ)·x0 + σ·ε, (B, C, …).
            key: PRNG key, needed if `s_churn` > 0 and `variance_noise` is not given.
            s_churn: Amount of noise added back over the trajectory.
            s_tmin: Smallest σ at which noise is added.
            s_tmax: Largest σ at which noise is added.
            s_noise: Standard deviation of that noise.
        """
        check_shape(require_timesteps(state.sample), sample)
        x, slope = at_least_float32(sample, model_output)
        index = next_index(state.timesteps, state.step_index, timestep)
        second, sigma, sigma_next = _levels(state, index)
        sigma_hat = sigma
        if s_churn > 0:
            noise = step_noise(key, variance_noise, x, f"Heun sampling with s_churn={s_churn}")
            most = min(s_churn / (state.sigmas.shape[0] - 1), math.sqrt(2) - 1)
            gamma = jnp.where((s_tmin <= sigma) & (sigma <= s_tmax), most, 0.0).astype(sigma.dtype)
            sigma_hat = sigma * (1 + gamma)
            x = x + noise * s_noise * sigma * jnp.sqrt(gamma * (gamma + 2))  # √(σ̂² − σ²), which may round below 0
            slope = jnp.where(second, slope, slope * sigma / sigma_hat)
        previous, state = _advance(state, index, x, slope, sigma_next - sigma_hat)
        return step_result(previous, sample, state, return_dict)

    def add_noise(self, state: HeunState, original_samples: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return (1 − σ)·x0 + σ·ε for entries of `state.timesteps`; see `FlaxScheduler`."""
        x0, epsilon = at_least_float32(original_samples, noise)
        sigma = expand(table_at(state.sigmas, schedule_index(state.timesteps, timesteps)), x0)
        return (sigma * epsilon + (1 - sigma) * x0).astype(original_samples.dtype)

    def get_velocity(self, state: HeunState, sample: Array, noise: Array, timesteps: ArrayLike) -> Array:
        """Return ε − x0, which is the same at all times; see `FlaxScheduler`."""
        del state, timesteps
        return noise - sample


@dataclasses.dataclass(frozen=True)
class FlaxEDMHeunScheduler(FlaxEDMEulerScheduler):
    """Deterministic Heun sampling of EDM, the method of its paper; for the fields see `FlaxEDMEulerScheduler`.

    Diffusers has no class for it; the twin is `torch_backend.schedulers.EDMHeunScheduler`.
    """

    torch_class_name = "EDMHeunScheduler"

    def create_state(self) -> HeunState:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the first state, over all training timesteps."""
        first = super().create_state()
        return HeunState(
            init_noise_sigma=first.init_noise_sigma,
            timesteps=first.timesteps,
            sigmas=first.sigmas,
            step_index=first.step_index,
        )

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: HeunState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> HeunState:
        """Return the state for a trajectory.

        Args:
            state: Any state of this scheduler.
            num_inference_steps: Steps to take, of which each but the last evaluates the model twice.
            shape: Of the samples, of which the state remembers one and its slope.

        Raises:
            ConfigError: No steps.
        """
        plain = super().set_timesteps(super().create_state(), num_inference_steps)
        return _set(state, plain.sigmas, plain.timesteps, shape, num_inference_steps, self.dtype)

    def scale_model_input(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: HeunState, sample: Array, timestep: ArrayLike
    ) -> Array:
        """Return the sample as the model wants it, c_in·sample; for arguments see `FlaxScheduler`."""
        (x,) = at_least_float32(sample)
        second, begin, end = _levels(state, next_index(state.timesteps, state.step_index, timestep))
        return (x / jnp.sqrt(jnp.where(second, end, begin) ** 2 + self.sigma_data**2)).astype(sample.dtype)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        state: HeunState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        variance_noise: Array | None = None,
    ) -> FlaxSchedulerOutput[HeunState]:
        """Return the sample after an evaluation; for errors see `FlaxScheduler`.

        Args:
            state: From `set_timesteps` with the sample's shape.
            model_output: F, (B, …).
            timestep: One of `state.timesteps`; may be traced. Read at the first step only, later ones are counted.
            sample: x0 + σ·ε, (B, …), before it was scaled.
            return_dict: A named tuple; else a plain one.
            key: Not used: no noise is added.
            variance_noise: Not used.
        """
        del key, variance_noise
        check_shape(require_timesteps(state.sample), sample)
        x, output = at_least_float32(sample, model_output)
        index = next_index(state.timesteps, state.step_index, timestep)
        second, begin, end = _levels(state, index)
        sigma = jnp.where(second, end, begin)
        slope = (x - self._denoised(x, output, sigma)) / sigma
        previous, state = _advance(state, index, x, slope, end - begin)
        return step_result(previous, sample, state, return_dict)


def _set(
    state: HeunState, sigmas: Array, timesteps: Array, shape: tuple[int, ...], count: int, dtype: Any
) -> HeunState:
    """Return the state for a trajectory of steps with given σ, (steps + 1,), and timesteps, (steps,)."""
    doubled, told = _evaluations(sigmas, timesteps)
    nothing = np.zeros(shape, dtype)
    return state.replace(
        timesteps=told,
        sigmas=doubled,
        step_index=jnp.asarray(-1, jnp.int32),
        sample=jnp.asarray(nothing),
        slope=jnp.asarray(nothing),
        interval=jnp.zeros((), dtype),
        num_inference_steps=count,
    )
