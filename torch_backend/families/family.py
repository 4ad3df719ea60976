"""What a family of models computes: what a batch tells the denoiser, and how the denoiser is called.

The twin of `flax_diffusion.jax_backend.families.family`; shapes as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flax_diffusion.core.registry import Registry

if TYPE_CHECKING:
    from torch_backend.modules import Modules

GROUP = "flax_diffusion.torch_backend"

Batch = Mapping[str, Tensor]


def _no_condition(modules: Modules, batch: Batch) -> None:
    return None


def _no_denoiser(*_: Any) -> Tensor:
    raise TypeError("this family has no denoiser")


@dataclass(frozen=True, kw_only=True)
class Family:
    """The functions of a family.

    Attributes:
        classes: PyTorch classes by name.
        condition: Returns what the denoiser is told beside sample and time, of `(modules, batch)`: batch holds tensors
            (B, …) of the examples, or of prompts that are drawn. None: it is told nothing.
        predict: Returns the denoiser's prediction (B, C, h, w), or (B, 2C, h, w) with a learned variance, of
            `(modules, sample, timesteps, condition)`: sample (B, C, h, w), timesteps (B,).
        losses: Returns the losses of each example, (B,) by name, of `(modules, batch)`: `loss` is trained, and others
            are logged. None: the `loss` of `losses.denoising_loss`.
    """

    classes: Mapping[str, Any]
    condition: Callable[[Modules, Batch], Any] = _no_condition
    predict: Callable[..., Tensor] = _no_denoiser
    losses: Callable[[Modules, Batch], dict[str, Tensor]] | None = None


FAMILIES: Registry[Family] = Registry("family", ["torch_backend.families"], GROUP)
"""All families, by the name of the one in `core.families`."""


def class_of(kind: str) -> Any:
    """Return a PyTorch class by name."""
    return next(family.classes[kind] for family in FAMILIES.values() if kind in family.classes)
