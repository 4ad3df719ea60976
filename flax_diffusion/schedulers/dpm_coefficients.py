"""Coefficients of DPM-Solver's updates, in NumPy and float64.

With λ = log α − log σ and h = λ_t − λ_s, all four algorithms have the same form in x, a multiple of h:

    sample' = a·sample + s·(e^x − 1)·D0 + s·((e^x − 1)/x − 1)·D1 + s·((e^x − 1 − x)/x² − ½)·D2 + n·noise

| algorithm       | x   | s    | a             | n                |
|-----------------|-----|------|---------------|------------------|
| dpmsolver++     | −h  | −α_t | σ_t/σ_s       | 0                |
| dpmsolver       | h   | −σ_t | α_t/α_s       | 0                |
| sde-dpmsolver++ | −2h | −α_t | σ_t/σ_s·e^−h  | σ_t·√(1 − e^−2h) |
| sde-dpmsolver   | h   | −2σ_t| α_t/α_s       | σ_t·√(e^2h − 1)  |

D0 is the newest output, D1 and D2 are divided differences of it and the two before. Second order with the
"midpoint" form has ½·s·(e^x − 1) before D1. (arXiv:2206.00927, algorithms 1 and 2; arXiv:2211.01095, algorithm 2.)
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from jax import Array

from flax_diffusion.core.errors import unknown

Levels = TypeVar("Levels", np.ndarray, Array)

_SERIES_LIMIT = 1e-4  # below it, two terms of the series are more exact than the quotients


def alpha_sigma(sigmas: Levels, flow: bool | None) -> tuple[Levels, Levels]:
    """Return α and σ of x = α·x0 + σ·ε from noise levels.

    Args:
        sigmas: Noise levels: σ/α where α² + σ² = 1, or σ itself in flow matching.
        flow: Whether the noise levels are those of flow matching, where α = 1 − σ.
    """
    if flow:
        return 1 - sigmas, sigmas
    alpha = 1 / (sigmas**2 + 1) ** 0.5
    return alpha, sigmas * alpha


def update_coefficients(
    alpha: np.ndarray, sigma: np.ndarray, algorithm_type: str, solver_type: str, solver_order: int
) -> np.ndarray:
    """Return the coefficients of every step at every order.

    Args:
        alpha: Share α of x0 in the samples before each step and after the last, (steps + 1,).
        sigma: That of the noise, likewise; the last may be 0 for the "++" algorithms.
        algorithm_type: One of the four in the table above.
        solver_type: "midpoint" or "heun".
        solver_order: Highest order, 1 to 3.

    Returns:
        Coefficients of the sample, of the outputs from newest to oldest, and of the noise, float64
        (solver_order, steps, 5). NaN where a step is too early for the order, or where a last level of 0 leaves the
        order undefined.
    """
    alpha, sigma = alpha.astype(np.float64), sigma.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        lam = np.log(alpha) - np.log(sigma)
        h = np.diff(lam)
        x, scale, keep, noise = _algorithm(algorithm_type, alpha, sigma, h)
        growth = np.expm1(x)
        d0, first = scale * growth, scale * _first_remainder(x, growth)
        h0 = np.concatenate([[np.nan], h[:-1]])
        h1 = np.concatenate([[np.nan], h0[:-1]])
        zero = np.zeros_like(h)
        orders = [np.stack([keep, d0, zero, zero, noise], axis=-1)]
        if solver_order >= 2:
            if solver_type not in ("midpoint", "heun"):
                raise unknown("solver_type", solver_type, ("midpoint", "heun"))
            slope = (0.5 * d0 if solver_type == "midpoint" else first) * h / h0
            orders.append(np.stack([keep, d0 + slope, -slope, zero, noise], axis=-1))
        if solver_order >= 3:
            # In PyTorch's sde-dpmsolver++ the sign of the last term turns −½ into +½; that is followed here.
            second = scale * (_second_remainder(x, growth) + (1 if algorithm_type == "sde-dpmsolver++" else 0))
            near, far = h0 / h, h1 / h
            bend = (first * near + second) / (near + far)
            newest, middle = (first + bend) / near, bend / far
            orders.append(np.stack([keep, d0 + newest, -newest - middle, middle, noise], axis=-1))
    return np.stack(orders)


def _algorithm(
    name: str, alpha: np.ndarray, sigma: np.ndarray, h: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return x, s, a and n of the table above."""
    no_noise = np.zeros_like(h)
    if name == "dpmsolver++":
        return -h, -alpha[1:], sigma[1:] / sigma[:-1], no_noise
    if name == "dpmsolver":
        return h, -sigma[1:], alpha[1:] / alpha[:-1], no_noise
    if name == "sde-dpmsolver++":
        return -2 * h, -alpha[1:], sigma[1:] / sigma[:-1] * np.exp(-h), sigma[1:] * np.sqrt(-np.expm1(-2 * h))
    if name == "sde-dpmsolver":
        return h, -2 * sigma[1:], alpha[1:] / alpha[:-1], sigma[1:] * np.sqrt(np.expm1(2 * h))
    raise unknown("algorithm_type", name, ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"))


def _first_remainder(x: np.ndarray, growth: np.ndarray) -> np.ndarray:
    """Return (e^x − 1)/x − 1."""
    return np.where(np.abs(x) < _SERIES_LIMIT, x / 2 + x**2 / 6, growth / x - 1)


def _second_remainder(x: np.ndarray, growth: np.ndarray) -> np.ndarray:
    """Return (e^x − 1 − x)/x² − ½."""
    return np.where(np.abs(x) < _SERIES_LIMIT, x / 6 + x**2 / 24, (growth - x) / x**2 - 0.5)
