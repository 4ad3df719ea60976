"""What a family of models computes: what a batch tells the denoiser, and how the denoiser is called.

The twin of `torch_backend.families.family`. Shapes: B images, C channels, H W pixels, h w of what is denoised (pixels
or latents).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from flax_diffusion.core.registry import Registry

if TYPE_CHECKING:
    from flax_diffusion.jax_backend.modules import Modules

GROUP = "flax_diffusion.jax_backend"

Params = dict[str, Any]
Batch = Mapping[str, jax.Array]


def _no_condition(modules: Modules, params: Params, batch: Batch, dropout: jax.Array | None = None) -> None:
    return None


def _no_denoiser(*_: Any) -> jax.Array:
    raise TypeError("this family has no denoiser")


@dataclass(frozen=True, kw_only=True)
class Family:
    """The functions of a family; all are traced.

    Attributes:
        classes: Flax modules by the name of their PyTorch class.
        condition: Returns what the denoiser is told beside sample and time, of `(modules, params, batch, dropout)`:
            batch holds arrays (B, …) of the examples, or of prompts that are drawn; dropout is the key of the dropout
            masks, None in evaluation. None: it is told nothing.
        predict: Returns the denoiser's prediction (B, C, h, w), or (B, 2C, h, w) with a learned variance, of
            `(modules, params, sample, timesteps, condition, dropout)`: sample (B, C, h, w), timesteps (B,).
        losses: Returns the losses of each example, (B,) by name, of `(modules, params, batch, dropout)`, dropout as of
            `condition`: `loss` is trained, and others are logged. None: the `loss` of `losses.denoising_loss`.
    """

    classes: Mapping[str, Any]
    condition: Callable[..., Any] = _no_condition
    predict: Callable[..., jax.Array] = _no_denoiser
    losses: Callable[[Modules, Params, Batch, jax.Array | None], dict[str, jax.Array]] | None = None


FAMILIES: Registry[Family] = Registry("family", ["flax_diffusion.jax_backend.families"], GROUP)
"""All families, by the name of the one in `core.families`."""


def class_of(kind: str) -> Any:
    """Return the Flax module of a PyTorch class, by the latter's name."""
    return next(family.classes[kind] for family in FAMILIES.values() if kind in family.classes)
