"""Pictures from noise alone, or of classes, by a UNet2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, UNet2DModel  # pyright: ignore[reportPrivateImportUsage]  (made at run time)
from torch import Tensor

from flax_diffusion.core.data.batches import CLASS_LABELS
from torch_backend.families.family import FAMILIES, Batch, Family

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Num


def condition(modules: Any, batch: Batch) -> Int[Tensor, " B"] | None:
    """Return the class indices (B,) of a batch; None where it has none."""
    return batch.get(CLASS_LABELS)


def predict(
    modules: Any,
    sample: Float[Tensor, "B C h w"],
    timesteps: Num[Tensor, " B"],
    condition: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B C h w"]:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,), of classes (B,) or of none."""
    unet = modules.by_name["unet"]
    return unet(sample.to(unet.dtype), timesteps, class_labels=condition).sample


FAMILIES.register(
    "ddpm",
    Family(classes={"UNet2DModel": UNet2DModel, "AutoencoderKL": AutoencoderKL}, condition=condition, predict=predict),
)
