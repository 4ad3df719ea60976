"""Pictures from noise alone, by a UNet2DModel."""

from __future__ import annotations

from typing import Any

import jax

from flax_diffusion.jax_backend.families.family import FAMILIES, Family, Params
from flax_diffusion.models import FlaxAutoencoderKL, FlaxUNet2DModel


def predict(
    modules: Any,
    params: Params,
    sample: jax.Array,
    timesteps: jax.Array,
    condition: None = None,
    dropout: jax.Array | None = None,
) -> jax.Array:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,)."""
    return modules.call("unet", params, dropout, sample, timesteps)[0]


FAMILIES.register(
    "ddpm", Family(classes={"UNet2DModel": FlaxUNet2DModel, "AutoencoderKL": FlaxAutoencoderKL}, predict=predict)
)
