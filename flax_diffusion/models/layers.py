"""Layers in PyTorch's form, channels last.

Axes in shapes: B batch, H height, W width, C channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from flax_diffusion.core.typed import Checkpointing
from flax_diffusion.models.dropout import Dropout
from flax_diffusion.models.norms import derivable, group_norm

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # PyTorch's default is the exact form
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Settings that all layers of a model, or of one of its blocks, share."""

    groups: int  #                          groups of every GroupNorm
    eps: float  #                           eps of the residual blocks' GroupNorm
    act: str = "silu"  #                    key of ACTIVATIONS
    dropout: float = 0.0  #                 in residual blocks only, as upstream
    time_scale_shift: bool = False  #       timestep embedding scales and shifts (else: only shifts)
    skip_time_act: bool = False  #          no activation before the timestep projection
    output_scale: float = 1.0  #            divides the output of residual blocks
    dtype: Any = jnp.float32  #             dtype of matrix products and convolutions
    param_dtype: Any = jnp.float32  #       dtype of newly initialised parameters
    checkpointing: Checkpointing = False  # recompute residual and transformer blocks in the backward pass


def dense(features: int, config: LayerConfig, name: str, *, bias: bool = True) -> nn.Dense:
    """Return a linear layer with PyTorch's name; `core.randomness.initial_weights` draws its first weights.

    Args:
        features: Output channels.
        config: Layer config; its dtypes are used.
        name: Name of the layer.
        bias: Whether the layer has a bias.
    """
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


class HalvedDense(nn.Module):
    """Linear layer that returns the first and the second half of its features as two arrays.

    Slicing them out of one array, and joining their gradients into one, would take XLA more time than the products.

    Args:
        features: Output channels of both halves together.
        config: Layer config; its dtypes are used.
    """

    features: int
    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map (…, C) to two arrays (…, features / 2)."""
        config, shape = self.config, (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, config.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], config.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=config.dtype)
        kernels, biases = jnp.split(kernel, 2, axis=-1), jnp.split(bias, 2)
        return x @ kernels[0] + biases[0], x @ kernels[1] + biases[1]


def conv(
    features: int,
    config: LayerConfig,
    name: str | None,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
) -> nn.Conv:
    """Return a 2-D convolution over (B, H, W, C).

    Args:
        features: Output channels.
        config: Layer config; its dtypes are used.
        name: Name of the layer; None in `setup`, where the attribute names it.
        kernel: Height and width of the kernel.
        stride: Step of the kernel in both directions.
        padding: Pixels before and after each row and column; None for PyTorch's `(kernel - 1) // 2`, which keeps the
            size.
    """
    padding = ((kernel - 1) // 2, (kernel - 1) // 2) if padding is None else padding
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=(padding, padding),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def layer_norm(config: LayerConfig, name: str) -> nn.LayerNorm:
    """Return a layer norm whose variance is computed in two passes, as PyTorch's is; of 16-bit inputs in one.

    Args:
        config: Layer config; its dtypes are used. See `group_norm` for the passes.
        name: Name of the layer.
    """
    fast = jnp.dtype(config.dtype).itemsize == 2
    return nn.LayerNorm(1e-5, dtype=config.dtype, param_dtype=config.param_dtype, use_fast_variance=fast, name=name)


class GroupNorm(nn.Module):
    """Group normalisation over channels-last tensors, and the activation that follows it: see `group_norm`.

    Args:
        config: Layer config; its groups and dtypes are used.
        eps: Number added to the variance.
        act: Key of ACTIVATIONS, or None.
    """

    config: LayerConfig
    eps: float
    act: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise (B, …, C) over all axes but the first, within groups of channels."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), self.config.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), self.config.param_dtype)
        act = None if self.act is None else ACTIVATIONS[self.act]
        norm = derivable(group_norm)
        y: jax.Array = norm(x.astype(self.config.dtype), scale, bias, self.config.groups, self.eps, act)
        return y.astype(self.config.dtype)


def timestep_embedding(
    timesteps: jax.Array, dim: int, *, flip_sin_to_cos: bool, freq_shift: float, dtype: Any = jnp.float32
) -> jax.Array:
    """Return sinusoidal embeddings of timesteps.

    Args:
        timesteps: Timesteps, integers or fractions, (B,).
        dim: Width of the embedding; an odd width gets a zero column.
        flip_sin_to_cos: Put the cosines first.
        freq_shift: The highest frequency index is `dim // 2 - freq_shift`.
        dtype: With float64 all is computed in float64, with any other dtype in float32.

    Returns:
        The embeddings, float32 or float64 (B, dim).

    Reference:
        Ho et al. 2020 (DDPM); operation order of Diffusers' get_timestep_embedding.
    """
    real = np.float64 if jnp.dtype(dtype) == jnp.float64 else np.float32
    half = dim // 2
    exponent = real(-math.log(10000)) * np.arange(half, dtype=real) / real(half - freq_shift)
    # exp in double precision, then rounded: the frequencies are the correctly rounded ones on every platform.
    frequencies = np.exp(exponent.astype(np.float64)).astype(real)
    angles = timesteps.astype(real)[:, None] * frequencies
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))


class TimestepEmbedding(nn.Module):
    """Two linear layers on top of a timestep (or any other) embedding.

    Args:
        features: Width of both layers.
        config: Layer config; its dtypes are used.
        act: Activation between the layers.
        post_act: Activation after the second layer, or None.
        with_condition: Whether a `cond_proj` layer exists (`time_cond_proj_dim` is set).
    """

    features: int
    config: LayerConfig
    act: str = "silu"
    post_act: str | None = None
    with_condition: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """Map `x` (B, C) to (B, features); `condition` (B, C') is projected to C and added first."""
        x = x.astype(self.config.dtype)
        if self.with_condition and condition is not None:
            x = x + dense(x.shape[-1], self.config, "cond_proj", bias=False)(condition)
        x = ACTIVATIONS[self.act](dense(self.features, self.config, "linear_1")(x))
        x = dense(self.features, self.config, "linear_2")(x)
        return ACTIVATIONS[self.post_act](x) if self.post_act else x


def upsample_nearest(x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """Enlarge (B, H, W, C) to (B, 2·H, 2·W, C), or to height and width `size`, by repeating the nearest pixel.

    Reference:
        torch.nn.functional.interpolate.
    """
    b, h, w, c = x.shape
    if size is None or size == (2 * h, 2 * w):
        # A broadcast, not jnp.repeat: repeat is a gather, whose gradient is a slow scatter.
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        return x.reshape(b, 2 * h, 2 * w, c)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (h, w), strict=True))
    return x[:, rows][:, :, columns]


def average_pool(x: jax.Array) -> jax.Array:
    """Map (B, H, W, C) to (B, H // 2, W // 2, C) by averaging 2x2 pixels; as in PyTorch, odd last ones are dropped."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


class Downsample2D(nn.Module):
    """Strided convolution that halves height and width.

    Args:
        features: Output channels.
        config: Layer config; its dtypes are used.
        padding: With 1, one pixel on every side; with 0, one row below and one column to the right, as upstream.
    """

    features: int
    config: LayerConfig
    padding: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H / 2, W / 2, features)."""
        padding = (0, 1) if self.padding == 0 else (self.padding, self.padding)
        return conv(self.features, self.config, "conv", stride=2, padding=padding)(x)


class Upsample2D(nn.Module):
    """Convolution after doubling height and width by repetition.

    Args:
        features: Output channels.
        config: Layer config; its dtypes are used.
    """

    features: int
    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """Map (B, H, W, C) to (B, 2·H, 2·W, features), or to height and width `size`."""
        return conv(self.features, self.config, "conv")(upsample_nearest(x, size))


class ResnetBlock2D(nn.Module):
    """Residual block: two convolutions, conditioned on a timestep embedding, optionally resampling.

    Args:
        features: Output channels.
        config: Layer config.
        resample: "up" or "down" resamples inside the block by a factor of two; None keeps the size.

    Reference:
        ResnetBlock2D of Diffusers (PyTorch).
    """

    features: int
    config: LayerConfig
    resample: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array | None, deterministic: bool) -> jax.Array:
        """Map `x` (B, H, W, C), with a timestep embedding (B, E) or None, to (B, H', W', features)."""
        config, act = self.config, ACTIVATIONS[self.config.act]
        resample = {"up": upsample_nearest, "down": average_pool, None: lambda x: x}[self.resample]

        h = resample(GroupNorm(config, config.eps, config.act, name="norm1")(x))
        residual = resample(x)
        h = conv(self.features, config, "conv1")(h)

        if temb is None:
            h = GroupNorm(config, config.eps, config.act, name="norm2")(h)
        else:
            temb = temb if config.skip_time_act else act(temb)
            width = self.features * (2 if config.time_scale_shift else 1)
            shift = dense(width, config, "time_emb_proj")(temb)[:, None, None, :]
            if config.time_scale_shift:
                scale, shift = jnp.split(shift, 2, axis=-1)
                h = act(GroupNorm(config, config.eps, name="norm2")(h) * (1 + scale) + shift)
            else:
                h = GroupNorm(config, config.eps, config.act, name="norm2")(h + shift)
        if config.dropout > 0:
            h = Dropout(config.dropout)(h, deterministic=deterministic)
        h = conv(self.features, config, "conv2")(h)
        if residual.shape[-1] != self.features:
            residual = conv(self.features, config, "conv_shortcut", kernel=1)(residual)
        h = residual.astype(h.dtype) + h
        return h if config.output_scale == 1.0 else h / config.output_scale
