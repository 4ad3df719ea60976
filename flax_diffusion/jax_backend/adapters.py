"""LoRA and new tokens in Flax: arrays beside the frozen weights, which the layers find when they are called.

The models themselves have no code for adapters. An adapter is in the parameter tree beside the weights of its layer
(`to_q/lora_A`, `token_embedding/new_rows`), and an interceptor of the layers' calls adds its part to the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        made = next_call(*args, **kwargs)
        alone = not isinstance(made, tuple)  # else the layer returns the parts of its output
        outs = [made] if alone else list(made)
        if lora is not None and "lora_A" in own:
            (x,) = args
            x = x.astype(outs[0].dtype)
            if train and lora.dropout:
                x = drop(x, layer.make_rng("dropout"), lora.dropout)
            down, up = (own[part]["kernel"].astype(x.dtype) for part in ("lora_A", "lora_B"))
            low = x @ down
            ups = jnp.split(up, len(outs), axis=-1)
            outs = [out + (low @ up) * lora.scale for out, up in zip(outs, ups, strict=True)]
        return outs[0] if alone else tuple(outs)

    return call
