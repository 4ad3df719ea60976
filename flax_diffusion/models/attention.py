"""Attention layers, all through one function, `attention`.

Axes in shapes: B batch, H height, W width, C channels, L query tokens, S key tokens, N heads, D channels per head.
"""

import math
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from flax_diffusion.models import flash
from flax_diffusion.models.layers import GroupNorm, HalvedDense, LayerConfig, conv, dense, layer_norm
from flax_diffusion.models.norms import derivable, widen
from flax_diffusion.models.remat import checkpointed

# Upstream's Dual transformer splits the context into 77 text tokens and 257 image tokens, in this order.
DUAL_CONDITION_LENGTHS = (77, 257)
DUAL_TRANSFORMER_FOR_CONDITION = (1, 0)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Return scaled dot-product attention, scores and softmax in at least float32 from products of the given dtype.

    Args:
        q: Queries, (B, L, N, D).
        k: Keys, (B, S, N, D).
        v: Values, (B, S, N, D).
        mask: Booleans that broadcast to (B, N, L, S); True marks what may be attended to.

    Returns:
        The weighted values, (B, L, N, D), in the dtype of the queries.

    Reference:
        Vaswani et al. 2017, eq. 1; torch.nn.functional.scaled_dot_product_attention.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mask is None and flash.has_kernel(mesh, q, k):
        return flash.flash_attention(q, k, v)
    if mask is None and _has_cudnn_kernel(mesh, q, k):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    dtype = q.dtype
    half_on_cpu = dtype == jnp.float16 and jax.default_backend() == "cpu"  # JAX has no such product there
    if dtype != jnp.float64 and not half_on_cpu:  # and in float64 its softmax would be in float32
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    wide = jnp.promote_types(dtype, jnp.float32)
    scores = jnp.einsum("blnd,bsnd->bnls", q.astype(wide), k.astype(wide))
    weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), where=mask)
    return jnp.einsum("bnls,bsnd->blnd", weights, v.astype(wide)).astype(dtype)


def _has_cudnn_kernel(mesh: AbstractMesh, q: jax.Array, k: jax.Array) -> bool:
    """Return whether a mesh's devices are GPUs, and cuDNN's flash attention takes these shapes, gradients included.

    Reference:
        the support matrix of cuDNN's frontend, scaled dot product attention, Ampere and later.
    """
    if mesh.empty or mesh.abstract_device is None or mesh.abstract_device.platform not in ("gpu", "cuda"):
        return False
    (_, queries, _, channels), keys = q.shape, k.shape[1]
    fits = queries % 64 == 0 and keys % 64 == 0 and channels % 8 == 0 and channels <= 128
    ampere = float(jax.devices()[0].compute_capability) >= 8
    return ampere and fits and q.dtype in (jnp.bfloat16, jnp.float16)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Reshape (B, L, N·D) to (B, L, N, D), with N heads."""
    return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: jax.Array) -> jax.Array:
    """Reshape (B, L, N, D) to (B, L, N·D)."""
    return x.reshape(*x.shape[:-2], -1)


def _attend(
    x: jax.Array, context: jax.Array, *, heads: int, head_dim: int, config: LayerConfig, bias: bool
) -> jax.Array:
    """Project to queries, keys and values, attend, project back; the layers belong to the calling module."""
    inner = heads * head_dim
    q = split_heads(dense(inner, config, "to_q", bias=bias)(x), heads)
    k = split_heads(dense(inner, config, "to_k", bias=bias)(context), heads)
    v = split_heads(dense(inner, config, "to_v", bias=bias)(context), heads)
    return dense(x.shape[-1], config, "to_out_0")(merge_heads(attention(q, k, v)))


class Attention(nn.Module):
    """Multi-head attention over tokens, without biases on queries, keys and values.

    Args:
        heads: Number of heads.
        head_dim: Channels per head.
        config: Layer config; its dtypes are used.
    """

    heads: int
    head_dim: int
    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Attend from `x` to `context`, or to itself.

        Args:
            x: Tokens that attend, (B, L, C).
            context: Tokens that are attended to, (B, S, C'); None attends to `x`.

        Returns:
            The attended tokens, (B, L, C).
        """
        context = x if context is None else context
        return _attend(x, context, heads=self.heads, head_dim=self.head_dim, config=self.config, bias=False)


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a feature map, with group norm and residual.

    Args:
        head_dim: Channels per head.
        config: Layer config; its eps, output scale and dtypes are used.
        groups: Number of groups of the group norm; None leaves it out.

    Reference:
        Attention of Diffusers as AttnDownBlock2D, UNetMidBlock2D and AutoencoderKL build it.
    """

    head_dim: int
    config: LayerConfig
    groups: int | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        b, h, w, c = x.shape
        tokens = x.reshape(b, h * w, c)
        if self.groups is not None:
            norm_config = replace(self.config, groups=self.groups)
            tokens = GroupNorm(norm_config, self.config.eps, name="group_norm")(tokens)
        out = _attend(tokens, tokens, heads=c // self.head_dim, head_dim=self.head_dim, config=self.config, bias=True)
        out = out.reshape(b, h, w, c) + x
        return out if self.config.output_scale == 1.0 else out / self.config.output_scale


class AddedKVAttention(nn.Module):
    """Attention from pixels to text tokens and, unless `only_cross`, to the pixels, with group norm and residual.

    Args:
        head_dim: Channels per head.
        config: Layer config; its groups and dtypes are used.
        only_cross: Attend to the text alone.
        cross_norm: Normalise the text tokens with a group norm of 32 groups.

    Reference:
        AttnAddedKVProcessor2_0 of Diffusers, as the SimpleCrossAttn blocks use it.
    """

    head_dim: int
    config: LayerConfig
    only_cross: bool = False
    cross_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Attend from pixels (B, H, W, C) to text tokens (B, S, C'); the result has the pixels' shape."""
        config, (b, h, w, c) = self.config, x.shape
        heads = c // self.head_dim
        inner = heads * self.head_dim
        if self.cross_norm:
            context = GroupNorm(replace(config, groups=32), 1e-5, name="norm_cross")(context)
        # eps here is the default of upstream's Attention, not the model's norm_eps.
        tokens = GroupNorm(config, 1e-5, name="group_norm")(x.reshape(b, h * w, c))
        q = dense(inner, config, "to_q")(tokens)
        k = dense(inner, config, "add_k_proj")(context)
        v = dense(inner, config, "add_v_proj")(context)
        if not self.only_cross:
            k = jnp.concatenate([k, dense(inner, config, "to_k")(tokens)], axis=1)
            v = jnp.concatenate([v, dense(inner, config, "to_v")(tokens)], axis=1)
        out = merge_heads(attention(*(split_heads(t, heads) for t in (q, k, v))))
        out = dense(c, config, "to_out_0")(out)
        return out.reshape(b, h, w, c) + x


@jax.custom_vjp
def gated_gelu(x: jax.Array, gate: jax.Array) -> jax.Array:
    """Return x · GELU(gate) of two arrays of one shape and dtype, exact and computed in at least float32.

    The gradient is written out, so that only these two arrays are kept for it. Without that, three more would be kept,
    which take longer to write and read than to compute again.

    Reference:
        Shazeer 2020, https://arxiv.org/abs/2002.05202; torch.nn.functional.gelu, whose form this is.
    """
    wide_x, wide_gate = widen(x), widen(gate)
    return (wide_x * wide_gate * _normal_cdf(wide_gate)).astype(x.dtype)


def _gated_gelu_forward(x: jax.Array, gate: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return gated_gelu(x, gate), (x, gate)


def _gated_gelu_backward(kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, gate, wide_grad = map(widen, (*kept, grad))
    cdf = _normal_cdf(gate)
    slope = cdf + gate * jnp.exp(-0.5 * jnp.square(gate)) / math.sqrt(2 * math.pi)
    return (wide_grad * gate * cdf).astype(grad.dtype), (wide_grad * x * slope).astype(grad.dtype)


gated_gelu.defvjp(_gated_gelu_forward, _gated_gelu_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
    """Return the share of a standard normal distribution that lies below x."""
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


class GEGLU(nn.Module):
    """Linear layer gated by an exact GELU (Shazeer 2020).

    Args:
        features: Output channels.
        config: Layer config; its dtypes are used.
    """

    features: int
    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, L, C) to (B, L, features)."""
        return derivable(gated_gelu)(*HalvedDense(2 * self.features, self.config, name="proj")(x))


class FeedForward(nn.Module):
    """GEGLU to four times the width, then back.

    Args:
        config: Layer config; its dtypes are used.
    """

    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, L, C) to the same shape."""
        width = x.shape[-1]
        return dense(width, self.config, "net_2")(GEGLU(4 * width, self.config, name="net_0")(x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normalised first and added back.

    Args:
        heads: Number of heads.
        head_dim: Channels per head.
        config: Layer config; its dtypes are used.
        only_cross: The first attention attends to the context too.
    """

    heads: int
    head_dim: int
    config: LayerConfig
    only_cross: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Map tokens (B, L, C) and a context (B, S, C') to the tokens' shape."""
        config = self.config
        attn1, attn2 = (Attention(self.heads, self.head_dim, config, name=name) for name in ("attn1", "attn2"))
        h = layer_norm(config, "norm1")(x)
        x = attn1(h, context if self.only_cross else None) + x
        x = attn2(layer_norm(config, "norm2")(x), context) + x
        return FeedForward(config, name="ff")(layer_norm(config, "norm3")(x)) + x


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map, with group norm, projections and residual.

    Args:
        heads: Number of heads.
        depth: Number of transformer blocks.
        config: Layer config; its groups, checkpointing and dtypes are used.
        linear_projection: Project with linear layers instead of 1x1 convolutions.
        only_cross: See `BasicTransformerBlock`.

    Reference:
        Transformer2DModel of Diffusers (PyTorch), continuous input.
    """

    heads: int
    depth: int
    config: LayerConfig
    linear_projection: bool = False
    only_cross: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Map pixels (B, H, W, C) and a context (B, S, C') to the pixels' shape."""
        config, (b, h, w, c) = self.config, x.shape
        head_dim = c // self.heads
        inner = self.heads * head_dim
        block = checkpointed(BasicTransformerBlock, config.checkpointing)

        def project(x: jax.Array, features: int, name: str) -> jax.Array:
            if self.linear_projection:
                return dense(features, config, name)(x)
            return conv(features, config, name, kernel=1)(x)

        tokens = GroupNorm(config, 1e-6, name="norm")(x)  # upstream's constant, not the model's norm_eps
        tokens = project(tokens, inner, "proj_in").reshape(b, h * w, inner)
        for i in range(self.depth):
            name = f"transformer_blocks_{i}"
            tokens = block(self.heads, head_dim, config, self.only_cross, name=name)(tokens, context)
        return project(tokens.reshape(b, h, w, inner), c, "proj_out") + x


class DualTransformer2DModel(nn.Module):
    """Mean of two transformers, one over the text and one over the image part of the context.

    Args:
        heads: Number of heads.
        config: Layer config; its groups, checkpointing and dtypes are used.

    Reference:
        DualTransformer2DModel of Diffusers (PyTorch) with its default mixing ratio of one half.
    """

    heads: int
    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Map pixels (B, H, W, C) to the same shape; the context holds 77 text and then 257 image tokens."""
        start, out = 0, x
        for index, length in zip(DUAL_TRANSFORMER_FOR_CONDITION, DUAL_CONDITION_LENGTHS, strict=True):
            transformer = Transformer2DModel(self.heads, 1, self.config, name=f"transformers_{index}")
            out = out + 0.5 * (transformer(x, context[:, start : start + length]) - x)
            start += length
        return out
