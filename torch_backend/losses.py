"""The losses of a micro-batch; the twin of `flax_diffusion.jax_backend.losses`, shapes as there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flax_diffusion.core.data.sources.source import PART_WEIGHTS
from torch_backend.modules import Modules

if TYPE_CHECKING:
    from jaxtyping import Float

Batch = dict[str, Tensor]

BIN = 1 / 255
"""Half the distance of two 8-bit values of a pixel in −1..1."""
OPEN = 0.999
"""Beyond this the lowest and the highest value have no bound on their outer side."""
MIN_PROBABILITY = 1e-12


def mean_losses(modules: Modules, batch: Batch) -> dict[str, Float[Tensor, ""]]:
    """Compute the weighted losses of a micro-batch; the twin of `flax_diffusion.jax_backend.losses.mean_losses`.

    Args:
        modules: The pipeline's modules.
        batch: As of `denoising_loss` or the family's own loss.

    Returns:
        Means over the examples by name, in float32 at least: `loss`, which is trained, and its parts.
    """
    if modules.family.losses is not None:
        losses = modules.family.losses(modules, batch)
    else:
        losses = {"loss": denoising_loss(modules, batch)}
    means = {name: (each * batch["loss_weights"]).mean() for name, each in losses.items()}
    parts = {name.removesuffix("_weights") for name in batch if name.endswith(PART_WEIGHTS)}
    return means | {name: (losses["loss"] * batch[f"{name}_weights"]).mean() for name in sorted(parts)}


def denoising_loss(modules: Modules, batch: Batch) -> Float[Tensor, " B"]:
    """Compute the denoising loss of each example; the twin of `flax_diffusion.jax_backend.losses.denoising_loss`.

    Args:
        modules: The pipeline's modules.
        batch: Images as pixel_values (B, C, H, W) or as the posterior (B, 2, C, h, w) of their latents, noise
            (B, C, h, w), the fields of the objective's `Mixture`, each (B,), and where the pipeline needs them
            latent_noise (B, C, h, w), perturbation (B, C, h, w), and what its family conditions on.

    Returns:
        mean((prediction_i − target_i)²) + bound_i, (B,), in float32 at least. There is a bound, that of
        `variational_bound`, only where a variance is trained.

    Reference:
        `core.objectives.objective`, for input and target.
    """
    if "posterior" in batch:
        mean, logvar = batch["posterior"].unbind(dim=1)
        clean = modules.sample_latents(mean, (0.5 * logvar).exp(), batch["latent_noise"])
    else:
        clean = modules.encode_images(batch["pixel_values"], batch.get("latent_noise"))
    noise = batch["noise"]
    added = noise + batch["perturbation"] if "perturbation" in batch else noise
    noisy = _mixed(batch, "input", clean, added)
    output = modules.output(noisy, batch["timesteps"], modules.condition(batch))
    predicted, variance = output[:, : noisy.shape[1]], output[:, noisy.shape[1] :]
    target = _mixed(batch, "target", clean, noise)
    wide = torch.promote_types(predicted.dtype, torch.float32)
    difference = predicted.to(wide) - target.to(wide)
    error = difference.square().mean(dim=(1, 2, 3))
    if "variance_weights" in batch:
        error = error + variational_bound(batch, clean.to(wide), difference, variance.to(wide))
    return error


def _mixed(
    batch: Batch, what: str, clean: Float[Tensor, "B C h w"], noise: Float[Tensor, "B C h w"]
) -> Float[Tensor, "B C h w"]:
    """Return the model's input or target, (B, C, h, w): what_clean · clean + what_noise · noise."""
    of_clean, of_noise = (batch[f"{what}_{part}"][:, None, None, None] for part in ("clean", "noise"))
    return of_clean * clean + of_noise * noise


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
