"""The CLIP text encoders of Stable Diffusion 1.x, 2.x and XL.

Axes in shapes: B batch, L tokens, C channels, N heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.typed import Checkpointing, Count, Size
from flax_diffusion.models.attention import attention, merge_heads, split_heads
from flax_diffusion.models.layers import ACTIVATIONS
from flax_diffusion.models.modeling import Config, PretrainedModel
from flax_diffusion.models.outputs import FlaxCLIPTextModelOutput, FlaxCLIPTextOutput
from flax_diffusion.models.remat import checkpointed


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Those fields of a text encoder that its layers read."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int
    dtype: Any
    param_dtype: Any
    gradient_checkpointing: Checkpointing


def _dense(features: int, config: CLIPConfig, name: str, bias: bool = True) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def _layer_norm(config: CLIPConfig, name: str) -> nn.LayerNorm:
    """Return a layer norm whose variance is computed in two passes, as PyTorch's is."""
    return nn.LayerNorm(
        config.layer_norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, use_fast_variance=False, name=name
    )


class CLIPAttention(nn.Module):
    """Multi-head self-attention with biases.

    Args:
        config: The text encoder's configuration and dtypes.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Map (B, L, C) to the same shape; `mask` broadcasts to (B, N, L, L)."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        q, k, v = (split_heads(_dense(width, self.config, name)(x), heads) for name in ("q_proj", "k_proj", "v_proj"))
        return _dense(width, self.config, "out_proj")(merge_heads(attention(q, k, v, mask)))


class CLIPMLP(nn.Module):
    """Two linear layers with the configured activation between.

    Args:
        config: The text encoder's configuration and dtypes.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, L, C) to the same shape."""
        config, width = self.config, self.config.hidden_size
        x = _dense(config.intermediate_size, config, "fc1")(x)
        return _dense(width, config, "fc2")(ACTIVATIONS[config.hidden_act](x))


class CLIPEncoderLayer(nn.Module):
    """Self-attention and MLP, each normalised first and added back.

    Args:
        config: The text encoder's configuration and dtypes.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Map (B, L, C) to the same shape; `mask` broadcasts to (B, N, L, L)."""
        h = _layer_norm(self.config, "layer_norm1")(x)
        x = x + CLIPAttention(self.config, name="self_attn")(h, mask)
        h = _layer_norm(self.config, "layer_norm2")(x)
        return x + CLIPMLP(self.config, name="mlp")(h)


class CLIPEmbeddings(nn.Module):
    """Token and position embeddings, summed.

    Args:
        config: The text encoder's configuration and dtypes.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(self, input_ids: jax.Array, position_ids: jax.Array) -> jax.Array:
        """Map token ids and positions, integers (B, L), to (B, L, hidden_size)."""

        def embed(rows: int, name: str) -> nn.Embed:
            width, dtypes = self.config.hidden_size, (self.config.dtype, self.config.param_dtype)
            return nn.Embed(rows, width, *dtypes, name=name)

        tokens = embed(self.config.vocab_size, "token_embedding")(input_ids)
        return tokens + embed(self.config.max_position_embeddings, "position_embedding")(position_ids)


class CLIPEncoder(nn.Module):
    """Stack of encoder layers.

    Args:
        config: The text encoder's configuration and dtypes.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
        """Return the input and every layer's output, each (B, L, C)."""
        layer = checkpointed(CLIPEncoderLayer, self.config.gradient_checkpointing)
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(layer(self.config, name=f"layers_{i}")(states[-1], mask))
        return tuple(states)


class CLIPTextTransformer(nn.Module):
    """Embeddings, causal encoder, final layer norm and pooling at the end-of-text token.

    Args:
        config: The text encoder's configuration and dtypes.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None, position_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """Return the last hidden state, the pooled output and all hidden states; see `FlaxCLIPTextModel`."""
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

        x = CLIPEmbeddings(self.config, name="embeddings")(input_ids, position_ids)
        states = CLIPEncoder(self.config, name="encoder")(x, mask)
        last = _layer_norm(self.config, "final_layer_norm")(states[-1])
        # Old configs say eos_token_id=2 although the token is another one: there the largest id is end-of-text.
        eos = self.config.eos_token_id
        position = jnp.argmax(input_ids if eos == 2 else input_ids == eos, axis=-1)
        return last, jnp.take_along_axis(last, position[:, None, None], axis=1)[:, 0], states


class CLIPPretrained(PretrainedModel):
    """Files, checks and smallest input of both text encoders."""

    weights_name: ClassVar[str] = "model"
    ignored_keys: ClassVar[frozenset[str]] = frozenset(
        {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version"}
    )
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("quick_gelu", "gelu", "relu", "silu"),
        "dropout": (0.0,),  # in old configs; Transformers reads it nowhere
        "attention_dropout": (0.0,),  # every published text encoder has 0
    }

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where fields contradict each other."""
        if config.hidden_size % config.num_attention_heads:
            raise ConfigError(
                f"hidden_size={config.hidden_size} must be a multiple of "
                f"num_attention_heads={config.num_attention_heads}: change one of them"
            )

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        return (jnp.zeros((1, 1), jnp.int32),)

    def saved_config(self, params: Any) -> dict[str, Any]:
        """Return a config.json as Transformers writes it; its dtype is that of the parameters."""
        dtype = jax.tree.leaves(params)[0].dtype
        config = {key: value for key, value in self.config.items() if key != "dropout"}  # pyright: ignore
        return {"architectures": [self.torch_class], "model_type": "clip_text_model", "dtype": str(dtype), **config}


class CLIPTextBase(CLIPPretrained, nn.Module):
    """Fields of both text encoders: the config keys of Transformers' CLIPTextConfig, and how to run the model."""

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


def _layer_config(model: CLIPTextBase) -> CLIPConfig:
    return CLIPConfig(**{field.name: getattr(model, field.name) for field in fields(CLIPConfig)})


class FlaxCLIPTextModel(CLIPTextBase):
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
        output_hidden_states: bool = False,
        return_dict: bool = True,
        train: bool = False,
    ) -> FlaxCLIPTextOutput | tuple[Any, ...]:
        """Encode token ids.

        Args:
            input_ids: Token ids, integers (B, L), with an end-of-text token in each row.
            attention_mask: 1 for tokens that may be attended to, else 0, (B, L); attention is causal in any case.
            position_ids: Positions, integers (B, L); None for 0 … L − 1.
            output_hidden_states: Also return the hidden states.
            return_dict: Return a dataclass; False returns a tuple.
            train: Kept for upstream's signature; the encoder has no dropout.

        Returns:
            Last hidden state, pooled output, and hidden states if asked for.

        Raises:
            ConfigError: If there are more tokens than the model has positions.
        """
        transformer = CLIPTextTransformer(_layer_config(self), name="text_model")
        last, pooled, states = transformer(input_ids, attention_mask, position_ids)
        output = FlaxCLIPTextOutput(last, pooled, states if output_hidden_states else None)
        return output if return_dict else output.to_tuple()


class FlaxCLIPTextModelWithProjection(CLIPTextBase):
    """CLIP's text encoder with the projection of the pooled output: Stable Diffusion XL's second encoder.

    Fields are those of `FlaxCLIPTextModel`.

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
        output_hidden_states: bool = False,
        return_dict: bool = True,
        train: bool = False,
    ) -> FlaxCLIPTextModelOutput | tuple[Any, ...]:
        """Encode token ids; arguments and errors are those of `FlaxCLIPTextModel`.

        Returns:
            Projected pooled output, last hidden state, and hidden states if asked for.
        """
        config = _layer_config(self)
        transformer = CLIPTextTransformer(config, name="text_model")
        last, pooled, states = transformer(input_ids, attention_mask, position_ids)
        embeds = _dense(self.projection_dim, config, "text_projection", bias=False)(pooled)
        output = FlaxCLIPTextModelOutput(embeds, last, states if output_hidden_states else None)
        return output if return_dict else output.to_tuple()
