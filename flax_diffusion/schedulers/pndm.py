"""PNDM: pseudo numerical methods, Runge-Kutta and linear multistep (arXiv:2202.09778).

Which formula a step uses depends only on the number of steps before it. `set_timesteps` therefore writes the whole
method as a table with one row per step, and `step` is always the same few operations, so it can be traced.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.schedulers.common import (
    CommonSchedulerState,
    FlaxSchedulerOutput,
    VariancePreservingScheduler,
    at_least_float32,
    predict_noise,
    previous_alpha_cumprod,
    step_result,
    table_at,
)
from flax_diffusion.schedulers.timesteps import check_inference_steps, check_shape, require_timesteps, spaced_timesteps

# Weights of the current output, of the Runge-Kutta sum, and of the three outputs remembered before it.
_CURRENT = (1, 0, 0, 0, 0)
_RUNGE_KUTTA_LAST = (1 / 6, 1, 0, 0, 0)
_REPEATED_FIRST = (1 / 2, 0, 1 / 2, 0, 0)  # the second evaluation of the first step: Heun's average
_MULTISTEP = {
    2: (3 / 2, 0, -1 / 2, 0, 0),
    3: (23 / 12, 0, -16 / 12, 5 / 12, 0),
    4: (55 / 24, 0, -59 / 24, 37 / 24, -9 / 24),
}
_RUNGE_KUTTA_STEPS = 12  # three intervals of four evaluations each


class StepTable(struct.PyTreeNode):
    """Method as one row per step.

    Attributes:
        weights: Weights of the current output, the Runge-Kutta sum and the remembered outputs, (steps, 5).
        sum_weight: Weight with which the output enters the Runge-Kutta sum, (steps,); NaN clears the sum.
        remember: Whether the output joins the remembered outputs, (steps,).
        keep_sample: Whether the sample is the start of an interval, (steps,).
        from_kept: Whether the step starts from the kept sample, (steps,).
        start: Timestep at which the step starts, relative to its own, int32 (steps,).
        end: Timestep at which the step ends, relative to its own, int32 (steps,).
    """

    weights: Array
    sum_weight: Array
    remember: Array
    keep_sample: Array
    from_kept: Array
    start: Array
    end: Array


class SolverState(struct.PyTreeNode):
    """Method and memory of one trajectory.

    Attributes:
        table: The method.
        counter: Number of steps taken, int32.
        output_sum: Running Runge-Kutta sum, in the shape of the sample.
        outputs: Remembered model outputs, newest first, (3, B, C, …).
        kept_sample: Sample at the start of the interval.
    """

    table: StepTable
    counter: Array
    output_sum: Array
    outputs: Array
    kept_sample: Array


class PNDMSchedulerState(struct.PyTreeNode):
    """State of `FlaxPNDMScheduler`.

    Attributes:
        common: Noise schedule.
        final_alpha_cumprod: ᾱ after the last step, a scalar.
        init_noise_sigma: Standard deviation of the first sample, a scalar.
        timesteps: Timesteps, one per model evaluation, int32 (evaluations,).
        solver: Method and memory; None before `set_timesteps`.
        num_inference_steps: Number of intervals; None before `set_timesteps`.
    """

    common: CommonSchedulerState
    final_alpha_cumprod: Array
    init_noise_sigma: Array
    timesteps: Array
    solver: SolverState | None = None
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class FlaxPNDMScheduler(VariancePreservingScheduler):
    """Pseudo numerical methods for diffusion models; the fields are the keys of PyTorch's `PNDMScheduler`.

    For fields that are not named here see `BetaScheduler`.

    Args:
        skip_prk_steps: Leave out the Runge-Kutta warm-up; the first step is Heun's, the next ones of rising order.
        set_alpha_to_one: Use 1 as ᾱ after the last step; else ᾱ_0.
    """

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    steps_offset: int = 0
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    dtype: Any = jnp.float32
    _: dataclasses.KW_ONLY
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"

    torch_class_name = "PNDMScheduler"

    def create_state(self, common: CommonSchedulerState | None = None) -> PNDMSchedulerState:
        """Return the first state; see `BetaScheduler`."""
        common = CommonSchedulerState.create(self) if common is None else common
        return PNDMSchedulerState(
            common=common,
            final_alpha_cumprod=jnp.asarray(1.0, self.dtype) if self.set_alpha_to_one else common.alphas_cumprod[0],
            init_noise_sigma=jnp.asarray(1.0, self.dtype),
            timesteps=jnp.arange(self.num_train_timesteps - 1, -1, -1, dtype=jnp.int32),
        )

    def set_timesteps(
        self, state: PNDMSchedulerState, num_inference_steps: int, shape: tuple[int, ...] = ()
    ) -> PNDMSchedulerState:
        """Return the state for a trajectory; see `FlaxScheduler`.

        Args:
            state: Any state of this scheduler.
            num_inference_steps: Number of intervals; with the Runge-Kutta warm-up at least 4. `state.timesteps` is
                longer: by one entry with `skip_prk_steps`, by nine without.
            shape: Shape of the samples, which the state remembers.

        Raises:
            ConfigError: If the number of steps is out of range.
        """
        check_inference_steps(num_inference_steps, self.num_train_timesteps)
        if not self.skip_prk_steps and num_inference_steps < 4:
            raise ConfigError(
                f"num_inference_steps is {num_inference_steps}; the Runge-Kutta warm-up of PNDM needs at least 4: "
                "raise it or set skip_prk_steps"
            )
        timesteps, table = self._step_table(num_inference_steps)
        return state.replace(
            timesteps=jnp.asarray(timesteps, jnp.int32),
            solver=SolverState(
                table=table,
                counter=jnp.asarray(0, jnp.int32),
                output_sum=jnp.zeros(shape, self.dtype),
                outputs=jnp.zeros((3, *shape), self.dtype),
                kept_sample=jnp.zeros(shape, self.dtype),
            ),
            num_inference_steps=num_inference_steps,
        )

    def _step_table(self, count: int) -> tuple[np.ndarray, StepTable]:
        """Return the timesteps and the method for a number of intervals (PNDM algorithm 2)."""
        ascending = spaced_timesteps(self.timestep_spacing, count, self.num_train_timesteps, self.steps_offset)[::-1]
        stride = self.num_train_timesteps // count
        if self.skip_prk_steps:
            timesteps = np.concatenate([ascending[:-1], ascending[-2:-1], ascending[-1:]])[::-1]
            rows = [_multistep_row(i, stride) for i in range(len(timesteps))]
        else:
            # Each of three intervals is evaluated at its start, twice in its middle, and at its end.
            points = (ascending[-4:, None] + np.array([0, stride // 2])).reshape(-1)[:-1]
            warm_up = points.repeat(2)[1:-1][::-1]
            timesteps = np.concatenate([warm_up, ascending[:-3][::-1]])
            rows = [_runge_kutta_row(i, warm_up, stride) for i in range(_RUNGE_KUTTA_STEPS)]
            rows += [_multistep_row(i, stride) for i in range(_RUNGE_KUTTA_STEPS, len(timesteps))]
        weights, sum_weight, *flags, start, end = zip(*rows, strict=True)
        remember, keep_sample, from_kept = (jnp.asarray(flag, bool) for flag in flags)
        return timesteps, StepTable(
            weights=jnp.asarray(weights, self.dtype),
            sum_weight=jnp.asarray(sum_weight, self.dtype),
            remember=remember,
            keep_sample=keep_sample,
            from_kept=from_kept,
            start=jnp.asarray(start, jnp.int32),
            end=jnp.asarray(end, jnp.int32),
        )

    def step(
        self,
        state: PNDMSchedulerState,
        model_output: Array,
        timestep: ArrayLike,
        sample: Array,
        return_dict: bool = True,
        *,
        key: Array | None = None,
        variance_noise: Array | None = None,
    ) -> FlaxSchedulerOutput[PNDMSchedulerState]:
        """Return the sample for the next model evaluation; for arguments that are not named here see `FlaxScheduler`.

        Args:
            state: State from `set_timesteps` with the sample's shape.
            timestep: The next of `state.timesteps`; may be traced.
            sample: Sample that the model was given, (B, C, …).
            key: Not used, since the method is deterministic; accepted so that all schedulers are called alike.
            variance_noise: Not used, likewise.

        Raises:
            ConfigError: If `set_timesteps` was not called, or was called for another shape.

        Reference:
            PNDM, equations 9, 12 and 13.
        """
        del key, variance_noise
        solver = require_timesteps(state.solver)
        check_shape(solver.kept_sample, sample)
        x, output = at_least_float32(sample, model_output)
        last = solver.table.sum_weight.shape[0] - 1
        table = jax.tree.map(lambda column: column[jnp.minimum(solver.counter, last)], solver.table)

        # Sums of products, not a dot: on TPUs a float32 dot rounds its inputs to bfloat16.
        combined = table.weights[0] * output + table.weights[1] * solver.output_sum
        combined = combined + sum(table.weights[2 + i] * solver.outputs[i] for i in range(3))
        start = jnp.where(table.from_kept, solver.kept_sample, x)
        t = jnp.asarray(timestep)
        previous = self._transfer(state, start, t + table.start, t + table.end, combined)

        dtype = solver.outputs.dtype
        total = jnp.where(jnp.isnan(table.sum_weight), 0, solver.output_sum + table.sum_weight * output)
        shifted = jnp.concatenate([output[None].astype(dtype), solver.outputs[:-1]])
        solver = solver.replace(
            counter=solver.counter + 1,
            output_sum=total.astype(dtype),
            outputs=jnp.where(table.remember, shifted, solver.outputs),
            kept_sample=jnp.where(table.keep_sample, x, solver.kept_sample).astype(dtype),
        )
        return step_result(previous, sample, state.replace(solver=solver), return_dict)

    def _transfer(self, state: PNDMSchedulerState, x: Array, t: Array, end: Array, output: Array) -> Array:
        """Return x moved from timestep t to `end` along the model output (PNDM equation 9)."""
        alpha_bar = table_at(state.common.alphas_cumprod, t)
        alpha_bar_end = previous_alpha_cumprod(state.common.alphas_cumprod, end, state.final_alpha_cumprod)
        epsilon = predict_noise(self.prediction_type, output, x, alpha_bar)
        denominator = alpha_bar * jnp.sqrt(1 - alpha_bar_end) + jnp.sqrt(alpha_bar * (1 - alpha_bar) * alpha_bar_end)
        return jnp.sqrt(alpha_bar_end / alpha_bar) * x - (alpha_bar_end - alpha_bar) * epsilon / denominator


def _runge_kutta_row(i: int, timesteps: np.ndarray, stride: int) -> tuple:
    stage = i % 4
    return (
        _RUNGE_KUTTA_LAST if stage == 3 else _CURRENT,
        (1 / 6, 1 / 3, 1 / 3, np.nan)[stage],
        stage == 0,
        stage == 0,
        stage != 0,
        timesteps[i - stage] - timesteps[i],
        0 if i % 2 else -(stride // 2),
    )


def _multistep_row(i: int, stride: int) -> tuple:
    """Return row i; the second evaluation (i = 1) is at the end of the first interval and repeats it."""
    if i == 0:
        return (_CURRENT, 0.0, True, True, False, 0, -stride)
    if i == 1:
        return (_REPEATED_FIRST, 0.0, False, False, True, stride, 0)
    return (_MULTISTEP[min(i, 4)], 0.0, True, False, False, 0, -stride)
