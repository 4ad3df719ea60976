"""Training on images with captions: `train text_to_image`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import DTypeLike
from pydantic import Field, model_validator

from flax_diffusion.core.config.defaults import with_defaults
from flax_diffusion.core.config.options import Reads
from flax_diffusion.core.data.batches import ExampleFn, Precomputed
from flax_diffusion.core.data.extra import MASK, MASKED_NOISE, Mask
from flax_diffusion.core.data.sources.source import ExtraImages, Source
from flax_diffusion.core.errors import ConfigError, nearest
from flax_diffusion.core.families.family import FAMILIES, ModelClass, Role
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec
from flax_diffusion.core.tasks.common.dataset import CaptionsConfig, CaptionsTask, stand_in
from flax_diffusion.core.tasks.common.text import NEW_PIPELINE, LoraConfig, LoraTask, variant_of
from flax_diffusion.core.tasks.parts import from_scratch, inpainting
from flax_diffusion.core.tasks.task import TASKS, Preview

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@with_defaults(image_interpolation_mode="lanczos", output_dir="sd-model-finetuned")
class TextToImageConfig(LoraConfig, CaptionsConfig):
    """Images from captions: `train text_to_image`. Fine-tunes Stable Diffusion 1.x and 2.x, or starts from scratch."""

    text_encoder: Annotated[dict[str, Any] | str | None, Reads.MODEL] = Field(
        None,
        description="From scratch: config of the CLIP text encoder, as a mapping, or the folder or .json file with it.",
    )
    text_encoder_2: Annotated[dict[str, Any] | str | None, Reads.MODEL] = Field(
        None, description="From scratch: config of the second text encoder, of a pipeline that has one; likewise."
    )
    pipeline: str = Field(
        NEW_PIPELINE,
        description="From scratch: Diffusers class of the pipeline, StableDiffusionPipeline or "
        "StableDiffusionXLPipeline.",
    )

    inpainting: bool = Field(
        False,
        description="Train to fill in a part of each picture. A UNet that takes only the sample is widened by zeros.",
    )
    mask_column: str | None = Field(
        None,
        description="Column that holds the masks, whose light parts are filled in. In metadata.jsonl and metadata.csv "
        "it, or <column>_file_name, names their files. None: masks are drawn, unless there is a folder.",
    )
    mask_data_dir: Annotated[str | None, Reads.DATA_FOLDER] = Field(
        None, description="Folder of the masks, with the names of the pictures."
    )

    @model_validator(mode="after")
    def _check_inpainting(self) -> TextToImageConfig:
        for name in ("mask_column", "mask_data_dir"):
            if getattr(self, name) is not None and not self.inpainting:
                raise ValueError(f"--{name} goes with --inpainting: add it, or drop the former")
        if self.mask_column is not None and self.mask_data_dir is not None:
            raise ValueError("--mask_column and --mask_data_dir exclude each other: drop one")
        if self.inpainting and self.cache_latents:
            raise ValueError(
                "--inpainting encodes each picture anew, without what its mask hides: drop --cache_latents"
            )
        return self

    @model_validator(mode="after")
    def _check_text(self) -> TextToImageConfig:
        scratch = self.pretrained_model_name_or_path is None
        families = [family for family in FAMILIES.values() if family.has(Role.TEXT_ENCODER)]
        kinds = {kind: own for family in families for kind, own in family.new_pipelines.items()}
        if self.pipeline not in kinds:
            known = ", ".join(kinds)
            raise ValueError(f"--pipeline {self.pipeline}: must be one of {known}{nearest(self.pipeline, kinds)}")
        encoders = [*kinds[self.pipeline].tokenizers.values()]
        lacking = [name for name in ("unet", *encoders) if getattr(self, name, None) is None]
        if scratch and lacking:
            raise ValueError(
                f"nothing to train: give --pretrained_model_name_or_path, or --{' and --'.join(lacking)} to start from "
                "scratch"
            )
        if self.text_encoder_2 is not None and "text_encoder_2" not in encoders:
            raise ValueError(f"--text_encoder_2: a {self.pipeline} has one text encoder; drop it, or add --pipeline")
        if scratch and self.vae == "pretrained":
            raise ValueError("--vae pretrained needs --pretrained_model_name_or_path: give a VAE's folder, or null")
        if scratch and not self.train_text_encoder:
            raise ValueError("a text encoder made from scratch must train: add --train_text_encoder")
        for name in ("text_encoder", "text_encoder_2"):
            if not scratch and getattr(self, name) is not None:
                raise ValueError(f"--{name} is for training from scratch: drop it or --pretrained_model_name_or_path")
        if not scratch and self.pipeline != NEW_PIPELINE:
            raise ValueError("--pipeline is for training from scratch: drop it or --pretrained_model_name_or_path")
        return self


class TextToImageTask(CaptionsTask[TextToImageConfig], LoraTask[TextToImageConfig]):
    """Training of Stable Diffusion on pictures with captions."""

    name = "text_to_image"
    config_class = TextToImageConfig

    def __init__(self, config: TextToImageConfig):
        super().__init__(config)
        self.previews_of_one_size = config.inpainting
        self.makes_tokenizer = not (config.pretrained_model_name_or_path or config.tokenizer_name)

    @property
    def extra_images(self) -> ExtraImages | None:
        """Place of the mask of each example; None where there is none or it is drawn."""
        config = self.config
        if config.mask_column is None and config.mask_data_dir is None:
            return None
        return ExtraImages(
            column=config.mask_column or "mask",
            folder=None if config.mask_data_dir is None else as_path(config.mask_data_dir),
            option="mask_column",
            folder_option="mask_data_dir",
        )

    def make_example_fn(
        self, spec: PipelineSpec, made: Precomputed | None = None, dtype: DTypeLike = np.float32
    ) -> ExampleFn:
        """Return what makes an example, with its mask for inpainting."""
        make = super().make_example_fn(spec, made, dtype)
        if not self.config.inpainting:
            return make
        latents = spec.sample_shape if spec.vae else None
        return replace(make, extra=Mask(from_files=self.extra_images is not None, latents=latents))

    def kind_of(self, found: str) -> str:
        """Return the class of the pipeline to train."""
        if not self.config.inpainting:
            return super().kind_of(found)
        return variant_of(found, "inpainting", "--inpainting")

    def pipeline(
        self, kind: str, components: dict[str, Component], tokenizers: Mapping[str, CLIPTokenizer] | None = None
    ) -> PipelineSpec:
        """Put a pipeline together; for inpainting with a UNet that takes a mask.

        Raises:
            ConfigError: If its parts do not go together, or if LoRA would have to train a UNet that is not one yet.
        """
        if self.config.inpainting:
            widened = {n: inpainting(part) for n, part in components.items() if part.role is Role.DENOISER}
            if self.config.lora_rank is not None and any(components[name] != part for name, part in widened.items()):
                raise ConfigError(
                    "--inpainting with --lora_rank: LoRA does not train the UNet's first layer, to which a mask would "
                    "be new; give --pretrained_model_name_or_path of an inpainting model, or drop --lora_rank"
                )
            components = components | widened
        return super().pipeline(kind, components, tokenizers)

    def check_channels(self, denoiser: Component) -> None:
        """Raise ConfigError for a UNet that does not take what it is to be given."""
        given, channels = denoiser.channels
        if self.config.inpainting:
            if not denoiser.fills_in:
                raise ConfigError(
                    f"--inpainting: the UNet has in_channels {given} and out_channels {channels}, and must take "
                    f"{2 * channels + 1}, or {channels} to be widened; use another UNet"
                )
        elif denoiser.fills_in:
            raise ConfigError(
                f"UNet with in_channels {given} and out_channels {channels}: it fills in pictures; add --inpainting, "
                "or use a UNet that has both equal"
            )
        else:
            super().check_channels(denoiser)

    def make_preview(self, spec: PipelineSpec, source: Source) -> Preview | None:
        """Draw pictures of the validation prompts, for inpainting into the first pictures of the dataset."""
        if not self.config.inpainting:
            return super().make_preview(spec, source)
        prompts = self.previewed_prompts(source)
        examples = [example for _, example in islice(self.first_examples(spec, source), len(prompts))]
        if not examples:
            return None
        places = [place % len(examples) for place in range(len(prompts))]
        names = ("pixel_values", MASK, MASKED_NOISE) if spec.vae else ("pixel_values", MASK)
        extra = {name: np.stack([examples[place][name] for place in places]) for name in names}
        return self.preview_of(prompts, extra)

    @classmethod
    def stand_ins(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options that name data, for a plan, which reads none but captions that make a tokenizer."""
        return stand_in(given) if given.get("pretrained_model_name_or_path") else {}

    def read_models(self, models: Mapping[str, ModelClass]) -> dict[str, Component]:
        """Read the configs of the text encoders and the denoiser, of a pipeline or of the options."""
        if self.config.pretrained_model_name_or_path:
            return super().read_models(models)
        return {
            name: from_scratch(getattr(self.config, name), f"--{name}", model)
            for name, model in models.items()
            if model.role is not Role.AUTOENCODER
        }

    @property
    def new_pipeline(self) -> str:
        """Class of a pipeline from scratch, which options give."""
        return self.config.pipeline


TASKS.register(TextToImageTask.name, TextToImageTask)
