"""Denoising diffusion over T timesteps: the model says the noise, the velocity or the clean sample.

Reference: Ho et al., arXiv:2006.11239, equations 4 and 14; Salimans and Ho, arXiv:2202.00512, appendix D, for the
velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from flax_diffusion.core.errors import unknown
from flax_diffusion.core.objectives.objective import Mixture

Table = NDArray[Any]

_TARGETS: dict[str, Callable[[Table, Table], tuple[Table, Table]]] = {
    "epsilon": lambda signal, noise: (np.zeros_like(signal), np.ones_like(noise)),
    "v_prediction": lambda signal, noise: (-noise, signal),
    "sample": lambda signal, noise: (np.ones_like(signal), np.zeros_like(noise)),
}
"""target_clean and target_noise of √ᾱ and √(1−ᾱ), by prediction type."""


@dataclass(frozen=True)
class Ddpm:
    """An objective whose time is one of T timesteps, each as likely as the others.

    Attributes:
        tables: Of every timestep, arrays (T,).
    """

    tables: Mixture = field(repr=False)

    def draw(self, rng: np.random.Generator) -> Mixture:
        """Draw one example's mixture."""
        return self.at(int(rng.integers(len(self.tables.timesteps))))

    def at(self, timestep: int) -> Mixture:
        """Return the mixture of a timestep in 0..T-1."""
        return Mixture(*(table[timestep, ...] for table in self.tables))


def ddpm(
    alphas_cumprod: Table, prediction_type: str, loss_weights: Table | None = None, dtype: DTypeLike = np.float32
) -> Ddpm:
    """Make the objective of a noise schedule.

    Args:
        alphas_cumprod: ᾱ, (T,).
        prediction_type: epsilon, v_prediction or sample.
        loss_weights: of every timestep, (T,); None for ones.
        dtype: in which the numbers are computed and kept.

    Raises:
        ConfigError: an unknown prediction type.
        ValueError: weights for another number of timesteps.
    """
    if prediction_type not in _TARGETS:
        raise unknown("prediction_type", prediction_type, _TARGETS)
    bar = np.asarray(alphas_cumprod, dtype)
    weights = np.ones(len(bar), np.float32) if loss_weights is None else np.asarray(loss_weights, np.float32)
    if weights.shape != bar.shape:
        raise ValueError(f"loss_weights has shape {weights.shape}; it must be {bar.shape}")
    signal, noise = np.sqrt(bar), np.sqrt(1 - bar)
    steps = np.arange(len(bar), dtype=np.int32)
    return Ddpm(Mixture(steps, signal, noise, *_TARGETS[prediction_type](signal, noise), weights))
