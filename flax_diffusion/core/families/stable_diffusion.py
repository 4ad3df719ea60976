"""Pictures from prompts: Stable Diffusion 1.x and 2.x, and smaller models of the same make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.families import stable_diffusion_names
from flax_diffusion.core.families.autoencoder import AUTOENCODER_KL
from flax_diffusion.core.families.family import FAMILIES, Family, ModelClass, PipelineClass, Role, SingleFileLayout
from flax_diffusion.core.typed import Count, Size

if TYPE_CHECKING:
    from flax_diffusion.core.spec.pipeline import PipelineSpec


class _UNet2DCondition:
    sample_size: Size | list[Size] | None = None
    in_channels: Size = 4
    out_channels: Size = 4
    block_out_channels: Sequence[Size] = (320, 640, 1280, 1280)
    down_block_types: Sequence[str] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    up_block_types: Sequence[str] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    layers_per_block: Count | list[Count] = 2
    cross_attention_dim: Size | list[Size] = 1280
    addition_embed_type: str | None = None


class _CLIPText:
    hidden_size: Size = 512
    num_hidden_layers: Count = 12
    max_position_embeddings: Size = 77
    hidden_act: str = "quick_gelu"


UNET_2D_CONDITION = ModelClass(name="UNet2DConditionModel", role=Role.DENOISER, schema=_UNet2DCondition)
CLIP_TEXT = ModelClass(name="CLIPTextModel", role=Role.TEXT_ENCODER, library="transformers", schema=_CLIPText)


def _check(spec: PipelineSpec) -> None:
    unet, encoder = spec.denoiser, spec.text_encoder
    if unet["addition_embed_type"] is not None:
        raise ConfigError(
            f"UNet with addition_embed_type {unet['addition_embed_type']!r} (SDXL): the models are here, training "
            "them is not yet; use a Stable Diffusion 1.x or 2.x pipeline"
        )
    if encoder and encoder["hidden_size"] != unet["cross_attention_dim"]:
        raise ConfigError(
            f"text encoder of hidden_size {encoder['hidden_size']} and UNet of cross_attention_dim "
            f"{unet['cross_attention_dim']}: they must be equal"
        )


def _check_drawing(spec: PipelineSpec) -> None:
    unet = spec.denoiser
    if unet["in_channels"] != unet["out_channels"]:
        raise WeightsError(
            f"{unet.weights}: its UNet has in_channels {unet['in_channels']} and out_channels {unet['out_channels']}; "
            "inpainting models are not drawn from yet: use one that has both equal"
        )


_NOTHING = [None, None]
"""How model_index.json says that a part is not there."""

STABLE_DIFFUSION = FAMILIES.register(
    "stable_diffusion",
    Family(
        name="stable_diffusion",
        title="a Stable Diffusion 1.x or 2.x pipeline (SDXL is not trained or drawn yet)",
        pipelines={
            "StableDiffusionPipeline": PipelineClass(
                parts={"text_encoder": CLIP_TEXT, "unet": UNET_2D_CONDITION, "vae": AUTOENCODER_KL},
                scheduler={"steps_offset": 1},
                index={
                    "safety_checker": _NOTHING,
                    "feature_extractor": _NOTHING,
                    "image_encoder": _NOTHING,
                    "vae": _NOTHING,
                    "requires_safety_checker": False,
                },
            )
        },
        same_parts={
            "StableDiffusionControlNetPipeline": "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
            "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
        },
        lora_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
        single_file=SingleFileLayout(
            prefixes={
                "unet": "model.diffusion_model.",
                "vae": "first_stage_model.",
                "text_encoder": "cond_stage_model.",
            },
            open_clip="cond_stage_model.model.",
            renamers=stable_diffusion_names.renamers,
            refused={
                "conditioner.embedders.": "a checkpoint of SDXL: only those of Stable Diffusion 1.x and 2.x are read "
                "yet"
            },
        ),
        check=_check,
        check_drawing=_check_drawing,
    ),
)
