"""The variational bound, by which a model learns the variance of each denoising step.

Such a model gives a second half of channels v, which mix two bounds of the variance by their logarithms:

    log σ² = (v + 1)/2 · log β_t + (1 − v)/2 · log β̃_t

Its loss has one term more, in bits per number of a sample, which moves v alone: the mean of the step is taken from the
prediction with no gradient.

Reference:
    Nichol and Dhariwal, https://arxiv.org/abs/2102.09672, equations 15 and 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

Table = NDArray[Any]


class VarianceTerms(NamedTuple):
    """What the bound needs of an example's timestep; every field is a scalar array (), or (T,) of all timesteps.

    Attributes:
        variance_lower: log β̃_t, the lower bound of log σ²; at t = 0, where β̃ is 0, that of t = 1.
        variance_upper: log β_t, the upper one.
        variance_mean: Factor from the error of the prediction to that of the step's mean.
        variance_weights: Of the example's bound in nats per number.
    """

    variance_lower: np.ndarray
    variance_upper: np.ndarray
    variance_mean: np.ndarray
    variance_weights: np.ndarray


class MixtureWithVariance(NamedTuple):
    """What is drawn for one example where a variance is learnt: the fields of `Mixture` and of `VarianceTerms`."""

    timesteps: np.ndarray
    input_clean: np.ndarray
    input_noise: np.ndarray
    target_clean: np.ndarray
    target_noise: np.ndarray
    loss_weights: np.ndarray
    variance_lower: np.ndarray
    variance_upper: np.ndarray
    variance_mean: np.ndarray
    variance_weights: np.ndarray


def variance_terms(
    alphas_cumprod: Table, target_clean: Table, target_noise: Table, weight: float, dtype: DTypeLike
) -> VarianceTerms:
    """Return the terms of all timesteps.

    Args:
        alphas_cumprod: ᾱ, (T,).
        target_clean: Of x in what the model predicts, (T,).
        target_noise: Of ε in what the model predicts, (T,).
        weight: λ of the bound, which is the sum over all timesteps; the mean over drawn ones is multiplied by T.
        dtype: Dtype of the terms.

    Reference:
        Ho et al., https://arxiv.org/abs/2006.11239, equation 7, for the mean of a step and β̃.
    """
    bar = np.asarray(alphas_cumprod, np.float64)
    before = np.append(1.0, bar[:-1])
    beta = 1 - bar / before
    posterior = beta * (1 - before) / (1 - bar)
    posterior[0] = posterior[1] if len(bar) > 1 else beta[0]
    # x = (target_noise · input − √(1 − ᾱ) · target) / share, so an error of the target is one of x, and of the mean.
    share = np.sqrt(bar) * target_noise - np.sqrt(1 - bar) * target_clean
    of_mean = np.sqrt(before) * beta / (1 - bar) * np.sqrt(1 - bar) / share
    terms = np.log(posterior), np.log(beta), of_mean, np.full(len(bar), weight * len(bar) / np.log(2))
    return VarianceTerms(*(np.asarray(term, dtype) for term in terms))
