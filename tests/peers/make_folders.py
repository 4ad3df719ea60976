"""Tiny folders for the programs, made with PyTorch's classes, by this environment or by the one of Diffusers 0.39."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

UNET: dict[str, Any] = {  # groups of 32 channels are fixed in the Flax UNet of Diffusers 0.39
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL_UNET: dict[str, Any] = {
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 48 + 16,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 1),
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "sample_size": 16,
}
VAE_OF_EIGHT: dict[str, Any] = VAE | {  # the ControlNet of 0.39 draws first parameters for pictures of 8 × 8 a latent
    "block_out_channels": (16, 16, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 64,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "projection_dim": 16,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 224,  # the safety checker of 0.39 draws its first parameters for it, whatever the config says
    "patch_size": 56,
}
NONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def write_tokenizer(folder: Path) -> Any:
    """Writes CLIP's files for a vocabulary of letters, and returns what both environments read from them."""
    letters = list(string.ascii_lowercase)
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12})
    )
    return transformers.CLIPTokenizer.from_pretrained(folder)


def text_config(tokenizer: Any, **changes: Any) -> transformers.CLIPTextConfig:
    """A tiny text encoder's config."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return transformers.CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **ids, **changes)


def noisy(model: Any) -> Any:
    """The model with random weights everywhere: layers that start at zero or one would hide what they do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def write(folder: Path, formats: tuple[bool, ...] = (True,)) -> None:
    """Writes `sd`, `inpaint`, `control`, `sdxl`, `safe`, `torch` and `clip`, of PyTorch's."""
    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder / "tokenizer")
    scheduler = diffusers.PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
    )
    parts: dict[str, Any] = {
        "vae": noisy(diffusers.AutoencoderKL(**VAE)),
        "text_encoder": noisy(transformers.CLIPTextModel(text_config(tokenizer))),
        "tokenizer": tokenizer,
        "unet": noisy(diffusers.UNet2DConditionModel(**UNET)),
        "scheduler": scheduler,
    }
    config = transformers.CLIPConfig(
        text_config=text_config(tokenizer).to_dict(),
        vision_config=transformers.CLIPVisionConfig(projection_dim=16, **VISION).to_dict(),
        projection_dim=16,
    )
    checker = noisy(diffusers.pipelines.stable_diffusion.safety_checker.StableDiffusionSafetyChecker(config))
    with torch.no_grad():
        checker.concept_embeds_weights.copy_(torch.linspace(-0.6, 0.4, 17))
        checker.special_care_embeds_weights.fill_(0.9)
    size = {"height": 224, "width": 224}
    extractor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(
        size={"shortest_edge": 224}, crop_size=size
    )
    controlnet = noisy(
        diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(16, 16, 16, 32))
    )
    second = noisy(transformers.CLIPTextModelWithProjection(text_config(tokenizer, hidden_act="gelu")))
    pipelines = {
        "sd": diffusers.StableDiffusionPipeline(**parts, **NONE),
        "safe": diffusers.StableDiffusionPipeline(
            **parts, safety_checker=checker, feature_extractor=extractor, requires_safety_checker=True
        ),
        "torch": diffusers.StableDiffusionPipeline(
            **parts, safety_checker=checker, feature_extractor=extractor, requires_safety_checker=True
        ),
        "control": diffusers.StableDiffusionControlNetPipeline(
            **parts | {"vae": noisy(diffusers.AutoencoderKL(**VAE_OF_EIGHT))}, controlnet=controlnet, **NONE
        ),
        "inpaint": diffusers.StableDiffusionInpaintPipeline(
            **parts | {"unet": noisy(diffusers.UNet2DConditionModel(**UNET, in_channels=9))}, **NONE
        ),
        "sdxl": diffusers.StableDiffusionXLPipeline(
            **parts | {"unet": noisy(diffusers.UNet2DConditionModel(**UNET | SDXL_UNET))},
            text_encoder_2=second,
            tokenizer_2=tokenizer,
            add_watermarker=False,
        ),
    }
    for name, pipeline in pipelines.items():
        for safe in formats:
            pipeline.save_pretrained(folder / name, safe_serialization=safe)
        for part in (folder / name).glob("tokenizer*"):
            for file in (folder / "tokenizer").iterdir():
                (part / file.name).write_bytes(file.read_bytes())
    clip = folder / "clip"
    model = noisy(transformers.CLIPModel(config))
    for safe in formats:
        model.save_pretrained(clip, safe_serialization=safe)
    extractor.save_pretrained(clip)
    for file in (folder / "tokenizer").iterdir():
        (clip / file.name).write_bytes(file.read_bytes())
