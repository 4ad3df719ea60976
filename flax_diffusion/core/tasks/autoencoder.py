"""Images to latents and back: `train autoencoder`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from flax_diffusion.core.config.options import DatasetConfig


class AutoencoderConfig(DatasetConfig):
    """Images to latents and back: `train autoencoder`. The result is the --vae of the other tasks."""

    vae: dict[str, Any] | str | None = Field(
        None, description="From scratch: the AutoencoderKL config, as a mapping or the folder or .json file of one."
    )
    rec_loss: Literal["l1", "l2"] = Field("l2", description="Reconstruction: absolute or squared error.")
    kl_scale: float = Field(1e-6, ge=0, description="Weight of the posterior's divergence from a normal one.")
    eval_batch_size: int = Field(16, ge=1, description="Pictures in the grid, each beside its reconstruction.")
    output_dir: str = Field("autoencoder-model", description="Folder of the run.")

    @model_validator(mode="after")
    def _check_autoencoder(self) -> AutoencoderConfig:
        if (self.vae is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError(
                "give one of --vae, the config of an AutoencoderKL to make, and --pretrained_model_name_or_path, a "
                "pipeline whose vae to go on with"
            )
        return self
