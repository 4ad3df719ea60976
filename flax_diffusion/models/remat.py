"""Gradient checkpointing: what the backward pass computes again instead of keeping it."""

from typing import Any

import flax.linen as nn

from flax_diffusion.core.errors import unknown
from flax_diffusion.core.typed import Checkpointing

_KEPT_PRIMITIVES = ("conv_general_dilated", "pallas_call", "dot_product_attention_fwd_wrapper")


def checkpointed(module: Any, checkpointing: Checkpointing, **options: Any) -> Any:
    """Return a module class whose backward pass computes activations again.

    Args:
        module: Class of a Linen module.
        checkpointing: True computes all activations again, "minimal" all but those that take long; False returns the
            class as it is.
        options: Further options of `flax.linen.remat`.
    """
    if not checkpointing:
        return module
    if checkpointing not in (True, "minimal"):
        raise unknown("gradient_checkpointing", checkpointing, ("true", "false", "minimal"))
    return nn.remat(module, policy=_is_kept if checkpointing == "minimal" else None, **options)


def _is_kept(primitive: Any, *_: Any, **params: Any) -> bool:
    """Return whether a primitive's results are kept; not those of batched products, which are attention's scores."""
    if primitive.name == "dot_general":
        return params["dimension_numbers"][1] == ((), ())
    return primitive.name in _KEPT_PRIMITIVES
