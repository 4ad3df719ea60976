"""Casts of parameter trees between float dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_diffusion.core.errors import ConfigError

Params = Mapping[str, Any]


def cast_floats(params: Params, dtype: Any, mask: Params | None = None) -> dict[str, Any]:
    """Cast the floats of a parameter tree.

    Args:
        params: Parameter tree; arrays of integers stay as they are.
        dtype: New dtype.
        mask: Tree of booleans with the paths of `params`: False leaves a parameter as it is. None casts all.

    Returns:
        A new tree of the same arrays, cast.

    Raises:
        ConfigError: If the mask has other paths than the parameters.
    """
    flat = _flatten(params)
    chosen = dict.fromkeys(flat, True) if mask is None else _flatten(mask)
    if flat.keys() != chosen.keys():
        path = "/".join(min(flat.keys() ^ chosen.keys()))
        raise ConfigError(f"the mask and the parameters differ at {path}: make the mask of the tree of the parameters")

    def cast(array: Any) -> Any:
        floating = jnp.issubdtype(jnp.result_type(array), np.floating)
        return array.astype(dtype) if floating else array

    return unflatten_dict({path: cast(array) if chosen[path] else array for path, array in flat.items()})


def _flatten(tree: Params) -> dict[tuple[str, ...], Any]:
    return flatten_dict(tree.unfreeze() if isinstance(tree, FrozenDict) else dict(tree))  # pyright: ignore


class FlaxCasts:
    """The three casts that models of Diffusers and Transformers have; the model itself is not changed."""

    def to_bf16(self, params: Params, mask: Params | None = None) -> dict[str, Any]:
        """Cast floats to bfloat16; arguments and errors are those of `cast_floats`."""
        return cast_floats(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Params, mask: Params | None = None) -> dict[str, Any]:
        """Cast floats to float16; arguments and errors are those of `cast_floats`."""
        return cast_floats(params, jnp.float16, mask)

    def to_fp32(self, params: Params, mask: Params | None = None) -> dict[str, Any]:
        """Cast floats to float32; arguments and errors are those of `cast_floats`."""
        return cast_floats(params, jnp.float32, mask)
