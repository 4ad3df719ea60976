"""Pictures from prompts: Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import (  # made at run time
    AutoencoderKL,  # pyright: ignore[reportPrivateImportUsage]
    UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import Tensor
from transformers import CLIPTextModel

from torch_backend.families.family import FAMILIES, Batch, Family

if TYPE_CHECKING:
    from jaxtyping import Float, Num


def condition(modules: Any, batch: Batch) -> Float[Tensor, "B L D"]:
    """Return the text encoder's last hidden states (B, L, D), which the UNet attends to.

    Args:
        modules: The pipeline's modules.
        batch: input_ids (B, L), or text_embeddings (B, L, D) that were made before.
    """
    if "input_ids" not in batch:
        return batch["text_embeddings"]
    return modules.by_name["text_encoder"](batch["input_ids"])[0]


def predict(
    modules: Any, sample: Float[Tensor, "B C h w"], timesteps: Num[Tensor, " B"], condition: Float[Tensor, "B L D"]
) -> Float[Tensor, "B C h w"]:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,) and hidden states (B, L, D)."""
    unet = modules.by_name["unet"]
    return unet(sample.to(unet.dtype), timesteps, condition.to(unet.dtype)).sample


FAMILIES.register(
    "stable_diffusion",
    Family(
        classes={
            "CLIPTextModel": CLIPTextModel,
            "UNet2DConditionModel": UNet2DConditionModel,
            "AutoencoderKL": AutoencoderKL,
        },
        condition=condition,
        predict=predict,
    ),
)
