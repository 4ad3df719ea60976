"""Images that follow a text: `train text_to_image`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from flax_diffusion.core.config.options import DatasetConfig, Interpolation, LoraConfig


class TextToImageConfig(LoraConfig, DatasetConfig):
    """Images from captions: `train text_to_image`. Fine-tunes Stable Diffusion 1.x and 2.x, or starts from scratch."""

    text_encoder: dict[str, Any] | str | None = Field(
        None, description="From scratch: the CLIP text config, as a mapping or the folder or .json file that holds it."
    )
    caption_column: str = Field("text", description="Column that holds the captions.")
    proportion_empty_prompts: float = Field(
        0.0, ge=0, le=1, description="Share of captions replaced by the empty one, which guidance needs."
    )
    image_interpolation_mode: Interpolation = Field("lanczos", description="Filter that resizes.")
    output_dir: str = Field("sd-model-finetuned", description="Folder of the run.")

    @model_validator(mode="after")
    def _check_text(self) -> TextToImageConfig:
        scratch = self.pretrained_model_name_or_path is None
        if scratch and (self.unet is None or self.text_encoder is None):
            raise ValueError(
                "nothing to train: give --pretrained_model_name_or_path, or --unet and --text_encoder to start from "
                "scratch"
            )
        if scratch and self.vae == "pretrained":
            raise ValueError("--vae pretrained needs --pretrained_model_name_or_path: give a VAE's folder, or null")
        if scratch and not self.train_text_encoder:
            raise ValueError("a text encoder made from scratch must train: add --train_text_encoder")
        if not scratch and self.text_encoder is not None:
            raise ValueError("--text_encoder is for training from scratch: drop it or --pretrained_model_name_or_path")
        return self
