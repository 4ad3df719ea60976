"""What a multistep solver remembers of a trajectory, and the step that all of them take with it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

# Trajectories of fewer steps than this end with lower orders under `lower_order_final`.
_FEW_STEPS = 15


class SolverState(struct.PyTreeNode):
    """Method and memory of one trajectory.

    Attributes:
        coefficients: Coefficients of the sample, three outputs and the noise, (order, steps, 5).
        highest_order: Highest order that each step may have, int32 (steps,).
        steps_taken: Number of steps taken, which is the number of outputs remembered, int32.
        outputs: Converted model outputs of the last two steps, newest first, (2, B, C, …).
    """

    coefficients: Array
    highest_order: Array
    steps_taken: Array
    outputs: Array


def solver_state(coefficients: np.ndarray, scheduler: Any, shape: tuple[int, ...]) -> SolverState:
    """Return the method of a trajectory, with nothing remembered.

    Args:
        coefficients: Of `update_coefficients`, (order, steps, 5).
        scheduler: A multistep scheduler, whose fields say which orders the last steps have.
        shape: Shape of the samples.
    """
    steps = coefficients.shape[1]
    highest = np.full(steps, scheduler.solver_order)
    few = scheduler.lower_order_final and steps < _FEW_STEPS
    if few and steps >= 2:
        highest[-2] = min(2, scheduler.solver_order)
    if few or scheduler.euler_at_final or scheduler.final_sigmas_type == "zero":
        highest[-1] = 1
    return SolverState(
        coefficients=jnp.asarray(coefficients, scheduler.dtype),
        highest_order=jnp.asarray(highest, jnp.int32),
        steps_taken=jnp.asarray(0, jnp.int32),
        outputs=jnp.zeros((2, *shape), scheduler.dtype),
    )


def remembering(
    solver: SolverState, index: Array, x: Array, output: Array, noise: Array | None
) -> tuple[Array, SolverState]:
    """Return the next sample, and the memory with the newest output in it.

    Args:
        solver: Method and memory.
        index: Place of the step.
        x: Sample, (B, C, …).
        output: Converted model output, (B, C, …).
        noise: Noise of the step in the same shape; None for an ODE.
    """
    order = jnp.minimum(solver.steps_taken + 1, solver.highest_order[index])
    weights = solver.coefficients[order - 1].at[index].get(mode="fill", fill_value=jnp.nan)
    previous = weights[0] * x + weights[1] * output
    previous = previous + weights[2] * solver.outputs[0] + weights[3] * solver.outputs[1]
    if noise is not None:
        previous = previous + weights[4] * noise
    outputs = jnp.stack([output.astype(solver.outputs.dtype), solver.outputs[0]])
    return previous, solver.replace(steps_taken=solver.steps_taken + 1, outputs=outputs)
