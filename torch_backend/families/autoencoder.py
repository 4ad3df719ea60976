"""The AutoencoderKL by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]  (made at run time)
from torch import Tensor

from torch_backend.families.family import FAMILIES, Batch, Family

if TYPE_CHECKING:
    from jaxtyping import Float


def loss(modules: Any, batch: Batch) -> Float[Tensor, ""]:
    """Return the autoencoder's loss, Σ_i w_i · (mean of the errors of image i + kl_scale · KL_i) / B.

    Args:
        modules: With the autoencoder alone.
        batch: pixel_values (B, C, H, W), latent_noise (B, c, h, w), loss_weights (B,).

    Reference:
        Kingma and Welling, https://arxiv.org/abs/1312.6114, equation 10; the twin of the JAX side's.
    """
    how = modules.spec.autoencoder_loss
    pixels = batch["pixel_values"]
    posterior = modules.posterior(pixels)
    made = modules.decode(posterior.mean + posterior.std * batch["latent_noise"])
    wide = torch.promote_types(made.dtype, torch.float32)
    error = made.to(wide) - pixels.to(wide)
    error = {"l1": torch.abs, "l2": torch.square}[how.rec_loss](error).mean(dim=(1, 2, 3))
    return ((error + how.kl_scale * posterior.kl().to(wide)) * batch["loss_weights"]).mean()


FAMILIES.register("autoencoder", Family(classes={"AutoencoderKL": AutoencoderKL}, loss=loss))
