"""What the backward pass computes again instead of keeping it."""

from typing import Any

import flax.linen as nn

from flax_diffusion.core.errors import unknown
from flax_diffusion.core.typed import Checkpointing

_KEPT = ("conv_general_dilated", "pallas_call", "dot_product_attention_fwd_wrapper")


def checkpointed(module: Any, how: Checkpointing, **options: Any) -> Any:
    """Return a module class whose backward pass computes activations again.

    Args:
        module: class of a Linen module.
        how: how much of it; False returns the class as it is.
        options: of `flax.linen.remat`.
    """
    if not how:
        return module
    if how not in (True, "minimal"):
        raise unknown("gradient_checkpointing", how, ("true", "false", "minimal"))
    return nn.remat(module, policy=_takes_long if how == "minimal" else None, **options)


def _takes_long(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether to keep a primitive's results; not those of products in batches, which are attention's scores."""
    if primitive.name == "dot_general":
        return params["dimension_numbers"][1] == ((), ())
    return primitive.name in _KEPT
