"""The ControlNet of Stable Diffusion: from a picture that steers to what the UNet adds to its features."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.typed import Checkpointing, Count, Size
from flax_diffusion.models.blocks import DOWN_BLOCKS
from flax_diffusion.models.condition import check_condition, condition_inputs, embed_conditions
from flax_diffusion.models.layers import LayerConfig, conv, dense
from flax_diffusion.models.modeling import Config, PretrainedModel
from flax_diffusion.models.outputs import FlaxControlNetOutput
from flax_diffusion.models.unet_2d_condition import FlaxUNet2DConditionModel
from flax_diffusion.models.unet_checks import TIMESTEP_ACTS, check_blocks, check_lengths
from flax_diffusion.models.unet_encoder import UNetEncoder

UNET_ONLY: dict[str, Any] = {
    "sample_size": None,
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "dual_cross_attention": False,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "timestep_post_act": None,
}
"""Fields of the UNet that a ControlNet has not, with the value that it behaves by."""


class FlaxControlNetConditioningEmbedding(nn.Module):
    """Convolutions that bring a picture to the size and width of the UNet's first features.

    Args:
        features: Output channels.
        channels: Channels of each stage; each but the first halves height and width.
        config: Layer config; its dtypes are used.
    """

    features: int
    channels: tuple[int, ...]
    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H / f, W / f, features) with f = 2^(stages − 1)."""
        x = jax.nn.silu(conv(self.channels[0], self.config, "conv_in")(x))
        for i, (width, wider) in enumerate(zip(self.channels, self.channels[1:], strict=False)):
            x = jax.nn.silu(conv(width, self.config, f"blocks_{2 * i}")(x))
            x = jax.nn.silu(conv(wider, self.config, f"blocks_{2 * i + 1}", stride=2)(x))
        return conv(self.features, self.config, "conv_out")(x)


class FlaxControlNetModel(UNetEncoder, PretrainedModel, nn.Module):
    """ControlNet: a copy of the UNet's first half that reads a picture, and gives the UNet what to add.

    Fields are the config keys of Diffusers' ControlNetModel, and:

    Args:
        sample_size: Height and width of the latents, of Diffusers' Flax alone, for those who read it.
        dropout: Rate of dropout in residual blocks, of Diffusers' Flax alone.
        dtype: Dtype of matrix products and convolutions.
        param_dtype: Dtype of newly initialised parameters.
        gradient_checkpointing: Recompute residual and transformer blocks in the backward pass, or parts ("minimal").

    Reference:
        ControlNetModel of Diffusers (PyTorch); Zhang et al. 2023, https://arxiv.org/abs/2302.05543.
    """

    torch_class: ClassVar[str] = "ControlNetModel"
    unsaved: ClassVar[tuple[str, ...]] = ("sample_size", "dropout")
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "class_embed_type": (None, "timestep", "identity", "projection"),
        "addition_embed_type": (None, "text_time"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "act_fn": TIMESTEP_ACTS,
        "controlnet_conditioning_channel_order": ("rgb", "bgr"),
    }
    # What the UNet has as fields, and a ControlNet has as constants.
    cross_attention_norm = None
    dual_cross_attention = False
    mid_block_only_cross_attention = None
    resnet_out_scale_factor = 1.0
    resnet_skip_time_act = False

    in_channels: Size = 4
    conditioning_channels: Size = 3
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[Size, ...] = (320, 640, 1280, 1280)
    layers_per_block: Count = 2
    downsample_padding: Count = 1
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: Size = 32
    norm_eps: float = 1e-5
    cross_attention_dim: Size = 1280
    transformer_layers_per_block: Count | tuple[Count, ...] = 1
    encoder_hid_dim: Size | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: Size | tuple[Size, ...] = 8
    num_attention_heads: Size | tuple[Size, ...] | None = None  # None: attention_head_dim is the number of heads
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: Size | None = None
    num_class_embeds: Size | None = None
    upcast_attention: bool | None = False  # scores and softmax in float32, which `attention` has in any case
    resnet_time_scale_shift: str = "default"
    projection_class_embeddings_input_dim: Size | None = None
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[Size, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False
    addition_embed_type_num_heads: Size = 64
    sample_size: Any = None
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: Checkpointing = False

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where fields contradict each other."""
        check_blocks(config, [name for name, (kind, _) in DOWN_BLOCKS.items() if kind in (None, "cross")])
        check_lengths(
            config,
            ("only_cross_attention", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads"),
        )
        if not config.conditioning_embedding_out_channels:
            raise ConfigError("conditioning_embedding_out_channels is empty: give each stage its channels")
        check_condition(config)

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        sample, timesteps, context, added, *_, labels, _ = condition_inputs(Config({**UNET_ONLY, **config}))
        factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        height, width = (factor * size for size in sample.shape[2:])
        picture = jnp.zeros((1, config.conditioning_channels, height, width))
        return sample, timesteps, context, picture, 1.0, True, False, added, labels

    @classmethod
    def from_unet(
        cls,
        unet: FlaxUNet2DConditionModel,
        params: Mapping[str, Any] | None = None,
        *,
        rng: jax.Array | int = 0,
        dtype: Any = None,
        **changes: Any,
    ) -> tuple["FlaxControlNetModel", dict[str, Any]]:
        """Make a ControlNet that starts from a UNet, and changes nothing at first.

        Args:
            unet: The UNet.
            params: Its parameters, which those of the same name become; None draws all.
            rng: JAX random key, or a seed, for the parameters that the UNet has not.
            dtype: Dtype of the computation; None for the UNet's.
            changes: Fields of the ControlNet, such as `conditioning_channels`.

        Returns:
            The ControlNet and its parameters.

        Reference:
            ControlNetModel.from_unet of Diffusers (PyTorch).
        """
        shared = {name: value for name, value in unet.config.items() if name in cls.config_fields()}
        model = cls(**{**shared, "dtype": dtype or unet.dtype, **changes})
        own = flatten_dict(model.init_weights(rng))
        given = flatten_dict(dict(params or {}))
        return model, unflatten_dict({path: given.get(path, value) for path, value in own.items()})

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array | float | int,
        encoder_hidden_states: jax.Array,
        controlnet_cond: jax.Array,
        conditioning_scale: jax.Array | float = 1.0,
        return_dict: bool = True,
        train: bool = False,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        class_labels: jax.Array | None = None,
    ) -> FlaxControlNetOutput | tuple[tuple[jax.Array, ...], jax.Array]:
        """Return what the UNet adds to its skip connections and to its mid block's output.

        Args:
            sample: Noisy latents, (B, in_channels, h, w).
            timesteps: Timesteps, (B,), or one number for all.
            encoder_hidden_states: Text embeddings, (B, S, cross_attention_dim).
            controlnet_cond: Pictures in [0, 1], (B, conditioning_channels, f·h, f·w), f = 2^(stages − 1) of
                `conditioning_embedding_out_channels`.
            conditioning_scale: Factor of the outputs.
            return_dict: Return a dataclass; False returns a tuple.
            train: Apply dropout, with the random key "dropout".
            added_cond_kwargs: See `FlaxUNet2DConditionModel`.
            class_labels: See `FlaxUNet2DConditionModel`.

        Returns:
            One array for each skip connection, and one for the mid block, each (B, H', W', C); where
            `global_pool_conditions` is set, means over the pixels, (B, 1, 1, C).

        Raises:
            ConfigError: If the picture does not fit the latents, or conditions are missing or not expected.
        """
        layers, deterministic = self._layers(), not train
        self._check_picture(sample, controlnet_cond)
        if self.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = jnp.flip(controlnet_cond, axis=1)
        config = Config({**UNET_ONLY, **self.config})
        timesteps = jnp.broadcast_to(timesteps, sample.shape[:1])
        temb = embed_conditions(config, layers, timesteps, class_labels, None, added_cond_kwargs)
        context = encoder_hidden_states.astype(self.dtype)
        if self.encoder_hid_dim is not None:
            context = dense(self.cross_attention_dim, layers, "encoder_hid_proj")(context)
        x = jnp.transpose(sample, (0, 2, 3, 1)).astype(self.dtype)
        picture = jnp.transpose(controlnet_cond, (0, 2, 3, 1)).astype(self.dtype)
        embed = FlaxControlNetConditioningEmbedding(
            self.block_out_channels[0],
            self.conditioning_embedding_out_channels,
            layers,
            name="controlnet_cond_embedding",
        )
        x = conv(self.block_out_channels[0], layers, "conv_in")(x) + embed(picture)

        skips = (x,)
        for i in range(len(self.down_block_types)):
            x, outputs = self._down_block(i, layers)(x, temb, context, deterministic)
            skips += outputs
        x = self._mid_block()(x, temb, context, deterministic)

        down = tuple(
            self._output(skip, layers, f"controlnet_down_blocks_{i}", conditioning_scale)
            for i, skip in enumerate(skips)
        )
        mid = self._output(x, layers, "controlnet_mid_block", conditioning_scale)
        return FlaxControlNetOutput(down, mid) if return_dict else (down, mid)

    def _output(self, x: jax.Array, layers: LayerConfig, name: str, scale: jax.Array | float) -> jax.Array:
        x = conv(x.shape[-1], layers, name, kernel=1)(x) * jnp.asarray(scale, self.dtype)
        return jnp.mean(x, axis=(1, 2), keepdims=True) if self.global_pool_conditions else x

    def _check_picture(self, sample: jax.Array, picture: jax.Array) -> None:
        """Raise ConfigError unless the pictures have the right channels and are f times as large as the latents."""
        factor = 2 ** (len(self.conditioning_embedding_out_channels) - 1)
        wanted = (sample.shape[0], self.conditioning_channels, *(factor * size for size in sample.shape[2:]))
        if tuple(picture.shape) != wanted:
            raise ConfigError(
                f"controlnet_cond has shape {tuple(picture.shape)}, and latents of {tuple(sample.shape)} "
                f"need {wanted}: resize the control pictures, and give one for each latent"
            )
