"""Pictures from prompts: Stable Diffusion 1.x and 2.x, and smaller models of the same make."""

from __future__ import annotations

from collections.abc import Sequence
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
from flax_diffusion.core.typed import Count, Size

if TYPE_CHECKING:
    from flax_diffusion.core.spec.pipeline import Component, PipelineSpec

_WIDTH_OF_2 = 1024
"""Width of what the UNet of Stable Diffusion 2.x is told of a prompt; 1.x has 768."""


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
    addition_time_embed_dim: Size | None = None
    projection_class_embeddings_input_dim: Size | None = None


class CLIPTextSchema:
    """Config keys of CLIP's text encoders."""

    hidden_size: Size = 512
    num_hidden_layers: Count = 12
    max_position_embeddings: Size = 77
    hidden_act: str = "quick_gelu"


class _ControlNet:
    in_channels: Size = 4
    conditioning_channels: Size = 3
    block_out_channels: Sequence[Size] = (320, 640, 1280, 1280)
    layers_per_block: Count = 2
    cross_attention_dim: Size | list[Size] = 1280
    addition_embed_type: str | None = None
    addition_time_embed_dim: Size | None = None
    projection_class_embeddings_input_dim: Size | None = None
    conditioning_embedding_out_channels: Sequence[Size] = (16, 32, 96, 256)


UNET_2D_CONDITION = ModelClass(name="UNet2DConditionModel", role=Role.DENOISER, schema=_UNet2DCondition)
CONTROLNET = ModelClass(name="ControlNetModel", role=Role.CONTROL, schema=_ControlNet)
CLIP_TEXT = ModelClass(name="CLIPTextModel", role=Role.TEXT_ENCODER, library="transformers", schema=CLIPTextSchema)


_SHARED = (
    "in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type", "only_cross_attention",
    "block_out_channels", "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn",
    "norm_num_groups", "norm_eps", "cross_attention_dim", "transformer_layers_per_block", "encoder_hid_dim",
    "encoder_hid_dim_type", "attention_head_dim", "num_attention_heads", "use_linear_projection", "class_embed_type",
    "addition_embed_type", "addition_time_embed_dim", "num_class_embeds", "upcast_attention",
    "resnet_time_scale_shift", "projection_class_embeddings_input_dim",
)  # fmt: skip
"""Config keys that a ControlNet has from the UNet that it starts from."""


def control_config(unet: Component, factor: int) -> dict[str, Any]:
    """Return the config of a new ControlNet for a UNet.

    Args:
        unet: The UNet.
        factor: Pixels per latent and side, by which the ControlNet's first layers divide the picture that it follows.

    Raises:
        ConfigError: If no such ControlNet is known: SD's divides by 8, and those here by 1, 2, 4 or 8.

    Reference:
        Zhang et al., https://arxiv.org/abs/2302.05543; `ControlNetModel.from_unet` of Diffusers.
    """
    widths = list(_ControlNet.conditioning_embedding_out_channels)
    halvings = factor.bit_length()
    if halvings > len(widths):
        raise ConfigError(
            f"a ControlNet for {factor} pixels per latent: new ones are made for up to {2 ** (len(widths) - 1)}; give "
            "--controlnet_model_name_or_path"
        )
    shared = {key: unet.config[key] for key in _SHARED if key in unet.config}
    return shared | {"conditioning_embedding_out_channels": widths[:halvings]}


_SAME = (
    "in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip


def check_control(spec: PipelineSpec, control: Component) -> None:
    """Raise ConfigError for a ControlNet that does not go with the UNet or with the autoencoder."""
    unet = spec.denoiser
    for key in _SAME:
        own, theirs = (list(v) if isinstance(v := part[key], Sequence) else v for part in (control, unet))
        if own != theirs:
            raise ConfigError(
                f"ControlNet of {key} {own} and UNet of {key} {theirs}: they must be equal; use a pair made for each "
                "other"
            )
    factor = 2 ** (len(control["conditioning_embedding_out_channels"]) - 1)
    if factor != spec.vae_factor:
        raise ConfigError(
            f"ControlNet whose conditioning_embedding_out_channels divide pictures by {factor}, and "
            f"{spec.vae_factor} pixels per latent: they must be equal; use a pair made for each other"
        )
    if control["conditioning_channels"] != 3:
        raise ConfigError(
            f"ControlNet of conditioning_channels {control['conditioning_channels']}: it must have 3, for RGB"
        )


def _check(spec: PipelineSpec) -> None:
    unet, encoder = spec.denoiser, spec.text_encoder
    if unet["addition_embed_type"] is not None:
        raise ConfigError(
            f"UNet with addition_embed_type {unet['addition_embed_type']!r} in a {spec.kind}: it belongs to a "
            "StableDiffusionXLPipeline; use a whole pipeline of one kind"
        )
    if encoder and encoder["hidden_size"] != unet["cross_attention_dim"]:
        raise ConfigError(
            f"text encoder of hidden_size {encoder['hidden_size']} and UNet of cross_attention_dim "
            f"{unet['cross_attention_dim']}: they must be equal"
        )
    for name in spec.names_of(Role.CONTROL):
        check_control(spec, spec.components[name])


def _lora_base(spec: PipelineSpec) -> LoraBase:
    if spec.denoiser["cross_attention_dim"] != _WIDTH_OF_2:
        return LoraBase("stable-diffusion-v1", "sd_v1", "diffusers")
    if spec.scheduler.get("prediction_type") == "v_prediction":
        return LoraBase("stable-diffusion-v2-768-v", "sd_v2_v", "diffusers")
    return LoraBase("stable-diffusion-v2-512", "sd_v2", "diffusers")


def check_drawing(spec: PipelineSpec) -> None:
    """Raise WeightsError for a UNet that takes something else than a sample, or a picture to fill in."""
    unet = spec.denoiser
    if unet["in_channels"] != unet["out_channels"] and not spec.fills_in:
        raise WeightsError(
            f"{unet.weights}: its UNet has in_channels {unet['in_channels']} and out_channels {unet['out_channels']}; "
            "use one that has both equal, or one for inpainting, which takes twice as many and one more"
        )


_PARTS = {"text_encoder": CLIP_TEXT, "unet": UNET_2D_CONDITION, "vae": AUTOENCODER_KL}
_TOKENIZERS = {"tokenizer": "text_encoder"}
_SCHEDULER = {"steps_offset": 1}
_INDEX = {
    "safety_checker": NOTHING,
    "feature_extractor": NOTHING,
    "image_encoder": NOTHING,
    "vae": NOTHING,
    "requires_safety_checker": False,
}

_OF_XL = (
    "LoRA of Stable Diffusion XL, and the model has one text encoder: give the model that it was trained on by --model"
)
_PIPELINE = PipelineClass(parts=_PARTS, tokenizers=_TOKENIZERS, scheduler=_SCHEDULER, index=_INDEX)

STABLE_DIFFUSION = FAMILIES.register(
    "stable_diffusion",
    Family(
        name="stable_diffusion",
        title="a Stable Diffusion 1.x or 2.x pipeline",
        pipelines={
            "StableDiffusionPipeline": _PIPELINE,
            # Diffusers' class does not open a folder that names no version.
            "StableDiffusionInpaintPipeline": replace(_PIPELINE, index=_INDEX | {"_diffusers_version": "0.39.0"}),
            "StableDiffusionControlNetPipeline": replace(_PIPELINE, parts=_PARTS | {"controlnet": CONTROLNET}),
        },
        same_parts={
            "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
            "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
        },
        inpainting="StableDiffusionInpaintPipeline",
        control="StableDiffusionControlNetPipeline",
        prompt_arrays=("text_embeddings",),
        lora_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
        lora_refused=dict.fromkeys(("lora_te2_", "text_encoder_2."), _OF_XL),
        lora_base=_lora_base,
        single_file=SingleFileLayout(
            prefixes={
                "unet": "model.diffusion_model.",
                "vae": "first_stage_model.",
                "text_encoder": "cond_stage_model.",
            },
            open_clip={"text_encoder": "cond_stage_model.model."},
            renamers=stable_diffusion_names.renamers,
            refused={
                "conditioner.embedders.": "a checkpoint of Stable Diffusion XL: give a StableDiffusionXLPipeline, "
                "whose configs it has, by --model"
            },
        ),
        check=_check,
        check_drawing=check_drawing,
    ),
)
