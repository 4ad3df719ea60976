"""Pictures from prompts: Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flax_diffusion.jax_backend.families.family import FAMILIES, Batch, Family, Params
from flax_diffusion.models import FlaxAutoencoderKL, FlaxCLIPTextModule, FlaxUNet2DConditionModel

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key, Num


def condition(
    modules: Any, params: Params, batch: Batch, dropout: Key[Array, ""] | None = None
) -> Float[Array, "B L D"]:
    """Return the text encoder's last hidden states (B, L, D), which the UNet attends to.

    Args:
        modules: The pipeline's modules.
        params: Weights of all components.
        batch: input_ids (B, L), or text_embeddings (B, L, D) that were made before.
        dropout: Key of the dropout masks; None in evaluation.
    """
    if "input_ids" not in batch:
        return batch["text_embeddings"]
    return modules.call("text_encoder", params, dropout, batch["input_ids"])[0]


def predict(
    modules: Any,
    params: Params,
    sample: Float[Array, "B C h w"],
    timesteps: Num[Array, " B"],
    condition: Float[Array, "B L D"],
    dropout: Key[Array, ""] | None = None,
) -> Float[Array, "B C h w"]:
    """Return the UNet's prediction (B, C, h, w) for noisy samples at timesteps (B,) and hidden states (B, L, D)."""
    return modules.call("unet", params, dropout, sample, timesteps, condition)[0]


FAMILIES.register(
    "stable_diffusion",
    Family(
        classes={
            "CLIPTextModel": FlaxCLIPTextModule,
            "UNet2DConditionModel": FlaxUNet2DConditionModel,
            "AutoencoderKL": FlaxAutoencoderKL,
        },
        condition=condition,
        predict=predict,
    ),
)
