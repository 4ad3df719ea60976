"""Pipelines with the calls of Diffusers' Flax classes: `from_pretrained` gives the pipeline and its parameters."""

from flax_diffusion.pipelines.outputs import (
    FlaxImagePipelineOutput,
    FlaxStableDiffusionPipelineOutput,
    FlaxStableDiffusionXLPipelineOutput,
)
from flax_diffusion.pipelines.pipeline import FlaxDiffusionPipeline
from flax_diffusion.pipelines.stable_diffusion import FlaxStableDiffusionPipeline
from flax_diffusion.pipelines.stable_diffusion_controlnet import FlaxStableDiffusionControlNetPipeline
from flax_diffusion.pipelines.stable_diffusion_img2img import FlaxStableDiffusionImg2ImgPipeline
from flax_diffusion.pipelines.stable_diffusion_inpaint import FlaxStableDiffusionInpaintPipeline
from flax_diffusion.pipelines.stable_diffusion_xl import FlaxStableDiffusionXLPipeline

__all__ = [
    "FlaxDiffusionPipeline",
    "FlaxImagePipelineOutput",
    "FlaxStableDiffusionControlNetPipeline",
    "FlaxStableDiffusionImg2ImgPipeline",
    "FlaxStableDiffusionInpaintPipeline",
    "FlaxStableDiffusionPipeline",
    "FlaxStableDiffusionPipelineOutput",
    "FlaxStableDiffusionXLPipeline",
    "FlaxStableDiffusionXLPipelineOutput",
]
