"""Train diffusion models with JAX and Flax on TPUs, in Hugging Face's formats.

The classes that Diffusers removed are importable from here; they load on first use, so that the command line answers
at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flax_diffusion._version import __version__

if TYPE_CHECKING:
    from flax_diffusion.models import (
        FlaxAutoencoderKL,
        FlaxCLIPModel,
        FlaxCLIPPreTrainedModel,
        FlaxCLIPTextModel,
        FlaxCLIPTextModelWithProjection,
        FlaxCLIPTextPreTrainedModel,
        FlaxCLIPVisionModel,
        FlaxCLIPVisionPreTrainedModel,
        FlaxControlNetModel,
        FlaxDiTTransformer2DModel,
        FlaxModelMixin,
        FlaxPreTrainedModel,
        FlaxStableDiffusionSafetyChecker,
        FlaxT5EncoderModel,
        FlaxT5PreTrainedModel,
        FlaxUNet2DConditionModel,
        FlaxUNet2DModel,
    )
    from flax_diffusion.pipelines import (
        FlaxDiffusionPipeline,
        FlaxStableDiffusionControlNetPipeline,
        FlaxStableDiffusionImg2ImgPipeline,
        FlaxStableDiffusionInpaintPipeline,
        FlaxStableDiffusionPipeline,
        FlaxStableDiffusionXLPipeline,
    )
    from flax_diffusion.schedulers import (
        FlaxDDIMScheduler,
        FlaxDDPMScheduler,
        FlaxDPMSolverMultistepScheduler,
        FlaxEDMDPMSolverMultistepScheduler,
        FlaxEDMEulerScheduler,
        FlaxEDMHeunScheduler,
        FlaxEulerDiscreteScheduler,
        FlaxFlowMatchEulerDiscreteScheduler,
        FlaxFlowMatchHeunDiscreteScheduler,
        FlaxFlowMatchSDEScheduler,
        FlaxKarrasDiffusionSchedulers,
        FlaxKarrasVeScheduler,
        FlaxLMSDiscreteScheduler,
        FlaxPNDMScheduler,
        FlaxSchedulerMixin,
        FlaxScoreSdeVeScheduler,
    )

__all__ = [
    "FlaxAutoencoderKL",
    "FlaxCLIPModel",
    "FlaxCLIPPreTrainedModel",
    "FlaxCLIPTextModel",
    "FlaxCLIPTextModelWithProjection",
    "FlaxCLIPTextPreTrainedModel",
    "FlaxCLIPVisionModel",
    "FlaxCLIPVisionPreTrainedModel",
    "FlaxControlNetModel",
    "FlaxDDIMScheduler",
    "FlaxDDPMScheduler",
    "FlaxDPMSolverMultistepScheduler",
    "FlaxDiTTransformer2DModel",
    "FlaxDiffusionPipeline",
    "FlaxEDMDPMSolverMultistepScheduler",
    "FlaxEDMEulerScheduler",
    "FlaxEDMHeunScheduler",
    "FlaxEulerDiscreteScheduler",
    "FlaxFlowMatchEulerDiscreteScheduler",
    "FlaxFlowMatchHeunDiscreteScheduler",
    "FlaxFlowMatchSDEScheduler",
    "FlaxKarrasDiffusionSchedulers",
    "FlaxKarrasVeScheduler",
    "FlaxLMSDiscreteScheduler",
    "FlaxModelMixin",
    "FlaxPNDMScheduler",
    "FlaxPreTrainedModel",
    "FlaxSchedulerMixin",
    "FlaxScoreSdeVeScheduler",
    "FlaxStableDiffusionControlNetPipeline",
    "FlaxStableDiffusionImg2ImgPipeline",
    "FlaxStableDiffusionInpaintPipeline",
    "FlaxStableDiffusionPipeline",
    "FlaxStableDiffusionSafetyChecker",
    "FlaxStableDiffusionXLPipeline",
    "FlaxT5EncoderModel",
    "FlaxT5PreTrainedModel",
    "FlaxUNet2DConditionModel",
    "FlaxUNet2DModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flax_diffusion' has no attribute {name!r}")
    module = "pipelines" if name.endswith("Pipeline") else "schedulers" if "Scheduler" in name else "models"
    return getattr(importlib.import_module(f"flax_diffusion.{module}"), name)


def __dir__() -> list[str]:
    return __all__
