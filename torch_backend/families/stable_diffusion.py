"""Pictures from prompts: Stable Diffusion 1.x and 2.x, with a ControlNet or without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import (  # made at run time
    AutoencoderKL,  # pyright: ignore[reportPrivateImportUsage]
    ControlNetModel,  # pyright: ignore[reportPrivateImportUsage]
    UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import Tensor
from transformers import CLIPTextModel

from flax_diffusion.core.data.batches import SIZE_NUMBERS
from flax_diffusion.core.data.extra import CONDITIONING_IMAGE, MASK, MASKED_NOISE
from torch_backend.families.family import FAMILIES, Batch, Family

if TYPE_CHECKING:
    from jaxtyping import Float, Num

Condition = dict[str, Tensor]
"""What the UNet is told, by the names of a batch: text_embeddings (B, L, D), and where there is a ControlNet
conditioning_pixel_values (B, 3, H, W), for inpainting masked (B, 1 + C, h, w), in SDXL pooled_embeddings (B, D') and
time_ids (B, 6)."""

MASKED = "masked"
"""What an inpainting UNet is told: the mask at the size of the latents, and the latents of the rest of the picture."""


def condition(modules: Any, batch: Batch) -> Condition:
    """Return the text encoder's last hidden states, which the UNet attends to, and what a ControlNet follows.

    Args:
        modules: The pipeline's modules.
        batch: input_ids (B, L), or text_embeddings (B, L, D) that were made before; conditioning_pixel_values
            (B, 3, H, W) in 0..1 for a ControlNet; for inpainting pixel_values (B, C, H, W), mask (B, 1, H, W) and
            with an autoencoder masked_latent_noise (B, C, h, w).
    """
    told = beside_text(modules, batch)
    if "input_ids" not in batch:
        return told | {"text_embeddings": batch["text_embeddings"]}
    return told | {"text_embeddings": modules.by_name["text_encoder"](batch["input_ids"])[0]}


def beside_text(modules: Any, batch: Batch) -> Condition:
    """Return what the UNet is told beside the text: pictures that a ControlNet follows, what to fill in, sizes.

    Args:
        modules: The pipeline's modules.
        batch: As of `condition`.
    """
    told = {name: batch[name] for name in (CONDITIONING_IMAGE, SIZE_NUMBERS) if name in batch}
    if MASK in batch:
        told[MASKED] = _masked(modules, batch)
    return told


def _masked(modules: Any, batch: Batch) -> Float[Tensor, "B c h w"]:
    """Return the mask at the size of the latents, by the nearest pixel, and the latents of the rest, (B, 1 + C, h, w).

    Reference:
        Rombach et al., https://arxiv.org/abs/2112.10752; StableDiffusionInpaintPipeline of Diffusers, for the order.
    """
    mask, factor = batch[MASK], modules.spec.vae_factor
    rest = batch["pixel_values"] * (mask < 0.5)
    latents = modules.encode_images(rest, batch.get(MASKED_NOISE))
    return torch.cat([mask[:, :, ::factor, ::factor], latents], dim=1)


def predict(
    modules: Any, sample: Float[Tensor, "B C h w"], timesteps: Num[Tensor, " B"], condition: Condition
) -> Float[Tensor, "B C h w"]:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,) and what it is told.

    Reference:
        Zhang et al., https://arxiv.org/abs/2302.05543, for the ControlNet, whose outputs are added to the UNet's.
    """
    unet, control = modules.by_name["unet"], modules.by_name.get("controlnet")
    text = condition["text_embeddings"].to(unet.dtype)
    options: dict[str, Any] = {}
    if SIZE_NUMBERS in condition:
        sizes = {"text_embeds": condition["pooled_embeddings"], "time_ids": condition[SIZE_NUMBERS]}
        options["added_cond_kwargs"] = {name: array.to(unet.dtype) for name, array in sizes.items()}
    if MASKED in condition:
        sample = torch.cat([sample, condition[MASKED].to(sample.dtype)], dim=1)
    if control is not None:
        inputs = (sample.to(control.dtype), timesteps, text.to(control.dtype))
        followed = condition[CONDITIONING_IMAGE].to(control.dtype)
        down, mid = control(*inputs, followed, return_dict=False, **options)
        options["down_block_additional_residuals"] = [residual.to(unet.dtype) for residual in down]
        options["mid_block_additional_residual"] = mid.to(unet.dtype)
    return unet(sample.to(unet.dtype), timesteps, text, **options).sample


CLASSES = {
    "CLIPTextModel": CLIPTextModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "ControlNetModel": ControlNetModel,
    "AutoencoderKL": AutoencoderKL,
}
"""The classes of the models, by the name of their PyTorch class."""

FAMILIES.register("stable_diffusion", Family(classes=CLASSES, condition=condition, predict=predict))
