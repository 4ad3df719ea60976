"""Tiny models of every family: the Flax class, the PyTorch class, a config, and inputs."""

from dataclasses import dataclass
from typing import Any

import diffusers
import jax
import numpy as np
import transformers

import flax_diffusion.models as models

SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
UNET = SMALL | {
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CONDITION = SMALL | {
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
RESNET_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
SIMPLE_BLOCKS = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
}
CROSS_BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
CLIP = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "projection_dim": 6,
    "pad_token_id": 1,
    "bos_token_id": 38,
    "eos_token_id": 39,
}


# For jax.jit: compile time, not run time, is what these tests cost.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True)
class Case:
    """A model to compare: `inputs` by our argument names, drawn by `draw`."""

    flax: Any
    torch: Any
    config: dict[str, Any]
    inputs: dict[str, Any]


def draw(case: Case) -> dict[str, Any]:
    """Draw inputs: a tuple is the shape of normal values, an array is taken as it is."""
    rng = np.random.default_rng(1)

    def value(spec: Any) -> Any:
        if isinstance(spec, dict):
            return {name: value(part) for name, part in spec.items()}
        return rng.standard_normal(spec).astype(np.float32) if isinstance(spec, tuple) else spec

    return value(case.inputs)


def _unet(inputs: dict[str, Any] | None = None, **config: Any) -> Case:
    sample = {"sample": (2, 3, 8, 8), "timesteps": np.array([3, 871])}
    return Case(models.FlaxUNet2DModel, diffusers.UNet2DModel, UNET | config, sample | (inputs or {}))


def _condition(inputs: dict[str, Any] | None = None, **config: Any) -> Case:
    sample = {"sample": (2, 4, 8, 8), "timesteps": np.array([3, 871]), "encoder_hidden_states": (2, 5, 12)}
    return Case(
        models.FlaxUNet2DConditionModel, diffusers.UNet2DConditionModel, CONDITION | config, sample | (inputs or {})
    )


def _control(inputs: dict[str, Any] | None = None, **config: Any) -> Case:
    sample = {"sample": (2, 4, 8, 8), "timesteps": np.array([3, 871]), "encoder_hidden_states": (2, 5, 12)}
    given = {name: value for name, value in CONDITION.items() if name not in ("sample_size", "up_block_types")}
    config = given | {"conditioning_embedding_out_channels": (4, 8)} | config
    picture = {"controlnet_cond": (2, config.get("conditioning_channels", 3), 16, 16)}
    return Case(models.FlaxControlNetModel, diffusers.ControlNetModel, config, sample | picture | (inputs or {}))


def _vae(**config: Any) -> Case:
    return Case(models.FlaxAutoencoderKL, diffusers.AutoencoderKL, VAE | config, {"sample": (2, 3, 8, 8)})


def _clip(flax: Any, torch: Any, inputs: dict[str, Any] | None = None, **config: Any) -> Case:
    ids = np.array([[38, 4, 17, 39, 39, 39], [38, 5, 6, 7, 8, 39]])
    return Case(flax, torch, CLIP | config, {"input_ids": ids} | (inputs or {}))


def random_params(model: Any, seed: int = 0) -> dict[str, Any]:
    """Draw parameters on the host: compiling an initialisation would cost more than the test."""
    rng = np.random.default_rng(seed)

    def value(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape) * 0.1
        return (noise + (jax.tree_util.keystr(path).endswith("['scale']"))).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, model.params_shape())


CASES = {
    "tutorial": _unet(),
    "ddpm": _unet(
        {"class_labels": (2, 32)},
        class_embed_type="identity",
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_eps=1e-6,
    ),
    "resnet_samplers": _unet(
        **RESNET_BLOCKS,
        downsample_type="resnet",
        upsample_type="resnet",
        mid_block_scale_factor=2**0.5,
        attn_norm_num_groups=2,
    ),
    "resnet_attention_samplers": _unet(
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        mid_block_type=None,
        act_fn="mish",
    ),
    "scale_shift": _unet(
        {"class_labels": np.array([4, 9])},
        resnet_time_scale_shift="scale_shift",
        class_embed_type="timestep",
        act_fn="gelu",
    ),
    "classes": _unet(
        {"class_labels": np.array([4, 0])},
        num_class_embeds=5,
        add_attention=False,
        center_input_sample=True,
        time_embedding_type="learned",
        num_train_timesteps=1000,
        time_embedding_dim=20,
    ),
    "sd1": _condition(),
    "sd2": _condition(
        {"class_labels": np.array([4, 0])},
        **CROSS_BLOCKS,
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        upcast_attention=True,
        num_class_embeds=7,
        only_cross_attention=(True, False),
    ),
    "sdxl": _condition(
        {"added_cond_kwargs": {"text_embeds": (2, 10), "time_ids": np.tile([[64, 48, 0, 8, 64, 64]], (2, 1))}},
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
    ),
    "unclip": _condition(
        {"class_labels": (2, 14), "timestep_cond": (2, 6)},
        class_embed_type="projection",
        projection_class_embeddings_input_dim=14,
        timestep_post_act="silu",
        time_embedding_act_fn="gelu",
        time_cond_proj_dim=6,
        layers_per_block=(1, 2),
        freq_shift=1,
        norm_eps=1e-6,
    ),
    "simple_cross": _condition(
        {"encoder_hidden_states": (2, 5, 10)},
        **SIMPLE_BLOCKS,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1.4,
        mid_block_scale_factor=1.2,
        encoder_hid_dim=10,
        cross_attention_dim=32,
        cross_attention_norm="group_norm",
        only_cross_attention=(True, False),
        act_fn="gelu",
    ),
    "odd_sizes": _condition(
        {"sample": (2, 4, 7, 9), "class_labels": (2, 6)},
        mid_block_type="UNetMidBlock2D",
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=6,
        class_embeddings_concat=True,
        conv_in_kernel=5,
        conv_out_kernel=1,
    ),
    "dual": _condition(
        {"encoder_hidden_states": (1, 334, 12), "sample": (1, 4, 4, 4), "timesteps": np.array([9])},
        dual_cross_attention=True,
    ),
    "control": _control(num_attention_heads=4, conditioning_embedding_out_channels=(4, 8)),
    "control_xl": _control(
        {"added_cond_kwargs": {"text_embeds": (2, 10), "time_ids": np.tile([[64, 48, 0, 8, 64, 64]], (2, 1))}},
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        use_linear_projection=True,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
        controlnet_conditioning_channel_order="bgr",
    ),
    "control_pooled": _control(
        {"class_labels": np.array([4, 0])},
        num_class_embeds=7,
        mid_block_type="UNetMidBlock2D",
        global_pool_conditions=True,
        conditioning_channels=1,
        mid_block_scale_factor=1.3,
        only_cross_attention=(True, False),
    ),
    "vae": _vae(layers_per_block=2),
    "vae_plain": _vae(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
    "clip": _clip(
        models.FlaxCLIPTextModel,
        transformers.CLIPTextModel,
        {"attention_mask": np.array([[1, 1, 1, 1, 0, 0], [1] * 6])},
        eos_token_id=2,
    ),
    "clip_projection": _clip(
        models.FlaxCLIPTextModelWithProjection, transformers.CLIPTextModelWithProjection, hidden_act="gelu"
    ),
}
