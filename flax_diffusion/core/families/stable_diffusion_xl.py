"""Pictures from prompts, by Stable Diffusion XL and smaller models of the same make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.families import stable_diffusion_names
from flax_diffusion.core.families.autoencoder import AUTOENCODER_KL
from flax_diffusion.core.families.family import (
    FAMILIES,
    NOTHING,
    Family,
    LoraBase,
    ModelClass,
    PipelineClass,
    Role,
    SingleFileLayout,
)
from flax_diffusion.core.families.stable_diffusion import (
    CLIP_TEXT,
    CONTROLNET,
    UNET_2D_CONDITION,
    CLIPTextSchema,
    check_control,
    check_drawing,
)
from flax_diffusion.core.typed import Size

if TYPE_CHECKING:
    from flax_diffusion.core.spec.pipeline import PipelineSpec

_LORA_BASE = LoraBase(
    "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "https://github.com/Stability-AI/generative-models"
)
_SIZES = 6
"""Numbers that the UNet is told of a picture, each by an embedding of its own; see `size_numbers`."""


class _CLIPTextWithProjection(CLIPTextSchema):
    projection_dim: Size = 512


CLIP_TEXT_WITH_PROJECTION = ModelClass(
    name="CLIPTextModelWithProjection", role=Role.TEXT_ENCODER, library="transformers", schema=_CLIPTextWithProjection
)


def _check_index(index: Mapping[str, Any]) -> None:
    lacking = [name for name in ("text_encoder", "text_encoder_2") if index.get(name) in (None, NOTHING)]
    if not lacking:
        return
    if lacking == ["text_encoder"]:
        raise WeightsError(
            "has no text_encoder, only text_encoder_2: it is a refiner of Stable Diffusion XL, which is not trained, "
            "drawn or converted here; use a base model"
        )
    raise WeightsError(f"has no {' and no '.join(lacking)}, and Stable Diffusion XL needs both: use a whole pipeline")


def _check(spec: PipelineSpec) -> None:
    unet = spec.denoiser
    first, second = (spec.components[name] for name in spec.names_of(Role.TEXT_ENCODER))
    if unet["addition_embed_type"] != "text_time" or unet["addition_time_embed_dim"] is None:
        raise ConfigError(
            f"UNet with addition_embed_type {unet['addition_embed_type']!r} and addition_time_embed_dim "
            f"{unet['addition_time_embed_dim']}: a {spec.kind} needs 'text_time' and a number"
        )
    width = first["hidden_size"] + second["hidden_size"]
    if width != unet["cross_attention_dim"]:
        raise ConfigError(
            f"text encoders of hidden_size {first['hidden_size']} and {second['hidden_size']}, and UNet of "
            f"cross_attention_dim {unet['cross_attention_dim']}: it must be {width}, their sum"
        )
    wanted = _SIZES * unet["addition_time_embed_dim"] + second["projection_dim"]
    if wanted != unet["projection_class_embeddings_input_dim"]:
        raise ConfigError(
            f"UNet of projection_class_embeddings_input_dim {unet['projection_class_embeddings_input_dim']}: it must "
            f"be {wanted}, {_SIZES} times its addition_time_embed_dim and the projection_dim of text_encoder_2"
        )
    for name in spec.names_of(Role.CONTROL):
        check_control(spec, spec.components[name])


_PARTS = {
    "text_encoder": CLIP_TEXT,
    "text_encoder_2": CLIP_TEXT_WITH_PROJECTION,
    "unet": UNET_2D_CONDITION,
    "vae": AUTOENCODER_KL,
}
_TOKENIZERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
_SCHEDULER = {"steps_offset": 1}
_INDEX = {"feature_extractor": NOTHING, "image_encoder": NOTHING, "vae": NOTHING}
_SETTINGS = {"force_zeros_for_empty_prompt": True}
_PIPELINE = PipelineClass(parts=_PARTS, tokenizers=_TOKENIZERS, scheduler=_SCHEDULER, index=_INDEX, settings=_SETTINGS)

STABLE_DIFFUSION_XL = FAMILIES.register(
    "stable_diffusion_xl",
    Family(
        name="stable_diffusion_xl",
        title="one of Stable Diffusion XL",
        pipelines={
            "StableDiffusionXLPipeline": _PIPELINE,
            "StableDiffusionXLInpaintPipeline": _PIPELINE,
            "StableDiffusionXLControlNetPipeline": replace(_PIPELINE, parts=_PARTS | {"controlnet": CONTROLNET}),
        },
        same_parts={
            "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
            "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
        },
        inpainting="StableDiffusionXLInpaintPipeline",
        control="StableDiffusionXLControlNetPipeline",
        resolution=1024,
        told_sizes=True,
        prompt_arrays=("text_embeddings", "pooled_embeddings"),
        word_keys={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        lora_prefixes={"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        lora_renamers=lambda spec: {"unet": stable_diffusion_names.unet_names(spec.denoiser)},
        lora_base=lambda _: _LORA_BASE,
        single_file=SingleFileLayout(
            prefixes={
                "unet": "model.diffusion_model.",
                "vae": "first_stage_model.",
                "text_encoder": "conditioner.embedders.0.",
                "text_encoder_2": "conditioner.embedders.1.",
            },
            open_clip={"text_encoder_2": "conditioner.embedders.1.model."},
            renamers=stable_diffusion_names.renamers,
            refused={
                "cond_stage_model.": "a checkpoint of Stable Diffusion 1.x or 2.x: give a StableDiffusionPipeline, "
                "whose configs it has, by --model",
                "conditioner.embedders.0.model.": "a checkpoint of a refiner of Stable Diffusion XL: give a base model",
            },
        ),
        check_index=_check_index,
        check=_check,
        check_drawing=check_drawing,
    ),
)
