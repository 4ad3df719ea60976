"""Images of one kind from noise alone: `train unconditional`."""

from __future__ import annotations

from pydantic import Field

from flax_diffusion.core.config.options import DatasetConfig, DiffusionConfig, LrScheduler, also


class UnconditionalConfig(DiffusionConfig, DatasetConfig):
    """Images from noise alone: `train unconditional`."""

    lr_scheduler: LrScheduler = Field("cosine", description="Shape of the rate over the run.")
    adam_beta1: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the first moment.")
    adam_weight_decay: float = Field(1e-6, ge=0, description="AdamW's decoupled weight decay.")
    ema_warmup: bool = Field(True, description="Decay 1-(1+n/inv_gamma)^-power instead of (1+n)/(10+n).")
    validation_epochs: int | None = Field(
        10,
        ge=1,
        validation_alias=also("validation_epochs", "save_images_epochs"),
        description="Sample a grid every so many epochs, and at the end. None: only at the end.",
    )
    validation_num_inference_steps: int = Field(
        1000,
        ge=1,
        validation_alias=also("validation_num_inference_steps", "ddpm_num_inference_steps"),
        description="Denoising steps of those samples.",
    )
    save_model_epochs: int | None = Field(10, ge=1, description="Write the pipeline every so many epochs.")
