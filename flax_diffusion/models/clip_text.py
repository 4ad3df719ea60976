"""The CLIP text encoders of Stable Diffusion 1.x, 2.x and XL, as Linen modules.

Axes in shapes: B batch, L tokens, C channels, N heads.
"""

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
from flax_diffusion.models.transformers_outputs import FlaxBaseModelOutputWithPooling, FlaxCLIPTextModelOutput


@dataclass(frozen=True, kw_only=True)
class CLIPTextLayerConfig(CLIPLayerConfig):
    """Those fields of a text encoder that its layers read."""

    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int


class CLIPTextEmbeddings(nn.Module):
    """Token and position embeddings, summed.

    Args:
        config: The text encoder's configuration and dtypes.
    """

    config: CLIPTextLayerConfig

    @nn.compact
    def __call__(self, input_ids: jax.Array, position_ids: jax.Array) -> jax.Array:
        """Map token ids and positions, integers (B, L), to (B, L, hidden_size)."""

        def embed(rows: int, name: str) -> nn.Embed:
            width, dtypes = self.config.hidden_size, (self.config.dtype, self.config.param_dtype)
            start = nn.initializers.normal()  # upstream's in Flax
            return nn.Embed(rows, width, *dtypes, embedding_init=start, name=name)

        tokens = embed(self.config.vocab_size, "token_embedding")(input_ids)
        return tokens + embed(self.config.max_position_embeddings, "position_embedding")(position_ids)


class CLIPTextTransformer(nn.Module):
    """Embeddings, causal encoder, final layer norm and pooling at the end-of-text token.

    Args:
        config: The text encoder's configuration and dtypes.
    """

    config: CLIPTextLayerConfig

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> FlaxBaseModelOutputWithPooling:
        """Encode token ids; see `FlaxCLIPTextModule`."""
        length = input_ids.shape[-1]
        if length > self.config.max_position_embeddings:
            raise ConfigError(
                f"{length} tokens exceed max_position_embeddings={self.config.max_position_embeddings}: "
                "truncate the captions when tokenizing"
            )
        if position_ids is None:
            position_ids = jnp.arange(length)[None]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.astype(bool)[:, None, None, :]

        x = CLIPTextEmbeddings(self.config, name="embeddings")(input_ids, position_ids)
        states, weights = CLIPEncoder(self.config, name="encoder")(x, mask, output_attentions)
        last = clip_layer_norm(self.config, "final_layer_norm")(states[-1])
        # Old configs say eos_token_id=2 although the token is another one: there the largest id is end-of-text.
        eos = self.config.eos_token_id
        position = jnp.argmax(input_ids if eos == 2 else input_ids == eos, axis=-1)
        pooled = jnp.take_along_axis(last, position[:, None, None], axis=1)[:, 0]
        return FlaxBaseModelOutputWithPooling(last, pooled, states if output_hidden_states else None, weights)


class CLIPTextBase(CLIPEncoderPretrained, nn.Module):
    """Fields of both text encoders: the config keys of Transformers' CLIPTextConfig, and how to run the model."""

    model_type: ClassVar[str] = "clip_text_model"

    vocab_size: Size = 49408
    hidden_size: Size = 512
    intermediate_size: Size = 2048
    projection_dim: Size = 512
    num_hidden_layers: Count = 12
    num_attention_heads: Size = 8
    max_position_embeddings: Size = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: Checkpointing = False

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        return (jnp.zeros((1, 1), jnp.int32),)

    def layer_config(self) -> CLIPTextLayerConfig:
        """Return what the layers read."""
        return CLIPTextLayerConfig.of(self.config, self.dtype, self.param_dtype, self.gradient_checkpointing)


class FlaxCLIPTextModule(CLIPTextBase):
    """CLIP's text encoder.

    Fields are the config keys of Transformers' CLIPTextConfig, and:

    Args:
        dtype: Dtype of matrix products.
        param_dtype: Dtype of newly initialised parameters.
        gradient_checkpointing: Recompute encoder layers in the backward pass, or parts ("minimal").

    Reference:
        CLIPTextModel of Transformers (PyTorch); Radford et al. 2021.
    """

    torch_class: ClassVar[str] = "CLIPTextModel"

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        train: bool = False,
    ) -> FlaxBaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode token ids.

        Args:
            input_ids: Token ids, integers (B, L), with an end-of-text token in each row.
            attention_mask: 1 for tokens that may be attended to, else 0, (B, L); attention is causal in any case.
            position_ids: Positions, integers (B, L); None for 0 … L − 1.
            deterministic: Kept for upstream's signature; the encoder has no dropout.
            output_attentions: Also return the attention weights.
            output_hidden_states: Also return the hidden states.
            return_dict: Return a dataclass; False returns a tuple.
            train: Kept for the other models' signature.

        Returns:
            Last hidden state and pooled output, and hidden states and attention weights if asked for.

        Raises:
            ConfigError: If there are more tokens than the model has positions.
        """
        transformer = CLIPTextTransformer(self.layer_config(), name="text_model")
        output = transformer(input_ids, attention_mask, position_ids, output_attentions, output_hidden_states)
        return output if return_dict else output.to_tuple()


class FlaxCLIPTextModelWithProjectionModule(CLIPTextBase):
    """CLIP's text encoder with the projection of the pooled output: Stable Diffusion XL's second encoder.

    Fields are those of `FlaxCLIPTextModule`.

    Reference:
        CLIPTextModelWithProjection of Transformers (PyTorch).
    """

    torch_class: ClassVar[str] = "CLIPTextModelWithProjection"

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        train: bool = False,
    ) -> FlaxCLIPTextModelOutput | tuple[Any, ...]:
        """Encode token ids; arguments and errors are those of `FlaxCLIPTextModule`.

        Returns:
            Projected pooled output and last hidden state, and hidden states and attention weights if asked for.
        """
        transformer = CLIPTextTransformer(self.layer_config(), name="text_model")
        text = transformer(input_ids, attention_mask, position_ids, output_attentions, output_hidden_states)
        project = nn.Dense(
            self.projection_dim, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name="text_projection"
        )
        output = FlaxCLIPTextModelOutput(
            project(text.pooler_output), text.last_hidden_state, text.hidden_states, text.attentions
        )
        return output if return_dict else output.to_tuple()


class FlaxCLIPTextPreTrainedModel(FlaxPreTrainedModel):
    """A CLIP text encoder that holds its parameters; see `FlaxPreTrainedModel`."""

    model_types = ("clip_text_model",)
    config_part = "text_config"
    other_parts = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode token ids.

        Args:
            input_ids: Token ids, integers (B, L), with an end-of-text token in each row.
            attention_mask: 1 for tokens that may be attended to, else 0, (B, L); attention is causal in any case.
            position_ids: Positions, integers (B, L); None for 0 … L − 1.
            params: Parameters; None for the model's own.
            dropout_rng: Kept for upstream's signature; the encoder has no dropout.
            train: Kept for upstream's signature.
            output_attentions: Also return the attention weights; None for what the config says, as below.
            output_hidden_states: Also return the hidden states.
            return_dict: Return a dataclass; False returns a tuple.

        Returns:
            The output of the model's Linen module.

        Raises:
            ConfigError: If there are more tokens than the model has positions.
        """
        asked = self.outputs(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        inputs = (None if x is None else jnp.asarray(x, jnp.int32) for x in (input_ids, attention_mask, position_ids))
        return self.apply(params, *inputs, deterministic=not train, dropout_rng=dropout_rng, **asked)


class FlaxCLIPTextModel(FlaxCLIPTextPreTrainedModel):
    """CLIP's text encoder, whose calls return FlaxBaseModelOutputWithPooling.

    Reference:
        FlaxCLIPTextModel of Transformers 4.57.
    """

    module_class = FlaxCLIPTextModule


class FlaxCLIPTextModelWithProjection(FlaxCLIPTextPreTrainedModel):
    """CLIP's text encoder with the projection of the pooled output, whose calls return FlaxCLIPTextModelOutput.

    Reference:
        FlaxCLIPTextModelWithProjection of Transformers 4.57.
    """

    module_class = FlaxCLIPTextModelWithProjectionModule
