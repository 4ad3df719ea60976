"""DPM-Solver and DPM-Solver++, multistep (arXiv:2206.00927, arXiv:2211.01095).

Every update is linear in the sample, the converted model outputs of this and the two steps before, and the noise.
`set_timesteps` computes these five coefficients for each step and each order in float64; `step` picks a row.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.objectives.noise_schedule import PREDICTION_TYPES, timesteps_with_signal
from flax_diffusion.schedulers import sigmas as levels
from flax_diffusion.schedulers.common import (
    BetaScheduler,
    CommonSchedulerState,
    FlaxSchedulerOutput,
    at_least_float32,
    dynamic_threshold,
    expand,
    step_noise,
    step_result,
    table_at,
    velocity,
)
from flax_diffusion.schedulers.dpm_coefficients import alpha_sigma, update_coefficients
from flax_diffusion.schedulers.dpm_memory import SolverState, remembering, solver_state
from flax_diffusion.schedulers.timesteps import (
    check_inference_steps,
    check_shape,
    next_index,
    require_timesteps,
    schedule_index,
)


class DPMSolverMultistepSchedulerState(struct.PyTreeNode):
    """State of `FlaxDPMSolverMultistepScheduler`.

    Attributes:
        common: Noise schedule.
        init_noise_sigma: Standard deviation of the first sample, a scalar.
        timesteps: Timesteps, largest first, int32 (steps,).
        sigmas: Noise levels at the timesteps and after the last, (steps + 1,).
        step_index: Place of the next step, int32; −1 before the first, which looks its timestep up.
        solver: Method and memory; None before `set_timesteps`.
        num_inference_steps: Number of steps; None before `set_timesteps`.
    """

    common: CommonSchedulerState
    init_noise_sigma: Array
    timesteps: Array
    sigmas: Array
    step_index: Array
    solver: SolverState | None = None
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class FlaxDPMSolverMultistepScheduler(BetaScheduler):
    """Fast multistep ODE and SDE solvers; the fields are the keys of PyTorch's `DPMSolverMultistepScheduler`.

    For fields that are not named here see `BetaScheduler`.

    Args:
        solver_order: Highest order: 1, 2 or 3.
        prediction_type: What the model predicts; "flow_prediction" goes with `use_flow_sigmas`.
        algorithm_type: "++" integrates the predicted x0, the others the predicted noise; "sde-" adds noise.
        solver_type: Form of the second-order term.
        lower_order_final: End trajectories of fewer than 15 steps with orders 2 and 1.
        euler_at_final: End with order 1.
        use_lu_lambdas: Space the noise levels evenly in λ = log α − log σ.
        use_flow_sigmas: Use the noise levels of flow matching, x = (1 − σ)·x0 + σ·ε.
        flow_shift: Shift of these.
        lambda_min_clipped: Smallest λ to start from; −5.1 suits squaredcos_cap_v2.
        variance_type: "learned" and "learned_range" models return twice the channels; the second half is dropped.
        use_dynamic_shifting: Allow `set_timesteps` to be given µ, for a flow shift of e^µ.
        time_shift_type: Form of that shift.
    """

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    solver_order: int = 2
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    dtype: Any = jnp.float32
    _: dataclasses.KW_ONLY
    steps_offset: int = 0
    euler_at_final: bool = False
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    use_flow_sigmas: bool | None = False
    flow_shift: float = 1.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: Literal["learned", "learned_range"] | None = None
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential"] = "exponential"

    torch_class_name = "DPMSolverMultistepScheduler"
    smallest_alpha_cumprod = 2**-24
    replaced_values = {  # noqa: RUF012
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
        # Of DDPM; PyTorch's class reads none of them.
        "variance_type": dict.fromkeys(("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")),
    }

    @classmethod
    def present_values(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return a configuration whose last noise level is said.

        "dpmsolver" cannot end at σ = 0. Diffusers ended at timestep 0 until releases had `final_sigmas_type`, and its
        Flax class always did.
        """
        without_zero = given.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver")
        return {"final_sigmas_type": "sigma_min"} | given if without_zero else given

    def __post_init__(self) -> None:
        if "final_sigmas_type" not in getattr(self, "_given"):  # noqa: B009
            values = self.present_values({"algorithm_type": self.algorithm_type})
            object.__setattr__(self, "final_sigmas_type", values.get("final_sigmas_type", self.final_sigmas_type))
        super().__post_init__()

    def _check_combination(self) -> None:
        spacings = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas", "flow_sigmas")
        levels.check_one_spacing({f"use_{name}": getattr(self, f"use_{name}") for name in spacings})
        data_prediction = self.algorithm_type.endswith("++")
        if not 1 <= self.solver_order <= 3:
            raise ConfigError(f"solver_order is {self.solver_order}; it must be 1, 2 or 3")
        if self.algorithm_type == "sde-dpmsolver" and self.solver_order == 3:
            raise ConfigError("algorithm_type 'sde-dpmsolver' has no solver_order 3; use order 2 or 'sde-dpmsolver++'")
        if not data_prediction and self.final_sigmas_type == "zero":
            raise ConfigError(
                f"final_sigmas_type 'zero' does not go with algorithm_type {self.algorithm_type!r}; use 'sigma_min'"
            )
        if self.prediction_type == "flow_prediction" and not (data_prediction and self.use_flow_sigmas):
            raise ConfigError(
                "prediction_type 'flow_prediction' needs use_flow_sigmas and algorithm_type 'dpmsolver++' or "
                f"'sde-dpmsolver++'; got use_flow_sigmas={self.use_flow_sigmas}, {self.algorithm_type!r}"
            )
        timesteps_with_signal(self.numpy_alphas_cumprod(), self.lambda_min_clipped)

    def create_state(self, common: CommonSchedulerState | None = None) -> DPMSolverMultistepSchedulerState:
        """Return the first state; see `BetaScheduler`."""
        training = levels.training_sigmas(self.numpy_alphas_cumprod())
        return DPMSolverMultistepSchedulerState(
            common=CommonSchedulerState.create(self) if common is None else common,
            init_noise_sigma=jnp.asarray(1.0, self.dtype),
            timesteps=jnp.arange(self.num_train_timesteps - 1, -1, -1, dtype=jnp.int32),
            sigmas=jnp.asarray(np.append(training[::-1], np.float32(0)), self.dtype),
            step_index=jnp.asarray(-1, jnp.int32),
        )

    def set_timesteps(
        self,
        state: DPMSolverMultistepSchedulerState,
        num_inference_steps: int,
        shape: tuple[int, ...] = (),
        *,
        mu: float | None = None,
    ) -> DPMSolverMultistepSchedulerState:
        """Return the state for a trajectory; for arguments and errors that are not named here see `FlaxScheduler`.

        Args:
            num_inference_steps: Number of steps; "trailing" with `lambda_min_clipped` may give fewer.
            shape: Shape of the samples, whose model outputs the state remembers.
            mu: µ of the flow shift e^µ, with `use_dynamic_shifting`.

        Raises:
            ConfigError: If `mu` is given where it has no effect.
        """
        check_inference_steps(num_inference_steps, self.num_train_timesteps)
        if mu is not None and not (self.use_dynamic_shifting and self.use_flow_sigmas):
            raise ConfigError(
                f"mu is {mu}; it needs use_dynamic_shifting and use_flow_sigmas: set both or leave mu out"
            )
        shift = self.flow_shift if mu is None else math.exp(mu)
        timesteps, sigmas = self._schedule(num_inference_steps, shift)
        steps = len(timesteps)
        alpha, sigma = alpha_sigma(sigmas.astype(np.float64), self.use_flow_sigmas)
        coefficients = update_coefficients(alpha, sigma, self.algorithm_type, self.solver_type, self.solver_order)
        return state.replace(
            timesteps=jnp.asarray(timesteps, jnp.int32),
            sigmas=jnp.asarray(sigmas, self.dtype),
            step_index=jnp.asarray(-1, jnp.int32),
            solver=solver_state(coefficients, self, shape),
            num_inference_steps=steps,
        )

    def _schedule(self, count: int, flow_shift: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the timesteps, int64 (steps,), and the noise levels, float32 (steps + 1,)."""
        training = levels.training_sigmas(self.numpy_alphas_cumprod())
        log_training = np.log(training)
        low, high = float(training[0]), float(training[-1])
        last = levels.sigma_after_last(self.final_sigmas_type, training)
        if self.use_flow_sigmas:
            plain = 1.0 - np.linspace(1, 1 / self.num_train_timesteps, count + 1)
            sigmas = (flow_shift * plain / (1 + (flow_shift - 1) * plain))[::-1][:-1]
            timesteps = sigmas * self.num_train_timesteps
        else:
            if self.use_karras_sigmas:
                sigmas = levels.karras_sigmas(low, high, count)
            elif self.use_lu_lambdas:
                ramp = np.linspace(0, 1, count)
                sigmas = np.exp(log_training[-1].item() + ramp * (log_training[0].item() - log_training[-1].item()))
            elif self.use_exponential_sigmas:
                sigmas = levels.exponential_sigmas(low, high, count)
            elif self.use_beta_sigmas:
                sigmas = levels.beta_sigmas(low, high, count)
            else:
                timesteps = self._spaced_timesteps(count)
                sigmas = np.interp(timesteps, np.arange(len(training)), training)
                return timesteps, np.append(sigmas, last).astype(np.float32)
            timesteps = levels.sigma_to_timestep(sigmas, log_training)
            rounded = self.use_karras_sigmas or self.use_lu_lambdas
            if rounded and self.beta_schedule != "squaredcos_cap_v2":
                timesteps = timesteps.round()
        return timesteps.astype(np.int64), np.append(sigmas, last).astype(np.float32)

    def _spaced_timesteps(self, count: int) -> np.ndarray:
        """Return timesteps spaced so that the interval after the last one ends at 0, unlike those of DDPM."""
        last = timesteps_with_signal(self.numpy_alphas_cumprod(), self.lambda_min_clipped)
        if self.timestep_spacing == "linspace":
            ascending = np.linspace(0, last - 1, count + 1).round()[1:]
        elif self.timestep_spacing == "leading":
            ascending = np.arange(1, count + 1) * (last // (count + 1)) + self.steps_offset
        else:
            ascending = np.arange(last, 0, -self.num_train_timesteps / count).round()[::-1] - 1
        return ascending[::-1].astype(np.int64)

    def scale_model_input(
        self, state: DPMSolverMultistepSchedulerState, sample: Array, timestep: ArrayLike | None = None
    ) -> Array:
        """Return the sample unchanged; see `FlaxScheduler`."""
        del state, timestep
        return sample

    def step(
        self,
        state: DPMSolverMultistepSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        variance_noise: Array | None = None,
    ) -> FlaxSchedulerOutput[DPMSolverMultistepSchedulerState]:
        """Return the sample at the next noise level; for arguments and errors not named here see `FlaxScheduler`.

        Args:
            state: State from `set_timesteps` with the sample's shape.
            model_output: Output of the model, (B, C, …), with twice the channels for a learned variance.
            timestep: One of `state.timesteps`; may be traced. Read at the first step only, later ones are counted.
            sample: α·x0 + σ·ε, (B, C, …).
            key: PRNG key, needed by the "sde-" algorithms if `variance_noise` is not given.

        Raises:
            ConfigError: If `set_timesteps` was called for another shape.

        Reference:
            arXiv:2211.01095, algorithm 2; see `dpm_coefficients`.
        """
        solver = require_timesteps(state.solver)
        check_shape(solver.outputs[0], sample)
        if self.variance_type is not None:
            model_output = model_output[:, : sample.shape[1]]
        x, raw = at_least_float32(sample, model_output)
        index = next_index(state.timesteps, state.step_index, timestep)
        output = self._convert_output(raw, x, table_at(state.sigmas, index))
        noise = None
        if self.algorithm_type.startswith("sde-"):
            noise = step_noise(key, variance_noise, x, f"{self.algorithm_type} sampling")
        previous, solver = remembering(solver, index, x, output, noise)
        state = state.replace(step_index=index + 1, solver=solver)
        return step_result(previous, sample, state, return_dict)

    def _convert_output(self, output: Array, x: Array, level: Array) -> Array:
        """Return the predicted x0 for "++" algorithms, else the predicted noise."""
        alpha, sigma = alpha_sigma(level, self.use_flow_sigmas)
        kind = self.prediction_type
        if self.algorithm_type.endswith("++") or self.thresholding:
            if kind == "epsilon":
                x0 = (x - sigma * output) / alpha
            elif kind == "v_prediction":
                x0 = alpha * x - sigma * output
            elif kind == "flow_prediction":
                x0 = x - sigma * output
            elif kind == "sample":
                x0 = output
            else:
                raise unknown("prediction_type", kind, (*PREDICTION_TYPES, "flow_prediction"))
            if self.thresholding:
                x0 = dynamic_threshold(x0, self.dynamic_thresholding_ratio, self.sample_max_value)
            return x0 if self.algorithm_type.endswith("++") else (x - alpha * x0) / sigma
        if kind == "epsilon":
            return output
        if kind == "v_prediction":
            return alpha * output + sigma * x
        if kind == "sample":
            return (x - alpha * output) / sigma
        raise unknown("prediction_type", kind, PREDICTION_TYPES)  # flow_prediction goes with "++" only

    def add_noise(
        self, state: DPMSolverMultistepSchedulerState, original_samples: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return α·x0 + σ·ε for entries of `state.timesteps`; see `FlaxScheduler`.

        Before `set_timesteps`, PyTorch's class reads its noise levels in reverse; that is not followed.
        """
        x0, epsilon = at_least_float32(original_samples, noise)
        level = expand(table_at(state.sigmas, schedule_index(state.timesteps, timesteps)), x0)
        alpha, sigma = alpha_sigma(level, self.use_flow_sigmas)
        return (alpha * x0 + sigma * epsilon).astype(original_samples.dtype)

    def get_velocity(
        self, state: DPMSolverMultistepSchedulerState, sample: Array, noise: Array, timesteps: ArrayLike
    ) -> Array:
        """Return v = √ᾱ_t·ε − √(1 − ᾱ_t)·x0 at integer training timesteps; see `FlaxScheduler`."""
        return velocity(state.common.alphas_cumprod, sample, noise, timesteps)
