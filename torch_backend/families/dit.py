"""Pictures of classes, by a transformer over patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]  (made at run time)
from torch import Tensor

from flax_diffusion.core.data.batches import CLASS_LABELS
from flax_diffusion.core.families.dit import DIT
from torch_backend.dit import DiTTransformer2DModel
from torch_backend.families.family import FAMILIES, Batch, Family

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Num


def condition(modules: Any, batch: Batch) -> Int[Tensor, " B"]:
    """Return the class indices (B,) of a batch; a dropped label is the number of classes there."""
    return batch[CLASS_LABELS]


def predict(
    modules: Any, sample: Float[Tensor, "B C h w"], timesteps: Num[Tensor, " B"], condition: Int[Tensor, " B"]
) -> Float[Tensor, "B c h w"]:
    """Return the transformer's prediction (B, C, h, w), or (B, 2C, h, w) where it learns the variance.

    Args:
        modules: The pipeline's modules.
        sample: Noisy samples, (B, C, h, w).
        timesteps: Times, (B,).
        condition: Class indices, (B,).
    """
    transformer = modules.by_name["transformer"]
    return transformer(sample.to(transformer.dtype), timesteps, condition).sample


FAMILIES.register(
    DIT.name,
    Family(
        classes={"DiTTransformer2DModel": DiTTransformer2DModel, "AutoencoderKL": AutoencoderKL},
        condition=condition,
        predict=predict,
    ),
)
