"""Mean and covariance of features that come in parts, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK_ROWS = 2048
"""Features that are added at a time. So the sums depend on neither the batch size nor the number of devices."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of features, which is all that a normal distribution is fitted by.

    Attributes:
        count: Number of features.
        mean: Their mean, float64 (D,).
        scatter: Sum of the outer products of their deviations from the mean, float64 (D, D).

    Reference:
        Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Return the moments of features (N, D), at least one."""
        values = np.asarray(features, np.float64)
        mean = values.mean(0)
        deviations = values - mean
        return cls(len(values), mean, deviations.T @ deviations)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets together, such as of two hosts."""
        count = self.count + other.count
        apart = other.mean - self.mean
        between = np.outer(apart, apart) * (self.count * other.count / count)
        mean = self.mean + apart * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """Sample covariance, over N - 1; float64 (D, D)."""
        return self.scatter / (self.count - 1)


class Collected:
    """What the metrics need of the features of some pictures, taken as they come.

    Args:
        count: Number of pictures that will come.
        keep: Number of pictures whose features themselves are kept, evenly spaced; 0 for none.
        keep_logits: Whether the logits of all pictures are kept.
    """

    def __init__(self, count: int, *, keep: int = 0, keep_logits: bool = False):
        self.count, self._keep, self._keep_logits = count, min(keep, count), keep_logits
        self._seen = 0
        self._moments: Moments | None = None
        self._waiting: list[np.ndarray] = []
        self._kept: list[np.ndarray] = []
        self._logits: list[np.ndarray] = []

    def add(self, features: np.ndarray, logits: np.ndarray | None = None) -> None:
        """Take the features of the next pictures.

        Args:
            features: Features, float32 (B, D).
            logits: Logits of the same pictures, float32 (B, classes); None where the features have none.
        """
        places = np.arange(self._seen, self._seen + len(features))
        kept = (places + 1) * self._keep // self.count > places * self._keep // self.count
        if kept.any():
            self._kept.append(features[kept])
        if self._keep_logits and logits is not None:
            self._logits.append(logits)
        self._seen += len(features)
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= BLOCK_ROWS:
            rows = np.concatenate(self._waiting)
            while len(rows) >= BLOCK_ROWS:
                self._count(rows[:BLOCK_ROWS])
                rows = rows[BLOCK_ROWS:]
            self._waiting = [rows]

    def _count(self, rows: np.ndarray) -> None:
        found = Moments.of(rows)
        self._moments = found if self._moments is None else self._moments + found

    @property
    def moments(self) -> Moments:
        """Mean and covariance of what came so far, which is at least one picture."""
        rest = [rows for rows in self._waiting if len(rows)]
        if not rest:
            assert self._moments is not None
            return self._moments
        last = Moments.of(np.concatenate(rest))
        return last if self._moments is None else self._moments + last

    @property
    def features(self) -> np.ndarray | None:
        """Features that were kept, float32 (n, D); None where none were."""
        return np.concatenate(self._kept) if self._kept else None

    @property
    def logits(self) -> np.ndarray | None:
        """Logits that were kept, float32 (n, classes); None where none were."""
        return np.concatenate(self._logits) if self._logits else None
