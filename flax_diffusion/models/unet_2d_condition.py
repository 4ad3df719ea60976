"""The text-conditional UNet of Stable Diffusion 1.x, 2.x and XL."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.typed import Checkpointing, Count, Size
from flax_diffusion.models.blocks import DOWN_BLOCKS, UP_BLOCKS, UpBlock, block_layer_config
from flax_diffusion.models.condition import check_condition, condition_inputs, embed_conditions
from flax_diffusion.models.layers import GroupNorm, LayerConfig, conv, dense
from flax_diffusion.models.modeling import Config, PretrainedModel
from flax_diffusion.models.outputs import FlaxUNet2DConditionOutput
from flax_diffusion.models.unet_checks import TIMESTEP_ACTS, check_blocks, check_lengths
from flax_diffusion.models.unet_encoder import UNetEncoder, per_block


class FlaxUNet2DConditionModel(UNetEncoder, PretrainedModel, nn.Module):
    """UNet from noisy latents, a timestep and text embeddings to a prediction of the latents' size.

    Fields are the config keys of Diffusers' UNet2DConditionModel, and:

    Args:
        dtype: Dtype of matrix products and convolutions.
        param_dtype: Dtype of newly initialised parameters.
        gradient_checkpointing: Recompute residual and transformer blocks in the backward pass, or parts ("minimal").

    Reference:
        UNet2DConditionModel of Diffusers (PyTorch); Rombach et al. 2022.
    """

    torch_class: ClassVar[str] = "UNet2DConditionModel"
    unsaved: ClassVar[tuple[str, ...]] = ("split_head_dim", "use_memory_efficient_attention")
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", None),
        "encoder_hid_dim_type": (None, "text_proj"),
        "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
        "addition_embed_type": (None, "text_time"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "time_embedding_type": ("positional",),
        "act_fn": TIMESTEP_ACTS,
        "time_embedding_act_fn": (None, *TIMESTEP_ACTS),
        "timestep_post_act": (None, *TIMESTEP_ACTS),
        "attention_type": ("default",),
        "cross_attention_norm": (None, "group_norm"),
    }

    sample_size: Any = None
    in_channels: Size = 4
    out_channels: Size = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[Size, ...] = (320, 640, 1280, 1280)
    layers_per_block: Count | tuple[Count, ...] = 2
    downsample_padding: Count = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: Size = 32
    norm_eps: float = 1e-5
    cross_attention_dim: Size | tuple[Size, ...] = 1280
    transformer_layers_per_block: Count | tuple[Count | tuple[Count, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[Count | tuple[Count, ...], ...] | None = None
    encoder_hid_dim: Size | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: Size | tuple[Size, ...] = 8
    num_attention_heads: Size | tuple[Size, ...] | None = None  # saved as attention_head_dim, which means the same
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: Size | None = None
    num_class_embeds: Size | None = None
    upcast_attention: bool | None = False  # scores and softmax in float32, which `attention` has in any case
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: Size | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: Size | None = None
    conv_in_kernel: Size = 3
    conv_out_kernel: Size = 3
    projection_class_embeddings_input_dim: Size | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: Size = 64
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: Checkpointing = False
    split_head_dim: bool = False  #                   of Diffusers' Flax; changes nothing here, nor does the next
    use_memory_efficient_attention: bool = False  #  `attention` chooses the kernel that fits the device

    def __post_init__(self) -> None:
        if self.num_attention_heads is not None:
            object.__setattr__(self, "attention_head_dim", self.num_attention_heads)
            object.__setattr__(self, "num_attention_heads", None)
        super().__post_init__()

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where fields contradict each other."""
        check_blocks(config, DOWN_BLOCKS, UP_BLOCKS)
        check_lengths(
            config,
            (
                "only_cross_attention",
                "layers_per_block",
                "cross_attention_dim",
                "transformer_layers_per_block",
                "reverse_transformer_layers_per_block",
                "attention_head_dim",
            ),
        )
        nested = config.transformer_layers_per_block
        if (
            isinstance(nested, list)
            and any(isinstance(depth, list) for depth in nested)
            and config.reverse_transformer_layers_per_block is None
        ):
            raise ConfigError(
                f"transformer_layers_per_block={nested} lists layers within a block: "
                "set reverse_transformer_layers_per_block for the up blocks too"
            )
        check_condition(config)

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        return condition_inputs(config)

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array | float | int,
        encoder_hidden_states: jax.Array,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        down_block_additional_residuals: Sequence[jax.Array] | None = None,
        mid_block_additional_residual: jax.Array | None = None,
        return_dict: bool = True,
        train: bool = False,
        class_labels: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
    ) -> FlaxUNet2DConditionOutput | tuple[jax.Array]:
        """Predict the noise, or what else the scheduler's prediction type names.

        Args:
            sample: Noisy latents, (B, in_channels, H, W).
            timesteps: Timesteps, (B,), or one number for all.
            encoder_hidden_states: Text embeddings, (B, S, cross_attention_dim).
            added_cond_kwargs: "text_embeds" (B, E) and "time_ids" (B, 6), where addition_embed_type is "text_time".
            down_block_additional_residuals: A ControlNet's outputs for the skip connections, each (B, H', W', C).
            mid_block_additional_residual: A ControlNet's output for the mid block, (B, H', W', C).
            return_dict: Return a dataclass; False returns a tuple.
            train: Apply dropout, with the random key "dropout".
            class_labels: What class_embed_type asks for: classes or noise levels, (B,), or embeddings, (B, E).
            timestep_cond: Another condition, (B, time_cond_proj_dim), such as an embedded guidance scale.

        Returns:
            The prediction, (B, out_channels, H, W), in `dtype`.

        Raises:
            ConfigError: If conditions are missing or not expected.
        """
        layers = self._layers()
        x = jnp.transpose(sample, (0, 2, 3, 1)).astype(self.dtype)
        if self.center_input_sample:
            x = 2 * x - 1
        timesteps = jnp.broadcast_to(timesteps, sample.shape[:1])
        temb = embed_conditions(self.config, layers, timesteps, class_labels, timestep_cond, added_cond_kwargs)
        context = encoder_hidden_states.astype(self.dtype)
        if self.encoder_hid_dim is not None:
            assert isinstance(self.cross_attention_dim, int)
            context = dense(self.cross_attention_dim, layers, "encoder_hid_proj")(context)
        x = conv(self.block_out_channels[0], layers, "conv_in", kernel=self.conv_in_kernel)(x)

        skips, deterministic = (x,), not train
        for i in range(len(self.down_block_types)):
            x, outputs = self._down_block(i, layers)(x, temb, context, deterministic)
            skips += outputs
        if self.mid_block_type is not None:
            x = self._mid_block()(x, temb, context, deterministic)
        x, skips = _add_residuals(x, skips, mid_block_additional_residual, down_block_additional_residuals)
        for i in range(len(self.up_block_types)):
            block = self._up_block(i, layers)
            used, skips = skips[-block.layers :], skips[: -block.layers]
            # Sizes that do not divide by two on the way down come back as they were, as upstream.
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            x = block(x, used, temb, context, deterministic, size)

        x = GroupNorm(layers, self.norm_eps, self.act_fn, name="conv_norm_out")(x)
        x = conv(self.out_channels, layers, "conv_out", kernel=self.conv_out_kernel)(x)
        x = jnp.transpose(x, (0, 3, 1, 2))
        return FlaxUNet2DConditionOutput(sample=x) if return_dict else (x,)

    def _up_block(self, index: int, layers: LayerConfig) -> UpBlock:
        blocks = len(self.block_out_channels)
        mirror = blocks - 1 - index
        kind, sampler = UP_BLOCKS[self.up_block_types[index]]
        channels = self.block_out_channels[mirror]
        number = per_block(self.layers_per_block, blocks)[mirror] + 1
        depth = per_block(self.transformer_layers_per_block, blocks)[mirror]
        if self.reverse_transformer_layers_per_block is not None:
            depth = self.reverse_transformer_layers_per_block[index]
        attention = self._attention(
            kind,
            block=mirror,
            depths=per_block(depth, number),
            only_cross=per_block(self.only_cross_attention, blocks)[mirror],
            head_dim=per_block(self.attention_head_dim, blocks)[index],  # upstream does not reverse this one
        )
        return UpBlock(
            features=channels,
            layers=number,
            config=block_layer_config(layers, self.up_block_types[index]),
            attention=attention,
            upsampler=None if index == blocks - 1 else sampler or "conv",
            name=f"up_blocks_{index}",
        )


def _add_residuals(
    x: jax.Array, skips: tuple[jax.Array, ...], mid: jax.Array | None, down: Sequence[jax.Array] | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Add a ControlNet's outputs, (B, H, W, C), to the mid block's output and to the skip connections."""
    if mid is None and down is None:
        return x, skips
    if mid is None or down is None or len(down) != len(skips):
        raise ConfigError(
            f"a ControlNet gives mid_block_additional_residual and {len(skips)} down_block_additional_residuals: "
            f"got {'no' if mid is None else 'a'} mid residual and {len(down or ())} down residuals; pass all of them"
        )

    def add(features: jax.Array, residual: jax.Array) -> jax.Array:
        allowed = features.shape, (features.shape[0], 1, 1, features.shape[-1])  # means over the pixels
        if residual.shape not in allowed:
            raise ConfigError(
                f"a ControlNet's residual has shape {residual.shape} where the UNet's features have {features.shape}: "
                "channels come last, and the latents are those that the ControlNet was given"
            )
        return features + residual.astype(features.dtype)

    return add(x, mid), tuple(map(add, skips, down))
