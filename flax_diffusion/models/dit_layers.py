"""Layers of class-conditional transformers: blocks whose norms, scales and gates are made from time and class.

Axes in shapes: B batch, L tokens, N heads, D channels per head, C channels of a token, h w patches in height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_diffusion.models.attention import attention, gated_gelu, merge_heads, split_heads
from flax_diffusion.models.condition import embedding_table
from flax_diffusion.models.dropout import Dropout
from flax_diffusion.models.layers import (
    ACTIVATIONS,
    HalvedDense,
    LayerConfig,
    TimestepEmbedding,
    conv,
    dense,
    timestep_embedding,
)
from flax_diffusion.models.norms import widen

Rotation = tuple[np.ndarray, np.ndarray]
"""Cosines and sines of the angles by which queries and keys turn, each (L, D / 2)."""

TIME_CHANNELS = 256
MAX_PERIOD = 10000
ADA_EPS = QK_EPS = 1e-6
"""Added to the variance before a scale and shift of time and class, and of queries and keys; PyTorch's constants."""

PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": ACTIVATIONS["gelu"],
    "gelu-approximate": lambda x: jax.nn.gelu(x, approximate=True),
    "geglu-approximate": ACTIVATIONS["quick_gelu"],  # upstream's name; there is no gate in it
    "linear-silu": ACTIVATIONS["silu"],
}
GATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "geglu": gated_gelu,
    "swiglu": lambda x, gate: x * jax.nn.silu(gate),
}
"""Activations of the feed-forward layers, of one array, or of an array and its gate."""


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Settings that all blocks of a transformer share."""

    heads: int  #                 number of heads
    head_dim: int  #              channels per head
    classes: int  #               number of classes; the embedding table has one row more
    layers: LayerConfig  #        its dtypes and dropout, and its eps for the norm before the feed-forward layers
    act: str  #                   key of PLAIN or GATED
    attention_bias: bool  #       biases on queries, keys and values
    affine: bool  #               scale and shift of their own in the norm before the feed-forward layers
    rms_norm: bool  #             norms divide by the root mean square, and subtract no mean
    qk_norm: bool  #              queries and keys are normalised, head by head

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim


def patch_positions(grid: tuple[int, int], base: int) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of each patch, in patches of a picture of the size that the model trained at.

    Args:
        grid: Patches in height and width.
        base: Patches a side of a picture of that size, over which those of other sizes are spread.

    Returns:
        Rows and columns, each float32 (h·w,).
    """
    rows, columns = (np.arange(count, dtype=np.float32) / np.float32(count / base) for count in grid)
    return np.repeat(rows, grid[1]), np.tile(columns, grid[0])


def _angles(positions: np.ndarray, count: int) -> np.ndarray:
    """Return the angles of positions (L,) for frequencies from 1 down to 1 / MAX_PERIOD, float64 (L, count)."""
    frequencies = 1.0 / MAX_PERIOD ** (np.arange(count, dtype=np.float64) / count)
    return np.outer(positions.astype(np.float64), frequencies)


def position_embedding(grid: tuple[int, int], base: int, width: int) -> np.ndarray:
    """Return fixed embeddings of the places of patches, rounded to float32 (h·w, width).

    Args:
        grid: Patches in height and width.
        base: As of `patch_positions`.
        width: Channels of a token, a multiple of 4.

    Reference:
        get_2d_sincos_pos_embed of Diffusers: the first half of the channels is of the column, the second of the row.
    """
    rows, columns = patch_positions(grid, base)
    parts = [of(_angles(places, width // 4)) for places in (columns, rows) for of in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rotation(grid: tuple[int, int], base: int, head_dim: int) -> Rotation:
    """Return the angles by which queries and keys turn, as cosines and sines, float64 (h·w, head_dim / 2).

    Channel i turns with channel i + head_dim / 2: the first half of these pairs by the row, the second by the column.

    Args:
        grid: Patches in height and width.
        base: As of `patch_positions`.
        head_dim: Channels per head, a multiple of 4.

    Reference:
        Su et al., https://arxiv.org/abs/2104.09864, equation 34, for rows and columns.
    """
    angles = np.concatenate([_angles(places, head_dim // 4) for places in patch_positions(grid, base)], axis=1)
    return np.cos(angles), np.sin(angles)


def rotate(x: jax.Array, turn: Rotation) -> jax.Array:
    """Turn queries or keys (B, L, N, D) by the angles of their places, in float32 at least."""
    first, second = jnp.split(widen(x), 2, axis=-1)
    cos, sin = (part[None, :, None].astype(first.dtype) for part in turn)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def token_norm(config: BlockConfig, eps: float, name: str, *, affine: bool = False) -> Any:
    """Return a norm over the channels of tokens, whose variance is computed as `group_norm` does.

    Args:
        config: The blocks' settings.
        eps: Number added to the variance.
        name: Name of the layer.
        affine: Whether it has a scale, and a shift where it subtracts the mean.
    """
    dtypes = {"dtype": config.layers.dtype, "param_dtype": config.layers.param_dtype}
    if config.rms_norm:
        return nn.RMSNorm(eps, use_scale=affine, name=name, **dtypes)
    fast = jnp.dtype(config.layers.dtype).itemsize == 2
    return nn.LayerNorm(eps, use_bias=affine, use_scale=affine, use_fast_variance=fast, name=name, **dtypes)


def modulated(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Scale and shift tokens (B, L, C) by 1 + scale and shift, each (B, C)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """Projection of patches to tokens, to which the embeddings of their places are added.

    Args:
        width: Channels of a token.
        patch: Height and width of a patch.
        base: As of `patch_positions`.
        config: Layer config; its dtypes are used.
    """

    width: int
    patch: int
    base: int
    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map pixels (B, H, W, C') to tokens (B, h·w, C), row by row."""
        x = conv(self.width, self.config, "proj", kernel=self.patch, stride=self.patch, padding=(0, 0))(x)
        batch, height, width, channels = x.shape
        places = position_embedding((height, width), self.base, channels)
        tokens = x.reshape(batch, height * width, channels)
        return (tokens + places.astype(widen(tokens).dtype)).astype(x.dtype)


class TimeAndClass(nn.Module):
    """Sum of the embeddings of a time and of a class.

    Args:
        config: The blocks' settings.

    Reference:
        CombinedTimestepLabelEmbeddings of Diffusers, without its own dropout of labels: the batch has labels dropped.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, timesteps: jax.Array, class_labels: jax.Array) -> jax.Array:
        """Embed times (B,) and class indices (B,), to (B, C)."""
        layers, width = self.config.layers, self.config.width
        sinusoids = timestep_embedding(timesteps, TIME_CHANNELS, flip_sin_to_cos=True, freq_shift=1, dtype=layers.dtype)
        time = TimestepEmbedding(width, layers, name="timestep_embedder")(sinusoids)
        return time + LabelEmbedding(self.config, name="class_embedder")(class_labels)


class LabelEmbedding(nn.Module):
    """Table of the classes' embeddings, whose last row is of no class.

    Args:
        config: The blocks' settings.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, class_labels: jax.Array) -> jax.Array:
        """Look class indices (B,) up, to (B, C)."""
        rows = self.config.classes + 1
        return embedding_table(rows, self.config.width, self.config.layers, "embedding_table")(class_labels)


class AdaLayerNormZero(nn.Module):
    """Norm whose scale and shift, and those and the gates of the rest of a block, are made from time and class.

    Args:
        config: The blocks' settings.
        embeds: Whether it holds the embedder of time and class, which the first block has for all.
    """

    config: BlockConfig
    embeds: bool

    def setup(self) -> None:
        """Make the layers."""
        layers, width = self.config.layers, self.config.width
        if self.embeds:
            self.emb = TimeAndClass(self.config)
        self.linear = nn.Dense(6 * width, dtype=layers.dtype, param_dtype=layers.param_dtype)
        self.norm = token_norm(self.config, ADA_EPS, "norm")

    def __call__(self, x: jax.Array, told: jax.Array) -> tuple[jax.Array, ...]:
        """Normalise tokens.

        Args:
            x: Tokens, (B, L, C).
            told: Embedding of time and class, (B, C).

        Returns:
            The tokens; the gate of attention; shift, scale and gate of the feed-forward layers, each (B, C).
        """
        shift, scale, *rest = jnp.split(self.linear(jax.nn.silu(told)), 6, axis=-1)
        return modulated(self.norm(x), scale, shift), *rest


class DiTAttention(nn.Module):
    """Self-attention over tokens, with normalised and turned queries and keys where that is asked for.

    Args:
        config: The blocks' settings.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, x: jax.Array, turn: Rotation | None, deterministic: bool) -> jax.Array:
        """Map tokens (B, L, C) to the same shape, with queries and keys turned by `turn`, or as they are for None."""
        config, layers = self.config, self.config.layers
        heads = {
            name: split_heads(dense(config.width, layers, name, bias=config.attention_bias)(x), config.heads)
            for name in ("to_q", "to_k", "to_v")
        }
        q, k, v = heads.values()
        if config.qk_norm:
            dtypes = {"dtype": layers.dtype, "param_dtype": layers.param_dtype}
            q, k = (nn.RMSNorm(QK_EPS, name=name, **dtypes)(part) for name, part in (("norm_q", q), ("norm_k", k)))
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        out = dense(config.width, layers, "to_out_0")(merge_heads(attention(q, k, v)))
        return Dropout(layers.dropout)(out, deterministic)


class DiTFeedForward(nn.Module):
    """Linear layer to four times the width, its activation, and a linear layer back.

    Args:
        config: The blocks' settings.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Map tokens (B, L, C) to the same shape."""
        config, layers = self.config, self.config.layers
        h = Activated(config, name="net_0")(x)
        h = Dropout(layers.dropout)(h, deterministic)
        return dense(config.width, layers, "net_2")(h)


class Activated(nn.Module):
    """Linear layer to four times the width with its activation, which another half of such a layer may gate.

    Args:
        config: The blocks' settings.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, L, C) to (B, L, 4·C)."""
        config, inner = self.config, 4 * self.config.width
        if config.act in GATED:
            return GATED[config.act](*HalvedDense(2 * inner, config.layers, name="proj")(x))
        return PLAIN[config.act](dense(inner, config.layers, "proj")(x))


class DiTBlock(nn.Module):
    """Self-attention and feed-forward layers, each normalised first, gated and added back.

    Args:
        config: The blocks' settings.
        embeds: Whether it holds the embedder of time and class.

    Reference:
        Peebles and Xie, https://arxiv.org/abs/2212.09748, figure 3, adaLN-Zero; BasicTransformerBlock of Diffusers.
    """

    config: BlockConfig
    embeds: bool = False

    def setup(self) -> None:
        """Make the layers."""
        config = self.config
        self.norm1 = AdaLayerNormZero(config, self.embeds)
        self.attn1 = DiTAttention(config)
        self.norm3 = token_norm(config, config.layers.eps, "norm3", affine=config.affine)
        self.ff = DiTFeedForward(config)

    def embed(self, timesteps: jax.Array, class_labels: jax.Array) -> jax.Array:
        """Return the embedding of times (B,) and classes (B,) for all blocks, (B, C)."""
        return self.norm1.emb(timesteps, class_labels)

    def __call__(self, x: jax.Array, told: jax.Array, turn: Rotation | None, deterministic: bool) -> jax.Array:
        """Map tokens to the same shape.

        Args:
            x: Tokens, (B, L, C).
            told: Embedding of time and class, (B, C).
            turn: Angles by which queries and keys turn; None for none.
            deterministic: Whether there is no dropout.

        Returns:
            The tokens, (B, L, C).
        """
        h, gate, shift_ff, scale_ff, gate_ff = self.norm1(x, told)
        x = gate[:, None] * self.attn1(h, turn, deterministic) + x
        h = modulated(self.norm3(x), scale_ff, shift_ff)
        return gate_ff[:, None] * self.ff(h, deterministic) + x


def unpatchified(tokens: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
    """Put patches together to a picture.

    Args:
        tokens: Pixels of the patches, channels last, (B, h·w, patch·patch·C').
        grid: Patches in height and width.
        patch: Height and width of a patch.

    Returns:
        The picture, (B, C', h·patch, w·patch).
    """
    batch, _, features = tokens.shape
    channels = features // patch**2
    pixels = tokens.reshape(batch, *grid, patch, patch, channels).transpose(0, 5, 1, 3, 2, 4)
    return pixels.reshape(batch, channels, *(side * patch for side in grid))
