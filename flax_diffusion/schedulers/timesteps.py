"""Timesteps of a trajectory: how they are spaced, checked and looked up."""

from __future__ import annotations

from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from flax_diffusion.core.errors import ConfigError, unknown

State = TypeVar("State")


def require_timesteps(prepared: State | None) -> State:
    """Return what `set_timesteps` prepares; raise ConfigError for None, where it has not been called."""
    if prepared is None:
        raise ConfigError("no timesteps are set; call set_timesteps(state, num_inference_steps, shape) before step()")
    return prepared


def check_shape(remembered: Array, sample: Array) -> None:
    """Raise ConfigError where the array that a state remembers has another shape than the sample."""
    if remembered.shape != sample.shape:
        raise ConfigError(
            f"sample has shape {sample.shape} but set_timesteps was given {remembered.shape}; "
            "call set_timesteps(state, num_inference_steps, shape=sample.shape)"
        )


def schedule_index(schedule: Array, timestep: ArrayLike) -> Array:
    """Return the places of timesteps in a schedule.

    Args:
        schedule: Timesteps of the trajectory, `state.timesteps`, (steps,).
        timestep: Entries of `schedule`, (B,) or a scalar.

    Returns:
        The places, int32, in the shape of `timestep`. Of a timestep that the schedule holds twice, the second place, so
        that a trajectory begun in the middle skips no level; but 0 for the first timestep, from which PyTorch's
        schedulers would run past their end. For a traced timestep that is not found, a place past the end, which
        `table_at` reads as NaN.

    Raises:
        ConfigError: If a timestep that is not traced is not in the schedule.

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
    """Return the place of the coming step in a schedule.

    Args:
        schedule: Timesteps of the trajectory, (steps,).
        step_index: Place of the coming step as counted so far; −1 before the first step.
        timestep: Timestep of the first step, which is looked up; not read at later steps.
    """
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
        count: Number of inference steps.
        num_train_timesteps: Number of training timesteps.
        steps_offset: Number added to the timesteps of "leading" spacing.

    Returns:
        The timesteps, int64 (count,).

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
