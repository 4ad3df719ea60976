"""Predictor and corrector of the variance-exploding SDE (arXiv:2011.13456)."""

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
from flax_diffusion.core.objectives.noise_schedule import linspace
from flax_diffusion.core.typed import Size
from flax_diffusion.schedulers.common import at_least_float32, expand, step_noise, table_at
from flax_diffusion.schedulers.mixin import FlaxSchedulerMixin
from flax_diffusion.schedulers.outputs import FlaxSdeVeOutput
from flax_diffusion.schedulers.timesteps import require_timesteps


class ScoreSdeVeSchedulerState(struct.PyTreeNode):
    """State of `FlaxScoreSdeVeScheduler`.

    Attributes:
        timesteps: Times from 1 down to `sampling_eps`, float32 (steps,).
        discrete_sigmas: Noise levels that `step_pred` uses, smallest first, (steps,).
        sigmas: Noise level at each of `timesteps`, (steps,).
    """

    timesteps: Array | None = None
    discrete_sigmas: Array | None = None
    sigmas: Array | None = None

    @classmethod
    def create(cls) -> ScoreSdeVeSchedulerState:
        """Return an empty state."""
        return cls()


@dataclasses.dataclass(frozen=True)
class FlaxScoreSdeVeScheduler(FlaxSchedulerMixin):
    """Sampling of variance-exploding score models; the fields are the keys of PyTorch's `ScoreSdeVeScheduler`.

    At each of `state.timesteps`, `step_correct` is called `correct_steps` times and then `step_pred`. The model returns
    the score, and is given the level of `state.sigmas`.

    Args:
        num_train_timesteps: Number of noise levels in training.
        snr: Ratio of signal to noise of a correction, which sets its size.
        sigma_min: Smallest σ.
        sigma_max: Largest σ.
        sampling_eps: Last time.
        correct_steps: Number of corrections before each prediction; for the loop that calls this class.
    """

    num_train_timesteps: Size = 2000
    snr: float = 0.15
    sigma_min: float = 0.01
    sigma_max: float = 1348.0
    sampling_eps: float = 1e-5
    correct_steps: int = 1
    _: dataclasses.KW_ONLY
    dtype: Any = jnp.float32

    torch_class_name = "ScoreSdeVeScheduler"

    def _check_combination(self) -> None:
        _check_levels(self.sigma_min, self.sigma_max)

    def __len__(self) -> int:
        return self.num_train_timesteps

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first sample, `sigma_max`."""
        return self.sigma_max

    def create_state(self) -> ScoreSdeVeSchedulerState:
        """Return the state over all training timesteps."""
        return self.set_sigmas(ScoreSdeVeSchedulerState(), self.num_train_timesteps)

    def set_timesteps(
        self,
        state: ScoreSdeVeSchedulerState,
        num_inference_steps: int,
        shape: tuple[int, ...] = (),
        sampling_eps: float | None = None,
    ) -> ScoreSdeVeSchedulerState:
        """Return the state with the times of a trajectory; `set_sigmas` then sets its noise levels.

        Args:
            state: Any state of this scheduler.
            num_inference_steps: Number of steps.
            shape: Shape of the samples; not needed.
            sampling_eps: Last time; None for the field's.

        Raises:
            ConfigError: If there is no step.
        """
        del shape
        if num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
        last = self.sampling_eps if sampling_eps is None else sampling_eps
        return state.replace(timesteps=jnp.asarray(linspace(1.0, last, num_inference_steps), jnp.float32))

    def set_sigmas(
        self,
        state: ScoreSdeVeSchedulerState,
        num_inference_steps: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sampling_eps: float | None = None,
    ) -> ScoreSdeVeSchedulerState:
        """Return the state with the noise levels of a trajectory.

        Args:
            state: State from `set_timesteps`; where it has no timesteps, they are set.
            num_inference_steps: Number of steps.
            sigma_min: Smallest σ; None for the field's.
            sigma_max: Largest σ; None for the field's.
            sampling_eps: Last time; None for the field's.

        Raises:
            ConfigError: If the levels are not above 0, the smaller first.
        """
        low = self.sigma_min if sigma_min is None else sigma_min
        high = self.sigma_max if sigma_max is None else sigma_max
        _check_levels(low, high)
        if state.timesteps is None:
            state = self.set_timesteps(state, num_inference_steps, sampling_eps=sampling_eps)
        times = np.asarray(require_timesteps(state.timesteps), np.float64)
        logs = linspace(math.log(low), math.log(high), num_inference_steps)
        return state.replace(
            discrete_sigmas=jnp.asarray(np.exp(logs.astype(np.float64)).astype(np.float32), self.dtype),
            sigmas=jnp.asarray((low * (high / low) ** times).astype(np.float32), self.dtype),
        )

    def get_adjacent_sigma(self, state: ScoreSdeVeSchedulerState, timesteps: ArrayLike, t: ArrayLike) -> Array:
        """Return the noise level one place below, and 0 below the first.

        Args:
            state: State from `set_sigmas`.
            timesteps: Places in `state.discrete_sigmas`, int32 (B,).
            t: The times; only their shape and dtype are read.
        """
        places = jnp.asarray(timesteps)
        below = table_at(require_timesteps(state.discrete_sigmas), jnp.maximum(places - 1, 0))
        return jnp.where(places == 0, jnp.zeros_like(t), below)

    def scale_model_input(
        self, state: ScoreSdeVeSchedulerState, sample: Array, timestep: ArrayLike | None = None
    ) -> Array:
        """Return the sample as the model wants it: unchanged."""
        del state, timestep
        return sample

    def step_pred(
        self,
        state: ScoreSdeVeSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        key: Array | None = None,
        return_dict: bool = True,
        *,
        variance_noise: Array | None = None,
    ) -> FlaxSdeVeOutput | tuple[Array, Array, ScoreSdeVeSchedulerState]:
        """Return the sample one step less noisy, by the reverse SDE.

        Args:
            state: State from `set_sigmas`.
            model_output: Score that the model predicts, (B, …).
            timestep: One of `state.timesteps`; may be traced.
            sample: Noisy sample, (B, …).
            key: PRNG key, a fresh one for every step.
            return_dict: Return a named tuple; False returns (`prev_sample`, `prev_sample_mean`, `state`).
            variance_noise: Noise of standard deviation 1 in the shape of `sample`, in place of `key`.

        Raises:
            ConfigError: If `set_timesteps` was not called, or neither or both of `key` and `variance_noise` are given.

        Reference:
            arXiv:2011.13456, equations 6 and 47.
        """
        times = require_timesteps(state.timesteps)
        x, output = at_least_float32(sample, model_output)
        t = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), sample.shape[:1])
        places = (t * (times.shape[0] - 1)).astype(jnp.int32)  # in float32, as PyTorch rounds it
        sigma = table_at(require_timesteps(state.discrete_sigmas), places)
        diffusion = expand(jnp.sqrt(sigma**2 - self.get_adjacent_sigma(state, places, sigma) ** 2), x)
        noise = step_noise(key, variance_noise, x, "step_pred")
        mean = x + diffusion**2 * output
        previous = (mean + diffusion * noise).astype(sample.dtype)
        result = FlaxSdeVeOutput(previous, state, mean.astype(sample.dtype))
        return result if return_dict else (previous, mean.astype(sample.dtype), state)

    def step_correct(
        self,
        state: ScoreSdeVeSchedulerState,
        model_output: Array,
        sample: Array,
        key: Array | None = None,
        return_dict: bool = True,
        *,
        variance_noise: Array | None = None,
    ) -> FlaxSdeVeOutput | tuple[Array, ScoreSdeVeSchedulerState]:
        """Return the sample moved by one step of Langevin's dynamics at its noise level.

        Args:
            state: State from `set_timesteps`.
            model_output: Score that the model predicts for `sample`, (B, …).
            sample: Noisy sample, (B, …).
            key: PRNG key, a fresh one for every step.
            return_dict: Return a named tuple; False returns (`prev_sample`, `state`).
            variance_noise: Noise of standard deviation 1 in the shape of `sample`, in place of `key`.

        Raises:
            ConfigError: If `set_timesteps` was not called, or neither or both of `key` and `variance_noise` are given.

        Reference:
            arXiv:2011.13456, algorithm 4. As in PyTorch's class, norms are means over the batch; Diffusers' Flax class
            took them over the whole of it.
        """
        require_timesteps(state.timesteps)
        x, output = at_least_float32(sample, model_output)
        noise = step_noise(key, variance_noise, x, "step_correct")
        size = 2 * (self.snr * _mean_norm(noise) / _mean_norm(output)) ** 2
        previous = (x + size * output + jnp.sqrt(2 * size) * noise).astype(sample.dtype)
        return FlaxSdeVeOutput(previous, state) if return_dict else (previous, state)

    def add_noise(
        self, state: ScoreSdeVeSchedulerState, original_samples: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return x0 + σ·ε.

        Args:
            state: State from `create_state` or `set_sigmas`.
            original_samples: Clean samples x0, (B, …).
            noise: Noise ε in the shape of x0.
            timesteps: Places in `state.discrete_sigmas`, (B,) or a scalar; past the end, the result is NaN.

        Returns:
            The noisy samples in the shape and dtype of `original_samples`.
        """
        x0, epsilon = at_least_float32(original_samples, noise)
        sigma = expand(table_at(require_timesteps(state.discrete_sigmas), timesteps), x0)
        return (x0 + sigma * epsilon).astype(original_samples.dtype)


def _mean_norm(array: Array) -> Array:
    """Return the mean over the batch of the 2-norm of each example."""
    return jnp.sqrt((array.reshape(array.shape[0], -1) ** 2).sum(-1)).mean()


def _check_levels(low: float, high: float) -> None:
    """Raise ConfigError unless 0 < low < high."""
    if not 0 < low < high:
        raise ConfigError(
            f"sigma_min is {low} and sigma_max {high}; they must be above 0, and the first the smaller (0.01 and 1348 "
            "are usual)"
        )
