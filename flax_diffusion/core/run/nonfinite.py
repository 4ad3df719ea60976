"""Steps whose loss or gradient is not a number: how they are told, and what is said of them."""

from __future__ import annotations

import math

from flax_diffusion.core.backend import MIN_LOSS_SCALE


def is_finite(metrics: dict[str, float]) -> bool:
    """Return whether a step is finite.

    Under fp16 gradients overflow now and then, and the loss scale gets smaller; that is no failure unless it is at its
    smallest.
    """
    if metrics.get("loss_scale", MIN_LOSS_SCALE) > MIN_LOSS_SCALE:
        return math.isfinite(metrics["loss"])
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


def said(metrics: dict[str, float]) -> str:
    """Return the loss, the norm of the gradient and the scale of the loss as text."""
    return ", ".join(f"{name} {metrics[name]:g}" for name in ("loss", "grad_norm", "loss_scale") if name in metrics)
