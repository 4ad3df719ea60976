"""T5's encoder: the Linen module, and Transformers' class of it.

Axes in shapes: B batch, L tokens, C channels, N heads, D channels per head.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.typed import Checkpointing, Count, Size
from flax_diffusion.models.attention import merge_heads, split_heads
from flax_diffusion.models.layers import ACTIVATIONS
from flax_diffusion.models.modeling import Config, PretrainedModel
from flax_diffusion.models.remat import checkpointed
from flax_diffusion.models.transformers_face import FlaxPreTrainedModel, Params
from flax_diffusion.models.transformers_outputs import FlaxBaseModelOutput

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
        return nn.Dropout(self.config["dropout_rate"])(x, deterministic=deterministic)

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
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
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
            bias = table(buckets).transpose(2, 0, 1)[None].astype(wide)
            if mask is not None:
                bias = jnp.where(mask, bias, jnp.finfo(wide).min)
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
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
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
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map (B, L, C) to the same shape; see `T5Attention`."""
        attention = self.inner(T5AttentionSublayer, "0", makes_bias=self.makes_bias)
        x, bias, weights = attention(x, mask, bias, deterministic)
        return self.inner(T5FeedForwardSublayer, "1")(x, deterministic), bias, weights


class T5Block(T5AttentionSublayer):
    """A block."""

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
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


class FlaxT5EncoderModule(PretrainedModel, nn.Module):
    """T5's encoder.

    Fields are those config keys of Transformers' T5Config that an encoder reads, and:

    Args:
        dtype: Dtype of matrix products.
        param_dtype: Dtype of newly initialised parameters.
        gradient_checkpointing: Recompute blocks in the backward pass, or parts ("minimal").

    Reference:
        T5EncoderModel of Transformers (PyTorch); Raffel et al. 2020.
    """

    torch_class: ClassVar[str] = "T5EncoderModel"
    weights_name: ClassVar[str] = "model"
    ignored_keys: ClassVar[frozenset[str]] = frozenset(
        {
            "architectures",
            "classifier_dropout",
            "model_type",
            "n_positions",
            "num_decoder_layers",
            "scale_decoder_outputs",
        }
    )

    vocab_size: Size = 32128
    d_model: Size = 512
    d_kv: Size = 64
    d_ff: Size = 2048
    num_layers: Count = 6
    num_heads: Size = 8
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: Checkpointing = False

    def __post_init__(self) -> None:
        act = self.feed_forward_proj.split("-")[-1]
        if self.dense_act_fn is None:
            object.__setattr__(self, "dense_act_fn", "gelu_new" if self.feed_forward_proj == "gated-gelu" else act)
        if self.is_gated_act is None:
            object.__setattr__(self, "is_gated_act", self.feed_forward_proj.startswith("gated-"))
        super().__post_init__()

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where fields contradict each other."""
        if config.dense_act_fn not in T5_ACTIVATIONS:
            raise ConfigError(
                f"feed_forward_proj={config.feed_forward_proj!r} needs activation {config.dense_act_fn!r}: use one of "
                + ", ".join(T5_ACTIVATIONS)
            )
        if config.relative_attention_num_buckets % 4:
            raise ConfigError(
                f"relative_attention_num_buckets={config.relative_attention_num_buckets} must be a multiple of 4"
            )

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        return (jnp.zeros((1, 1), jnp.int32),)

    def saved_config(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json as Transformers writes it; its dtype is that of the parameters."""
        dtype = str(jax.tree.leaves(params)[0].dtype)
        return {"architectures": [self.torch_class], "model_type": "t5", "dtype": dtype, **self.config}

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        deterministic: bool = True,
    ) -> FlaxBaseModelOutput | tuple[Any, ...]:
        """Encode token ids.

        Args:
            input_ids: Token ids, integers (B, L).
            attention_mask: 1 for tokens that may be attended to, else 0, (B, L).
            output_attentions: Also return the attention weights.
            output_hidden_states: Also return the hidden states.
            return_dict: Return a dataclass; False returns a tuple.
            deterministic: Drop nothing; False needs a key "dropout".

        Returns:
            Last hidden state, and hidden states and attention weights if asked for.
        """
        start = nn.initializers.normal(self.initializer_factor)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(self.vocab_size, self.d_model, embedding_init=start, name="shared", **dtypes)
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        settings = nn.FrozenDict(self.config)
        stack = T5Stack(settings, self.dtype, self.param_dtype, self.gradient_checkpointing, name="encoder")
        states, weights = stack(embed(input_ids), mask, deterministic)
        output = FlaxBaseModelOutput(
            states[-1], tuple(states) if output_hidden_states else None, tuple(weights) if output_attentions else None
        )
        return output if return_dict else output.to_tuple()


class FlaxT5PreTrainedModel(FlaxPreTrainedModel):
    """A T5 model that holds its parameters; see `FlaxPreTrainedModel`."""

    model_types = ("t5",)
    base_model_prefix = "transformer"
    other_parts = ("decoder.", "lm_head.", "encoder.embed_tokens.")  # the last one is `shared` once more

    @classmethod
    def settings_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the module's fields of a configuration, of a whole T5 too; see `FlaxPreTrainedModel.settings_of`."""
        others = cls.module_class.ignored_keys
        return {key: value for key, value in super().settings_of(config).items() if key not in others}


class FlaxT5EncoderModel(FlaxT5PreTrainedModel):
    """T5's encoder, whose calls return FlaxBaseModelOutput.

    Reference:
        FlaxT5EncoderModel of Transformers 4.57.
    """

    module_class = FlaxT5EncoderModule

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        train: bool = False,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> Any:
        """Encode token ids.

        Args:
            input_ids: Token ids, integers (B, L).
            attention_mask: 1 for tokens that may be attended to, else 0, (B, L).
            output_attentions: Also return the attention weights; None for what the config says, as below.
            output_hidden_states: Also return the hidden states.
            return_dict: Return a dataclass; False returns a tuple.
            train: Drop values at random.
            params: Parameters; None for the model's own.
            dropout_rng: Key of the dropout masks.

        Returns:
            The output of the model's Linen module.
        """
        asked = self.outputs(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        ids, mask = (None if x is None else jnp.asarray(x, jnp.int32) for x in (input_ids, attention_mask))
        return self.apply(params, ids, mask, deterministic=not train, dropout_rng=dropout_rng, **asked)
