"""Pictures from prompts: Stable Diffusion 1.x and 2.x, with a ControlNet or without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import (  # made at run time
    AutoencoderKL,  # pyright: ignore[reportPrivateImportUsage]
    ControlNetModel,  # pyright: ignore[reportPrivateImportUsage]
    UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import Tensor
from transformers import CLIPTextModel

from flax_diffusion.core.data.extra import CONDITIONING_IMAGE
from torch_backend.families.family import FAMILIES, Batch, Family

if TYPE_CHECKING:
    from jaxtyping import Float, Num

Condition = dict[str, Tensor]
"""What the UNet is told, by the names of a batch: text_embeddings (B, L, D), and where there is a ControlNet
conditioning_pixel_values (B, 3, H, W)."""


def condition(modules: Any, batch: Batch) -> Condition:
    """Return the text encoder's last hidden states, which the UNet attends to, and what a ControlNet follows.

    Args:
        modules: The pipeline's modules.
        batch: input_ids (B, L), or text_embeddings (B, L, D) that were made before; conditioning_pixel_values
            (B, 3, H, W) in 0..1 for a ControlNet.
    """
    told = {name: batch[name] for name in (CONDITIONING_IMAGE,) if name in batch}
    if "input_ids" not in batch:
        return told | {"text_embeddings": batch["text_embeddings"]}
    return told | {"text_embeddings": modules.by_name["text_encoder"](batch["input_ids"])[0]}


def predict(
    modules: Any, sample: Float[Tensor, "B C h w"], timesteps: Num[Tensor, " B"], condition: Condition
) -> Float[Tensor, "B C h w"]:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,) and what it is told.

    Reference:
        Zhang et al., https://arxiv.org/abs/2302.05543, for the ControlNet, whose outputs are added to the UNet's.
    """
    unet, control = modules.by_name["unet"], modules.by_name.get("controlnet")
    text = condition["text_embeddings"].to(unet.dtype)
    residuals: dict[str, Any] = {}
    if control is not None:
        inputs = (sample.to(control.dtype), timesteps, text.to(control.dtype))
        down, mid = control(*inputs, condition[CONDITIONING_IMAGE].to(control.dtype), return_dict=False)
        residuals["down_block_additional_residuals"] = [residual.to(unet.dtype) for residual in down]
        residuals["mid_block_additional_residual"] = mid.to(unet.dtype)
    return unet(sample.to(unet.dtype), timesteps, text, **residuals).sample


FAMILIES.register(
    "stable_diffusion",
    Family(
        classes={
            "CLIPTextModel": CLIPTextModel,
            "UNet2DConditionModel": UNet2DConditionModel,
            "ControlNetModel": ControlNetModel,
            "AutoencoderKL": AutoencoderKL,
        },
        condition=condition,
        predict=predict,
    ),
)
