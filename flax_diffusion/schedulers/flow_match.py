"""Euler's method on the straight paths of flow matching (arXiv:2210.02747; as in arXiv:2403.03206)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.typed import Size
from flax_diffusion.schedulers import sigmas as levels
from flax_diffusion.schedulers.common import (
    FlaxScheduler,
    FlaxSchedulerOutput,
    at_least_float32,
    expand,
    step_noise,
    step_result,
    table_at,
)
from flax_diffusion.schedulers.timesteps import next_index, require_timesteps, schedule_index


class FlowMatchEulerDiscreteSchedulerState(struct.PyTreeNode):
    """State of `FlaxFlowMatchEulerDiscreteScheduler`.

    Attributes:
        init_noise_sigma: Standard deviation of the first sample, 1.
        timesteps: Times that the model is given, σ · `num_train_timesteps`, (steps,).
        sigmas: Share σ of noise at the timesteps and after the last, (steps + 1,).
        step_index: Place of the next step, int32; −1 before the first, which looks its timestep up.
        num_inference_steps: Number of steps; None before `set_timesteps`.
    """

    init_noise_sigma: Array
    timesteps: Array
    sigmas: Array
    step_index: Array
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class FlaxFlowMatchEulerDiscreteScheduler(FlaxScheduler):
    """Euler sampling of flow matching; the fields are the keys of PyTorch's `FlowMatchEulerDiscreteScheduler`.

    Samples are (1 − σ)·x0 + σ·ε with σ from 1 to 0, and the model predicts the velocity ε − x0.

    Args:
        num_train_timesteps: Number T of timesteps that the model was trained with.
        shift: Shift of σ towards noise, σ' = shift·σ / (1 + (shift − 1)·σ).
        use_dynamic_shifting: Shift by `mu` of `set_timesteps` instead, which grows with the size of the picture.
        base_shift: `mu` for `base_image_seq_len` tokens; for callers that compute `mu`.
        max_shift: `mu` for `max_image_seq_len` tokens; likewise.
        base_image_seq_len: See `base_shift`.
        max_image_seq_len: See `max_shift`.
        invert_sigmas: Count σ from 0 to 1, as Mochi does.
        shift_terminal: σ of the last timestep, to which the others are stretched; None stretches nothing.
        use_karras_sigmas: Space σ evenly in σ^(1/7).
        use_exponential_sigmas: Space σ evenly in log σ.
        use_beta_sigmas: Space σ by quantiles of a Beta distribution.
        time_shift_type: Form of the shift by `mu`.
        stochastic_sampling: Draw the next sample anew around the predicted x0, with noise in each step.
    """

    num_train_timesteps: Size = 1000
    _: dataclasses.KW_ONLY
    dtype: Any = jnp.float32
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: Size = 256
    max_image_seq_len: Size = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False

    torch_class_name = "FlowMatchEulerDiscreteScheduler"

    def _check_combination(self) -> None:
        names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        levels.check_one_spacing({name: getattr(self, name) for name in names})
        if not self.shift > 0:
            raise ConfigError(f"shift is {self.shift}; it must be greater than 0 (1 shifts nothing)")

    def _training_sigmas(self) -> np.ndarray:
        """Return σ of every training timestep, largest first, float32 (T,)."""
        total = np.float32(self.num_train_timesteps)
        sigmas = np.arange(self.num_train_timesteps, 0, -1, dtype=np.float32) / total
        return sigmas if self.use_dynamic_shifting else self._shift_sigmas(sigmas)

    def _shift_sigmas(self, sigmas: np.ndarray) -> np.ndarray:
        shift = np.asarray(self.shift, sigmas.dtype)
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    def create_state(self) -> FlowMatchEulerDiscreteSchedulerState:
        """Return the first state; see `FlaxScheduler`."""
        sigmas = self._training_sigmas()
        return self._state(sigmas, sigmas * np.float32(self.num_train_timesteps), None)

    def _state(
        self, sigmas: np.ndarray, timesteps: np.ndarray, count: int | None
    ) -> FlowMatchEulerDiscreteSchedulerState:
        last = np.float32(1 if self.invert_sigmas and count is not None else 0)
        return FlowMatchEulerDiscreteSchedulerState(
            init_noise_sigma=jnp.ones((), self.dtype),
            timesteps=jnp.asarray(timesteps, self.dtype),
            sigmas=jnp.asarray(np.append(sigmas, last), self.dtype),
            step_index=jnp.asarray(-1, jnp.int32),
            num_inference_steps=count,
        )

    def set_timesteps(
        self,
        state: FlowMatchEulerDiscreteSchedulerState,
        num_inference_steps: int | None = None,
        shape: tuple[int, ...] = (),
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> FlowMatchEulerDiscreteSchedulerState:
        """Return the state for a trajectory.

        Args:
            state: Any state of this scheduler.
            num_inference_steps: Number of steps; None takes the length of `sigmas` or `timesteps`.
            shape: Shape of the samples; not needed.
            sigmas: σ of each step before shifting, largest first; None spaces them evenly.
            timesteps: Times to give the model in place of σ · `num_train_timesteps`.
            mu: Shift for the size of the picture, needed with `use_dynamic_shifting`.

        Raises:
            ConfigError: If `mu` is missing, or the numbers of steps contradict each other.
        """
        del state, shape
        counts = {len(given) for given in (sigmas, timesteps) if given is not None}
        counts |= set() if num_inference_steps is None else {num_inference_steps}
        if len(counts) != 1 or min(counts) < 1:
            raise ConfigError(
                "num_inference_steps, sigmas and timesteps must say one number of steps, at least 1: they say "
                f"{', '.join(map(str, sorted(counts))) or 'none'}"
            )
        (count,) = counts
        if self.use_dynamic_shifting and mu is None:
            raise ConfigError("use_dynamic_shifting needs mu, which is None: pass set_timesteps(…, mu=…)")
        given_timesteps = None if timesteps is None else np.asarray(timesteps, np.float32)
        shifted = self._schedule(count, sigmas, given_timesteps, mu)
        total = np.float32(self.num_train_timesteps)
        if self.invert_sigmas:
            shifted = np.float32(1) - shifted
            given_timesteps = shifted * total
        return self._state(shifted, shifted * total if given_timesteps is None else given_timesteps, count)

    def _schedule(
        self, count: int, given: Sequence[float] | None, given_timesteps: np.ndarray | None, mu: float | None
    ) -> np.ndarray:
        """Return σ of each step of a trajectory, float32 (count,)."""
        total = self.num_train_timesteps
        if given is not None:
            sigmas = np.asarray(given, np.float32)
        elif given_timesteps is not None:
            sigmas = given_timesteps / total
        else:
            training = self._training_sigmas()
            sigmas = np.linspace(float(training[0]) * total, float(training[-1]) * total, count) / total
        if self.use_dynamic_shifting:
            assert mu is not None
            sigmas = self._shift_by_mu(mu, sigmas)
        else:
            sigmas = self._shift_sigmas(sigmas)
        if self.shift_terminal:
            rest = 1 - sigmas
            sigmas = 1 - rest / (rest[-1] / (1 - self.shift_terminal))
        high, low = float(sigmas[0]), float(sigmas[-1])
        if self.use_karras_sigmas:
            sigmas = levels.karras_sigmas(low, high, count)
        elif self.use_exponential_sigmas:
            sigmas = levels.exponential_sigmas(low, high, count)
        elif self.use_beta_sigmas:
            sigmas = levels.beta_sigmas(low, high, count)
        return sigmas.astype(np.float32)

    def _shift_by_mu(self, mu: float, sigmas: np.ndarray) -> np.ndarray:
        if self.time_shift_type == "exponential":
            return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))
        if self.time_shift_type == "linear":
            return mu / (mu + (1 / sigmas - 1))
        raise unknown("time_shift_type", self.time_shift_type, ("exponential", "linear"))

    def scale_model_input(
        self, state: FlowMatchEulerDiscreteSchedulerState, sample: Array, timestep: ArrayLike | None = None
    ) -> Array:
        """Return the sample unchanged; see `FlaxScheduler`."""
        del state, timestep
        return sample

    def step(
        self,
        state: FlowMatchEulerDiscreteSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        variance_noise: Array | None = None,
    ) -> FlaxSchedulerOutput[FlowMatchEulerDiscreteSchedulerState]:
        """Return the sample at the next σ; for arguments that are not named here see `FlaxScheduler`.

        Args:
            model_output: Velocity that the model predicts, (B, C, …).
            timestep: One of `state.timesteps`; may be traced. Read at the first step only, later ones are counted.
            sample: (1 − σ)·x0 + σ·ε, (B, C, …).
            key: PRNG key, needed with `stochastic_sampling` if `variance_noise` is not given.
        """
        require_timesteps(state.num_inference_steps)
        x, output = at_least_float32(sample, model_output)
        index = next_index(state.timesteps, state.step_index, timestep)
        sigma, sigma_next = table_at(state.sigmas, index), table_at(state.sigmas, index + 1)
        if self.stochastic_sampling:
            noise = step_noise(key, variance_noise, x, "stochastic_sampling")
            previous = (1 - sigma_next) * (x - sigma * output) + sigma_next * noise
        else:
            previous = x + (sigma_next - sigma) * output
        return step_result(previous, sample, state.replace(step_index=index + 1), return_dict)

    def scale_noise(
        self, state: FlowMatchEulerDiscreteSchedulerState, sample: Array, timestep: ArrayLike, noise: Array
    ) -> Array:
        """Return (1 − σ)·x0 + σ·ε: `add_noise` under PyTorch's name and with its order of arguments."""
        return self.add_noise(state, sample, noise, timestep)

    def add_noise(
        self, state: FlowMatchEulerDiscreteSchedulerState, original_samples: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return (1 − σ)·x0 + σ·ε for entries of `state.timesteps`; see `FlaxScheduler`."""
        x0, epsilon = at_least_float32(original_samples, noise)
        sigma = expand(table_at(state.sigmas, schedule_index(state.timesteps, timesteps)), x0)
        return (sigma * epsilon + (1 - sigma) * x0).astype(original_samples.dtype)

    def get_velocity(
        self, state: FlowMatchEulerDiscreteSchedulerState, sample: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return ε − x0, which is the same at all times; see `FlaxScheduler`."""
        del state, timesteps
        return noise - sample
