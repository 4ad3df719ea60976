"""The AutoencoderKL by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from flax_diffusion.jax_backend.families.family import FAMILIES, Batch, Family, Params
from flax_diffusion.models import FlaxAutoencoderKL

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key


def losses(modules: Any, params: Params, batch: Batch, dropout: Key[Array, ""] | None) -> dict[str, Float[Array, " B"]]:
    """Return the autoencoder's losses of each example: reconstruction, the posterior's divergence, and what is trained.

    Args:
        modules: With the autoencoder alone.
        params: Its weights.
        batch: pixel_values (B, C, H, W), latent_noise (B, c, h, w).
        dropout: Not used; the autoencoder has none.

    Returns:
        `reconstruction_loss`, the mean error of a picture's pixels; `kl_loss`, the divergence of the posterior of its
        latents from a standard normal distribution; and `loss`, the former + kl_scale · the latter. Each (B,), in
        float32 at least.

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
    divergence = posterior.kl().astype(wide)
    return {"loss": error + how.kl_scale * divergence, "reconstruction_loss": error, "kl_loss": divergence}


FAMILIES.register("autoencoder", Family(classes={"AutoencoderKL": FlaxAutoencoderKL}, losses=losses))
