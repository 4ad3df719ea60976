"""CLIP as a whole, which compares texts with images: the Linen module, and Transformers' class of it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from flax_diffusion.core.typed import Checkpointing, Size
from flax_diffusion.models.clip_layers import CLIPPretrained
from flax_diffusion.models.clip_text import CLIPTextLayerConfig, CLIPTextTransformer, FlaxCLIPTextModule
from flax_diffusion.models.clip_vision import (
    CLIPVisionLayerConfig,
    CLIPVisionTransformer,
    FlaxCLIPVisionModule,
    channels_last,
)
from flax_diffusion.models.modeling import Config
from flax_diffusion.models.transformers_config import as_mapping, without_common_keys
from flax_diffusion.models.transformers_face import FlaxPreTrainedModel, Params
from flax_diffusion.models.transformers_outputs import FlaxCLIPOutput


class CLIPBase(CLIPPretrained, nn.Module):
    """Fields of models with both of CLIP's configs: the config keys of Transformers' CLIPConfig, and how to run it."""

    model_type: ClassVar[str] = "clip"

    text_config: Any = None
    vision_config: Any = None
    projection_dim: Size = 512
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: Checkpointing = False

    def __post_init__(self) -> None:
        for field, kind in (("text_config", FlaxCLIPTextModule), ("vision_config", FlaxCLIPVisionModule)):
            given = as_mapping(getattr(self, field) or {})
            part = kind.from_config(without_common_keys(given, kind.config_fields()))
            object.__setattr__(self, field, FrozenDict(part.config))
        super().__post_init__()

    @property
    def config(self) -> Config:
        """Configuration with every field, those of the encoders too."""
        fields = {name: getattr(self, name) for name in self.config_fields()}
        return Config({name: dict(field) if isinstance(field, Mapping) else field for name, field in fields.items()})

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        vision = config.vision_config
        shape = (1, vision["image_size"], vision["image_size"], vision["num_channels"])
        return jnp.zeros((1, 1), jnp.int32), jnp.zeros(shape)

    def saved_config(self, params: Any) -> dict[str, Any]:
        """Return a config.json as Transformers writes it, with the encoders' model types."""
        saved = super().saved_config(params)
        saved["text_config"] = saved["text_config"] | {"model_type": "clip_text_model"}
        saved["vision_config"] = saved["vision_config"] | {"model_type": "clip_vision_model"}
        return saved


class FlaxCLIPModule(CLIPBase):
    """CLIP: a text and a vision encoder, each with a projection, and the scale of their products.

    Fields are the config keys of Transformers' CLIPConfig, and:

    Args:
        dtype: Dtype of matrix products.
        param_dtype: Dtype of newly initialised parameters.
        gradient_checkpointing: Recompute encoder layers in the backward pass, or parts ("minimal").

    Reference:
        CLIPModel of Transformers (PyTorch); Radford et al. 2021.
    """

    torch_class: ClassVar[str] = "CLIPModel"

    def setup(self) -> None:
        """Make the layers."""
        run = (self.dtype, self.param_dtype, self.gradient_checkpointing)
        self.text_model = CLIPTextTransformer(CLIPTextLayerConfig.of(self.text_config, *run))
        self.vision_model = CLIPVisionTransformer(CLIPVisionLayerConfig.of(self.vision_config, *run))
        self.visual_projection, self.text_projection = self._projection(), self._projection()
        start = nn.initializers.constant(self.logit_scale_init_value)
        self.logit_scale = self.param("logit_scale", start, (), self.param_dtype)

    def _projection(self) -> nn.Dense:
        start = nn.initializers.normal(0.02)  # upstream's in Flax
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(self.projection_dim, use_bias=False, kernel_init=start, **dtypes)

    def __call__(
        self,
        input_ids: jax.Array,
        pixel_values: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> FlaxCLIPOutput | tuple[Any, ...]:
        """Compare texts with images.

        Args:
            input_ids: Token ids, integers (texts, L).
            pixel_values: Normalised images, (images, H, W, C), channels last.
            attention_mask: 1 for tokens that may be attended to, else 0, (texts, L).
            position_ids: Positions, integers (texts, L); None for 0 … L − 1.
            deterministic: Kept for upstream's signature; the encoders have no dropout.
            output_attentions: Also return the attention weights.
            output_hidden_states: Also return the hidden states.
            return_dict: Return a dataclass; False returns a tuple.

        Returns:
            Similarities, embeddings of length 1 and the encoders' outputs.
        """
        vision = self.vision_model(pixel_values, output_attentions, output_hidden_states)
        text = self.text_model(input_ids, attention_mask, position_ids, output_attentions, output_hidden_states)
        images = self.visual_projection(vision.pooler_output)
        texts = self.text_projection(text.pooler_output)
        images = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
        texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
        logits = texts @ images.T * jnp.exp(self.logit_scale)
        output = FlaxCLIPOutput(logits.T, logits, texts, images, text, vision)
        return output if return_dict else output.to_tuple()

    def text_features(
        self, input_ids: jax.Array, attention_mask: jax.Array | None, position_ids: jax.Array | None
    ) -> jax.Array:
        """Return the projected texts, (texts, projection_dim); arguments are those of a call."""
        return self.text_projection(self.text_model(input_ids, attention_mask, position_ids).pooler_output)

    def image_features(self, pixel_values: jax.Array) -> jax.Array:
        """Return the projected images, (images, projection_dim), of images (images, H, W, C)."""
        return self.visual_projection(self.vision_model(pixel_values).pooler_output)


class FlaxCLIPPreTrainedModel(FlaxPreTrainedModel):
    """A model with both of CLIP's configs that holds its parameters. Its `input_shape` is ((1, L), (1, H, W, C))."""

    model_types = ("clip",)

    def default_shape(self) -> Any:
        """Return the shapes of one token and of one image."""
        vision = self.module.config.vision_config
        return ((1, 1), (1, vision["image_size"], vision["image_size"], vision["num_channels"]))

    def init_inputs(self, input_shape: Any) -> tuple[Any, ...]:
        """Return the module's inputs of two shapes, abstract: values do not matter to new parameters."""
        text, image = input_shape
        return jax.ShapeDtypeStruct(tuple(text), jnp.int32), jax.ShapeDtypeStruct(tuple(image), jnp.float32)


class FlaxCLIPModel(FlaxCLIPPreTrainedModel):
    """CLIP, whose calls return FlaxCLIPOutput.

    Reference:
        FlaxCLIPModel of Transformers 4.57.
    """

    module_class = FlaxCLIPModule

    def __call__(
        self,
        input_ids: Any,
        pixel_values: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compare texts with images.

        Args:
            input_ids: Token ids, integers (texts, L).
            pixel_values: Normalised images, (images, C, H, W).
            attention_mask: 1 for tokens that may be attended to, else 0, (texts, L).
            position_ids: Positions, integers (texts, L); None for 0 … L − 1.
            params: Parameters; None for the model's own.
            dropout_rng: Kept for upstream's signature; the encoders have no dropout.
            train: Kept for upstream's signature.
            output_attentions: Also return the attention weights; None for what the config says, as below.
            output_hidden_states: Also return the hidden states.
            return_dict: Return a dataclass; False returns a tuple.

        Returns:
            The output of the model's Linen module.
        """
        asked = self.outputs(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        ids, mask, positions = _integers(input_ids, attention_mask, position_ids)
        pixels = channels_last(pixel_values, self.dtype)
        options = {"deterministic": not train, "dropout_rng": dropout_rng, **asked}
        return self.apply(params, ids, pixels, mask, positions, **options)

    def get_text_features(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Return the projected texts, (texts, projection_dim); arguments are those of a call."""
        inputs = _integers(input_ids, attention_mask, position_ids)
        return self.apply(params, *inputs, dropout_rng=dropout_rng, method="text_features")

    def get_image_features(
        self, pixel_values: Any, params: Params | None = None, dropout_rng: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Return the projected images, (images, projection_dim); arguments are those of a call."""
        pixels = channels_last(pixel_values, self.dtype)
        return self.apply(params, pixels, dropout_rng=dropout_rng, method="image_features")


def _integers(*arrays: Any) -> tuple[jax.Array | None, ...]:
    return tuple(None if array is None else jnp.asarray(array, jnp.int32) for array in arrays)
