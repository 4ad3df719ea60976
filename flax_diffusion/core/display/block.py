"""The lines that a run begins with."""

from __future__ import annotations


def row(label: str, text: str) -> str:
    """Return a line of the block: what it is about, and what there is to know."""
    return f"{label:<11} {text}"


def size(count: int) -> str:
    """Return a number of bytes as text, such as 3.4 GB."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def checkpoints(step: int, total: int, every: int) -> int:
    """Return how many checkpoints a run saves: one every so many steps, and one at its end.

    Args:
        step: Steps that are taken already.
        total: Steps of the whole run.
        every: Steps between two checkpoints.
    """
    if total <= step:
        return 0
    return total // every - step // every + (total % every > 0)
