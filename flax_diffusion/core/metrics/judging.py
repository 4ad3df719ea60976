"""The metrics by name: what each needs, and how it is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flax_diffusion.core.metrics import distances
from flax_diffusion.core.metrics.distances import PrecisionRecall
from flax_diffusion.core.metrics.reference import Reference
from flax_diffusion.core.metrics.statistics import Collected

INCEPTION, PIXELS = "inception", "pixels"
FEATURES = (INCEPTION, PIXELS)
"""Names of the features. Those of `pixels` are the pixels themselves, scaled to 0..1; they need no network."""
MAX_KEPT = 50_000
"""Number of pictures whose features are kept. Of more real pictures, evenly spaced ones are."""


class Extractor(Protocol):
    """What computes the features of pictures, on the devices of a backend.

    Attributes:
        feature: Name of the feature.
        weights: Fingerprint of the network's weights; None where there is no network.
    """

    feature: str
    weights: str | None

    def dimension(self, size: tuple[int, int], channels: int) -> int:
        """Return the number of features of pictures of a height and width in pixels."""
        ...

    def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the features, float32 (B, D), and the logits (B, classes) or None, of uint8 (B, H, W, 1 or 3)."""
        ...


@dataclass(frozen=True)
class Sets:
    """Features of the pictures to judge, and the statistics of real ones.

    Attributes:
        drawn: Of the pictures to judge.
        reference: Of the real pictures; None where no metric needs them.
        seed: Seed of what is random in the metrics.
    """

    drawn: Collected
    reference: Reference | None
    seed: int

    @property
    def real(self) -> Reference:
        """Statistics of the real pictures, which are there."""
        assert self.reference is not None
        return self.reference

    @property
    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """Features themselves, of the pictures to judge and of the real ones."""
        assert self.drawn.features is not None
        assert self.real.features is not None
        return self.drawn.features, self.real.features

    @functools.cached_property
    def precision_recall(self) -> PrecisionRecall:
        """Precision and recall, which share most of their work."""
        return distances.precision_recall(*self.features)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric needs, and how it is computed.

    Attributes:
        least: Smallest number of pictures, of either set.
        compute: Returns its values by column of the table.
        needs_reference: Whether it compares with real pictures.
        needs_features: Whether it needs the features themselves, not their mean and covariance alone.
        needs_logits: Whether it needs the classes of the Inception network.
    """

    least: int
    compute: Callable[[Sets], dict[str, float]]
    needs_reference: bool = True
    needs_features: bool = False
    needs_logits: bool = False


def _fid(sets: Sets) -> dict[str, float]:
    drawn, real = sets.drawn.moments, sets.real
    return {"fid": distances.frechet_distance(drawn.mean, drawn.covariance, real.mean, real.covariance)}


def _is(sets: Sets) -> dict[str, float]:
    assert sets.drawn.logits is not None
    return _with_deviation("is", distances.inception_score(sets.drawn.logits, sets.seed))


def _kid(sets: Sets) -> dict[str, float]:
    return _with_deviation("kid", distances.kernel_distance(*sets.features, seed=sets.seed))


def _with_deviation(name: str, estimate: distances.Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name}_std": estimate.deviation}


_NEIGHBOURS = distances.NEIGHBOURS + 1
METRICS: dict[str, Metric] = {
    "fid": Metric(least=2, compute=_fid),
    "is": Metric(least=distances.SPLITS, compute=_is, needs_reference=False, needs_logits=True),
    "kid": Metric(least=distances.SUBSET_SIZE, compute=_kid, needs_features=True),
    "precision": Metric(
        least=_NEIGHBOURS, compute=lambda sets: {"precision": sets.precision_recall.precision}, needs_features=True
    ),
    "recall": Metric(
        least=_NEIGHBOURS, compute=lambda sets: {"recall": sets.precision_recall.recall}, needs_features=True
    ),
}
"""The metrics by name, in the order of the table."""


def needs(names: Iterable[str], what: str) -> list[str]:
    """Return those of some metrics that need something.

    Args:
        names: Names of metrics.
        what: Attribute of `Metric` that says whether it does.
    """
    return [name for name in names if getattr(METRICS[name], what)]


def collect(
    batches: Iterable[np.ndarray], extractor: Extractor, count: int, names: Iterable[str], *, real: bool = False
) -> Collected:
    """Compute the features of pictures as they come, and keep what the metrics need.

    Args:
        batches: Pictures, each uint8 (B, H, W, C).
        extractor: Computes the features.
        count: Number of pictures in all.
        names: Names of the metrics.
        real: Whether these are the real pictures, which need no logits, and not all of whose features are kept.

    Returns:
        What was kept.
    """
    names = list(names)
    keep = (MAX_KEPT if real else count) if needs(names, "needs_features") else 0
    collected = Collected(count, keep=keep, keep_logits=not real and bool(needs(names, "needs_logits")))
    for pictures in batches:
        collected.add(*extractor(pictures))
    return collected


def judge(names: Iterable[str], sets: Sets) -> Iterator[tuple[str, float]]:
    """Yield the values of metrics by column, such as `kid` and `kid_std`.

    Args:
        names: Names of the metrics.
        sets: Features of both sets of pictures.
    """
    for name in METRICS:
        if name in names:
            yield from METRICS[name].compute(sets).items()
