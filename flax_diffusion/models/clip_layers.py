"""The layers that CLIP's text and vision encoders share.

Axes in shapes: B batch, L tokens, C channels, N heads.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.typed import Checkpointing
from flax_diffusion.models.attention import attention, merge_heads, split_heads
from flax_diffusion.models.layers import ACTIVATIONS
from flax_diffusion.models.modeling import Config, PretrainedModel
from flax_diffusion.models.remat import checkpointed


@dataclass(frozen=True, kw_only=True)
class CLIPLayerConfig:
    """Those fields of an encoder that its layers read."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    dtype: Any
    param_dtype: Any
    gradient_checkpointing: Checkpointing

    @classmethod
    def of(cls, config: Mapping[str, Any], dtype: Any, param_dtype: Any, checkpointing: Checkpointing) -> Any:
        """Return the fields of a whole configuration.

        Args:
            config: Configuration of the encoder with every field.
            dtype: Dtype of matrix products.
            param_dtype: Dtype of newly initialised parameters.
            checkpointing: What the backward pass computes again.
        """
        run = {"dtype": dtype, "param_dtype": param_dtype, "gradient_checkpointing": checkpointing}
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name not in run}, **run)


def clip_dense(features: int, config: CLIPLayerConfig, name: str) -> nn.Dense:
    """Return a linear layer with bias.

    Args:
        features: Number of output features.
        config: The encoder's configuration and dtypes.
        name: Name of the layer.
    """
    start = nn.initializers.normal(0.01)  # upstream's in Flax
    return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, kernel_init=start, name=name)


def clip_layer_norm(config: CLIPLayerConfig, name: str) -> nn.LayerNorm:
    """Return a layer norm whose variance is computed in two passes, as PyTorch's is.

    Args:
        config: The encoder's configuration and dtypes.
        name: Name of the layer.
    """
    return nn.LayerNorm(
        config.layer_norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, use_fast_variance=False, name=name
    )


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the weights (B, N, L, S) that `attention` gives to the values, in the dtype of the queries.

    Args:
        q: Queries, (B, L, N, D).
        k: Keys, (B, S, N, D).
        mask: Booleans that broadcast to (B, N, L, S); True marks what may be attended to.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("blnd,bsnd->bnls", q.astype(wide), k.astype(wide)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
    return jax.nn.softmax(scores).astype(q.dtype)


class CLIPAttention(nn.Module):
    """Multi-head self-attention with biases.

    Args:
        config: The encoder's configuration and dtypes.
        with_weights: Also return the attention weights.
    """

    config: CLIPLayerConfig
    with_weights: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Map (B, L, C) to the same shape; `mask` broadcasts to (B, N, L, L); the weights are (B, N, L, L), or None."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (split_heads(clip_dense(width, self.config, name)(x), heads) for name in names)
        out = clip_dense(width, self.config, "out_proj")(merge_heads(attention(q, k, v, mask)))
        return out, attention_weights(q, k, mask) if self.with_weights else None


class CLIPMLP(nn.Module):
    """Two linear layers with the configured activation between.

    Args:
        config: The encoder's configuration and dtypes.
    """

    config: CLIPLayerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, L, C) to the same shape."""
        config, width = self.config, self.config.hidden_size
        x = clip_dense(config.intermediate_size, config, "fc1")(x)
        return clip_dense(width, config, "fc2")(ACTIVATIONS[config.hidden_act](x))


class CLIPEncoderLayer(nn.Module):
    """Self-attention and MLP, each normalised first and added back.

    Args:
        config: The encoder's configuration and dtypes.
        with_weights: Also return the attention weights.
    """

    config: CLIPLayerConfig
    with_weights: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Map (B, L, C) to the same shape; masks and weights are those of `CLIPAttention`."""
        h = clip_layer_norm(self.config, "layer_norm1")(x)
        attended, weights = CLIPAttention(self.config, self.with_weights, name="self_attn")(h, mask)
        x = x + attended
        h = clip_layer_norm(self.config, "layer_norm2")(x)
        return x + CLIPMLP(self.config, name="mlp")(h), weights


class CLIPLayers(nn.Module):
    """The encoder's layers, named "0", "1", … as upstream's.

    Args:
        config: The encoder's configuration and dtypes.
    """

    config: CLIPLayerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, with_weights: bool = False
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...] | None]:
        """Return what `CLIPEncoder` returns."""
        layer = checkpointed(CLIPEncoderLayer, self.config.gradient_checkpointing)
        states, weights = [x], []
        for i in range(self.config.num_hidden_layers):
            x, attended = layer(self.config, with_weights, name=str(i))(x, mask)
            states.append(x)
            weights.append(attended)
        return tuple(states), tuple(weights) if with_weights else None


class CLIPEncoder(nn.Module):
    """Stack of encoder layers.

    Args:
        config: The encoder's configuration and dtypes.
    """

    config: CLIPLayerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, with_weights: bool = False
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...] | None]:
        """Apply the layers one after the other.

        Args:
            x: Tokens, (B, L, C).
            mask: Booleans that broadcast to (B, N, L, L); True marks what may be attended to; None for all tokens.
            with_weights: Also return the attention weights.

        Returns:
            The input and every layer's output, each (B, L, C), and every layer's attention weights, each
            (B, N, L, L), or None.
        """
        return CLIPLayers(self.config, name="layers")(x, mask, with_weights)


class CLIPPretrained(PretrainedModel):
    """Files and checks of all CLIP models."""

    weights_name: ClassVar[str] = "model"
    ignored_keys: ClassVar[frozenset[str]] = frozenset(
        {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version"}
    )
    model_type: ClassVar[str]

    def saved_config(self, params: Any) -> dict[str, Any]:
        """Return a config.json as Transformers writes it; its dtype is that of the parameters."""
        dtype = jax.tree.leaves(params)[0].dtype
        config = {key: value for key, value in self.config.items() if key != "dropout"}  # pyright: ignore
        return {"architectures": [self.torch_class], "model_type": self.model_type, "dtype": str(dtype), **config}


class CLIPEncoderPretrained(CLIPPretrained):
    """What the text and the vision encoder allow."""

    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("quick_gelu", "gelu", "relu", "silu"),
        "dropout": (0.0,),  # in old configs; Transformers reads it nowhere
        "attention_dropout": (0.0,),  # every published encoder has 0
    }

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where fields contradict each other."""
        if config.hidden_size % config.num_attention_heads:
            raise ConfigError(
                f"hidden_size={config.hidden_size} must be a multiple of "
                f"num_attention_heads={config.num_attention_heads}: change one of them"
            )
