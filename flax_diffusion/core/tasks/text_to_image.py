"""Training on images with captions: `train text_to_image`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from flax_diffusion.core.config.defaults import with_defaults
from flax_diffusion.core.config.options import Reads
from flax_diffusion.core.families.family import ModelClass
from flax_diffusion.core.spec.pipeline import Component
from flax_diffusion.core.tasks.dataset import CaptionsConfig, CaptionsTask, stand_in
from flax_diffusion.core.tasks.parts import from_scratch
from flax_diffusion.core.tasks.task import TASKS
from flax_diffusion.core.tasks.text import LoraConfig, LoraTask


@with_defaults(image_interpolation_mode="lanczos", output_dir="sd-model-finetuned")
class TextToImageConfig(LoraConfig, CaptionsConfig):
    """Images from captions: `train text_to_image`. Fine-tunes Stable Diffusion 1.x and 2.x, or starts from scratch."""

    text_encoder: Annotated[dict[str, Any] | str | None, Reads.MODEL] = Field(
        None,
        description="From scratch: config of the CLIP text encoder, as a mapping, or the folder or .json file with it.",
    )

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


class TextToImageTask(CaptionsTask[TextToImageConfig], LoraTask[TextToImageConfig]):
    """Training of Stable Diffusion on pictures with captions."""

    name = "text_to_image"
    config_class = TextToImageConfig

    def __init__(self, config: TextToImageConfig):
        super().__init__(config)
        self.makes_tokenizer = not (config.pretrained_model_name_or_path or config.tokenizer_name)

    @classmethod
    def stand_ins(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options that name data, for a plan, which reads none but captions that make a tokenizer."""
        return stand_in(given) if given.get("pretrained_model_name_or_path") else {}

    def read_models(self, models: Mapping[str, ModelClass]) -> dict[str, Component]:
        """Read the configs of the text encoders and the denoiser, of a pipeline or of the options."""
        if self.config.pretrained_model_name_or_path:
            return super().read_models(models)
        given = {name: getattr(self.config, name) for name in ("text_encoder", "unet")}
        return {name: from_scratch(value, f"--{name}", models[name]) for name, value in given.items()}


TASKS.register(TextToImageTask.name, TextToImageTask)
