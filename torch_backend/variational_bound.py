"""The variational bound of a micro-batch; the twin of `flax_diffusion.jax_backend.variational_bound`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

BIN = 1 / 255
"""Half the distance of two 8-bit values of a pixel in −1..1."""
OPEN = 0.999
"""Beyond this the lowest and the highest value have no bound on their outer side."""
MIN_PROBABILITY = 1e-12


def variational_bound(
    batch: Mapping[str, Tensor],
    clean: Float[Tensor, "B C h w"],
    difference: Float[Tensor, "B C h w"],
    variance: Float[Tensor, "B C h w"],
) -> Float[Tensor, " B"]:
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
    error = of_mean * difference.detach()
    divergence = (above + torch.expm1(-above) + error**2 * torch.exp(-log_variance)) / 2
    at_start = (batch["timesteps"] == 0)[:, None, None, None]
    nats = torch.where(at_start, -_log_probability(clean, error, log_variance), divergence)
    return nats.mean(dim=(1, 2, 3)) * batch["variance_weights"]


def _log_probability(
    clean: Float[Tensor, "B C h w"], error: Float[Tensor, "B C h w"], log_variance: Float[Tensor, "B C h w"]
) -> Float[Tensor, "B C h w"]:
    """Return the log probability of 8-bit values under a normal distribution whose mean is `clean` − `error`."""
    scale = torch.exp(-log_variance / 2)
    lowest, highest = _normal_cdf(scale * (error + BIN)), _normal_cdf(scale * (BIN - error))
    near = -error.abs()  # the distribution is symmetric, and its lower side has no rounding to 1
    inner = _normal_cdf(scale * (near + BIN)) - _normal_cdf(scale * (near - BIN))
    chance = torch.where(clean < -OPEN, lowest, torch.where(clean > OPEN, highest, inner))
    return torch.log(chance.clamp(min=MIN_PROBABILITY))


def _normal_cdf(x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """Return the distribution function of the standard normal by the approximation that the papers' code uses."""
    return torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
