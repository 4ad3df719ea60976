"""The AutoencoderKL by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from flax_diffusion.jax_backend.families.family import FAMILIES, Batch, Family, Params
from flax_diffusion.models import FlaxAutoencoderKL

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key


def loss(modules: Any, params: Params, batch: Batch, dropout: Key[Array, ""] | None) -> Float[Array, ""]:
    """Return the autoencoder's loss of a micro-batch: reconstruction, and the posterior's divergence from a normal one.

    Args:
        modules: With the autoencoder alone.
        params: Its weights.
        batch: pixel_values (B, C, H, W), latent_noise (B, c, h, w), loss_weights (B,).
        dropout: Not used; the autoencoder has none.

    Returns:
        Σ_i w_i · (mean of the errors of image i + kl_scale · KL_i) / B, in float32 at least.

    Reference:
        Kingma and Welling, https://arxiv.org/abs/1312.6114, equation 10; the scales of Diffusers' train_autoencoderkl.
    """
    how = modules.spec.autoencoder_loss
    pixels = batch["pixel_values"]
    posterior = modules.posterior(params, pixels)
    made = modules.decode(params, posterior.sample_with(batch["latent_noise"]))
    wide = jnp.promote_types(made.dtype, jnp.float32)
    error = made.astype(wide) - pixels.astype(wide)
    error = {"l1": jnp.abs, "l2": jnp.square}[how.rec_loss](error).mean(axis=(1, 2, 3))
    return jnp.mean((error + how.kl_scale * posterior.kl().astype(wide)) * batch["loss_weights"])


FAMILIES.register("autoencoder", Family(classes={"AutoencoderKL": FlaxAutoencoderKL}, loss=loss))
