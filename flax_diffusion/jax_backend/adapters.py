"""LoRA and new tokens in Flax: arrays beside the frozen weights, which the layers find when they are called.

The models themselves have no code for adapters. An adapter is in the parameter tree beside the weights of its layer
(`to_q/lora_A`, `token_embedding/new_rows`), and an interceptor of the layers' calls adds its part to the output.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_diffusion.core.io.torch_names import from_torch_layout, to_torch_layout, torch_name
from flax_diffusion.core.spec import adapters
from flax_diffusion.core.spec.pipeline import Component
from flax_diffusion.models.dropout import drop
from flax_diffusion.models.layers import HalvedDense
from flax_diffusion.models.weights import torch_shapes

Tree = dict[str, Any]


def draw(component: Component, weights: Tree, seed: int) -> Tree:
    """Draw the first values of a component's adapters.

    Args:
        component: The component, with its LoRA or new tokens.
        weights: Its weights, or others of the same shapes.
        seed: Seed of the run.

    Returns:
        The adapters, as a tree to be merged with the weights.

    Raises:
        ConfigError: If a LoRA does not fit the model.
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(weights)  # pyright: ignore[reportAssignmentType]
    owners = [path for path in flat if path[-1] in ("kernel", "embedding")]
    layers = {torch_name(path).removesuffix(".weight"): path[:-1] for path in owners}
    if component.lora is not None:
        arrays = adapters.draw_lora(component.lora, torch_shapes(weights), component.kind, seed)
    else:
        assert component.new_tokens is not None
        path = (*layers[adapters.TOKEN_EMBEDDING], "embedding")
        arrays = adapters.draw_rows(component.new_tokens, to_torch_layout(path, np.asarray(flat[path])))
    tree = {}
    for name, array in arrays.items():
        place = _place(name, layers)
        tree[place] = np.array(from_torch_layout(place, array, array.ndim), order="C")
    return unflatten_dict(tree)


def _place(name: str, layers: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the path of an adapter's array, which is beside the weights of its layer."""
    if name == adapters.NEW_ROWS:
        return (*layers[adapters.TOKEN_EMBEDDING], "new_rows")
    layer, part, _ = name.rsplit(".", 2)
    return (*layers[layer], part, "kernel")


def merge(ours: Tree, theirs: Tree) -> Tree:
    """Merge two parameter trees, which share branches but no leaves."""
    both = {key: merge(ours[key], theirs[key]) for key in ours.keys() & theirs.keys()}
    return {**ours, **theirs, **both}


def interceptor(component: Component, *, train: bool) -> Any:
    """Return an interceptor for `nn.intercept_methods`, which calls the layers of a component with their adapters.

    Args:
        component: The component, with its LoRA or new tokens.
        train: Whether to drop inputs of LoRA at random.
    """
    lora, new_tokens = component.lora, component.new_tokens

    def call(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, nn.Dense | nn.Embed | HalvedDense):
            return next_call(*args, **kwargs)
        own = layer.variables["params"]
        if new_tokens is not None and "new_rows" in own:
            (ids,) = args
            new = ids >= new_tokens.first
            known = next_call(jnp.where(new, 0, ids))
            rows = own["new_rows"].astype(known.dtype)[jnp.maximum(ids - new_tokens.first, 0)]
            return jnp.where(new[..., None], rows, known)
        if lora is None or "lora_A" not in own:
            return next_call(*args, **kwargs)
        (x,) = args
        down, up = (own[part]["kernel"] for part in ("lora_A", "lora_B"))
        drops = train and lora.dropout > 0
        # One product gives the gradient of x, unless the LoRA has another input, or the layer gathers its weights.
        joint = not drops and own["kernel"].shape == (len(down), up.shape[1])
        made = next_call(_rows(jax.lax.stop_gradient(x) if joint else x))
        alone = not isinstance(made, tuple)  # else the layer returns the parts of its output
        outs = [made] if alone else list(made)
        source, down, up, kernel = (array.astype(outs[0].dtype) for array in (x, down, up, own["kernel"]))
        if drops:
            source = drop(source, layer.make_rng("dropout"), lora.dropout)
        kernels = jnp.split(kernel, len(outs), axis=-1) if joint else [None] * len(outs)
        parts = zip(outs, kernels, jnp.split(up, len(outs), axis=-1), strict=True)
        sums: list[jax.Array] = [
            _add_product(lora.scale, out, _rows(source), weights, down, part) for out, weights, part in parts
        ]
        shaped = [rows.reshape(*x.shape[:-1], -1) for rows in sums]
        return shaped[0] if alone else tuple(shaped)

    return call


def _rows(x: jax.Array) -> jax.Array:
    """Reshape (…, C) to (T, C)."""
    return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_product(
    scale: float, out: jax.Array, x: jax.Array, kernel: jax.Array | None, down: jax.Array, up: jax.Array
) -> jax.Array:
    """Add a LoRA's part to the output of its layer.

    On a TPU a product that sums over the rank takes half as long as one that sums over 1280 channels. So the gradient
    of `x` is one product, which sums over channels and rank together.

    Args:
        scale: Factor of the LoRA's part.
        out: Output of the layer, (T, C').
        x: Input of the LoRA, (T, C).
        kernel: Weights of the layer, (C, C'), where `out` passes no gradient on to its input and the gradient of `x`
            is to be that of both; None where `out` does.
        down: First factor, (C, R).
        up: Second factor, (R, C').

    Returns:
        out + scale · x · down · up, (T, C').
    """
    return _add_product_forward(scale, out, x, kernel, down, up)[0]


def _add_product_forward(
    scale: float, out: jax.Array, x: jax.Array, kernel: jax.Array | None, down: jax.Array, up: jax.Array
) -> tuple[jax.Array, Any]:
    low = x @ down
    return out + low @ up * scale, (x, low, kernel, down, up)


def _add_product_backward(scale: float, kept: Any, grad: jax.Array) -> tuple[Any, ...]:
    x, low, kernel, down, up = kept
    dlow = grad @ up.T * scale
    # Else XLA computes the LoRA's gradients late, and what they need takes the fast memory of a TPU until then.
    dlow, ddown, dup = jax.lax.optimization_barrier((dlow, x.T @ dlow, low.T @ grad * scale))
    if kernel is None:
        return grad, dlow @ down.T, None, ddown, dup
    dx = jnp.concatenate([grad, dlow], axis=1) @ jnp.concatenate([kernel, down], axis=1).T
    return grad, dx, jnp.zeros_like(kernel), ddown, dup


_add_product.defvjp(_add_product_forward, _add_product_backward)
