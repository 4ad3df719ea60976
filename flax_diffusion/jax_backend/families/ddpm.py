"""Pictures from noise alone, or of classes, by a UNet2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flax_diffusion.core.data.batches import CLASS_LABELS
from flax_diffusion.jax_backend.families.family import FAMILIES, Batch, Family, Params
from flax_diffusion.models import FlaxAutoencoderKL, FlaxUNet2DModel

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key, Num


def condition(
    modules: Any, params: Params, batch: Batch, dropout: Key[Array, ""] | None = None
) -> Int[Array, " B"] | None:
    """Return the class indices (B,) of a batch; None where it has none."""
    return batch.get(CLASS_LABELS)


def predict(
    modules: Any,
    params: Params,
    sample: Float[Array, "B C h w"],
    timesteps: Num[Array, " B"],
    condition: Int[Array, " B"] | None = None,
    dropout: Key[Array, ""] | None = None,
) -> Float[Array, "B C h w"]:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,), of classes (B,) or of none."""
    return modules.call("unet", params, dropout, sample, timesteps, condition)[0]


FAMILIES.register(
    "ddpm",
    Family(
        classes={"UNet2DModel": FlaxUNet2DModel, "AutoencoderKL": FlaxAutoencoderKL},
        condition=condition,
        predict=predict,
    ),
)
