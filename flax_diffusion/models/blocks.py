"""The UNets' and the autoencoder's blocks: one down, one mid and one up block, told what to hold."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.models.attention import (
    AddedKVAttention,
    DualTransformer2DModel,
    SpatialAttention,
    Transformer2DModel,
)
from flax_diffusion.models.layers import Downsample2D, LayerConfig, ResnetBlock2D, Upsample2D
from flax_diffusion.models.remat import checkpointed

AttentionKind = Literal["spatial", "cross", "added_kv"]

# Upstream's block types: the attention each holds, and what it resamples with. None as resampler: the model's
# downsample_type or upsample_type.
DOWN_BLOCKS: dict[str, tuple[AttentionKind | None, str | None]] = {
    "DownBlock2D": (None, "conv"),
    "ResnetDownsampleBlock2D": (None, "resnet"),
    "AttnDownBlock2D": ("spatial", None),
    "CrossAttnDownBlock2D": ("cross", "conv"),
    "SimpleCrossAttnDownBlock2D": ("added_kv", "resnet"),
}
UP_BLOCKS: dict[str, tuple[AttentionKind | None, str | None]] = {
    "UpBlock2D": (None, "conv"),
    "ResnetUpsampleBlock2D": (None, "resnet"),
    "AttnUpBlock2D": ("spatial", None),
    "CrossAttnUpBlock2D": ("cross", "conv"),
    "SimpleCrossAttnUpBlock2D": ("added_kv", "resnet"),
}


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The attention layers of one block."""

    kind: AttentionKind
    heads: int = 1  #                       of kind "cross"
    head_dim: int = 8  #                    of the other kinds
    depths: tuple[int, ...] = ()  #         transformer blocks of each layer; kind "cross"
    groups: int | None = None  #            of the group norm, None: no norm; kind "spatial"
    linear_projection: bool = False  #      kind "cross"
    only_cross: bool = False  #             kinds "cross" and "added_kv"
    dual: bool = False  #                   two transformers; kind "cross"
    cross_norm: bool = False  #             group norm of the context; kind "added_kv"


def block_layers(config: LayerConfig, block_type: str) -> LayerConfig:
    """Return the layer config of a block: only the blocks that resample with residual blocks take all of it.

    Reference: get_down_block and get_up_block of Diffusers, which hand `resnet_skip_time_act` and
    `resnet_out_scale_factor` to the Resnet… and SimpleCrossAttn… blocks alone.
    """
    if block_type.startswith(("Resnet", "SimpleCrossAttn")):
        return config
    return replace(config, skip_time_act=False, output_scale=1.0)


def _resnet(config: LayerConfig) -> Any:
    return checkpointed(ResnetBlock2D, config.checkpointing, static_argnums=(3,))


def _attention(config: LayerConfig, attn: AttentionConfig, index: int, x: jax.Array, context: Any) -> jax.Array:
    """Apply the block's attention layer `index`; the layer belongs to the calling module."""
    name = f"attentions_{index}"
    if attn.kind == "spatial":
        module = checkpointed(SpatialAttention, config.checkpointing)
        return module(attn.head_dim, config, attn.groups, name=name)(x)
    if attn.kind == "added_kv":
        module = checkpointed(AddedKVAttention, config.checkpointing)
        return module(attn.head_dim, config, attn.only_cross, attn.cross_norm, name=name)(x, context)
    if attn.dual:
        return DualTransformer2DModel(attn.heads, config, name=name)(x, context)
    transformer = Transformer2DModel(
        attn.heads, attn.depths[index], config, attn.linear_projection, attn.only_cross, name=name
    )
    return transformer(x, context)


class DownBlock(nn.Module):
    """Residual blocks, each followed by attention if there is any, then a downsampler.

    Args:
        features: output channels.
        layers: number of residual blocks.
        config: layer config.
        attention: the attention layers, or None.
        downsampler: "conv", "resnet" or None.
        padding: of the convolution that downsamples.
    """

    features: int
    layers: int
    config: LayerConfig
    attention: AttentionConfig | None = None
    downsampler: str | None = "conv"
    padding: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, temb: jax.Array | None, context: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Return the output and every intermediate result, all (B, H, W, C)."""
        resnet, skips = _resnet(self.config), []
        for i in range(self.layers):
            x = resnet(self.features, self.config, name=f"resnets_{i}")(x, temb, deterministic)
            if self.attention is not None:
                x = _attention(self.config, self.attention, i, x, context)
            skips.append(x)
        if self.downsampler == "resnet":
            x = resnet(self.features, self.config, "down", name="downsamplers_0")(x, temb, deterministic)
            skips.append(x)
        elif self.downsampler == "conv":
            x = Downsample2D(self.features, self.config, self.padding, name="downsamplers_0")(x)
            skips.append(x)
        return x, tuple(skips)


class UpBlock(nn.Module):
    """Residual blocks over the input and a skip connection each, with attention if there is any, then an upsampler.

    Args:
        features: output channels.
        layers: number of residual blocks.
        config: layer config.
        attention: the attention layers, or None.
        upsampler: "conv", "resnet" or None.
    """

    features: int
    layers: int
    config: LayerConfig
    attention: AttentionConfig | None = None
    upsampler: str | None = "conv"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        skips: tuple[jax.Array, ...] | None,
        temb: jax.Array | None,
        context: jax.Array | None,
        deterministic: bool,
        size: tuple[int, int] | None = None,
    ) -> jax.Array:
        """Return (B, H', W', features); `skips` are taken last first, `size` is the size to upsample to."""
        resnet = _resnet(self.config)
        for i in range(self.layers):
            if skips is not None:
                x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
            x = resnet(self.features, self.config, name=f"resnets_{i}")(x, temb, deterministic)
            if self.attention is not None:
                x = _attention(self.config, self.attention, i, x, context)
        if self.upsampler == "resnet":
            x = resnet(self.features, self.config, "up", name="upsamplers_0")(x, temb, deterministic)
        elif self.upsampler == "conv":
            x = Upsample2D(self.features, self.config, name="upsamplers_0")(x, size)
        return x


class MidBlock(nn.Module):
    """One residual block, then attention (if there is any) and another one.

    Args:
        config: layer config.
        attention: the attention layer, or None.
        layers: 1, or 0 for the first residual block alone.
    """

    config: LayerConfig
    attention: AttentionConfig | None = None
    layers: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, temb: jax.Array | None, context: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        resnet, features = _resnet(self.config), x.shape[-1]
        x = resnet(features, self.config, name="resnets_0")(x, temb, deterministic)
        for i in range(self.layers):
            if self.attention is not None:
                x = _attention(self.config, self.attention, i, x, context)
            x = resnet(features, self.config, name=f"resnets_{i + 1}")(x, temb, deterministic)
        return x
