"""The unconditional (or class-conditional) UNet, which upstream never had in Flax."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.typed import Checkpointing, Count, Size
from flax_diffusion.models.blocks import (
    DOWN_BLOCKS,
    UP_BLOCKS,
    AttentionConfig,
    DownBlock,
    MidBlock,
    UpBlock,
    block_layer_config,
)
from flax_diffusion.models.condition import embedding_table
from flax_diffusion.models.layers import GroupNorm, LayerConfig, TimestepEmbedding, conv, timestep_embedding
from flax_diffusion.models.modeling import Config, PretrainedModel
from flax_diffusion.models.outputs import FlaxUNet2DOutput
from flax_diffusion.models.unet_checks import TIMESTEP_ACTS, check_blocks

NO_CROSS_ATTENTION = ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D")


class FlaxUNet2DModel(PretrainedModel, nn.Module):
    """UNet from a noisy image and a timestep to a prediction of the same size.

    Fields are the config keys of Diffusers' UNet2DModel, and:

    Args:
        dtype: Dtype of matrix products and convolutions.
        param_dtype: Dtype of newly initialised parameters.
        gradient_checkpointing: Recompute residual and attention blocks in the backward pass, or parts ("minimal").

    Reference:
        UNet2DModel of Diffusers (PyTorch); Ho et al. 2020.
    """

    torch_class: ClassVar[str] = "UNet2DModel"
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "time_embedding_type": ("positional", "learned"),
        "mid_block_type": ("UNetMidBlock2D", None),
        "downsample_type": ("conv", "resnet"),
        "upsample_type": ("conv", "resnet"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None, "timestep", "identity"),
        "act_fn": TIMESTEP_ACTS,
    }

    sample_size: Any = None
    in_channels: Size = 3
    out_channels: Size = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: Size | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", *("AttnDownBlock2D",) * 3)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (*("AttnUpBlock2D",) * 3, "UpBlock2D")
    block_out_channels: tuple[Size, ...] = (224, 448, 672, 896)
    layers_per_block: Count = 2
    mid_block_scale_factor: float = 1
    downsample_padding: Count = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: Size | None = 8
    norm_num_groups: Size = 32
    attn_norm_num_groups: Size | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: Size | None = None
    num_train_timesteps: Size | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: Checkpointing = False

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where fields contradict each other."""
        up_types = tuple(name for name in UP_BLOCKS if "CrossAttn" not in name)
        check_blocks(config, NO_CROSS_ATTENTION, up_types)
        if config.time_embedding_type == "learned" and config.num_train_timesteps is None:
            raise ConfigError(
                "time_embedding_type='learned' needs num_train_timesteps, which is None: set it to the scheduler's"
            )

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        size = 2 ** (len(config.block_out_channels) - 1)
        width = config.time_embedding_dim or 4 * config.block_out_channels[0]
        labels = jnp.zeros((1, width)) if config.class_embed_type == "identity" else jnp.zeros((1,), jnp.int32)
        conditional = config.class_embed_type is not None or config.num_class_embeds is not None
        sample = jnp.zeros((1, config.in_channels, size, size))
        return sample, jnp.zeros((1,), jnp.int32), labels if conditional else None

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array | float | int,
        class_labels: jax.Array | None = None,
        return_dict: bool = True,
        train: bool = False,
    ) -> FlaxUNet2DOutput | tuple[jax.Array]:
        """Predict the noise, or what else the scheduler's prediction type names.

        Args:
            sample: Noisy images, (B, in_channels, H, W), H and W multiples of 2^(blocks − 1).
            timesteps: Timesteps, (B,), or one number for all.
            class_labels: Class indices, (B,), or embeddings, (B, time_embedding_dim), where class_embed_type is
                "identity".
            return_dict: Return a dataclass; False returns a tuple.
            train: Apply dropout, with the random key "dropout".

        Returns:
            The prediction, (B, out_channels, H, W), in `dtype`.

        Raises:
            ConfigError: If class labels are missing or not expected, or the size does not fit the UNet.
        """
        factor = 2 ** (len(self.block_out_channels) - 1)
        if any(size % factor for size in sample.shape[2:]):
            raise ConfigError(
                f"images of {sample.shape[2]}x{sample.shape[3]} do not fit this UNet: "
                f"make height and width multiples of {factor}"
            )
        layers = self._layers()
        x = jnp.transpose(sample, (0, 2, 3, 1)).astype(self.dtype)
        if self.center_input_sample:
            x = 2 * x - 1
        temb = self._time_embedding(jnp.broadcast_to(timesteps, sample.shape[:1]), class_labels, layers)
        x = conv(self.block_out_channels[0], layers, "conv_in")(x)

        skips, deterministic = (x,), not train
        for i in range(len(self.down_block_types)):
            x, outputs = self._down_block(i, layers)(x, temb, None, deterministic)
            skips += outputs
        if self.mid_block_type is not None:
            x = self._mid_block()(x, temb, None, deterministic)
        for i in range(len(self.up_block_types)):
            block = self._up_block(i, layers)
            x = block(x, skips[-block.layers :], temb, None, deterministic)
            skips = skips[: -block.layers]

        x = GroupNorm(layers, self.norm_eps, "silu", name="conv_norm_out")(x)  # SiLU whatever act_fn is
        x = jnp.transpose(conv(self.out_channels, layers, "conv_out")(x), (0, 3, 1, 2))
        return FlaxUNet2DOutput(sample=x) if return_dict else (x,)

    def _layers(self, **changes: Any) -> LayerConfig:
        fields: dict[str, Any] = {
            "groups": self.norm_num_groups,
            "eps": self.norm_eps,
            "act": self.act_fn,
            "dropout": self.dropout,
            "time_scale_shift": self.resnet_time_scale_shift == "scale_shift",
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "checkpointing": self.gradient_checkpointing,
        }
        return LayerConfig(**{**fields, **changes})

    def _time_embedding(self, timesteps: jax.Array, class_labels: jax.Array | None, layers: LayerConfig) -> jax.Array:
        """Return the embedding of timesteps and class labels, (B, time_embedding_dim)."""
        width = self.time_embedding_dim or 4 * self.block_out_channels[0]
        learned = None
        if self.time_embedding_type == "learned":
            assert self.num_train_timesteps is not None
            learned = embedding_table(self.num_train_timesteps, self.block_out_channels[0], layers, "time_proj")

        def project(values: jax.Array) -> jax.Array:
            if learned is not None:
                return learned(values)
            return timestep_embedding(
                values,
                self.block_out_channels[0],
                flip_sin_to_cos=self.flip_sin_to_cos,
                freq_shift=self.freq_shift,
                dtype=self.dtype,
            )

        temb = TimestepEmbedding(width, layers, name="time_embedding")(project(timesteps))
        conditional = self.class_embed_type is not None or self.num_class_embeds is not None
        if conditional != (class_labels is not None):
            raise ConfigError(
                "this UNet is class-conditional: pass class_labels"
                if conditional
                else "class_labels were given to a UNet without class embedding: set num_class_embeds or drop them"
            )
        if class_labels is None:
            return temb
        if self.class_embed_type == "timestep":
            return temb + TimestepEmbedding(width, layers, name="class_embedding")(project(class_labels))
        if self.class_embed_type == "identity":
            return temb + class_labels.astype(temb.dtype)
        assert self.num_class_embeds is not None
        return temb + embedding_table(self.num_class_embeds, width, layers, "class_embedding")(class_labels)

    def _spatial(self, channels: int, groups: int | None) -> AttentionConfig:
        return AttentionConfig(kind="spatial", head_dim=self.attention_head_dim or channels, groups=groups)

    def _down_block(self, index: int, layers: LayerConfig) -> DownBlock:
        kind, sampler = DOWN_BLOCKS[self.down_block_types[index]]
        channels = self.block_out_channels[index]
        final = index == len(self.block_out_channels) - 1
        return DownBlock(
            features=channels,
            layers=self.layers_per_block,
            config=block_layer_config(layers, self.down_block_types[index]),
            attention=self._spatial(channels, self.norm_num_groups) if kind else None,
            downsampler=None if final else sampler or self.downsample_type,
            padding=self.downsample_padding,
            name=f"down_blocks_{index}",
        )

    def _up_block(self, index: int, layers: LayerConfig) -> UpBlock:
        kind, sampler = UP_BLOCKS[self.up_block_types[index]]
        channels = self.block_out_channels[-1 - index]
        final = index == len(self.block_out_channels) - 1
        return UpBlock(
            features=channels,
            layers=self.layers_per_block + 1,
            config=block_layer_config(layers, self.up_block_types[index]),
            attention=self._spatial(channels, self.norm_num_groups) if kind else None,
            upsampler=None if final else sampler or self.upsample_type,
            name=f"up_blocks_{index}",
        )

    def _mid_block(self) -> MidBlock:
        groups = self.attn_norm_num_groups
        if groups is None and self.resnet_time_scale_shift == "default":
            groups = self.norm_num_groups  # else upstream leaves the attention's norm out
        attention = self._spatial(self.block_out_channels[-1], groups) if self.add_attention else None
        return MidBlock(self._layers(output_scale=self.mid_block_scale_factor), attention, name="mid_block")
