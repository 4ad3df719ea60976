"""Parts of the autoencoder under the names and fields that Diffusers' `vae_flax` had, for code that builds on them.

All take and return feature maps with channels last, (B, H, W, C). Parameters have PyTorch's names. As in Diffusers'
Flax, `in_channels` need not be right where the input tells it.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.models.attention import SpatialAttention
from flax_diffusion.models.autoencoder_kl import Decoder, Encoder
from flax_diffusion.models.blocks import AttentionConfig, DownBlock, MidBlock, UpBlock
from flax_diffusion.models.layers import Downsample2D, LayerConfig, ResnetBlock2D, Upsample2D


def _layers(groups: int | None, dtype: Any, dropout: float = 0.0, act: str = "silu", channels: int = 0) -> LayerConfig:
    groups = min(channels // 4, 32) if groups is None else groups
    return LayerConfig(groups=groups, eps=1e-6, act=act, dropout=dropout, dtype=dtype)


def _check_types(field: str, types: Sequence[str], allowed: str, channels: Sequence[int]) -> None:
    if any(name != allowed for name in types) or len(types) != len(channels):
        raise ConfigError(
            f"{field}={tuple(types)} with block_out_channels={tuple(channels)}: give '{allowed}' once for each"
        )


class _Wrapper(nn.Module):
    """Module with Diffusers' fields around one of ours, whose parameters are its own."""

    def make(self) -> nn.Module:
        """Return the module that computes."""
        raise NotImplementedError

    def setup(self) -> None:
        """Create the module that computes, in this module's scope."""
        self.layer = self.make()
        nn.share_scope(self, self.layer)


class FlaxUpsample2D(_Wrapper):
    """Convolution after doubling height and width by repetition.

    Args:
        in_channels: Channels of input and output.
        dtype: Dtype of the convolution.
    """

    in_channels: int
    dtype: Any = jnp.float32

    def make(self) -> nn.Module:
        """Return the module that computes."""
        return Upsample2D(self.in_channels, _layers(1, self.dtype))

    def __call__(self, hidden_states: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, 2·H, 2·W, C)."""
        return self.layer(hidden_states)


class FlaxDownsample2D(_Wrapper):
    """Strided convolution that halves height and width, padded below and on the right.

    Args:
        in_channels: Channels of input and output.
        dtype: Dtype of the convolution.
    """

    in_channels: int
    dtype: Any = jnp.float32

    def make(self) -> nn.Module:
        """Return the module that computes."""
        return Downsample2D(self.in_channels, _layers(1, self.dtype), padding=0)

    def __call__(self, hidden_states: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H / 2, W / 2, C)."""
        return self.layer(hidden_states)


class FlaxResnetBlock2D(_Wrapper):
    """Residual block without a timestep.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; None for those of the input.
        dropout: Rate of dropout.
        groups: Groups of the group norms.
        use_nin_shortcut: Whether the residual is projected; None, and the only other value allowed, for where the
            channels differ.
        dtype: Dtype of the convolutions.
    """

    in_channels: int
    out_channels: int | None = None
    dropout: float = 0.0
    groups: int = 32
    use_nin_shortcut: bool | None = None
    dtype: Any = jnp.float32

    def make(self) -> nn.Module:
        """Return the module that computes.

        Raises:
            ConfigError: If `use_nin_shortcut` says another thing than the channels.
        """
        out = self.out_channels or self.in_channels
        if self.use_nin_shortcut not in (None, out != self.in_channels):
            raise ConfigError(
                f"use_nin_shortcut={self.use_nin_shortcut} with {self.in_channels} channels in and {out} out: leave it "
                "out, the residual is projected where they differ"
            )
        return ResnetBlock2D(out, _layers(self.groups, self.dtype, self.dropout))

    def __call__(self, hidden_states: jax.Array, deterministic: bool = True) -> jax.Array:
        """Map (B, H, W, in_channels) to (B, H, W, out_channels)."""
        return self.layer(hidden_states, None, deterministic)


class FlaxAttentionBlock(_Wrapper):
    """Self-attention over pixels, with group norm and residual.

    Args:
        channels: Channels of input and output.
        num_head_channels: Channels per head; None for one head.
        num_groups: Groups of the group norm.
        dtype: Dtype of the products.
    """

    channels: int
    num_head_channels: int | None = None
    num_groups: int = 32
    dtype: Any = jnp.float32

    def make(self) -> nn.Module:
        """Return the module that computes."""
        layers = _layers(self.num_groups, self.dtype)
        return SpatialAttention(self.num_head_channels or self.channels, layers, self.num_groups)

    def __call__(self, hidden_states: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        return self.layer(hidden_states)


class FlaxDownEncoderBlock2D(_Wrapper):
    """Residual blocks, then a downsampler.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dropout: Rate of dropout.
        num_layers: Number of residual blocks.
        resnet_groups: Groups of the group norms.
        add_downsample: Whether there is a downsampler.
        dtype: Dtype of the convolutions.
    """

    in_channels: int
    out_channels: int
    dropout: float = 0.0
    num_layers: int = 1
    resnet_groups: int = 32
    add_downsample: bool = True
    dtype: Any = jnp.float32

    def make(self) -> nn.Module:
        """Return the module that computes."""
        layers = _layers(self.resnet_groups, self.dtype, self.dropout)
        sampler = "conv" if self.add_downsample else None
        return DownBlock(self.out_channels, self.num_layers, layers, None, sampler, padding=0)

    def __call__(self, hidden_states: jax.Array, deterministic: bool = True) -> jax.Array:
        """Map (B, H, W, in_channels) to (B, H', W', out_channels)."""
        return self.layer(hidden_states, None, None, deterministic)[0]


class FlaxUpDecoderBlock2D(_Wrapper):
    """Residual blocks, then an upsampler.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dropout: Rate of dropout.
        num_layers: Number of residual blocks.
        resnet_groups: Groups of the group norms.
        add_upsample: Whether there is an upsampler.
        dtype: Dtype of the convolutions.
    """

    in_channels: int
    out_channels: int
    dropout: float = 0.0
    num_layers: int = 1
    resnet_groups: int = 32
    add_upsample: bool = True
    dtype: Any = jnp.float32

    def make(self) -> nn.Module:
        """Return the module that computes."""
        layers = _layers(self.resnet_groups, self.dtype, self.dropout)
        return UpBlock(self.out_channels, self.num_layers, layers, None, "conv" if self.add_upsample else None)

    def __call__(self, hidden_states: jax.Array, deterministic: bool = True) -> jax.Array:
        """Map (B, H, W, in_channels) to (B, H', W', out_channels)."""
        return self.layer(hidden_states, None, None, None, deterministic)


class FlaxUNetMidBlock2D(_Wrapper):
    """One residual block, then pairs of attention and residual block.

    Args:
        in_channels: Channels of input and output.
        dropout: Rate of dropout.
        num_layers: Number of pairs.
        resnet_groups: Groups of all group norms; None for a quarter of the channels, at most 32.
        num_attention_heads: Channels per head, as in Diffusers' Flax in spite of the name; None for one head.
        dtype: Dtype of convolutions and products.
    """

    in_channels: int
    dropout: float = 0.0
    num_layers: int = 1
    resnet_groups: int | None = 32
    num_attention_heads: int | None = 1
    dtype: Any = jnp.float32

    def make(self) -> nn.Module:
        """Return the module that computes."""
        layers = _layers(self.resnet_groups, self.dtype, self.dropout, channels=self.in_channels)
        head_dim = self.num_attention_heads or self.in_channels
        attention = AttentionConfig(kind="spatial", head_dim=head_dim, groups=layers.groups)
        return MidBlock(layers, attention, self.num_layers)

    def __call__(self, hidden_states: jax.Array, deterministic: bool = True) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        return self.layer(hidden_states, None, None, deterministic)


class FlaxEncoder(_Wrapper):
    """Network from images to latents, or with `double_z` to their means and log variances.

    Args:
        in_channels: Channels of the images.
        out_channels: Channels of the latents.
        down_block_types: "DownEncoderBlock2D" for each block.
        block_out_channels: Channels of each block.
        layers_per_block: Residual blocks per block.
        norm_num_groups: Groups of all group norms.
        act_fn: Activation.
        double_z: Return twice the channels.
        dtype: Dtype of convolutions and products.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    act_fn: str = "silu"
    double_z: bool = False
    dtype: Any = jnp.float32

    def make(self) -> nn.Module:
        """Return the module that computes.

        Raises:
            ConfigError: If the block types are others, or not as many as the blocks.
        """
        _check_types("down_block_types", self.down_block_types, "DownEncoderBlock2D", self.block_out_channels)
        layers = _layers(self.norm_num_groups, self.dtype, act=self.act_fn)
        width = self.out_channels * (2 if self.double_z else 1)
        return Encoder(tuple(self.block_out_channels), self.layers_per_block, width, True, layers)

    def __call__(self, sample: jax.Array, deterministic: bool = True) -> jax.Array:
        """Map (B, H, W, in_channels) to (B, H / f, W / f, C) with f = 2^(blocks − 1)."""
        return self.layer(sample, deterministic)


class FlaxDecoder(_Wrapper):
    """Network from latents to images.

    Args:
        in_channels: Channels of the latents.
        out_channels: Channels of the images.
        up_block_types: "UpDecoderBlock2D" for each block.
        block_out_channels: Channels of each of the encoder's blocks; they are walked in reverse.
        layers_per_block: Residual blocks per block, less one.
        norm_num_groups: Groups of all group norms.
        act_fn: Activation.
        dtype: Dtype of convolutions and products.
    """

    in_channels: int = 3
    out_channels: int = 3
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    act_fn: str = "silu"
    dtype: Any = jnp.float32

    def make(self) -> nn.Module:
        """Return the module that computes.

        Raises:
            ConfigError: If the block types are others, or not as many as the blocks.
        """
        _check_types("up_block_types", self.up_block_types, "UpDecoderBlock2D", self.block_out_channels)
        layers = _layers(self.norm_num_groups, self.dtype, act=self.act_fn)
        return Decoder(tuple(self.block_out_channels), self.layers_per_block, self.out_channels, True, layers)

    def __call__(self, sample: jax.Array, deterministic: bool = True) -> jax.Array:
        """Map (B, h, w, in_channels) to (B, h·f, w·f, out_channels) with f = 2^(blocks − 1)."""
        return self.layer(sample, deterministic)
