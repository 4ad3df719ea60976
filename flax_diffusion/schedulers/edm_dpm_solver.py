"""DPM-Solver++ on the preconditioned denoiser of EDM (arXiv:2211.01095, arXiv:2206.00364); see `dpm_coefficients`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.objectives.noise_schedule import linspace
from flax_diffusion.schedulers.common import (
    FlaxSchedulerOutput,
    at_least_float32,
    dynamic_threshold,
    step_noise,
    step_result,
    table_at,
)
from flax_diffusion.schedulers.dpm_coefficients import update_coefficients
from flax_diffusion.schedulers.dpm_memory import SolverState, remembering, solver_state
from flax_diffusion.schedulers.edm_euler import FlaxEDMEulerScheduler
from flax_diffusion.schedulers.timesteps import check_shape, next_index, require_timesteps


class EDMDPMSolverMultistepSchedulerState(struct.PyTreeNode):
    """State of `FlaxEDMDPMSolverMultistepScheduler`.

    Attributes:
        init_noise_sigma: Standard deviation of the first sample, √(σ_max² + 1).
        timesteps: What the model is told, ln(σ) / 4, (steps,).
        sigmas: σ of each step and after the last, (steps + 1,).
        step_index: Place of the next step, int32; −1 before the first, which looks its timestep up.
        solver: Method and memory; None before `set_timesteps`.
        num_inference_steps: Number of steps; None before `set_timesteps`.
    """

    init_noise_sigma: Array
    timesteps: Array
    sigmas: Array
    step_index: Array
    solver: SolverState | None = None
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class FlaxEDMDPMSolverMultistepScheduler(FlaxEDMEulerScheduler):
    """Multistep solvers of EDM; the fields are the keys of PyTorch's `EDMDPMSolverMultistepScheduler`.

    For fields that are not named here see `FlaxEDMEulerScheduler`.

    Args:
        solver_order: Highest order: 1, 2 or 3.
        thresholding: Threshold the predicted x0 dynamically.
        dynamic_thresholding_ratio: Quantile of the magnitudes that is the threshold.
        sample_max_value: Upper limit of the threshold.
        algorithm_type: "dpmsolver++", or "sde-dpmsolver++", which adds noise and has no order 3.
        solver_type: Form of the second-order term.
        lower_order_final: End trajectories of fewer than 15 steps with orders 2 and 1.
        euler_at_final: End with order 1.
    """

    _: dataclasses.KW_ONLY
    solver_order: int = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False

    torch_class_name = "EDMDPMSolverMultistepScheduler"
    replaced_values = {  # noqa: RUF012
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    }

    def _check_combination(self) -> None:
        super()._check_combination()
        highest = 2 if self.algorithm_type == "sde-dpmsolver++" else 3
        if not 1 <= self.solver_order <= highest:
            raise ConfigError(
                f"solver_order is {self.solver_order}; with algorithm_type {self.algorithm_type!r} it must lie between "
                f"1 and {highest}"
            )

    def _levels(self, ramp: np.ndarray) -> np.ndarray:
        """Return float32 σ at as many even places as `ramp` has, which are float32 in PyTorch's class."""
        places = linspace(0, 1, len(ramp))
        if self.sigma_schedule != "karras":
            return super()._levels(places)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        base = np.float32(high) + places * np.float32(low - high)
        return (base.astype(np.float64) ** self.rho).astype(np.float32)

    def create_state(self) -> EDMDPMSolverMultistepSchedulerState:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the first state, over all training timesteps."""
        sigmas = self._levels(np.zeros(self.num_train_timesteps))
        return self._of(sigmas, np.float32(0), None, ())

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: EDMDPMSolverMultistepSchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> EDMDPMSolverMultistepSchedulerState:
        """Return the state for a trajectory.

        Args:
            state: Any state of this scheduler.
            num_inference_steps: Steps to take.
            shape: Of the samples, whose model outputs the state remembers.

        Raises:
            ConfigError: No steps.
        """
        del state
        if num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
        if self.final_sigmas_type not in ("zero", "sigma_min"):
            raise unknown("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        last = np.float32(self.sigma_min if self.final_sigmas_type == "sigma_min" else 0)
        return self._of(self._levels(np.zeros(num_inference_steps)), last, num_inference_steps, shape)

    def _of(
        self, sigmas: np.ndarray, last: np.float32, count: int | None, shape: tuple[int, ...]
    ) -> EDMDPMSolverMultistepSchedulerState:
        levels = np.append(sigmas, last)
        solver = None
        if count is not None:
            table = update_coefficients(
                np.ones_like(levels), levels, self.algorithm_type, self.solver_type, self.solver_order
            )
            solver = solver_state(table, self, shape)
        return EDMDPMSolverMultistepSchedulerState(
            init_noise_sigma=jnp.asarray(math.hypot(self.sigma_max, 1), self.dtype),
            timesteps=jnp.asarray(np.float32(0.25) * np.log(sigmas.astype(np.float64)).astype(np.float32), self.dtype),
            sigmas=jnp.asarray(levels, self.dtype),
            step_index=jnp.asarray(-1, jnp.int32),
            solver=solver,
            num_inference_steps=count,
        )

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        state: EDMDPMSolverMultistepSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        variance_noise: Array | None = None,
    ) -> FlaxSchedulerOutput[EDMDPMSolverMultistepSchedulerState]:
        """Return the sample at the next σ; for errors see `FlaxScheduler`.

        Args:
            state: From `set_timesteps` with the sample's shape.
            model_output: F, (B, …).
            timestep: One of `state.timesteps`; may be traced. Read at the first step only, later ones are counted.
            sample: x0 + σ·ε, (B, …), before it was scaled.
            return_dict: A named tuple; else a plain one.
            key: PRNG key, needed by "sde-dpmsolver++" if `variance_noise` is not given.
            variance_noise: That noise itself.
        """
        solver = require_timesteps(state.solver)
        check_shape(solver.outputs[0], sample)
        x, output = at_least_float32(sample, model_output)
        index = next_index(state.timesteps, state.step_index, timestep)
        x0 = self._denoised(x, output, table_at(state.sigmas, index))
        if self.thresholding:
            x0 = dynamic_threshold(x0, self.dynamic_thresholding_ratio, self.sample_max_value)
        noise = None
        if self.algorithm_type.startswith("sde-"):
            noise = step_noise(key, variance_noise, x, f"{self.algorithm_type} sampling")
        previous, solver = remembering(solver, index, x, x0, noise)
        return step_result(previous, sample, state.replace(step_index=index + 1, solver=solver), return_dict)
