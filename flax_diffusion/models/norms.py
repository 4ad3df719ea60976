"""Group normalisation that reads its input as often as it must, and keeps nothing else for the backward pass."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]

_FORWARD = contextvars.ContextVar("forward_derivatives", default=False)


@contextlib.contextmanager
def forward_derivatives() -> Iterator[None]:
    """Within: gradients that are written out give way to JAX's own, so that `jax.jvp` goes through the models too."""
    token = _FORWARD.set(True)
    try:
        yield
    finally:
        _FORWARD.reset(token)


def derivable(function: Any) -> Any:
    """Return a function of `jax.custom_vjp`, or within `forward_derivatives` the plain function of the same values."""
    return function.fun if _FORWARD.get() else function


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, eps: float, act: Activation | None = None
) -> jax.Array:
    """Normalise over all axes but the first, within groups of channels; then scale, shift and activate.

    Sums run over pixels first and over the channels of a group second, so that the channel axis, which TPUs lay out
    in lanes, is never split on a full-size tensor. They are in float32 at least. The variance is that of PyTorch, in
    two passes; of 16-bit inputs, whose own rounding loses more than a single pass does, in one.

    Args:
        x: Input, (B, …, C).
        scale: Factor of each channel, (C,).
        bias: Shift of each channel, (C,).
        groups: Number of groups; a divisor of C.
        eps: Number added to the variance.
        act: Activation of each element, or None.

    Returns:
        The result, float32 or wider (B, …, C).

    Reference:
        Wu and He, https://arxiv.org/abs/1803.08494, equations 1 to 7.
    """
    return _forward(x, scale, bias, groups, eps, act)[0]


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, eps: float, act: Activation | None
) -> tuple[jax.Array, Any]:
    wide = widen(x)
    mean = _group_mean(wide, groups)
    if x.dtype.itemsize == 2:
        variance = jnp.maximum(_group_mean(jnp.square(wide), groups) - jnp.square(mean), 0)
    else:
        variance = _group_mean(jnp.square(wide - mean), groups)
    inverse = jax.lax.rsqrt(variance + eps)
    out = (wide - mean) * (inverse * scale.astype(wide.dtype)) + bias.astype(wide.dtype)
    return (out if act is None else act(out)), (x, scale, bias, mean, inverse)


def _backward(
    groups: int, eps: float, act: Activation | None, kept: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute dx = (g − mean(g) − x̂ · mean(g · x̂)) / σ, with x̂ the normalised input and g the gradient at it."""
    x, scale, bias, mean, inverse = kept
    wide = widen(x)
    normal, factor = (wide - mean) * inverse, scale.astype(wide.dtype)
    if act is not None:
        _, pull = jax.vjp(act, normal * factor + bias.astype(wide.dtype))
        (grad,) = pull(grad)
    pixels = tuple(range(1, x.ndim - 1))
    shift_sums = grad.sum(pixels, keepdims=True)  # (B, 1, …, C), from which all other sums are made
    scale_sums = (grad * normal).sum(pixels, keepdims=True)
    count = x.size // (x.shape[0] * x.shape[-1])
    mean_grad = _channel_mean(shift_sums * factor, groups) / count
    mean_product = _channel_mean(scale_sums * factor, groups) / count
    dx = inverse * (grad * factor - mean_grad - normal * mean_product)

    def per_channel(sums: jax.Array) -> jax.Array:
        return sums.sum(tuple(range(sums.ndim - 1)))

    return dx.astype(x.dtype), per_channel(scale_sums).astype(scale.dtype), per_channel(shift_sums).astype(bias.dtype)


group_norm.defvjp(_forward, _backward)


def widen(x: jax.Array) -> jax.Array:
    """Return an array in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _group_mean(x: jax.Array, groups: int) -> jax.Array:
    """Return the mean over pixels and channels of each group: (B, …, C) to (B, 1, …, C), equal within a group."""
    return _channel_mean(x.mean(axis=tuple(range(1, x.ndim - 1)), keepdims=True), groups)


def _channel_mean(x: jax.Array, groups: int) -> jax.Array:
    """Return the mean over the channels of each group, repeated for each of them."""
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(x.shape)
