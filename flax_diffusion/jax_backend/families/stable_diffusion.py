"""Pictures from prompts: Stable Diffusion 1.x and 2.x, with a ControlNet or without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from flax_diffusion.core.data.batches import SIZE_NUMBERS
from flax_diffusion.core.data.extra import CONDITIONING_IMAGE, MASK, MASKED_NOISE
from flax_diffusion.jax_backend.families.family import FAMILIES, Batch, Family, Params
from flax_diffusion.models import FlaxAutoencoderKL, FlaxCLIPTextModule, FlaxControlNetModel, FlaxUNet2DConditionModel

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key, Num

Condition = dict[str, Any]
"""What the UNet is told, by the names of a batch: text_embeddings (B, L, D), and where there is a ControlNet
conditioning_pixel_values (B, 3, H, W), for inpainting masked (B, 1 + C, h, w), in SDXL pooled_embeddings (B, D') and
time_ids (B, 6)."""

MASKED = "masked"
"""What an inpainting UNet is told: the mask at the size of the latents, and the latents of the rest of the picture."""


def condition(modules: Any, params: Params, batch: Batch, dropout: Key[Array, ""] | None = None) -> Condition:
    """Return the text encoder's last hidden states, which the UNet attends to, and what a ControlNet follows.

    Args:
        modules: The pipeline's modules.
        params: Weights of all components.
        batch: input_ids (B, L), or text_embeddings (B, L, D) that were made before; conditioning_pixel_values
            (B, 3, H, W) in 0..1 for a ControlNet; for inpainting pixel_values (B, C, H, W), mask (B, 1, H, W) and
            with an autoencoder masked_latent_noise (B, C, h, w).
        dropout: Key of the dropout masks; None in evaluation.
    """
    told = beside_text(modules, params, batch)
    if "input_ids" not in batch:
        return told | {"text_embeddings": batch["text_embeddings"]}
    return told | {"text_embeddings": modules.call("text_encoder", params, dropout, batch["input_ids"])[0]}


def beside_text(modules: Any, params: Params, batch: Batch) -> Condition:
    """Return what the UNet is told beside the text: pictures that a ControlNet follows, what to fill in, sizes.

    Args:
        modules: The pipeline's modules.
        params: Weights of all components.
        batch: As of `condition`.
    """
    told: Condition = {name: batch[name] for name in (CONDITIONING_IMAGE, SIZE_NUMBERS) if name in batch}
    if MASK in batch:
        told[MASKED] = _masked(modules, params, batch)
    return told


def _masked(modules: Any, params: Params, batch: Batch) -> Float[Array, "B c h w"]:
    """Return the mask at the size of the latents, by the nearest pixel, and the latents of the rest, (B, 1 + C, h, w).

    Reference:
        Rombach et al., https://arxiv.org/abs/2112.10752; StableDiffusionInpaintPipeline of Diffusers, for the order.
    """
    mask, factor = batch[MASK], modules.spec.vae_factor
    rest = batch["pixel_values"] * (mask < 0.5)
    latents = modules.encode_images(params, rest, batch.get(MASKED_NOISE))
    return jnp.concatenate([mask[:, :, ::factor, ::factor], latents], axis=1)


def predict(
    modules: Any,
    params: Params,
    sample: Float[Array, "B C h w"],
    timesteps: Num[Array, " B"],
    condition: Condition,
    dropout: Key[Array, ""] | None = None,
) -> Float[Array, "B C h w"]:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,) and what it is told.

    Reference:
        Zhang et al., https://arxiv.org/abs/2302.05543, for the ControlNet, whose outputs are added to the UNet's.
    """
    text, options = condition["text_embeddings"], {}
    if SIZE_NUMBERS in condition:
        sizes = {"text_embeds": condition["pooled_embeddings"], "time_ids": condition[SIZE_NUMBERS]}
        options["added_cond_kwargs"] = sizes
    if MASKED in condition:
        sample = jnp.concatenate([sample, condition[MASKED]], axis=1)
    if "controlnet" in modules.by_name:
        inputs = (sample, timesteps, text, condition[CONDITIONING_IMAGE])
        down, mid = modules.call("controlnet", params, dropout, *inputs, return_dict=False, **options)
        options |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return modules.call("unet", params, dropout, sample, timesteps, text, **options)[0]


CLASSES = {
    "CLIPTextModel": FlaxCLIPTextModule,
    "UNet2DConditionModel": FlaxUNet2DConditionModel,
    "ControlNetModel": FlaxControlNetModel,
    "AutoencoderKL": FlaxAutoencoderKL,
}
"""The classes of the models, by the name of their PyTorch class."""

FAMILIES.register("stable_diffusion", Family(classes=CLASSES, condition=condition, predict=predict))
