"""Linear multistep in the noise level: Adams and Bashforth's method on the probability-flow ODE in σ.

A step adds the integral, over the interval of σ, of the polynomial through the newest derivatives. These enter it with
weights that depend on the noise levels only: `set_timesteps` computes them for every step and every order in float64,
and `step` picks a row, so it can be traced.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.schedulers import sigmas as levels
from flax_diffusion.schedulers.common import (
    CommonSchedulerState,
    FlaxSchedulerOutput,
    at_least_float32,
    step_result,
    table_at,
)
from flax_diffusion.schedulers.timesteps import check_inference_steps, check_shape, next_index, require_timesteps
from flax_diffusion.schedulers.variance_exploding import VarianceExplodingScheduler

_HIGHEST_ORDER = 4


class LMSDiscreteSchedulerState(struct.PyTreeNode):
    """State of `FlaxLMSDiscreteScheduler`.

    Attributes:
        common: Noise schedule.
        init_noise_sigma: Standard deviation of the first sample, a scalar.
        timesteps: Fractional timesteps, largest first, (steps,).
        sigmas: Noise levels at the timesteps and after the last, (steps + 1,).
        step_index: Place of the next step, int32; −1 before the first, which looks its timestep up.
        coefficients: Weights of the derivatives from newest to oldest, of every order and step, (4, steps, 4); None
            before `set_timesteps`.
        derivatives: Derivatives of the last three steps, newest first, (3, B, C, …); None likewise.
        steps_taken: Number of steps taken, int32; None likewise.
        num_inference_steps: Number of steps; None before `set_timesteps`.
    """

    common: CommonSchedulerState
    init_noise_sigma: Array
    timesteps: Array
    sigmas: Array
    step_index: Array
    coefficients: Array | None = None
    derivatives: Array | None = None
    steps_taken: Array | None = None
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class FlaxLMSDiscreteScheduler(VarianceExplodingScheduler):
    """Linear multistep sampling in noise levels; the fields are the keys of PyTorch's `LMSDiscreteScheduler`.

    Samples are x0 + σ·ε; `scale_model_input` brings them to the variance the model was trained with. For the fields see
    `BetaScheduler`.
    """

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    dtype: Any = jnp.float32

    torch_class_name = "LMSDiscreteScheduler"

    def create_state(self, common: CommonSchedulerState | None = None) -> LMSDiscreteSchedulerState:
        """Return the first state; see `BetaScheduler`."""
        sigmas = np.append(levels.training_sigmas(self.numpy_alphas_cumprod())[::-1], np.float32(0))
        return LMSDiscreteSchedulerState(
            common=CommonSchedulerState.create(self) if common is None else common,
            init_noise_sigma=self._init_noise_sigma(sigmas),
            timesteps=jnp.arange(self.num_train_timesteps - 1, -1, -1, dtype=self.dtype),
            sigmas=jnp.asarray(sigmas, self.dtype),
            step_index=jnp.asarray(-1, jnp.int32),
        )

    def set_timesteps(
        self, state: LMSDiscreteSchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> LMSDiscreteSchedulerState:
        """Return the state for a trajectory; for arguments and errors that are not named here see `FlaxScheduler`.

        Args:
            shape: Shape of the samples, whose derivatives the state remembers.
        """
        check_inference_steps(num_inference_steps, self.num_train_timesteps)
        training = levels.training_sigmas(self.numpy_alphas_cumprod())
        timesteps = self._spaced_timesteps(num_inference_steps)
        sigmas = np.interp(timesteps, np.arange(len(training)), training)
        timesteps, sigmas = self._respaced(timesteps, sigmas, float(sigmas[-1]), float(sigmas[0]), np.log(training))
        sigmas = np.append(sigmas, 0).astype(np.float32)
        return state.replace(
            init_noise_sigma=self._init_noise_sigma(sigmas),
            timesteps=jnp.asarray(timesteps.astype(np.float32), self.dtype),
            sigmas=jnp.asarray(sigmas, self.dtype),
            step_index=jnp.asarray(-1, jnp.int32),
            coefficients=jnp.asarray(_coefficients(sigmas), self.dtype),
            derivatives=jnp.zeros((_HIGHEST_ORDER - 1, *shape), self.dtype),
            steps_taken=jnp.asarray(0, jnp.int32),
            num_inference_steps=num_inference_steps,
        )

    def get_lms_coefficient(self, state: LMSDiscreteSchedulerState, order: int, t: int, current_order: int) -> float:
        """Return the weight of one derivative in a step.

        Args:
            state: State from `set_timesteps`; not traced.
            order: Order of the step, the number of derivatives in it.
            t: Place of the step in the schedule, at least `order` − 1.
            current_order: Age of the derivative in steps; 0 is the newest.
        """
        return float(_integrals(np.asarray(state.sigmas, np.float64), order, np.array([t]), current_order)[0])

    def step(
        self,
        state: LMSDiscreteSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        order: int = _HIGHEST_ORDER,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        variance_noise: Array | None = None,
    ) -> FlaxSchedulerOutput[LMSDiscreteSchedulerState]:
        """Return the sample at the next noise level; for arguments that are not named here see `FlaxScheduler`.

        The order rises with the steps that were taken. From a start in the middle of the schedule PyTorch's class takes
        the weights of order 4 at once, with derivatives missing; that is not followed here.

        Args:
            state: State from `set_timesteps` with the sample's shape.
            model_output: Output of the model for the scaled input, (B, C, …).
            timestep: One of `state.timesteps`; may be traced. Read at the first step only, later ones are counted.
            sample: Unscaled sample x0 + σ·ε, (B, C, …).
            order: Highest order: 1 to 4.
            key: Not used, since the method is deterministic; accepted so that all schedulers are called alike.
            variance_noise: Not used, likewise.

        Raises:
            ConfigError: If `set_timesteps` was not called, or was called for another shape, or `order` is out of range.
        """
        del key, variance_noise
        remembered = require_timesteps(state.derivatives)
        assert state.coefficients is not None
        assert state.steps_taken is not None
        check_shape(remembered[0], sample)
        if not 1 <= order <= _HIGHEST_ORDER:
            raise ConfigError(f"order is {order}; it must lie between 1 and {_HIGHEST_ORDER}")
        x, output = at_least_float32(sample, model_output)
        index = next_index(state.timesteps, state.step_index, timestep)
        sigma = table_at(state.sigmas, index)
        slope = self._slope(output, x, sigma, sigma)
        row = jnp.minimum(state.steps_taken + 1, order) - 1
        weights = state.coefficients[row].at[index].get(mode="fill", fill_value=jnp.nan)
        previous = x + weights[0] * slope
        for age in range(1, _HIGHEST_ORDER):
            previous = previous + weights[age] * remembered[age - 1]
        state = state.replace(
            step_index=index + 1,
            derivatives=jnp.concatenate([slope[None].astype(remembered.dtype), remembered[:-1]]),
            steps_taken=state.steps_taken + 1,
        )
        return step_result(previous, sample, state, return_dict)


def _coefficients(sigmas: np.ndarray) -> np.ndarray:
    """Return the weights of every order, step and derivative, float64 (4, steps, 4).

    Derivatives that an order does not have get 0; steps that are too early for an order get NaN.

    Args:
        sigmas: Noise levels at the steps and after the last, (steps + 1,).
    """
    steps = np.arange(len(sigmas) - 1)
    table = np.zeros((_HIGHEST_ORDER, len(steps), _HIGHEST_ORDER))
    for order in range(1, _HIGHEST_ORDER + 1):
        table[order - 1, : order - 1] = np.nan
        late = steps[order - 1 :]
        for age in range(order):
            table[order - 1, late, age] = _integrals(sigmas.astype(np.float64), order, late, age)
    return table


def _integrals(sigmas: np.ndarray, order: int, step: np.ndarray, age: int) -> np.ndarray:
    """Return ∫ Π_{k≠age} (τ − σ_{step−k}) / (σ_{step−age} − σ_{step−k}) dτ from σ_step to σ_{step+1}.

    Args:
        sigmas: Noise levels, float64 (steps + 1,).
        order: Number of factors k, and one.
        step: Places of the steps, (n,), at least `order` − 1.
        age: See the formula.
    """
    nodes, weights = np.polynomial.legendre.leggauss(order)  # exact for polynomials up to degree 2·order − 1
    half = (sigmas[step + 1] - sigmas[step]) / 2
    tau = sigmas[step] + half * (nodes[:, None] + 1)
    basis = np.ones_like(tau)
    for k in range(order):
        if k != age:
            basis *= (tau - sigmas[step - k]) / (sigmas[step - age] - sigmas[step - k])
    return half * (weights[:, None] * basis).sum(0)
