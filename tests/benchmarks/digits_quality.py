"""Judges digits that a model drew: an SVM says which they are, a Fréchet distance whether they are as real ones are."""

import functools
from dataclasses import dataclass

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def real_digits():
    """scikit-learn's 1,797 scans: pixels (n, 64) in 0..1, and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.data / 16.0, data.target


def to_vectors(images):
    """uint8 (n, 8, 8, 1) to (n, 64) in 0..1."""
    return images.reshape(len(images), -1) / 255.0


@functools.cache
def svm(*, fit_on_all=False):
    """The judge, which takes pixels in -1..1: fit on the first 1,300 digits, or all. Returns it and its accuracy.

    The accuracy is that on the digits that it was not fit on; on all, where there are none.
    """
    from sklearn.svm import SVC

    pixels, labels = real_digits()
    pixels = pixels * 2 - 1
    count = len(labels) if fit_on_all else 1300
    judge = SVC(kernel="rbf", gamma=0.1).fit(pixels[:count], labels[:count])
    unseen = slice(None) if fit_on_all else slice(count, None)
    return judge, judge.score(pixels[unseen], labels[unseen])


def frechet(a, b):
    """Fréchet distance of two sets of vectors under a normal fit: |μa − μb|² + tr(Σa + Σb − 2(Σa^½ Σb Σa^½)^½).

    Reference: Heusel et al., https://arxiv.org/abs/1706.08500, equation 6.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # Some pixels are white in every scan, so the covariances are singular: roots by symmetric eigenvalues.
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    of_product = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    trace_of_root = np.sqrt(np.clip(of_product, 0, None)).sum()
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b) - 2 * trace_of_root)


@dataclass(frozen=True)
class Verdict:
    """What a pipeline's pictures are worth: of the new thing, and of the old ones."""

    new: float
    """Share of the new thing's pictures that are judged to be it."""
    old: float
    """Share of the old things' pictures that are judged to be what was asked for."""
    worst: float
    """The same of the old thing that fares worst."""
    distance: float
    """Fréchet distance of the old things' pictures to real ones. It sees what no share does: bold ink, few kinds."""

    @classmethod
    def of(cls, images):
        """Judges as many uint8 pictures (n, 8, 8, 1) of each digit: the old ones, 0 to 8, then the new one, 9."""
        pixels, labels = real_digits()
        right = [share_of(digit, part) for digit, part in enumerate(np.split(images, 10))]
        distance = frechet(to_vectors(images[: len(images) // 10 * 9]), pixels[labels < 9])
        return cls(right[9], float(np.mean(right[:9])), min(right[:9]), distance)


def share_of(digit, images):
    """Share of pictures that are judged to be a digit."""
    judge, _ = svm(fit_on_all=True)
    return float((judge.predict(to_vectors(images) * 2 - 1) == digit).mean())
