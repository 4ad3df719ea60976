"""Names of tensors in single-file checkpoints: those of the original Stable Diffusion code.

Reference: the modules of https://github.com/CompVis/stable-diffusion, https://github.com/Stability-AI/stablediffusion
and, for XL, https://github.com/Stability-AI/generative-models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.family import Role

if TYPE_CHECKING:
    from flax_diffusion.core.spec.pipeline import Component, PipelineSpec

Substitutions = tuple[tuple[str, str], ...]
_RESNET: Substitutions = (
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
)  # fmt: skip
_VAE_ATTENTION: Substitutions = (
    ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
)  # fmt: skip
_OPEN_CLIP_LAYER: Substitutions = (
    ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)  # fmt: skip


def renamers(spec: PipelineSpec, open_clip: Collection[str]) -> dict[str, Callable[[str], str]]:
    """Return, for each component, a function from PyTorch's names to the original ones, less the prefix.

    Args:
        spec: The pipeline, with an autoencoder.
        open_clip: Names of its text encoders that are OpenCLIP's, and not OpenAI's.

    Raises:
        ConfigError: If the original code has no UNet of its kind.
    """
    encoders = {
        name: _open_clip_name if name in open_clip else "transformer.{}".format
        for name in spec.names_of(Role.TEXT_ENCODER)
    }
    return {"unet": unet_names(spec.denoiser), "vae": _vae_names(spec.components["vae"]), **encoders}


def _substitute(name: str, pairs: Substitutions) -> str:
    """Rename the module that a dotted name starts with."""
    for theirs, original in pairs:
        if name.startswith(f"{theirs}."):
            return original + name[len(theirs) :]
    return name


def _by_module(modules: Mapping[str, tuple[str, Substitutions]]) -> Callable[[str], str]:
    """Return a function that renames by the longest module that a name starts with, and inside by its substitutions."""

    def renamed(name: str) -> str:
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            found = modules.get(".".join(parts[:end]))
            if found is not None:
                return f"{found[0]}.{_substitute('.'.join(parts[end:]), found[1])}"
        return name

    return renamed


def unet_names(unet: Component) -> Callable[[str], str]:
    """Return the names of the original UNet, which counts through: first convolution, then resnets and resamplers."""
    layers, levels = unet["layers_per_block"], len(unet["down_block_types"])
    if not isinstance(layers, int):
        raise ConfigError(f"single files hold UNets with one layers_per_block, this one has {layers}")
    modules: dict[str, tuple[str, Substitutions]] = {
        "conv_in": ("input_blocks.0.0", ()),
        "time_embedding.linear_1": ("time_embed.0", ()),
        "time_embedding.linear_2": ("time_embed.2", ()),
        "add_embedding.linear_1": ("label_emb.0.0", ()),
        "add_embedding.linear_2": ("label_emb.0.2", ()),
        "conv_norm_out": ("out.0", ()),
        "conv_out": ("out.2", ()),
        "mid_block.resnets.0": ("middle_block.0", _RESNET),
        "mid_block.attentions.0": ("middle_block.1", ()),
        "mid_block.resnets.1": ("middle_block.2", _RESNET),
    }
    for level in range(levels):
        down, up = 1 + level * (layers + 1), level * (layers + 1)
        for layer in range(layers):
            modules[f"down_blocks.{level}.resnets.{layer}"] = (f"input_blocks.{down + layer}.0", _RESNET)
            modules[f"down_blocks.{level}.attentions.{layer}"] = (f"input_blocks.{down + layer}.1", ())
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = (f"input_blocks.{down + layers}.0.op", ())
        for layer in range(layers + 1):
            modules[f"up_blocks.{level}.resnets.{layer}"] = (f"output_blocks.{up + layer}.0", _RESNET)
            modules[f"up_blocks.{level}.attentions.{layer}"] = (f"output_blocks.{up + layer}.1", ())
        place = 2 if "CrossAttn" in unet["up_block_types"][level] else 1
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = (f"output_blocks.{up + layers}.{place}.conv", ())
    return _by_module(modules)


def _vae_names(vae: Component) -> Callable[[str], str]:
    """Return the names of the original autoencoder, whose decoder counts its levels from the finest."""
    layers, levels = vae["layers_per_block"], len(vae["block_out_channels"])
    shortcut: Substitutions = (("conv_shortcut", "nin_shortcut"),)
    modules: dict[str, tuple[str, Substitutions]] = {}
    for side in ("encoder", "decoder"):
        modules[f"{side}.conv_norm_out"] = (f"{side}.norm_out", ())
        modules[f"{side}.mid_block.attentions.0"] = (f"{side}.mid.attn_1", _VAE_ATTENTION)
        for layer in range(2):
            modules[f"{side}.mid_block.resnets.{layer}"] = (f"{side}.mid.block_{layer + 1}", shortcut)
        for level in range(levels):
            ours = f"{side}.{'down' if side == 'encoder' else 'up'}_blocks.{level}"
            theirs = f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{levels - 1 - level}"
            for layer in range(layers + 1):
                modules[f"{ours}.resnets.{layer}"] = (f"{theirs}.block.{layer}", shortcut)
            modules[f"{ours}.downsamplers.0.conv"] = (f"{theirs}.downsample.conv", ())
            modules[f"{ours}.upsamplers.0.conv"] = (f"{theirs}.upsample.conv", ())
    return _by_module(modules)


def _open_clip_name(name: str) -> str:
    """OpenCLIP's name of a text encoder's parameter; `in_proj` stands for queries, keys and values."""
    name = name.removeprefix("text_model.")
    fixed = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "text_projection.weight": "text_projection",
    }
    if name in fixed:
        return f"model.{fixed[name]}"
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name)
    if layer is None:
        return f"model.{_substitute(name, (('final_layer_norm', 'ln_final'),))}"
    inside = _substitute(layer[2], _OPEN_CLIP_LAYER).replace("self_attn.in_proj", "attn.in_proj")
    return f"model.transformer.resblocks.{layer[1]}.{inside}"
