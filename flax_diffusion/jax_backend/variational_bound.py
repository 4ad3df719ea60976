"""The variational bound of a micro-batch, which trains a learned variance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

BIN = 1 / 255
"""Half the distance of two 8-bit values of a pixel in −1..1."""
OPEN = 0.999
"""Beyond this the lowest and the highest value have no bound on their outer side."""
MIN_PROBABILITY = 1e-12


def variational_bound(
    batch: Mapping[str, jax.Array],
    clean: Float[Array, "B C h w"],
    difference: Float[Array, "B C h w"],
    variance: Float[Array, "B C h w"],
) -> Float[Array, " B"]:
    """Return the bound of each example, times its `variance_weights`, (B,).

    Args:
        batch: The timesteps and the fields of `VarianceTerms`, each (B,).
        clean: What was noised, (B, C, h, w).
        difference: Prediction minus target, (B, C, h, w); no gradient goes through it.
        variance: What the model gives of the variance, (B, C, h, w).

    Returns:
        At t > 0 the divergence of the model's denoising step from the true one; at t = 0 minus the log probability of
        the sample, as of 8-bit values; both as means over the numbers of a sample.

    Reference:
        Ho et al., https://arxiv.org/abs/2006.11239, equations 5 and 13; Nichol and Dhariwal,
        https://arxiv.org/abs/2102.09672, section 3.1.
    """
    lower, upper, of_mean = (batch[f"variance_{name}"][:, None, None, None] for name in ("lower", "upper", "mean"))
    above = (variance + 1) / 2 * (upper - lower)
    log_variance = lower + above
    error = of_mean * jax.lax.stop_gradient(difference)
    divergence = (above + jnp.expm1(-above) + error**2 * jnp.exp(-log_variance)) / 2
    at_start = (batch["timesteps"] == 0)[:, None, None, None]
    nats = jnp.where(at_start, -_log_probability(clean, error, log_variance), divergence)
    return nats.mean(axis=(1, 2, 3)) * batch["variance_weights"]


def _log_probability(
    clean: Float[Array, "B C h w"], error: Float[Array, "B C h w"], log_variance: Float[Array, "B C h w"]
) -> Float[Array, "B C h w"]:
    """Return the log probability of 8-bit values under a normal distribution whose mean is `clean` − `error`."""
    scale = jnp.exp(-log_variance / 2)
    lowest, highest = _normal_cdf(scale * (error + BIN)), _normal_cdf(scale * (BIN - error))
    near = -jnp.abs(error)  # the distribution is symmetric, and its lower side has no rounding to 1
    inner = _normal_cdf(scale * (near + BIN)) - _normal_cdf(scale * (near - BIN))
    chance = jnp.where(clean < -OPEN, lowest, jnp.where(clean > OPEN, highest, inner))
    return jnp.log(jnp.maximum(chance, MIN_PROBABILITY))


def _normal_cdf(x: Float[Array, "B C h w"]) -> Float[Array, "B C h w"]:
    """Return the distribution function of the standard normal by the approximation that the papers' code uses."""
    return jax.nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
