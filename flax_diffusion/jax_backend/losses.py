"""The losses of a micro-batch: of what a model predicts, of a learned variance, and of an objective of one's own.

Shapes: B images, C channels, H and W in pixels, h and w of what is denoised (pixels or latents).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from flax_diffusion.core.data.sources.source import PART_WEIGHTS
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.jax_backend.modules import Modules
from flax_diffusion.jax_backend.optimizers.optimizer import Params
from flax_diffusion.models.norms import forward_derivatives
from flax_diffusion.models.outputs import FlaxDiagonalGaussianDistribution

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key

Batch = dict[str, jax.Array]
Scalars = dict[str, jax.Array]
"""Scalars by name."""

BIN = 1 / 255
"""Half the distance of two 8-bit values of a pixel in −1..1."""
OPEN = 0.999
"""Beyond this the lowest and the highest value have no bound on their outer side."""
MIN_PROBABILITY = 1e-12


def mean_losses(modules: Modules, params: Params, batch: Batch, dropout: Key[Array, ""] | None) -> Scalars:
    """Compute the weighted losses of a micro-batch, by the family's function, the objective's, or `denoising_loss`.

    Args:
        modules: The pipeline's modules.
        params: Weights of all components, trained and frozen.
        batch: As of `denoising_loss`, `objective_losses` or the family's own loss.
        dropout: Key of the dropout masks, and of an objective's own loss; None in evaluation.

    Returns:
        Means over the examples by name, in float32 at least: Σ_i w_i · loss_i / B of every loss of the function, with
        the batch's `loss_weights` as w; `loss` is trained, and others are its parts. With weights of its own,
        `<name>_loss_weights`, the batch may ask for more parts of `loss`, `<name>_loss`.
    """
    if modules.family.losses is not None:
        losses = modules.family.losses(modules, params, batch, dropout)
    else:
        compute = denoising_loss if modules.objective is None else objective_losses
        losses = {"loss": compute(modules, params, batch, dropout)}
    means = {name: jnp.mean(each * batch["loss_weights"]) for name, each in losses.items()}
    parts = {name.removesuffix("_weights") for name in batch if name.endswith(PART_WEIGHTS)}
    return means | {name: jnp.mean(losses["loss"] * batch[f"{name}_weights"]) for name in sorted(parts)}


def denoising_loss(
    modules: Modules, params: Params, batch: Batch, dropout: Key[Array, ""] | None
) -> Float[Array, " B"]:
    """Compute the denoising loss of each example.

    Args:
        modules: The pipeline's modules.
        params: Weights of all components, trained and frozen.
        batch: Images as pixel_values (B, C, H, W) or as the posterior (B, 2, C, h, w) of their latents, noise
            (B, C, h, w), the fields of the objective's `Mixture`, each (B,), and where the pipeline needs them
            latent_noise (B, C, h, w), perturbation (B, C, h, w), and what its family conditions on.
        dropout: Key of the dropout masks; None in evaluation.

    Returns:
        mean((prediction_i − target_i)²) + bound_i, (B,), in float32 at least. There is a bound, that of
        `variational_bound`, only where a variance is trained.

    Reference:
        `core.objectives.objective`, for input and target.
    """
    clean, noise = _clean(modules, params, batch), batch["noise"]
    added = noise + batch["perturbation"] if "perturbation" in batch else noise
    noisy = _mixed(batch, "input", clean, added)
    condition = modules.condition(params, batch, dropout)
    output = modules.output(params, noisy, batch["timesteps"], condition, dropout)
    predicted, variance = output[:, : noisy.shape[1]], output[:, noisy.shape[1] :]
    target = _mixed(batch, "target", clean, noise)
    wide = jnp.promote_types(predicted.dtype, jnp.float32)
    difference = predicted.astype(wide) - target.astype(wide)
    error = jnp.square(difference).mean(axis=(1, 2, 3))
    if "variance_weights" in batch:
        error += variational_bound(batch, clean.astype(wide), difference, variance.astype(wide))
    return error


def _clean(modules: Modules, params: Params, batch: Batch) -> Float[Array, "B C h w"]:
    """Return what is noised: pixels, or scaled latents."""
    if "posterior" in batch:
        posterior = FlaxDiagonalGaussianDistribution.of(batch["posterior"][:, 0], batch["posterior"][:, 1])
        return modules.sample_latents(posterior, batch["latent_noise"])
    return modules.encode_images(params, batch["pixel_values"], batch.get("latent_noise"))


def objective_losses(modules: Modules, params: Params, batch: Batch, key: Key[Array, ""] | None) -> Float[Array, " B"]:
    """Compute the loss of each example by an objective that has a loss of its own.

    Args:
        modules: The pipeline's modules, with the objective.
        params: Weights of all components, trained and frozen.
        batch: As of `denoising_loss`, but with the fields of what the objective draws in place of `Mixture`'s.
        key: Key of the dropout masks, and of the loss. None in evaluation, without dropout and with a fixed key.

    Returns:
        The losses, (B,), in float32 at least.

    Reference:
        `core.objectives.objective.Objective.loss`.
    """
    objective = modules.objective
    assert objective is not None
    assert objective.loss is not None
    dropout, own = (None, jax.random.key(0)) if key is None else jax.random.split(key)
    condition = modules.condition(params, batch, dropout)

    def model(x: Float[Array, "B C h w"], t: Float[Array, " B"]) -> Float[Array, "B C h w"]:
        with forward_derivatives():
            predicted = modules.predict(params, x, t, condition, dropout)
        return predicted.astype(jnp.promote_types(predicted.dtype, jnp.float32))

    given = batch | {"clean": _clean(modules, params, batch)}
    losses = objective.loss(model, given, own)
    if losses.shape != batch["loss_weights"].shape:
        raise ConfigError(
            f"--objective: the loss of {objective.name} has shape {losses.shape}; it must be that of the batch's "
            f"examples, {batch['loss_weights'].shape}: take the mean over an example's pixels"
        )
    return losses


def _mixed(
    batch: Batch, what: str, clean: Float[Array, "B C h w"], noise: Float[Array, "B C h w"]
) -> Float[Array, "B C h w"]:
    """Return the model's input or target, (B, C, h, w): what_clean · clean + what_noise · noise."""
    of_clean, of_noise = (batch[f"{what}_{part}"][:, None, None, None] for part in ("clean", "noise"))
    return of_clean * clean + of_noise * noise


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
