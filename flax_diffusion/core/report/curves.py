"""Curves that are thinned as they grow: a million steps take no more room than a thousand.

A curve is a row of buckets, each of which covers `width` steps: bucket k has the steps from k·width on. It keeps the
mean, the least and the largest value of its steps, so that a spike of one step is still seen, and how many values were
not finite. Once there are `MOST` buckets, each two neighbours become one of twice the width.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

MOST = 2048
"""Number of buckets at which a curve is thinned to half of them."""

_FIELDS = 6  # of a bucket: last step, finite values, their mean, their least, their largest, values that are not finite
_LARGEST = float(np.finfo(np.float32).max)


class Curve:
    """Values by step, in ascending order of the steps.

    Args:
        width: Steps that a bucket covers.
        rows: The buckets so far, float64 (N, 6): last step with a value, number of finite values, their mean, least
            and largest, number of values that are not finite.
    """

    def __init__(self, width: int = 1, rows: np.ndarray | None = None):
        self.width = width
        self._rows = array("d", () if rows is None else rows.astype(np.float64).tobytes())
        self._place = -1  # of the open bucket, the last one; -1 for none
        self._last = self._count = self._bad = 0
        self._sum, self._low, self._high = 0.0, math.inf, -math.inf

    def add(self, step: int, value: float) -> None:
        """Add a value.

        Args:
            step: Its step. One that is less than the step before counts as of the same bucket as that.
            value: The value.
        """
        if step // self.width > self._place:
            self._open(step)
        if step > self._last:
            self._last = step
        if math.isfinite(value):
            self._count += 1
            self._sum += value
            if value < self._low:
                self._low = value
            if value > self._high:
                self._high = value
        else:
            self._bad += 1

    def _open(self, step: int) -> None:
        """Close the open bucket, and open that of a step, which may be the one that was just closed and thinned."""
        self._close()
        if len(self._rows) >= MOST * _FIELDS:
            self._thin()
        self._place = step // self.width
        if self._rows and self._rows[-_FIELDS] // self.width >= self._place:
            self._place = int(self._rows[-_FIELDS] // self.width)
            last, count, mean, self._low, self._high, bad = self._rows[-_FIELDS:]
            del self._rows[-_FIELDS:]
            self._last, self._count, self._bad = int(last), int(count), int(bad)
            self._sum = mean * count if count else 0.0
            if not count:
                self._low, self._high = math.inf, -math.inf
        else:
            self._last = self._count = self._bad = 0
            self._sum, self._low, self._high = 0.0, math.inf, -math.inf

    def _close(self) -> None:
        if self._place >= 0:
            self._rows.extend(self._open_row())
            self._place = -1

    def _open_row(self) -> tuple[float, ...]:
        if not self._count:
            return (self._last, 0, math.nan, math.nan, math.nan, self._bad)
        return (self._last, self._count, self._sum / self._count, self._low, self._high, self._bad)

    def _thin(self) -> None:
        rows = np.frombuffer(self._rows).reshape(-1, _FIELDS)
        while len(rows) >= MOST:
            self.width *= 2
            rows = _merged(rows, self.width)
        self._rows = array("d", rows.tobytes())

    @property
    def rows(self) -> np.ndarray:
        """All buckets, float64 (N, 6); see the class."""
        rows = array("d", self._rows)
        if self._place >= 0:
            rows.extend(self._open_row())
        return np.frombuffer(rows).reshape(-1, _FIELDS) if rows else np.zeros((0, _FIELDS))

    @property
    def last_step(self) -> int:
        """The last step with a value; 0 without any."""
        rows = self.rows
        return int(rows[-1, 0]) if len(rows) else 0

    def before(self, step: int) -> Curve:
        """Return the curve without the buckets that hold values of a step or of later ones."""
        rows = self.rows
        return Curve(self.width, rows[rows[:, 0] < step])

    def mean_of_last(self, steps: int) -> float | None:
        """Return the mean of the values of the last so many steps, at least of the last bucket; None without any."""
        rows = self.rows
        rows = rows[rows[:, 1] > 0]
        if not len(rows):
            return None
        rows = rows[rows[:, 0] > min(rows[-1, 0] - steps, rows[-1, 0] - 1)]
        return float(np.average(rows[:, 2], weights=rows[:, 1]))

    def as_json(self) -> dict[str, Any]:
        """Return the curve as plain data: the width, and in base 64 the last steps, uint32, and the rest, float32."""
        rows = self.rows
        values = np.clip(rows[:, 1:], -_LARGEST, _LARGEST).astype("<f4")
        return {"width": self.width, "last": _encoded(rows[:, 0].astype("<u4")), "values": _encoded(values)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curve:
        """Return a curve of such plain data.

        Raises:
            ValueError: If they are none, or KeyError or TypeError.
        """
        last = np.frombuffer(base64.b64decode(data["last"]), "<u4").astype(np.float64)
        values = np.frombuffer(base64.b64decode(data["values"]), "<f4").reshape(len(last), _FIELDS - 1)
        width = int(data["width"])
        if width < 1 or np.any(np.diff(last) <= 0):
            raise ValueError(f"a curve of width {width} whose steps do not rise")
        return cls(width, np.column_stack([last, values]))


def _merged(rows: np.ndarray, width: int) -> np.ndarray:
    """Return the buckets of a greater width that hold the same values."""
    starts = np.flatnonzero(np.diff(rows[:, 0] // width, prepend=-1))
    last, count, mean, low, high, bad = rows.T
    ends = np.append(starts[1:], len(rows)) - 1
    counts = np.add.reduceat(count, starts)
    sums = np.add.reduceat(np.where(count > 0, mean * count, 0.0), starts)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    lows, highs = np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts)
    return np.column_stack([last[ends], counts, means, lows, highs, np.add.reduceat(bad, starts)])


def _encoded(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode()
