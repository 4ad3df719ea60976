"""Outputs of the pipelines."""

from __future__ import annotations

from typing import Any

import flax.struct
import numpy as np

from flax_diffusion.models.outputs import ModelOutput


@flax.struct.dataclass
class FlaxImagePipelineOutput(ModelOutput):
    """Output of a pipeline.

    Attributes:
        images: Pictures in [0, 1], float32 (N, H, W, 3); (D, B, H, W, 3) for inputs of D devices.
    """

    images: np.ndarray


@flax.struct.dataclass
class FlaxStableDiffusionPipelineOutput(ModelOutput):
    """Output of the pipelines of Stable Diffusion 1.x and 2.x.

    Attributes:
        images: Pictures in [0, 1], float32 (N, H, W, 3); (D, B, H, W, 3) for inputs of D devices.
        nsfw_content_detected: One boolean for each picture, which is black where it is True; False where the pipeline
            has no safety checker.
    """

    images: np.ndarray
    nsfw_content_detected: Any


@flax.struct.dataclass
class FlaxStableDiffusionXLPipelineOutput(ModelOutput):
    """Output of the pipeline of Stable Diffusion XL.

    Attributes:
        images: Pictures in [0, 1], float32 (N, H, W, 3), or latents (N, C, h, w); (D, B, …) for inputs of D devices.
    """

    images: np.ndarray
