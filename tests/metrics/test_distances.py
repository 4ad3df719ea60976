"""Moments, Fréchet distance, Inception score, kernel distance, precision and recall, against what they are by hand."""

import itertools

import numpy as np
import pytest

from flax_diffusion.core.metrics import distances
from flax_diffusion.core.metrics.statistics import BLOCK_ROWS, Collected, Moments


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_moments_of_parts(rng):
    """Far from the origin, too, where sums of squares would lose all digits."""
    features = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6)) + 1e6
    parts = [Moments.of(part) for part in np.split(features, [1, 130, 131, 400])]
    for order in itertools.islice(itertools.permutations(parts), 10):
        whole = sum(order[1:], order[0])
        assert whole.count == 500
        np.testing.assert_allclose(whole.mean, features.mean(0), rtol=1e-14)
        np.testing.assert_allclose(whole.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-8)


def test_collected_does_not_depend_on_batches(rng):
    features = rng.standard_normal((2 * BLOCK_ROWS + 77, 3)).astype(np.float32)

    def collected(batch):
        found = Collected(len(features), keep=1000, keep_logits=True)
        for first in range(0, len(features), batch):
            found.add(features[first : first + batch], features[first : first + batch, :2])
        return found

    one, other = collected(64), collected(BLOCK_ROWS * 2 + 1)
    for name in ("count", "mean", "scatter"):
        np.testing.assert_array_equal(getattr(one.moments, name), getattr(other.moments, name))
    np.testing.assert_allclose(one.moments.covariance, np.cov(features.astype(float), rowvar=False), rtol=1e-12)
    np.testing.assert_array_equal(one.features, other.features)
    np.testing.assert_array_equal(one.logits, features[:, :2])
    places = [int(np.flatnonzero((features == row).all(1))[0]) for row in one.features]
    assert len(places) == 1000
    assert {4, 5} >= set(np.diff(places))  # evenly spaced


def test_frechet_distance_of_known_normals(rng):
    """Covariances that commute: the distance is |μ − μ'|² + Σ(√λ − √λ')²."""
    basis = np.linalg.qr(rng.standard_normal((7, 7)))[0]
    first, second = rng.random(7) * 9, rng.random(7) * 9
    first[0] = second[1] = 0  # singular
    mean, apart = rng.standard_normal(7), rng.standard_normal(7)
    covariances = [(basis * values) @ basis.T for values in (first, second)]
    found = distances.frechet_distance(mean, covariances[0], mean + apart, covariances[1])
    assert found == pytest.approx(apart @ apart + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum(), rel=1e-7)
    assert distances.frechet_distance(mean, covariances[0], mean, covariances[0]) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_any_normals(rng):
    """Against SciPy's root of the product, which is not symmetric."""
    from scipy.linalg import sqrtm

    first, second = (np.cov(rng.standard_normal((5, 40)) * np.arange(1, 6)[:, None]) for _ in range(2))
    expected = np.trace(first + second - 2 * sqrtm(first @ second).real)
    zero = np.zeros(5)
    assert distances.frechet_distance(zero, first, zero, second) == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_known_classes():
    """Pictures that are each surely of one of five classes: 5; pictures of which nothing is known: 1."""
    sure = np.full((1000, 8), -1e4, np.float32)
    sure[np.arange(1000), np.arange(1000) % 5] = 1e4
    assert distances.inception_score(sure, seed=None) == pytest.approx((5, 0))
    assert distances.inception_score(np.zeros((20, 8)), seed=3) == pytest.approx((1, 0))
    by_class = sure[np.argsort(np.arange(1000) % 5, kind="stable")]
    assert distances.inception_score(by_class, seed=None).mean == pytest.approx(1)
    assert distances.inception_score(by_class, seed=0).mean > 4.7


def test_inception_score_by_hand(rng):
    logits = rng.standard_normal((40, 6)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [np.exp(np.mean([(q * np.log(q / part.mean(0))).sum() for q in part])) for part in np.split(p, 10)]
    found = distances.inception_score(logits, seed=None)
    assert found == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_kernel_distance_is_the_direct_sum(rng):
    """One subset of everything, pair by pair; and the mean over subsets comes close to it."""
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 4)) + 0.7

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    pairs = list(itertools.permutations(range(30), 2))
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / (30 * 29)
    direct = within - 2 * sum(kernel(a, b) for a, b in itertools.product(x, y)) / 900
    assert distances.kernel_distance(x, y, subsets=1, size=30) == pytest.approx((direct, 0), rel=1e-12)
    several = distances.kernel_distance(x, y, seed=1, subsets=400, size=20)
    assert abs(several.mean - direct) < 3 * several.deviation / 20
    assert several == distances.kernel_distance(x, y, seed=1, subsets=400, size=20)
    assert several != distances.kernel_distance(x, y, seed=2, subsets=400, size=20)


@pytest.mark.parametrize("rows", [7, 1000])
def test_precision_and_recall_are_the_direct_ones(rng, rows):
    drawn, real = rng.standard_normal((60, 3)) + 50, rng.standard_normal((83, 3)) * 1.5 + 50

    def apart(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    radii = [np.sort(apart(own, own), 1)[:, 3] for own in (drawn, real)]
    precision = (apart(drawn, real) <= radii[1]).any(1).mean()
    recall = (apart(real, drawn) <= radii[0]).any(1).mean()
    assert distances.precision_recall(drawn, real, rows=rows) == pytest.approx((precision, recall), abs=1e-12)
    assert 0.5 < recall < precision < 1


def test_precision_and_recall_of_the_same_and_of_others(rng):
    features = rng.standard_normal((20, 5)).astype(np.float32)
    assert distances.precision_recall(features, features) == (1, 1)
    assert distances.precision_recall(features, features + 100) == (0, 0)
