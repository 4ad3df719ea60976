"""T5's encoder: the Linen module, and Transformers' class of it.

Axes in shapes: B batch, L tokens.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.typed import Checkpointing, Count, Size
from flax_diffusion.models.modeling import Config, PretrainedModel
from flax_diffusion.models.t5_layers import T5_ACTIVATIONS, T5Stack
from flax_diffusion.models.transformers_face import FlaxPreTrainedModel, Params
from flax_diffusion.models.transformers_outputs import FlaxBaseModelOutput


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
