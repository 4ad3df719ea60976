"""Distances between two sets of features, and scores of one, in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SPLITS = 10
"""Parts of the pictures for each of which the Inception score is computed."""
SUBSETS, SUBSET_SIZE = 100, 1000
"""Number of random subsets for the kernel distance, and pictures in each."""
NEIGHBOURS = 3
"""A picture lies on the manifold of others if it is as near to one of them as that one's third neighbour."""
_BLOCK_ROWS = 2048  # of a matrix of distances between all pictures, which as a whole would not fit


class Estimate(NamedTuple):
    """A mean over parts of the pictures, and the standard deviation between these parts."""

    mean: float
    deviation: float


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """Return the Fréchet distance of two normal distributions: |μ − μ'|² + tr(Σ + Σ' − 2(Σ^½ Σ' Σ^½)^½).

    The trace of the root is the sum of the roots of eigenvalues. Both matrices whose eigenvalues are taken are
    symmetric, so the roots are real, and a singular covariance, as of fewer pictures than features, needs no care.

    Args:
        mean: Mean of one, (D,).
        covariance: Covariance of one, (D, D).
        other_mean: Mean of the other, (D,).
        other_covariance: Covariance of the other, (D, D).

    Reference:
        Heusel et al., https://arxiv.org/abs/1706.08500, equation 6.
    """
    arrays = (mean, covariance, other_mean, other_covariance)
    mean, covariance, other_mean, other_covariance = (np.asarray(array, np.float64) for array in arrays)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    of_product = np.linalg.eigvalsh(root @ other_covariance @ root)
    trace_of_root = np.sqrt(np.clip(of_product, 0, None)).sum()
    apart = mean - other_mean
    return float(apart @ apart + np.trace(covariance) + np.trace(other_covariance) - 2 * trace_of_root)


def inception_score(logits: np.ndarray, seed: int | None = 0, splits: int = SPLITS) -> Estimate:
    """Return the Inception score: exp of the mean KL divergence of each picture's classes from those of its part.

    Args:
        logits: Scores of the classes, (N, classes). As published, they are without the bias of the last layer.
        seed: Seed of the order in which pictures are divided into parts, as they may come prompt by prompt; None for
            the order in which they are given.
        splits: Number of parts.

    Reference:
        Salimans et al., https://arxiv.org/abs/1606.03498, section 4.
    """
    count = len(logits)
    order = np.arange(count) if seed is None else _rng(seed).permutation(count)
    scores = []
    for part in range(splits):
        rows = order[part * count // splits : (part + 1) * count // splits]
        values = np.asarray(logits[rows], np.float64)
        values -= values.max(1, keepdims=True)
        log_p = values - np.log(np.exp(values).sum(1, keepdims=True))
        p = np.exp(log_p)
        with np.errstate(divide="ignore", invalid="ignore"):  # a class that no picture has adds nothing
            log_mean = np.log(p.mean(0))
            terms = np.where(p > 0, p * (log_p - log_mean), 0)
        scores.append(np.exp(terms.sum(1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    features: np.ndarray, others: np.ndarray, seed: int = 0, subsets: int = SUBSETS, size: int = SUBSET_SIZE
) -> Estimate:
    """Return the kernel distance: the unbiased squared MMD with the kernel (x·y / D + 1)³, over random subsets.

    Args:
        features: Features of one set, (N, D).
        others: Features of the other, (M, D).
        seed: Seed of the subsets.
        subsets: Number of subsets.
        size: Pictures of either set in a subset, each at most once.

    Reference:
        Bińkowski et al., https://arxiv.org/abs/1801.01401, equation 4.
    """
    rng = _rng(seed)
    found = []
    for _ in range(subsets):
        x = np.asarray(features[rng.choice(len(features), size, replace=False)], np.float64)
        y = np.asarray(others[rng.choice(len(others), size, replace=False)], np.float64)
        within = sum(kernel.sum() - np.trace(kernel) for kernel in (_cubic(x, x), _cubic(y, y)))
        found.append(within / (size * (size - 1)) - 2 * _cubic(x, y).mean())
    return Estimate(float(np.mean(found)), float(np.std(found)))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel = x @ y.T
    kernel /= x.shape[1]
    kernel += 1
    return kernel * kernel * kernel  # NumPy's powers take ten times as long


class PrecisionRecall(NamedTuple):
    """Shares of pictures that lie on the manifold of the other set.

    Attributes:
        precision: Share of the drawn pictures that lie on the real ones' manifold.
        recall: Share of the real pictures that lie on the drawn ones' manifold.
    """

    precision: float
    recall: float


def precision_recall(
    drawn: np.ndarray, real: np.ndarray, neighbours: int = NEIGHBOURS, rows: int = _BLOCK_ROWS
) -> PrecisionRecall:
    """Return the improved precision and recall.

    Args:
        drawn: Features of the drawn pictures, (N, D).
        real: Features of real pictures, (M, D).
        neighbours: The manifold is a ball around each picture, which reaches to this neighbour of its own set.
        rows: Pictures whose distances to all others are held at a time.

    Reference:
        Kynkäänniemi et al., https://arxiv.org/abs/1904.06991, equations 1 and 2.
    """
    center = np.asarray(real, np.float64).mean(0)  # near to the origin, squares lose fewer digits
    drawn, real = (np.asarray(features, np.float64) - center for features in (drawn, real))
    return PrecisionRecall(
        _share_inside(drawn, real, _radii(real, neighbours, rows), rows),
        _share_inside(real, drawn, _radii(drawn, neighbours, rows), rows),
    )


def _radii(features: np.ndarray, neighbours: int, rows: int) -> np.ndarray:
    """Return the squared distance of each picture to its k-th neighbour, (N,)."""
    radii = []
    for first in range(0, len(features), rows):
        squared = _squared_distances(features[first : first + rows], features)
        places = np.arange(len(squared))
        squared[places, first + places] = 0  # of a picture to itself, which is no neighbour
        radii.append(np.partition(squared, neighbours, 1)[:, neighbours])
    return np.concatenate(radii)


def _share_inside(features: np.ndarray, centers: np.ndarray, radii: np.ndarray, rows: int) -> float:
    """Return the share of pictures that lie in any of the balls."""
    inside = 0
    for first in range(0, len(features), rows):
        inside += int((_squared_distances(features[first : first + rows], centers) <= radii).any(1).sum())
    return inside / len(features)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    products = x @ y.T
    products *= -2
    products += np.square(x).sum(1)[:, None]
    products += np.square(y).sum(1)
    return np.maximum(products, 0, out=products)


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))
