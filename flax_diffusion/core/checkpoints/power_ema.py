"""Power-function averages of the weights, and how one that was not kept is made of snapshots of those that were.

The average of exponent γ after t optimizer steps weighs the weights θ(τ) of each earlier step by a power of τ:

    θ_γ(t) = ∫₀ᵗ p_γ,t(τ) θ(τ) dτ        p_γ,t(τ) = (γ + 1) τ^γ / t^(γ+1)        (1)

A run keeps it as a moving average with the decay β_γ(t) = (1 − 1/t)^(γ+1)                      (2)
Its relative width is σ_rel = (γ + 1)^½ (γ + 2)⁻¹ (γ + 3)^-½                                    (3)
Since (1) is linear in the profile p, the sum of snapshots Σ xᵢ θ_γᵢ(tᵢ) that comes closest to another average is the
one whose profile Σ xᵢ p_γᵢ,tᵢ comes closest to that of the average:

    A x = b        Aᵢⱼ = ⟨pᵢ, pⱼ⟩, bᵢ = ⟨pᵢ, p⟩                                                     (4)
    ⟨p_γ,t, p_δ,u⟩ = (γ + 1)(δ + 1) / ((γ + δ + 1) u) · (t / u)^δ        for t ≤ u                  (5)

In the paper's networks the length of weights makes no difference. Elsewhere it does, so x is divided by its sum, which
is 1 where the profiles match.

Reference:
    Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, https://arxiv.org/abs/2312.02696,
    section 3 and appendix C.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np


@functools.cache
def exponent_of(sigma_rel: float) -> float:
    """Return the exponent γ of an average by equation (3).

    Args:
        sigma_rel: Relative width, greater than 0 and less than 12^-½.
    """
    # Squared, (3) is a cubic that is convex for positive γ and has one positive root, at most 1/σ_rel: from there
    # Newton's steps only get smaller values until they are exact.
    square = sigma_rel**-2
    gamma, before = 1.0 / sigma_rel, math.inf
    while gamma < before:
        before = gamma
        value = ((gamma + 7.0) * gamma + 16.0 - square) * gamma + 12.0 - square
        gamma -= value / ((3.0 * gamma + 14.0) * gamma + 16.0 - square)
    return before


def decay_of(exponent: float, step: int) -> float:
    """Return the decay of an average at an optimizer step by equation (2).

    Args:
        exponent: The exponent γ.
        step: Number of the optimizer step, from 1, which copies the weights.
    """
    return (1.0 - 1.0 / step) ** (exponent + 1.0)


def combination(kept: Sequence[tuple[float, int]], sigma_rel: float, step: int) -> tuple[np.ndarray, float]:
    """Solve (4) for an average that was not kept, and divide the factors by their sum.

    Args:
        kept: Relative width and optimizer step of each snapshot.
        sigma_rel: Relative width of the average.
        step: Its optimizer step.

    Returns:
        The factors of the snapshots, float64 (N,), and the distance of their profile from that of the average,
        relative to its norm.
    """
    widths, steps = (np.array(column, np.float64) for column in zip(*kept, (sigma_rel, step), strict=True))
    exponents = np.array([exponent_of(float(width)) for width in widths])
    products = _inner(exponents[:, None], steps[:, None], exponents, steps)
    gram, wanted, norm = products[:-1, :-1], products[:-1, -1], float(products[-1, -1])
    lengths = np.sqrt(np.diag(gram))  # profiles of length 1 have the better conditioned matrix
    factors = np.linalg.lstsq(gram / np.outer(lengths, lengths), wanted / lengths, rcond=None)[0] / lengths
    factors /= factors.sum()
    rest = norm + float(factors @ (gram @ factors - 2.0 * wanted))
    return factors, math.sqrt(max(0.0, rest / norm))


def _inner(gamma: np.ndarray, t: np.ndarray, delta: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Return the inner products of profiles by equation (5), broadcast."""
    first, last = np.minimum(t, u), np.maximum(t, u)
    exponent = np.where(t <= u, delta, gamma)
    return (gamma + 1.0) * (delta + 1.0) / ((gamma + delta + 1.0) * last) * (first / last) ** exponent
