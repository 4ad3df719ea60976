"""Blocks of the UNets and of the autoencoder: one down, one mid and one up block, configured by what they hold."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from flax_diffusion.models.attention import (
    AddedKVAttention,
    DualTransformer2DModel,
    SpatialAttention,
    Transformer2DModel,
)
from flax_diffusion.models.layers import Downsample2D, LayerConfig, ResnetBlock2D, Upsample2D
from flax_diffusion.models.remat import checkpointed

AttentionKind = Literal["spatial", "cross", "added_kv"]

# Upstream's block types: the attention that each holds, and what it resamples with, where None stands for the model's
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
    """Configuration of the attention layers of one block."""

    kind: AttentionKind
    heads: int = 1  #                       number of heads; kind "cross"
    head_dim: int = 8  #                    channels per head; the other kinds
    depths: tuple[int, ...] = ()  #         transformer blocks of each layer; kind "cross"
    groups: int | None = None  #            of the group norm, None: no norm; kind "spatial"
    linear_projection: bool = False  #      kind "cross"
    only_cross: bool = False  #             kinds "cross" and "added_kv"
    dual: bool = False  #                   two transformers; kind "cross"
    cross_norm: bool = False  #             group norm of the context; kind "added_kv"


def block_layer_config(config: LayerConfig, block_type: str) -> LayerConfig:
    """Return the layer config of a block: only the blocks that resample with residual blocks take all of it.

    Args:
        config: Layer config of the model.
        block_type: Upstream's name of the block.

    Reference:
        get_down_block and get_up_block of Diffusers, which hand `resnet_skip_time_act` and
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
        features: Output channels.
        layers: Number of residual blocks.
        config: Layer config.
        attention: Config of the attention layers, or None.
        downsampler: "conv", "resnet" or None.
        padding: Padding of the convolution that downsamples.
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
        """Return the output and every intermediate result.

        Args:
            x: Feature map, (B, H, W, C).
            temb: Timestep embedding, (B, E), or None.
            context: Tokens for cross-attention, (B, S, C'), or None.
            deterministic: Apply no dropout.

        Returns:
            The output, (B, H', W', features), and the output of each layer and of the downsampler, for the skip
            connections.
        """
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


def _joined(x: jax.Array, skip: jax.Array) -> jax.Array:
    """Join two feature maps (B, H, W, …) along their channels."""
    x = jnp.concatenate([x, skip], axis=-1)
    if x.shape[0] > 1:
        return x
    # Of one picture XLA lays out rows along the lanes of a TPU where the channels do not fill them, and then takes
    # longer to transpose the norm's result for the convolution than that runs.
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2, 3)))


class UpBlock(nn.Module):
    """Residual blocks, each over the input and a skip connection, with attention if there is any, then an upsampler.

    Args:
        features: Output channels.
        layers: Number of residual blocks.
        config: Layer config.
        attention: Config of the attention layers, or None.
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
        """Return the output.

        Args:
            x: Feature map, (B, H, W, C).
            skips: Outputs of the down blocks, taken last first, or None.
            temb: Timestep embedding, (B, E), or None.
            context: Tokens for cross-attention, (B, S, C'), or None.
            deterministic: Apply no dropout.
            size: Height and width to upsample to; None doubles them.

        Returns:
            The output, (B, H', W', features).
        """
        resnet = _resnet(self.config)
        for i in range(self.layers):
            if skips is not None:
                x = _joined(x, skips[-1 - i])
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
        config: Layer config.
        attention: Config of the attention layer, or None.
        layers: Number of pairs of attention and residual block after the first residual block: 1 or 0.
    """

    config: LayerConfig
    attention: AttentionConfig | None = None
    layers: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, temb: jax.Array | None, context: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """Map (B, H, W, C) to the same shape; the other arguments are those of `DownBlock`."""
        resnet, features = _resnet(self.config), x.shape[-1]
        x = resnet(features, self.config, name="resnets_0")(x, temb, deterministic)
        for i in range(self.layers):
            if self.attention is not None:
                x = _attention(self.config, self.attention, i, x, context)
            x = resnet(features, self.config, name=f"resnets_{i + 1}")(x, temb, deterministic)
        return x
