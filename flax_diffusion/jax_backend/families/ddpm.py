"""Pictures from noise alone, by a UNet2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flax_diffusion.jax_backend.families.family import FAMILIES, Family, Params
from flax_diffusion.models import FlaxAutoencoderKL, FlaxUNet2DModel

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key, Num


def predict(
    modules: Any,
    params: Params,
    sample: Float[Array, "B C h w"],
    timesteps: Num[Array, " B"],
    condition: None = None,
    dropout: Key[Array, ""] | None = None,
) -> Float[Array, "B C h w"]:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,)."""
    return modules.call("unet", params, dropout, sample, timesteps)[0]


FAMILIES.register(
    "ddpm", Family(classes={"UNet2DModel": FlaxUNet2DModel, "AutoencoderKL": FlaxAutoencoderKL}, predict=predict)
)
