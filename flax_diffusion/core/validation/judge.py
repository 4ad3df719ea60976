"""What says while a run trains what it is worth."""

from __future__ import annotations

from typing import Protocol


class Judge(Protocol):
    """A function that computes values of the present weights. It changes nothing that training depends on.

    Attributes:
        every: Number of steps after which it is called again, beside at the end of the run; None for there only.
        names: Names of its values.
        of: What they are computed of, for the line that says them.
    """

    every: int | None
    names: list[str]
    of: str

    def __call__(self) -> dict[str, float]:
        """Compute the values, by name."""
        ...
