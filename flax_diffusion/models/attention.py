"""Attention layers, all through one function, `attention`.

Shape suffixes: B batch, H height, W width, C channels, L query tokens, S key tokens, N heads, D channels a head.
"""

import math
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from flax_diffusion.models import flash
from flax_diffusion.models.layers import GroupNorm, HalvedDense, LayerConfig, conv, dense, layer_norm
from flax_diffusion.models.norms import widen
from flax_diffusion.models.remat import checkpointed

# Upstream's Dual transformer splits the context into 77 text tokens and 257 image tokens, in this order.
DUAL_CONDITION_LENGTHS = (77, 257)
DUAL_TRANSFORMER_FOR_CONDITION = (1, 0)


def attention(q_BLND: jax.Array, k_BSND: jax.Array, v_BSND: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Return scaled dot-product attention, scores and softmax in at least float32 from products of the given dtype.

    Args:
        q_BLND: queries, (B, L, N, D).
        k_BSND: keys, (B, S, N, D).
        v_BSND: values, (B, S, N, D).
        mask: booleans that broadcast to (B, N, L, S); True may be attended to.

    Returns:
        (B, L, N, D) in the dtype of the queries.

    Reference: Vaswani et al. 2017, eq. 1; torch.nn.functional.scaled_dot_product_attention.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mask is None and flash.has_kernel(mesh, q_BLND, k_BSND):
        return flash.flash_attention(q_BLND, k_BSND, v_BSND)
    if mask is None and _has_cudnn_kernel(mesh, q_BLND, k_BSND):
        return jax.nn.dot_product_attention(q_BLND, k_BSND, v_BSND, implementation="cudnn")
    dtype = q_BLND.dtype
    half_on_cpu = dtype == jnp.float16 and jax.default_backend() == "cpu"  # JAX has no such product there
    if dtype != jnp.float64 and not half_on_cpu:  # and in float64 its softmax would be in float32
        return jax.nn.dot_product_attention(q_BLND, k_BSND, v_BSND, mask=mask)
    wide = jnp.promote_types(dtype, jnp.float32)
    scores_BNLS = jnp.einsum("blnd,bsnd->bnls", q_BLND.astype(wide), k_BSND.astype(wide))
    weights_BNLS = jax.nn.softmax(scores_BNLS / math.sqrt(q_BLND.shape[-1]), where=mask)
    return jnp.einsum("bnls,bsnd->blnd", weights_BNLS, v_BSND.astype(wide)).astype(dtype)


def _has_cudnn_kernel(mesh: AbstractMesh, q_BLND: jax.Array, k_BSND: jax.Array) -> bool:
    """Whether the devices of a mesh are GPUs, and cuDNN's flash attention takes these shapes, gradients too.

    Reference: the support matrix of cuDNN's frontend, scaled dot product attention, Ampere and later.
    """
    if mesh.empty or mesh.abstract_device is None or mesh.abstract_device.platform not in ("gpu", "cuda"):
        return False
    (_, queries, _, channels), keys = q_BLND.shape, k_BSND.shape[1]
    fits = queries % 64 == 0 and keys % 64 == 0 and channels % 8 == 0 and channels <= 128
    ampere = float(jax.devices()[0].compute_capability) >= 8
    return ampere and fits and q_BLND.dtype in (jnp.bfloat16, jnp.float16)


def split_heads(x_BLC: jax.Array, heads: int) -> jax.Array:
    """Reshape (B, L, N*D) to (B, L, N, D)."""
    return x_BLC.reshape(*x_BLC.shape[:-1], heads, -1)


def merge_heads(x_BLND: jax.Array) -> jax.Array:
    """Reshape (B, L, N, D) to (B, L, N*D)."""
    return x_BLND.reshape(*x_BLND.shape[:-2], -1)


def _attend(
    x_BLC: jax.Array, context_BSC: jax.Array, *, heads: int, head_dim: int, config: LayerConfig, bias: bool
) -> jax.Array:
    """Project to queries, keys and values, attend, project back; the layers belong to the calling module."""
    inner = heads * head_dim
    q = split_heads(dense(inner, config, "to_q", bias=bias)(x_BLC), heads)
    k = split_heads(dense(inner, config, "to_k", bias=bias)(context_BSC), heads)
    v = split_heads(dense(inner, config, "to_v", bias=bias)(context_BSC), heads)
    return dense(x_BLC.shape[-1], config, "to_out_0")(merge_heads(attention(q, k, v)))


class Attention(nn.Module):
    """Multi-head attention over tokens, without biases on queries, keys and values.

    Args:
        heads: number of heads.
        head_dim: channels a head.
        config: dtypes.
    """

    heads: int
    head_dim: int
    config: LayerConfig

    @nn.compact
    def __call__(self, x_BLC: jax.Array, context_BSC: jax.Array | None = None) -> jax.Array:
        """Attend from `x_BLC` to `context_BSC`, or to itself; returns (B, L, C)."""
        context = x_BLC if context_BSC is None else context_BSC
        return _attend(x_BLC, context, heads=self.heads, head_dim=self.head_dim, config=self.config, bias=False)


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a feature map, with group norm and residual.

    Args:
        head_dim: channels a head.
        config: eps, output scale, dtypes.
        groups: of the group norm; None leaves it out.

    Reference: Attention of Diffusers as AttnDownBlock2D, UNetMidBlock2D and AutoencoderKL build it.
    """

    head_dim: int
    config: LayerConfig
    groups: int | None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        b, h, w, c = x_BHWC.shape
        tokens = x_BHWC.reshape(b, h * w, c)
        if self.groups is not None:
            norm_config = replace(self.config, groups=self.groups)
            tokens = GroupNorm(norm_config, self.config.eps, name="group_norm")(tokens)
        out = _attend(tokens, tokens, heads=c // self.head_dim, head_dim=self.head_dim, config=self.config, bias=True)
        out = out.reshape(b, h, w, c) + x_BHWC
        return out if self.config.output_scale == 1.0 else out / self.config.output_scale


class AddedKVAttention(nn.Module):
    """Attention from pixels to text tokens and, unless `only_cross`, to the pixels, with group norm and residual.

    Args:
        head_dim: channels a head.
        config: groups and dtypes.
        only_cross: attend to the text alone.
        cross_norm: normalise the text tokens with a group norm of 32 groups.

    Reference: AttnAddedKVProcessor2_0 of Diffusers, as the SimpleCrossAttn blocks use it.
    """

    head_dim: int
    config: LayerConfig
    only_cross: bool = False
    cross_norm: bool = False

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, context_BSC: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        config, (b, h, w, c) = self.config, x_BHWC.shape
        heads = c // self.head_dim
        inner = heads * self.head_dim
        if self.cross_norm:
            context_BSC = GroupNorm(replace(config, groups=32), 1e-5, name="norm_cross")(context_BSC)
        # eps here is the default of upstream's Attention, not the model's norm_eps.
        tokens = GroupNorm(config, 1e-5, name="group_norm")(x_BHWC.reshape(b, h * w, c))
        q = dense(inner, config, "to_q")(tokens)
        k = dense(inner, config, "add_k_proj")(context_BSC)
        v = dense(inner, config, "add_v_proj")(context_BSC)
        if not self.only_cross:
            k = jnp.concatenate([k, dense(inner, config, "to_k")(tokens)], axis=1)
            v = jnp.concatenate([v, dense(inner, config, "to_v")(tokens)], axis=1)
        out = merge_heads(attention(*(split_heads(t, heads) for t in (q, k, v))))
        out = dense(c, config, "to_out_0")(out)
        return out.reshape(b, h, w, c) + x_BHWC


@jax.custom_vjp
def gated_gelu(x: jax.Array, gate: jax.Array) -> jax.Array:
    """Return x · GELU(gate) of two arrays of one shape and dtype, exact and computed in at least float32.

    Its gradient is written out, so that these two are all that is kept for it: three arrays more would be, and take
    longer to write and read than to compute again.

    Reference: Shazeer 2020, https://arxiv.org/abs/2002.05202; torch.nn.functional.gelu, whose form this is.
    """
    wide_x, wide_gate = widen(x), widen(gate)
    return (wide_x * wide_gate * _normal_cdf(wide_gate)).astype(x.dtype)


def _gated_gelu_forward(x: jax.Array, gate: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return gated_gelu(x, gate), (x, gate)


def _gated_gelu_backward(kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, gate, wide_grad = map(widen, (*kept, grad))
    below = _normal_cdf(gate)
    slope = below + gate * jnp.exp(-0.5 * jnp.square(gate)) / math.sqrt(2 * math.pi)
    return (wide_grad * gate * below).astype(grad.dtype), (wide_grad * x * slope).astype(grad.dtype)


gated_gelu.defvjp(_gated_gelu_forward, _gated_gelu_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The share of a standard normal distribution that lies below."""
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


class GEGLU(nn.Module):
    """Linear layer gated by an exact GELU (Shazeer 2020).

    Args:
        features: output width.
        config: dtypes.
    """

    features: int
    config: LayerConfig

    @nn.compact
    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        """Map (B, L, C) to (B, L, features)."""
        return gated_gelu(*HalvedDense(2 * self.features, self.config, name="proj")(x_BLC))


class FeedForward(nn.Module):
    """GEGLU to four times the width, then back.

    Args:
        config: dtypes.
    """

    config: LayerConfig

    @nn.compact
    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        """Map (B, L, C) to the same shape."""
        width = x_BLC.shape[-1]
        return dense(width, self.config, "net_2")(GEGLU(4 * width, self.config, name="net_0")(x_BLC))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normalised first and added back.

    Args:
        heads: number of heads.
        head_dim: channels a head.
        config: dtypes.
        only_cross: the first attention, too, attends to the context.
    """

    heads: int
    head_dim: int
    config: LayerConfig
    only_cross: bool = False

    @nn.compact
    def __call__(self, x_BLC: jax.Array, context_BSC: jax.Array) -> jax.Array:
        """Map (B, L, C) to the same shape."""
        config = self.config
        attn1, attn2 = (Attention(self.heads, self.head_dim, config, name=name) for name in ("attn1", "attn2"))
        h = layer_norm(config, "norm1")(x_BLC)
        x_BLC = attn1(h, context_BSC if self.only_cross else None) + x_BLC
        x_BLC = attn2(layer_norm(config, "norm2")(x_BLC), context_BSC) + x_BLC
        return FeedForward(config, name="ff")(layer_norm(config, "norm3")(x_BLC)) + x_BLC


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map, with group norm, projections and residual.

    Args:
        heads: number of heads.
        depth: number of transformer blocks.
        config: groups, checkpointing, dtypes.
        linear_projection: project with linear layers instead of 1x1 convolutions.
        only_cross: see BasicTransformerBlock.

    Reference: Transformer2DModel of Diffusers (PyTorch), continuous input.
    """

    heads: int
    depth: int
    config: LayerConfig
    linear_projection: bool = False
    only_cross: bool = False

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, context_BSC: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        config, (b, h, w, c) = self.config, x_BHWC.shape
        head_dim = c // self.heads
        inner = self.heads * head_dim
        block = checkpointed(BasicTransformerBlock, config.checkpointing)

        def project(x: jax.Array, features: int, name: str) -> jax.Array:
            if self.linear_projection:
                return dense(features, config, name)(x)
            return conv(features, config, name, kernel=1)(x)

        tokens = GroupNorm(config, 1e-6, name="norm")(x_BHWC)  # upstream's constant, not the model's norm_eps
        tokens = project(tokens, inner, "proj_in").reshape(b, h * w, inner)
        for i in range(self.depth):
            name = f"transformer_blocks_{i}"
            tokens = block(self.heads, head_dim, config, self.only_cross, name=name)(tokens, context_BSC)
        return project(tokens.reshape(b, h, w, inner), c, "proj_out") + x_BHWC


class DualTransformer2DModel(nn.Module):
    """Mean of two transformers, one over the text and one over the image part of the context.

    Args:
        heads: number of heads.
        config: groups, checkpointing, dtypes.

    Reference: DualTransformer2DModel of Diffusers (PyTorch) with its default mixing ratio of one half.
    """

    heads: int
    config: LayerConfig

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, context_BSC: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape; the context holds 77 text and then 257 image tokens."""
        start, out = 0, x_BHWC
        for index, length in zip(DUAL_TRANSFORMER_FOR_CONDITION, DUAL_CONDITION_LENGTHS, strict=True):
            transformer = Transformer2DModel(self.heads, 1, self.config, name=f"transformers_{index}")
            out = out + 0.5 * (transformer(x_BHWC, context_BSC[:, start : start + length]) - x_BHWC)
            start += length
        return out
