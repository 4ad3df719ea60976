"""Noise levels σ = √((1 − ᾱ)/ᾱ) for the samplers that walk in σ, in NumPy, rounded as PyTorch's schedulers do."""

from __future__ import annotations

import math

import numpy as np

from flax_diffusion.core.errors import ConfigError, unknown

_KARRAS_RHO = 7.0  # arXiv:2206.00364, equation 5
_BETA_SHAPE = 0.6  # both shape parameters, arXiv:2407.12173


def training_sigmas(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Return σ of every training timestep, smallest first, float32 (T,).

    Args:
        alphas_cumprod: ᾱ of every training timestep, float32 (T,), above 0.
    """
    alpha_bar = np.asarray(alphas_cumprod, np.float32)
    return np.sqrt((np.float32(1) - alpha_bar) / alpha_bar)


def karras_sigmas(sigma_min: float, sigma_max: float, count: int) -> np.ndarray:
    """Return `count` levels from σ_max down to σ_min, even in σ^(1/7) (arXiv:2206.00364, equation 5)."""
    low, high = sigma_min ** (1 / _KARRAS_RHO), sigma_max ** (1 / _KARRAS_RHO)
    return (high + np.linspace(0, 1, count) * (low - high)) ** _KARRAS_RHO


def exponential_sigmas(sigma_min: float, sigma_max: float, count: int) -> np.ndarray:
    """Return `count` levels from σ_max down to σ_min, even in log σ."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))


def beta_sigmas(sigma_min: float, sigma_max: float, count: int) -> np.ndarray:
    """Return `count` levels from σ_max down to σ_min at quantiles of a Beta distribution (arXiv:2407.12173)."""
    from scipy.stats import beta  # slow to import and needed only here

    quantiles = beta.ppf(1 - np.linspace(0, 1, count), _BETA_SHAPE, _BETA_SHAPE)
    return sigma_min + quantiles * (sigma_max - sigma_min)


def sigma_to_timestep(sigmas: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
    """Return the fractional training timesteps at which the noise schedule passes given levels.

    Args:
        sigmas: Levels, any shape.
        log_sigmas: Rising log σ of every training timestep, (T,).

    Returns:
        Timesteps in the shape of `sigmas`, interpolated linearly in log σ and clipped to [0, T − 1].
    """
    if len(log_sigmas) < 2:
        return np.zeros(np.shape(sigmas))
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_sigmas, wanted, side="right") - 1, 0, len(log_sigmas) - 2)
    weight = (log_sigmas[low] - wanted) / (log_sigmas[low] - log_sigmas[low + 1])
    weight = np.clip(weight, 0, 1)
    return (1 - weight) * low + weight * (low + 1)


def check_one_spacing(flags: dict[str, bool | None]) -> None:
    """Raise ConfigError where more than one of the flags, each a way to space the noise levels, is set."""
    chosen = [name for name, value in flags.items() if value]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are set; the noise levels can be spaced in one way only: keep one")


def sigma_after_last(final_sigmas_type: str, training: np.ndarray) -> float:
    """Return the noise level after the last step.

    Args:
        final_sigmas_type: "zero" for 0, or "sigma_min" for the level of timestep 0.
        training: σ of every training timestep, smallest first, (T,).
    """
    if final_sigmas_type not in ("zero", "sigma_min"):
        raise unknown("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
    return float(training[0]) if final_sigmas_type == "sigma_min" else 0.0
