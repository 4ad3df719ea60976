"""Models in Flax Linen, with the names, config keys and parameter names of their PyTorch counterparts."""

from flax_diffusion.models.autoencoder_kl import FlaxAutoencoderKL
from flax_diffusion.models.clip_text import FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection
from flax_diffusion.models.controlnet import FlaxControlNetModel
from flax_diffusion.models.modeling import PretrainedModel as FlaxModelMixin
from flax_diffusion.models.outputs import (
    FlaxAutoencoderKLOutput,
    FlaxControlNetOutput,
    FlaxDecoderOutput,
    FlaxDiagonalGaussianDistribution,
    FlaxUNet2DConditionOutput,
    FlaxUNet2DOutput,
)
from flax_diffusion.models.unet_2d import FlaxUNet2DModel
from flax_diffusion.models.unet_2d_condition import FlaxUNet2DConditionModel

__all__ = [
    "FlaxAutoencoderKL",
    "FlaxAutoencoderKLOutput",
    "FlaxCLIPTextModel",
    "FlaxCLIPTextModelWithProjection",
    "FlaxControlNetModel",
    "FlaxControlNetOutput",
    "FlaxDecoderOutput",
    "FlaxDiagonalGaussianDistribution",
    "FlaxModelMixin",
    "FlaxUNet2DConditionModel",
    "FlaxUNet2DConditionOutput",
    "FlaxUNet2DModel",
    "FlaxUNet2DOutput",
]
