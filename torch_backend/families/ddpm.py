"""Pictures from noise alone, by a UNet2DModel."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, UNet2DModel  # pyright: ignore[reportPrivateImportUsage]  (made at run time)
from torch import Tensor

from torch_backend.families.family import FAMILIES, Family


def predict(modules: Any, sample: Tensor, timesteps: Tensor, condition: None = None) -> Tensor:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,)."""
    unet = modules.by_name["unet"]
    return unet(sample.to(unet.dtype), timesteps).sample


FAMILIES.register("ddpm", Family(classes={"UNet2DModel": UNet2DModel, "AutoencoderKL": AutoencoderKL}, predict=predict))
