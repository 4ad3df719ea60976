"""The tasks: each one's options, over what it shares with the others."""

from __future__ import annotations

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.tasks.autoencoder import AutoencoderConfig
from flax_diffusion.core.tasks.dreambooth import DreamBoothConfig
from flax_diffusion.core.tasks.text_to_image import TextToImageConfig
from flax_diffusion.core.tasks.textual_inversion import TextualInversionConfig
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig

TASKS: dict[str, type[TrainConfig]] = {
    "unconditional": UnconditionalConfig,
    "text_to_image": TextToImageConfig,
    "dreambooth": DreamBoothConfig,
    "textual_inversion": TextualInversionConfig,
    "autoencoder": AutoencoderConfig,
}
