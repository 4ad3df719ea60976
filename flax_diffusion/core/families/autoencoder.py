"""The AutoencoderKL by itself, and as a part of the other families."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import FiniteFloat

from flax_diffusion.core.families.family import FAMILIES, Family, ModelClass, PipelineClass, Role
from flax_diffusion.core.typed import Count, Size


class _AutoencoderKL:
    in_channels: Size = 3
    latent_channels: Size = 4
    block_out_channels: Sequence[Size] = (64,)
    layers_per_block: Count = 1
    scaling_factor: FiniteFloat = 0.18215


AUTOENCODER_KL = ModelClass(name="AutoencoderKL", role=Role.AUTOENCODER, schema=_AutoencoderKL)

AUTOENCODER = FAMILIES.register(
    "autoencoder", Family(name="autoencoder", pipelines={"AutoencoderKL": PipelineClass(parts={"vae": AUTOENCODER_KL})})
)
