"""Embeddings of the conditional UNet's conditions other than text tokens: timestep, classes, sizes and crops."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.models.attention import DUAL_CONDITION_LENGTHS
from flax_diffusion.models.layers import ACTIVATIONS, LayerConfig, TimestepEmbedding, dense, timestep_embedding
from flax_diffusion.models.modeling import Config


def check_condition(config: Config) -> None:
    """Raise ConfigError where the fields that describe conditions contradict each other."""
    input_dim = config.projection_class_embeddings_input_dim
    if config.class_embed_type in ("projection", "simple_projection") and input_dim is None:
        raise ConfigError(
            f"class_embed_type={config.class_embed_type!r} needs projection_class_embeddings_input_dim, which is None: "
            "set it to the width of the class_labels"
        )
    if config.addition_embed_type == "text_time" and None in (config.addition_time_embed_dim, input_dim):
        raise ConfigError(
            "addition_embed_type='text_time' needs addition_time_embed_dim and projection_class_embeddings_input_dim: "
            f"set both, they are {config.addition_time_embed_dim} and {input_dim}"
        )
    if config.encoder_hid_dim is None and config.encoder_hid_dim_type is not None:
        raise ConfigError(
            f"encoder_hid_dim_type={config.encoder_hid_dim_type!r} needs encoder_hid_dim, which is None: set it to the "
            "width of the text features"
        )
    if config.encoder_hid_dim is not None and not isinstance(config.cross_attention_dim, int):
        raise ConfigError(
            f"encoder_hid_dim={config.encoder_hid_dim} needs one cross_attention_dim for all blocks: give one number "
            f"in place of {config.cross_attention_dim}"
        )


def is_class_conditional(config: Config) -> bool:
    """Return whether the model takes class labels."""
    return config.class_embed_type is not None or config.num_class_embeds is not None


def condition_inputs(config: Config) -> tuple[Any, ...]:
    """Return the conditional UNet's smallest inputs that reach every parameter, in the order of its arguments."""
    size = 2 ** (len(config.block_out_channels) - 1)
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    tokens = sum(DUAL_CONDITION_LENGTHS) if config.dual_cross_attention else 1
    added, labels = None, None
    if config.addition_embed_type == "text_time":
        ids = 6 if config.projection_class_embeddings_input_dim > 6 * config.addition_time_embed_dim else 1
        text = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        added = {"text_embeds": jnp.zeros((1, text)), "time_ids": jnp.zeros((1, ids))}
    if is_class_conditional(config):
        label_width = {
            "identity": config.time_embedding_dim or 4 * config.block_out_channels[0],
            "projection": config.projection_class_embeddings_input_dim,
            "simple_projection": config.projection_class_embeddings_input_dim,
        }.get(config.class_embed_type)
        labels = jnp.zeros((1,), jnp.int32) if label_width is None else jnp.zeros((1, label_width))
    guidance = jnp.zeros((1, config.time_cond_proj_dim)) if config.time_cond_proj_dim else None
    return (
        jnp.zeros((1, config.in_channels, size, size)),
        jnp.zeros((1,), jnp.int32),
        jnp.zeros((1, tokens, config.encoder_hid_dim or width)),
        added,
        None,
        None,
        True,
        False,
        labels,
        guidance,
    )


def embed_numbers(values: jax.Array, dim: int, config: Config, layers: LayerConfig) -> jax.Array:
    """Embed numbers as the model embeds timesteps: (B,) to (B, dim).

    Args:
        values: The numbers, (B,).
        dim: Width of the embedding.
        config: The model's configuration.
        layers: Layer config; its dtype is used.
    """
    return timestep_embedding(
        values, dim, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift, dtype=layers.dtype
    )


def embed_conditions(
    config: Config,
    layers: LayerConfig,
    timesteps: jax.Array,
    class_labels: jax.Array | None,
    timestep_cond: jax.Array | None,
    added_cond_kwargs: Mapping[str, jax.Array] | None,
) -> jax.Array:
    """Sum the embeddings of a UNet's conditions; the layers belong to the calling module.

    Args:
        config: The model's configuration.
        layers: Layer config; its dtypes are used.
        timesteps: Timesteps, (B,).
        class_labels: See `FlaxUNet2DConditionModel`.
        timestep_cond: See `FlaxUNet2DConditionModel`.
        added_cond_kwargs: See `FlaxUNet2DConditionModel`.

    Returns:
        The sum, (B, time_embedding_dim), twice as wide where class_embeddings_concat is set.

    Raises:
        ConfigError: If a condition is missing or not expected.
    """
    channels = config.block_out_channels[0]
    width = config.time_embedding_dim or 4 * channels
    if timestep_cond is not None and config.time_cond_proj_dim is None:
        raise ConfigError("timestep_cond was given to a UNet whose time_cond_proj_dim is None: drop it")
    embed_time = TimestepEmbedding(
        width,
        layers,
        act=config.act_fn,
        post_act=config.timestep_post_act,
        with_condition=config.time_cond_proj_dim is not None,
        name="time_embedding",
    )
    temb = embed_time(embed_numbers(timesteps, channels, config, layers), timestep_cond)
    labels = _class_embedding(config, layers, class_labels, width)
    if labels is not None:
        temb = jnp.concatenate([temb, labels], -1) if config.class_embeddings_concat else temb + labels
    if config.addition_embed_type == "text_time":
        if added_cond_kwargs is None or {"text_embeds", "time_ids"} - set(added_cond_kwargs):
            raise ConfigError(
                "addition_embed_type='text_time' needs added_cond_kwargs with 'text_embeds' and 'time_ids': "
                f"got {sorted(added_cond_kwargs or ())}"
            )
        text, ids = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
        times = embed_numbers(ids.reshape(-1), config.addition_time_embed_dim, config, layers)
        added = jnp.concatenate([text, times.reshape(text.shape[0], -1)], axis=-1)
        temb = temb + TimestepEmbedding(width, layers, name="add_embedding")(added)
    elif added_cond_kwargs:
        raise ConfigError(
            f"added_cond_kwargs {sorted(added_cond_kwargs)} were given to a UNet whose addition_embed_type is None: "
            "drop them"
        )
    return ACTIVATIONS[config.time_embedding_act_fn](temb) if config.time_embedding_act_fn else temb


def _class_embedding(
    config: Config, layers: LayerConfig, class_labels: jax.Array | None, width: int
) -> jax.Array | None:
    """Return the embedding of class labels, (B, width); None for a model without classes."""
    if is_class_conditional(config) != (class_labels is not None):
        raise ConfigError(
            f"class_embed_type={config.class_embed_type!r} with num_class_embeds={config.num_class_embeds} "
            + ("takes no class_labels: drop them" if class_labels is not None else "needs class_labels: pass them")
        )
    if class_labels is None:
        return None
    if config.class_embed_type == "timestep":
        values = embed_numbers(class_labels, config.block_out_channels[0], config, layers)
        return TimestepEmbedding(width, layers, act=config.act_fn, name="class_embedding")(values)
    if config.class_embed_type == "identity":
        return class_labels.astype(layers.dtype)
    if config.class_embed_type == "projection":
        return TimestepEmbedding(width, layers, name="class_embedding")(class_labels)
    if config.class_embed_type == "simple_projection":
        return dense(width, layers, "class_embedding")(class_labels)
    return embedding_table(config.num_class_embeds, width, layers, "class_embedding")(class_labels)


def embedding_table(rows: int, width: int, layers: LayerConfig, name: str) -> nn.Embed:
    """Return an embedding table (rows, width), with the layer's name and the config's dtypes."""
    return nn.Embed(rows, width, layers.dtype, layers.param_dtype, name=name)
