"""Pictures of classes, by a transformer over patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flax_diffusion.core.data.batches import CLASS_LABELS
from flax_diffusion.core.families.dit import DIT
from flax_diffusion.jax_backend.families.family import FAMILIES, Batch, Family, Params
from flax_diffusion.models import FlaxAutoencoderKL, FlaxDiTTransformer2DModel

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key, Num


def condition(modules: Any, params: Params, batch: Batch, dropout: Key[Array, ""] | None = None) -> Int[Array, " B"]:
    """Return the class indices (B,) of a batch; a dropped label is the number of classes there."""
    return batch[CLASS_LABELS]


def predict(
    modules: Any,
    params: Params,
    sample: Float[Array, "B C h w"],
    timesteps: Num[Array, " B"],
    condition: Int[Array, " B"],
    dropout: Key[Array, ""] | None = None,
) -> Float[Array, "B c h w"]:
    """Return the transformer's prediction (B, C, h, w), or (B, 2C, h, w) where it learns the variance.

    Args:
        modules: The pipeline's modules.
        params: Weights of all components.
        sample: Noisy samples, (B, C, h, w).
        timesteps: Times, (B,).
        condition: Class indices, (B,).
        dropout: Key of the dropout masks; None in evaluation.
    """
    return modules.call("transformer", params, dropout, sample, timesteps, condition)[0]


FAMILIES.register(
    DIT.name,
    Family(
        classes={"DiTTransformer2DModel": FlaxDiTTransformer2DModel, "AutoencoderKL": FlaxAutoencoderKL},
        condition=condition,
        predict=predict,
    ),
)
