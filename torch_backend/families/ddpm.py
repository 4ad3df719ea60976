"""Pictures from noise alone, by a UNet2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, UNet2DModel  # pyright: ignore[reportPrivateImportUsage]  (made at run time)
from torch import Tensor

from torch_backend.families.family import FAMILIES, Family

if TYPE_CHECKING:
    from jaxtyping import Float, Num


def predict(
    modules: Any, sample: Float[Tensor, "B C h w"], timesteps: Num[Tensor, " B"], condition: None = None
) -> Float[Tensor, "B C h w"]:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,)."""
    unet = modules.by_name["unet"]
    return unet(sample.to(unet.dtype), timesteps).sample


FAMILIES.register("ddpm", Family(classes={"UNet2DModel": UNet2DModel, "AutoencoderKL": AutoencoderKL}, predict=predict))
