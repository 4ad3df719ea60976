"""Pictures from prompts, by Stable Diffusion XL, with a ControlNet or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from flax_diffusion.core.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from torch_backend.families.family import FAMILIES, Batch, Family
from torch_backend.families.stable_diffusion import CLASSES, Condition, beside_text, predict


def condition(modules: Any, batch: Batch) -> Condition:
    """Return what the UNet is told: both text encoders' last hidden states but one, and the second's projection.

    Args:
        modules: The pipeline's modules.
        batch: input_ids and input_ids_2, each (B, L), or text_embeddings (B, L, D) and pooled_embeddings (B, D') that
            were made before; time_ids (B, 6); and what `beside_text` needs.

    Reference:
        Podell et al., https://arxiv.org/abs/2307.01952, section 2.1; StableDiffusionXLPipeline of Diffusers.
    """
    told = beside_text(modules, batch)
    if "input_ids" not in batch:
        return told | {name: batch[name] for name in STABLE_DIFFUSION_XL.prompt_arrays}
    first = modules.by_name["text_encoder"](batch["input_ids"], output_hidden_states=True)
    second = modules.by_name["text_encoder_2"](batch["input_ids_2"], output_hidden_states=True)
    pooled = second.text_embeds
    if first.last_hidden_state.requires_grad:
        pooled = pooled + _zero_of(first.last_hidden_state)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return told | {"text_embeddings": states, "pooled_embeddings": pooled}


def _zero_of(unused: Tensor) -> Tensor:
    """Return zero, a scalar, that gives zero gradients to all that a tensor was computed from.

    Nothing else reaches the first text encoder's last layer. DDP and FSDP wait for a gradient of each weight, and AdamW
    decays only weights that have one, where JAX's decays all.
    """
    return unused.masked_fill(torch.ones_like(unused, dtype=torch.bool), 0).sum()


FAMILIES.register(
    STABLE_DIFFUSION_XL.name,
    Family(
        classes=CLASSES | {"CLIPTextModelWithProjection": CLIPTextModelWithProjection},
        condition=condition,
        predict=predict,
    ),
)
