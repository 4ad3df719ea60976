"""CLIP's vision encoder: the Linen module, and Transformers' class of it.

Axes in shapes: B batch, H height, W width, C channels, L tokens, N heads.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.typed import Checkpointing, Count, Size
from flax_diffusion.models.clip_layers import CLIPEncoder, CLIPEncoderPretrained, CLIPLayerConfig, clip_layer_norm
from flax_diffusion.models.modeling import Config
from flax_diffusion.models.transformers_face import FlaxPreTrainedModel, Params
from flax_diffusion.models.transformers_outputs import FlaxBaseModelOutputWithPooling


@dataclass(frozen=True, kw_only=True)
class CLIPVisionLayerConfig(CLIPLayerConfig):
    """Those fields of a vision encoder that its layers read."""

    num_channels: int
    image_size: int
    patch_size: int


class CLIPVisionEmbeddings(nn.Module):
    """Patches of the image as tokens, behind a class token, with position embeddings.

    Args:
        config: The vision encoder's configuration and dtypes.
    """

    config: CLIPVisionLayerConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Map images (B, H, W, C) to tokens (B, 1 + patches, hidden_size)."""
        config, width = self.config, self.config.hidden_size
        expected = (config.image_size, config.image_size, config.num_channels)
        if pixels.shape[1:] != expected:
            raise ConfigError(
                f"the images are {pixels.shape[1:]} (height, width, channels), the model takes {expected}: resize them"
            )
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        start = nn.initializers.normal()  # upstream's in Flax
        token = self.param("class_embedding", nn.initializers.normal(0.02), (width,), config.param_dtype)
        size = (config.patch_size, config.patch_size)
        patches = nn.Conv(
            width, size, size, "VALID", use_bias=False, kernel_init=start, name="patch_embedding", **dtypes
        )(pixels)
        patches = patches.reshape(len(pixels), -1, width)
        first = jnp.broadcast_to(token.astype(patches.dtype), (len(pixels), 1, width))
        count = 1 + patches.shape[1]
        places = nn.Embed(count, width, embedding_init=start, name="position_embedding", **dtypes)(jnp.arange(count))
        return jnp.concatenate([first, patches], axis=1) + places


class CLIPVisionTransformer(nn.Module):
    """Embeddings, layer norm, encoder, and the normalised class token.

    Args:
        config: The vision encoder's configuration and dtypes.
    """

    config: CLIPVisionLayerConfig

    @nn.compact
    def __call__(
        self, pixel_values: jax.Array, output_attentions: bool = False, output_hidden_states: bool = False
    ) -> FlaxBaseModelOutputWithPooling:
        """Encode images; see `FlaxCLIPVisionModule`."""
        x = CLIPVisionEmbeddings(self.config, name="embeddings")(pixel_values)
        x = clip_layer_norm(self.config, "pre_layrnorm")(x)  # as it is spelt on disk
        states, weights = CLIPEncoder(self.config, name="encoder")(x, None, output_attentions)
        pooled = clip_layer_norm(self.config, "post_layernorm")(states[-1][:, 0])
        return FlaxBaseModelOutputWithPooling(states[-1], pooled, states if output_hidden_states else None, weights)


class FlaxCLIPVisionModule(CLIPEncoderPretrained, nn.Module):
    """CLIP's vision encoder.

    Fields are the config keys of Transformers' CLIPVisionConfig, and:

    Args:
        dtype: Dtype of matrix products.
        param_dtype: Dtype of newly initialised parameters.
        gradient_checkpointing: Recompute encoder layers in the backward pass, or parts ("minimal").

    Reference:
        CLIPVisionModel of Transformers (PyTorch); Radford et al. 2021.
    """

    torch_class: ClassVar[str] = "CLIPVisionModel"
    model_type: ClassVar[str] = "clip_vision_model"

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    projection_dim: Size = 512
    num_hidden_layers: Count = 12
    num_attention_heads: Size = 12
    num_channels: Size = 3
    image_size: Size = 224
    patch_size: Size = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: Checkpointing = False

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where fields contradict each other."""
        CLIPEncoderPretrained.check(config)
        if config.patch_size > config.image_size:
            raise ConfigError(
                f"patch_size={config.patch_size} exceeds image_size={config.image_size}: change one of them"
            )

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        return (jnp.zeros((1, config.image_size, config.image_size, config.num_channels)),)

    def layer_config(self) -> CLIPVisionLayerConfig:
        """Return what the layers read."""
        return CLIPVisionLayerConfig.of(self.config, self.dtype, self.param_dtype, self.gradient_checkpointing)

    @nn.compact
    def __call__(
        self,
        pixel_values: jax.Array,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> FlaxBaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode images.

        Args:
            pixel_values: Normalised images, (B, H, W, C), channels last.
            deterministic: Kept for upstream's signature; the encoder has no dropout.
            output_attentions: Also return the attention weights.
            output_hidden_states: Also return the hidden states.
            return_dict: Return a dataclass; False returns a tuple.

        Returns:
            Last hidden state and pooled output, and hidden states and attention weights if asked for.

        Raises:
            ConfigError: If the images are not of the model's size.
        """
        transformer = CLIPVisionTransformer(self.layer_config(), name="vision_model")
        output = transformer(pixel_values, output_attentions, output_hidden_states)
        return output if return_dict else output.to_tuple()


def channels_last(pixel_values: Any, dtype: Any) -> jax.Array:
    """Return images (B, C, H, W) as (B, H, W, C), in float32 or the wider dtype of the computation."""
    pixels = jnp.asarray(pixel_values, jnp.promote_types(dtype, jnp.float32))
    if pixels.ndim != 4:
        raise ConfigError(f"pixel_values has shape {pixels.shape}: give images (B, C, H, W)")
    return pixels.transpose(0, 2, 3, 1)


class FlaxCLIPVisionPreTrainedModel(FlaxPreTrainedModel):
    """A CLIP vision encoder that holds its parameters; see `FlaxPreTrainedModel`. Its `input_shape` is (1, H, W, C)."""

    main_input_name = "pixel_values"
    model_types = ("clip_vision_model",)
    config_part = "vision_config"
    other_parts = ("text_model.", "visual_projection.", "text_projection.", "logit_scale")
    renamed = (  # Transformers 5 leaves out the start
        (re.compile(r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\."), r"vision_model.\1."),
    )

    def default_shape(self) -> Any:
        """Return the shape of one image."""
        config = self.module.config
        return (1, config.image_size, config.image_size, config.num_channels)

    def init_inputs(self, input_shape: Any) -> tuple[Any, ...]:
        """Return the module's inputs of a shape, abstract: values do not matter to new parameters."""
        return (jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32),)

    def __call__(
        self,
        pixel_values: Any,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode images.

        Args:
            pixel_values: Normalised images, (B, C, H, W).
            params: Parameters; None for the model's own.
            dropout_rng: Kept for upstream's signature; the encoder has no dropout.
            train: Kept for upstream's signature.
            output_attentions: Also return the attention weights; None for what the config says, as below.
            output_hidden_states: Also return the hidden states.
            return_dict: Return a dataclass; False returns a tuple.

        Returns:
            The output of the model's Linen module.

        Raises:
            ConfigError: If the images are not of the model's size.
        """
        asked = self.outputs(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        pixels = channels_last(pixel_values, self.dtype)
        return self.apply(params, pixels, deterministic=not train, dropout_rng=dropout_rng, **asked)


class FlaxCLIPVisionModel(FlaxCLIPVisionPreTrainedModel):
    """CLIP's vision encoder, whose calls return FlaxBaseModelOutputWithPooling.

    Reference:
        FlaxCLIPVisionModel of Transformers 4.57.
    """

    module_class = FlaxCLIPVisionModule
