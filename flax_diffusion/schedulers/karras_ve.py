"""Stochastic sampling of variance-exploding models (arXiv:2206.00364, algorithm 2, with the VE column of table 1)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.schedulers.common import at_least_float32, step_noise
from flax_diffusion.schedulers.mixin import FlaxSchedulerMixin
from flax_diffusion.schedulers.outputs import FlaxKarrasVeOutput
from flax_diffusion.schedulers.timesteps import require_timesteps


class KarrasVeSchedulerState(struct.PyTreeNode):
    """State of `FlaxKarrasVeScheduler`.

    Attributes:
        timesteps: Places in `schedule`, largest first, int32 (steps,); None before `set_timesteps`.
        schedule: σ² of VE models, smallest first, which Diffusers' pipelines take as their levels, (steps,); None
            likewise.
        num_inference_steps: Number of steps; None before `set_timesteps`.
    """

    timesteps: Array | None = None
    schedule: Array | None = None
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def create(cls) -> KarrasVeSchedulerState:
        """Return the state before `set_timesteps`."""
        return cls()


@dataclasses.dataclass(frozen=True)
class FlaxKarrasVeScheduler(FlaxSchedulerMixin):
    """Second-order sampling of VE models, with noise; the fields are the keys of PyTorch's `KarrasVeScheduler`.

    A step is: `add_noise_to_input`, the model, `step`; and unless the next σ is 0 the model again, and `step_correct`.
    The model returns the derivative of the sample by σ with the other sign.

    Args:
        sigma_min: Smallest σ.
        sigma_max: Largest σ.
        s_noise: Standard deviation of the noise that is added.
        s_churn: Amount of noise added over the trajectory.
        s_min: Smallest σ at which noise is added.
        s_max: Largest σ at which noise is added.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    s_noise: float = 1.007
    s_churn: float = 80.0
    s_min: float = 0.05
    s_max: float = 50.0
    _: dataclasses.KW_ONLY
    dtype: Any = jnp.float32

    torch_class_name = "KarrasVeScheduler"

    def _check_combination(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigError(
                f"sigma_min is {self.sigma_min} and sigma_max {self.sigma_max}; they must be above 0, and the first "
                "the smaller (0.02 and 100 are usual)"
            )

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first sample, `sigma_max`."""
        return self.sigma_max

    def create_state(self) -> KarrasVeSchedulerState:
        """Return the state before `set_timesteps`."""
        return KarrasVeSchedulerState()

    def set_timesteps(
        self, state: KarrasVeSchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> KarrasVeSchedulerState:
        """Return the state for a trajectory.

        Args:
            state: Any state of this scheduler.
            num_inference_steps: Number of steps.
            shape: Shape of the samples; not needed.

        Raises:
            ConfigError: If there are fewer than two steps.
        """
        del shape
        if num_inference_steps < 2:
            raise ConfigError(f"num_inference_steps is {num_inference_steps}; the levels of KarrasVe need at least 2")
        timesteps = np.arange(num_inference_steps)[::-1]
        low, high = self.sigma_min**2, self.sigma_max**2
        schedule = high * (low / high) ** (timesteps / (num_inference_steps - 1))
        return state.replace(
            timesteps=jnp.asarray(timesteps, jnp.int32),
            schedule=jnp.asarray(schedule.astype(np.float32), self.dtype),
            num_inference_steps=num_inference_steps,
        )

    def scale_model_input(
        self, state: KarrasVeSchedulerState, sample: Array, timestep: ArrayLike | None = None
    ) -> Array:
        """Return the sample as the model wants it: unchanged."""
        del state, timestep
        return sample

    def add_noise_to_input(
        self,
        state: KarrasVeSchedulerState,
        sample: Array,
        sigma: ArrayLike,
        key: Array | None = None,
        *,
        variance_noise: Array | None = None,
    ) -> tuple[Array, Array]:
        """Return the sample with noise added, and its level σ̂ = σ + γ·σ.

        Args:
            state: State from `set_timesteps`.
            sample: Sample at the level `sigma`, (B, …).
            sigma: The level, a scalar; may be traced.
            key: PRNG key, a fresh one for every step.
            variance_noise: Noise of standard deviation 1 in the shape of `sample`, in place of `key`.

        Raises:
            ConfigError: If `set_timesteps` was not called, or neither or both of `key` and `variance_noise` are given.

        Reference:
            arXiv:2206.00364, algorithm 2, lines 4 to 6.
        """
        steps = require_timesteps(state.num_inference_steps)
        x, level = at_least_float32(sample, sigma)
        noise = self.s_noise * step_noise(key, variance_noise, x, "add_noise_to_input")
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1)
        inside = (self.s_min <= level) & (level <= self.s_max)
        level_hat = level + jnp.where(inside, gamma, 0).astype(level.dtype) * level
        return (x + jnp.sqrt(level_hat**2 - level**2) * noise).astype(sample.dtype), level_hat

    def step(
        self,
        state: KarrasVeSchedulerState,
        model_output: Array,
        sigma_hat: ArrayLike,
        sigma_prev: ArrayLike,
        sample_hat: Array,
        return_dict: bool = True,
    ) -> FlaxKarrasVeOutput | tuple[Array, Array, KarrasVeSchedulerState]:
        """Return the sample at the next level by Euler's method.

        Args:
            state: State from `set_timesteps`.
            model_output: Output of the model for `sample_hat`, (B, …).
            sigma_hat: Level of `sample_hat`.
            sigma_prev: Next level.
            sample_hat: Sample from `add_noise_to_input`, (B, …).
            return_dict: Return a named tuple; False returns a plain one.

        Returns:
            The sample, the derivative by σ, in its shape and dtype, and the state.

        Reference:
            arXiv:2206.00364, algorithm 2, lines 7 and 8.
        """
        x, output, high, low = at_least_float32(sample_hat, model_output, sigma_hat, sigma_prev)
        derivative = -output
        previous = x + (low - high) * derivative
        return self._result(previous, derivative, state, sample_hat, return_dict)

    def step_correct(
        self,
        state: KarrasVeSchedulerState,
        model_output: Array,
        sigma_hat: ArrayLike,
        sigma_prev: ArrayLike,
        sample_hat: Array,
        sample_prev: Array,
        derivative: Array,
        return_dict: bool = True,
    ) -> FlaxKarrasVeOutput | tuple[Array, Array, KarrasVeSchedulerState]:
        """Return the sample at the next level by the mean of the derivatives at both ends.

        Args:
            state: State from `set_timesteps`.
            model_output: Output of the model for `sample_prev`, (B, …).
            sigma_hat: Level of `sample_hat`.
            sigma_prev: Next level.
            sample_hat: Sample that `step` was given, (B, …).
            sample_prev: Sample that `step` returned, (B, …); not read, since the model's output says its derivative.
            derivative: Derivative that `step` returned, (B, …).
            return_dict: Return a named tuple; False returns a plain one.

        Returns:
            The sample, the derivative as it was given, and the state.

        Reference:
            arXiv:2206.00364, algorithm 2, lines 10 and 11.
        """
        del sample_prev
        x, output, high, low, slope = at_least_float32(sample_hat, model_output, sigma_hat, sigma_prev, derivative)
        previous = x + (low - high) * (0.5 * slope - 0.5 * output)
        return self._result(previous, slope, state, sample_hat, return_dict)

    def _result(
        self, previous: Array, derivative: Array, state: KarrasVeSchedulerState, like: Array, return_dict: bool
    ) -> FlaxKarrasVeOutput | tuple[Array, Array, KarrasVeSchedulerState]:
        output = FlaxKarrasVeOutput(previous.astype(like.dtype), derivative.astype(like.dtype), state)
        return output if return_dict else (output.prev_sample, output.derivative, output.state)

    def add_noise(
        self, state: KarrasVeSchedulerState, original_samples: Array, noise: Array, timesteps: ArrayLike
    ) -> NoReturn:
        """Raise ConfigError: this scheduler has no schedule of training, as in Diffusers."""
        del state, original_samples, noise, timesteps
        raise ConfigError("FlaxKarrasVeScheduler has no add_noise: add σ·noise to the sample for the σ that you train")
