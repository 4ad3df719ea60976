"""The AutoencoderKL by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]  (made at run time)
from torch import Tensor

from torch_backend.families.family import FAMILIES, Batch, Family

if TYPE_CHECKING:
    from jaxtyping import Float


def losses(modules: Any, batch: Batch) -> dict[str, Float[Tensor, " B"]]:
    """Return the autoencoder's losses of each example; the twin of the JAX side's, which describes them.

    Args:
        modules: With the autoencoder alone.
        batch: pixel_values (B, C, H, W), latent_noise (B, c, h, w).

    Reference:
        Kingma and Welling, https://arxiv.org/abs/1312.6114, equation 10.
    """
    how = modules.spec.autoencoder_loss
    pixels = batch["pixel_values"]
    posterior = modules.posterior(pixels)
    made = modules.decode(posterior.mean + posterior.std * batch["latent_noise"])
    wide = torch.promote_types(made.dtype, torch.float32)
    error = made.to(wide) - pixels.to(wide)
    error = {"l1": torch.abs, "l2": torch.square}[how.rec_loss](error).mean(dim=(1, 2, 3))
    divergence = posterior.kl().to(wide)
    return {"loss": error + how.kl_scale * divergence, "reconstruction_loss": error, "kl_loss": divergence}


FAMILIES.register("autoencoder", Family(classes={"AutoencoderKL": AutoencoderKL}, losses=losses))
