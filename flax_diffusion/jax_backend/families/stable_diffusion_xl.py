"""Pictures from prompts, by Stable Diffusion XL, with a ControlNet or without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from flax_diffusion.core.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from flax_diffusion.jax_backend.families.family import FAMILIES, Batch, Family, Params
from flax_diffusion.jax_backend.families.stable_diffusion import CLASSES, Condition, beside_text, predict
from flax_diffusion.models import FlaxCLIPTextModelWithProjectionModule

if TYPE_CHECKING:
    from jaxtyping import Array, Key


def condition(modules: Any, params: Params, batch: Batch, dropout: Key[Array, ""] | None = None) -> Condition:
    """Return what the UNet is told: both text encoders' last hidden states but one, and the second's projection.

    Args:
        modules: The pipeline's modules.
        params: Weights of all components.
        batch: input_ids and input_ids_2, each (B, L), or text_embeddings (B, L, D) and pooled_embeddings (B, D') that
            were made before; time_ids (B, 6); and what `beside_text` needs.
        dropout: Key of the dropout masks; None in evaluation.

    Reference:
        Podell et al., https://arxiv.org/abs/2307.01952, section 2.1; StableDiffusionXLPipeline of Diffusers.
    """
    told = beside_text(modules, params, batch)
    if "input_ids" not in batch:
        return told | {name: batch[name] for name in STABLE_DIFFUSION_XL.prompt_arrays}
    first = modules.call("text_encoder", params, dropout, batch["input_ids"], output_hidden_states=True)
    second = modules.call("text_encoder_2", params, dropout, batch["input_ids_2"], output_hidden_states=True)
    states = jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], axis=-1)
    return told | {"text_embeddings": states, "pooled_embeddings": second.text_embeds}


FAMILIES.register(
    STABLE_DIFFUSION_XL.name,
    Family(
        classes=CLASSES | {"CLIPTextModelWithProjection": FlaxCLIPTextModelWithProjectionModule},
        condition=condition,
        predict=predict,
    ),
)
