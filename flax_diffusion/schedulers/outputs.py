"""What the schedulers' steps return: named tuples, which are also read by key, as Diffusers' outputs are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from jax import Array

if TYPE_CHECKING:
    from flax_diffusion.schedulers.karras_ve import KarrasVeSchedulerState
    from flax_diffusion.schedulers.score_sde_ve import ScoreSdeVeSchedulerState

State = TypeVar("State")


class _Output(tuple):
    """Calls of Diffusers' `BaseOutput`."""

    __slots__ = ()
    _fields: tuple[str, ...]

    def __getitem__(self, key: Any) -> Any:
        place: Any = self._fields.index(key) if isinstance(key, str) else key
        return tuple.__getitem__(self, place)

    def keys(self) -> tuple[str, ...]:
        """Return the names of the values."""
        return self._fields

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None as a plain tuple."""
        return tuple(value for value in self if value is not None)


class _StepFields(NamedTuple, Generic[State]):
    prev_sample: Array
    state: State


class FlaxSchedulerOutput(_StepFields[State], _Output):
    """Result of a step.

    Attributes:
        prev_sample: Sample one step less noisy, with the shape and dtype of the sample that went in.
        state: Scheduler state for the next step.
    """

    __slots__ = ()
    __getitem__ = _Output.__getitem__


class _KarrasVeFields(NamedTuple):
    prev_sample: Array
    derivative: Array
    state: KarrasVeSchedulerState


class FlaxKarrasVeOutput(_KarrasVeFields, _Output):
    """Result of a step of `FlaxKarrasVeScheduler`.

    Attributes:
        prev_sample: Sample at the next σ.
        derivative: Derivative of the sample by σ, in the same shape; `step_correct` needs it.
        state: Scheduler state for the next step.
    """

    __slots__ = ()
    __getitem__ = _Output.__getitem__


class _SdeVeFields(NamedTuple):
    prev_sample: Array
    state: ScoreSdeVeSchedulerState
    prev_sample_mean: Array | None = None


class FlaxSdeVeOutput(_SdeVeFields, _Output):
    """Result of a step of `FlaxScoreSdeVeScheduler`.

    Attributes:
        prev_sample: Sample one step less noisy.
        state: Scheduler state for the next step.
        prev_sample_mean: The same without the noise of this step; None from `step_correct`.
    """

    __slots__ = ()
    __getitem__ = _Output.__getitem__


FlaxDDIMSchedulerOutput = FlaxSchedulerOutput
FlaxDDPMSchedulerOutput = FlaxSchedulerOutput
FlaxDPMSolverMultistepSchedulerOutput = FlaxSchedulerOutput
FlaxEulerDiscreteSchedulerOutput = FlaxSchedulerOutput
FlaxLMSSchedulerOutput = FlaxSchedulerOutput
FlaxPNDMSchedulerOutput = FlaxSchedulerOutput
