"""The layers of T5's encoder.

Axes in shapes: B batch, L tokens, C channels, N heads, D channels per head.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.typed import Checkpointing
from flax_diffusion.models.attention import merge_heads, split_heads
from flax_diffusion.models.dropout import Dropout
from flax_diffusion.models.layers import ACTIVATIONS
from flax_diffusion.models.remat import checkpointed

T5_ACTIVATIONS = {**ACTIVATIONS, "gelu_new": lambda x: jax.nn.gelu(x, approximate=True)}


def relative_position_buckets(length: int, buckets: int, max_distance: int) -> jax.Array:
    """Return the bucket, integers (L, L), of every distance from a query to a key.

    Half of the buckets are for keys behind the query. Of each half, the first half holds single distances, and the rest
    grows by logarithm up to `max_distance`.

    Args:
        length: Number of tokens.
        buckets: Number of buckets.
        max_distance: Distance from which on all share one bucket.

    Reference:
        Raffel et al. 2020, section 2.1; T5Attention of Transformers (PyTorch).
    """
    distance = jnp.arange(length)[None] - jnp.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    far = jnp.maximum(jnp.abs(distance), 1).astype(jnp.float32)
    grown = jnp.log(far / exact) / math.log(max_distance / exact) * (half - exact)
    grown = jnp.minimum(exact + grown.astype(jnp.int32), half - 1)
    near = jnp.abs(distance)
    return jnp.where(distance > 0, half, 0) + jnp.where(near < exact, near, grown)


class T5Layer(nn.Module):
    """Base of the layers: what they read of the whole module.

    Args:
        config: Configuration with every field, hashable.
        dtype: Dtype of matrix products.
        param_dtype: Dtype of newly initialised parameters.
    """

    config: Any
    dtype: Any
    param_dtype: Any

    def dense(self, features: int, name: str, std: float) -> nn.Dense:
        """Return a linear layer without bias whose first weights have a standard deviation."""
        start = nn.initializers.normal(std * self.config["initializer_factor"])
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(features, use_bias=False, kernel_init=start, name=name, **dtypes)

    def drop(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Drop values at random, unless deterministic."""
        return Dropout(self.config["dropout_rate"])(x, deterministic=deterministic)

    def inner(self, kind: Any, name: str, **options: Any) -> Any:
        """Return a layer of another class with the same settings."""
        return kind(self.config, self.dtype, self.param_dtype, name=name, **options)


class T5LayerNorm(T5Layer):
    """RMS norm with a scale, in float32 at least."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, L, C) to the same shape."""
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.config["layer_norm_epsilon"])
        return wide.astype(self.dtype) * weight.astype(self.dtype)


class T5Attention(T5Layer):
    """Self-attention whose scores are not scaled and have a bias by distance, which the first block makes.

    Args:
        makes_bias: Whether the layer has the embeddings of distances.
    """

    makes_bias: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Attend.

        Args:
            x: Tokens, (B, L, C).
            mask: True for keys that may be attended to, (B, 1, 1, L).
            bias: Bias of the scores, (B or 1, N, L, L); None where this layer makes it.
            deterministic: Whether nothing is dropped.

        Returns:
            The attended tokens, the bias, and the attention weights (B, N, L, L).
        """
        config, heads, size = self.config, self.config["num_heads"], self.config["d_kv"]
        width = heads * size
        stds = {"q": (config["d_model"] * size) ** -0.5, "k": config["d_model"] ** -0.5, "v": config["d_model"] ** -0.5}
        q, k, v = (split_heads(self.dense(width, name, std)(x), heads) for name, std in stds.items())
        wide = jnp.promote_types(self.dtype, jnp.float32)
        if self.makes_bias:
            start = nn.initializers.normal(config["initializer_factor"] * config["d_model"] ** -0.5)
            rows = config["relative_attention_num_buckets"]
            dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            table = nn.Embed(rows, heads, embedding_init=start, name="relative_attention_bias", **dtypes)
            buckets = relative_position_buckets(x.shape[1], rows, config["relative_attention_max_distance"])
            made = table(buckets).transpose(2, 0, 1)[None].astype(wide)
            bias = made if mask is None else jnp.where(mask, made, jnp.finfo(wide).min)
        assert bias is not None
        scores = jnp.einsum("blnd,bsnd->bnls", q.astype(wide), k.astype(wide)) + bias
        weights = jax.nn.softmax(scores).astype(self.dtype)
        out = jnp.einsum("bnls,bsnd->blnd", self.drop(weights, deterministic), v)
        return self.dense(config["d_model"], "o", width**-0.5)(merge_heads(out)), bias, weights


class T5FeedForward(T5Layer):
    """Linear layers with an activation between, gated or not."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Map (B, L, C) to the same shape."""
        config, width = self.config, self.config["d_ff"]
        act, std = T5_ACTIVATIONS[config["dense_act_fn"]], config["d_model"] ** -0.5
        if config["is_gated_act"]:
            h = act(self.dense(width, "wi_0", std)(x)) * self.dense(width, "wi_1", std)(x)
        else:
            h = act(self.dense(width, "wi", std)(x))
        return self.dense(config["d_model"], "wo", width**-0.5)(self.drop(h, deterministic))


class T5AttentionSublayer(T5Layer):
    """Norm, attention and residual.

    Args:
        makes_bias: Whether its attention makes the bias by distance.
    """

    makes_bias: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Map (B, L, C) to the same shape; see `T5Attention`."""
        h = self.inner(T5LayerNorm, "layer_norm")(x)
        attention = self.inner(T5Attention, "SelfAttention", makes_bias=self.makes_bias)
        h, bias, weights = attention(h, mask, bias, deterministic)
        return x + self.drop(h, deterministic), bias, weights


class T5FeedForwardSublayer(T5Layer):
    """Norm, linear layers and residual."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Map (B, L, C) to the same shape."""
        h = self.inner(T5FeedForward, "DenseReluDense")(self.inner(T5LayerNorm, "layer_norm")(x), deterministic)
        return x + self.drop(h, deterministic)


class T5Sublayers(T5AttentionSublayer):
    """The two parts of a block, named "0" and "1" as upstream's."""

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Map (B, L, C) to the same shape; see `T5Attention`."""
        attention = self.inner(T5AttentionSublayer, "0", makes_bias=self.makes_bias)
        x, bias, weights = attention(x, mask, bias, deterministic)
        return self.inner(T5FeedForwardSublayer, "1")(x, deterministic), bias, weights


class T5Block(T5AttentionSublayer):
    """A block."""

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Map (B, L, C) to the same shape; see `T5Attention`."""
        return self.inner(T5Sublayers, "layer", makes_bias=self.makes_bias)(x, mask, bias, deterministic)


class T5Blocks(T5Layer):
    """The blocks, named "0", "1", … as upstream's.

    Args:
        checkpointing: What the backward pass computes again.
    """

    checkpointing: Checkpointing = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, deterministic: bool
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return the input and every block's output, each (B, L, C), and every block's attention weights."""
        kind = checkpointed(T5Block, self.checkpointing, static_argnums=(4,))
        states, weights, bias = [x], [], None
        for i in range(self.config["num_layers"]):
            x, bias, attended = self.inner(kind, str(i), makes_bias=i == 0)(x, mask, bias, deterministic)
            states.append(x)
            weights.append(attended)
        return states, weights


class T5Stack(T5Layer):
    """Blocks and the last norm.

    Args:
        checkpointing: What the backward pass computes again.
    """

    checkpointing: Checkpointing = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, deterministic: bool
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return the hidden states, the last one normalised, and the attention weights."""
        blocks = self.inner(T5Blocks, "block", checkpointing=self.checkpointing)
        states, weights = blocks(self.drop(x, deterministic), mask, deterministic)
        last = self.drop(self.inner(T5LayerNorm, "final_layer_norm")(states[-1]), deterministic)
        return [*states[:-1], last], weights
