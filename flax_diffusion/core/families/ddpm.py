"""Pictures from noise alone, by a UNet2DModel: in pixels, or in the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.autoencoder import AUTOENCODER_KL
from flax_diffusion.core.families.family import FAMILIES, ClassTable, Family, ModelClass, PipelineClass, Role
from flax_diffusion.core.typed import Count, Size

if TYPE_CHECKING:
    from flax_diffusion.core.spec.pipeline import PipelineSpec


class _UNet2D:
    sample_size: Size | list[Size] | None = None
    in_channels: Size = 3
    out_channels: Size = 3
    block_out_channels: Sequence[Size] = (224, 448, 672, 896)
    down_block_types: Sequence[str] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    layers_per_block: Count | list[Count] = 2
    num_class_embeds: Size | None = None
    class_embed_type: str | None = None


UNET_2D = ModelClass(name="UNet2DModel", role=Role.DENOISER, schema=_UNet2D)

_PIXELS = {"unet": UNET_2D}


def _check(spec: PipelineSpec) -> None:
    """Raise ConfigError for a UNet that is told the class of a picture otherwise than by a table of classes."""
    kind = spec.denoiser["class_embed_type"]
    if kind is not None:
        raise ConfigError(
            f"UNet with class_embed_type {kind!r}: only a UNet with a table of classes can be told the class of a "
            "picture; leave class_embed_type out, and give num_class_embeds"
        )


DDPM = FAMILIES.register(
    "ddpm",
    Family(
        name="ddpm",
        class_table=ClassTable(key="num_class_embeds", counts_null=True),
        check=_check,
        check_drawing=_check,
        pipelines={
            "DDPMPipeline": PipelineClass(parts=_PIXELS, scheduler={"clip_sample": True}),
            "DDIMPipeline": PipelineClass(parts=_PIXELS),
            "PNDMPipeline": PipelineClass(parts=_PIXELS),
            "LDMPipeline": PipelineClass(parts=_PIXELS | {"vqvae": AUTOENCODER_KL}),
        },
    ),
)
