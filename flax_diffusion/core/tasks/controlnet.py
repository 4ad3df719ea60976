"""Training of a ControlNet, by which pictures follow other pictures: `train controlnet`.

Reference: Zhang et al., https://arxiv.org/abs/2302.05543.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import DTypeLike
from pydantic import Field, model_validator

from flax_diffusion.core.config.defaults import with_defaults
from flax_diffusion.core.config.options import Reads, also
from flax_diffusion.core.config.prompt_file import Prompt
from flax_diffusion.core.data.batches import ExampleFn, Precomputed
from flax_diffusion.core.data.extra import CONDITIONING_IMAGE, ConditioningImage, conditioning_images
from flax_diffusion.core.data.sources.source import ExtraImages, Source
from flax_diffusion.core.errors import ConfigError, naming
from flax_diffusion.core.families import folders
from flax_diffusion.core.families.family import ModelClass, Role, family_of
from flax_diffusion.core.families.stable_diffusion import CONTROLNET, control_config
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training, read_component
from flax_diffusion.core.tasks.common.dataset import CaptionsConfig, CaptionsTask, stand_in
from flax_diffusion.core.tasks.common.text import PREVIEWED, variant_of
from flax_diffusion.core.tasks.parts import check_part, pretrained, vae_factor
from flax_diffusion.core.tasks.task import TASKS, Preview

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@with_defaults(
    num_train_epochs=1,
    train_batch_size=4,
    learning_rate=5e-6,
    center_crop=True,
    validation_steps=100,
    output_dir="controlnet-model",
)
class ControlNetConfig(CaptionsConfig):
    """Pictures that follow other pictures, such as edges or poses: `train controlnet`."""

    controlnet_model_name_or_path: Annotated[str | None, Reads.MODEL] = Field(
        None,
        description="Folder or Hub id of a ControlNet to go on with. None: that of the pipeline, or a new one, which "
        "starts as a copy of the UNet's first half.",
    )
    controlnet_revision: str | None = Field(None, description="Branch, tag or commit of that Hub id.")
    conditioning_image_column: str = Field(
        "conditioning_image",
        description="Column that holds the pictures to follow. In metadata.jsonl and metadata.csv it, or "
        "<column>_file_name, names their files.",
    )
    conditioning_data_dir: Annotated[str | None, Reads.DATA_FOLDER] = Field(
        None, description="Folder of the pictures to follow, with the names of the others. None: the column has them."
    )
    validation_images: list[str] = Field(
        [],
        validation_alias=also("validation_images", "validation_image"),
        description="Pictures that the validation prompts follow: one for each prompt, or one for all. One prompt may "
        "have several.",
    )

    @model_validator(mode="after")
    def _check_control(self) -> ControlNetConfig:
        if self.pretrained_model_name_or_path is None:
            raise ValueError("controlnet starts from a model: give --pretrained_model_name_or_path")
        if self.controlnet_revision is not None and self.controlnet_model_name_or_path is None:
            raise ValueError("--controlnet_revision goes with --controlnet_model_name_or_path: add it, or drop it")
        if "{timestamp}" in self.output_dir:
            raise ValueError(f"--output_dir {self.output_dir}: a run that can be resumed has one name: write it out")
        if self.validation_prompts_file is None:
            check_counts(len(self.validation_images), len(self.validation_prompts), "validation_prompts")
        return self


def check_counts(images: int, prompts: int, option: str) -> None:
    """Raise ValueError unless prompts and the pictures that they follow are as many, or one of either.

    Args:
        images: Number of the pictures.
        prompts: Number of the prompts.
        option: Name of their option, for the message.
    """
    if (images == 0) != (prompts == 0) or (images != prompts and 1 not in (images, prompts)):
        raise ValueError(
            f"--validation_images are {images} and --{option} are {prompts}: give as many of both, or one of either "
            "for all of the others"
        )


class ControlNetTask(CaptionsTask[ControlNetConfig]):
    """Training of a ControlNet beside a pipeline that stays as it is."""

    name = "controlnet"
    config_class = ControlNetConfig
    roles = CaptionsTask.roles | {Role.CONTROL}
    previews_of_one_size = True

    @classmethod
    def stand_ins(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options that name data, for a plan, which reads none."""
        return stand_in(given)

    @property
    def extra_images(self) -> ExtraImages:
        """Place of the picture that each example follows."""
        config = self.config
        return ExtraImages(
            column=config.conditioning_image_column,
            folder=None if config.conditioning_data_dir is None else as_path(config.conditioning_data_dir),
            option="conditioning_image_column",
            folder_option="conditioning_data_dir",
        )

    def make_example_fn(
        self, spec: PipelineSpec, made: Precomputed | None = None, dtype: DTypeLike = np.float32
    ) -> ExampleFn:
        """Return what makes an example, with the picture that it follows."""
        return replace(super().make_example_fn(spec, made, dtype), extra=ConditioningImage())

    def checked(self, spec: PipelineSpec) -> PipelineSpec:
        """Return a pipeline that can be trained with the options, and that can draw their prompts."""
        for option, prompts in super().prompts.items():
            try:
                check_counts(len(self.config.validation_images), len(prompts), option)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        return super().checked(spec)

    def kind_of(self, found: str) -> str:
        """Return the class of pipelines with a ControlNet, whatever the pretrained one is."""
        return variant_of(found, "control", "a ControlNet")

    def read_models(self, models: Mapping[str, ModelClass]) -> dict[str, Component]:
        """Read the configs of the text encoder and the UNet, which do not train."""
        frozen = {name: model for name, model in models.items() if model.role is not Role.CONTROL}
        return {name: replace(part, training=Training.NOTHING) for name, part in super().read_models(frozen).items()}

    def pipeline(
        self, kind: str, components: dict[str, Component], tokenizers: Mapping[str, CLIPTokenizer] | None = None
    ) -> PipelineSpec:
        """Put a pipeline together, with its ControlNet, and check that its parts go with one another."""
        name = next(name for name, model in family_of(kind).pipelines[kind].parts.items() if model is CONTROLNET)
        return super().pipeline(kind, components | {name: self._control(name, components)}, tokenizers)

    def _control(self, name: str, components: dict[str, Component]) -> Component:
        config, given = self.config, self.config.controlnet_model_name_or_path
        if given:
            option = "--controlnet_model_name_or_path"
            check_part(given, option, name)
            with naming(option):
                folder = model_files.resolve(given, None, config.controlnet_revision, allow_patterns=["*.json"])
            return read_component(folder, CONTROLNET.name, given, None, config.controlnet_revision, None, Training.ALL)
        index = folders.read_index(str(config.pretrained_model_name_or_path), config.revision)
        if folders.has_part(index, name):
            return pretrained(config, name, CONTROLNET, train=True)
        unet = next(part for part in components.values() if part.role is Role.DENOISER)
        vae = next((part for part in components.values() if part.role is Role.AUTOENCODER), None)
        values = control_config(unet, vae_factor(vae))
        return Component(kind=CONTROLNET.name, config=values, training=Training.ALL, copied_from=unet)

    def make_preview(self, spec: PipelineSpec, source: Source) -> Preview | None:
        """Draw pictures of the validation prompts, or of the first captions, each following its picture."""
        prompts, images = self.validation_prompts, self.config.validation_images
        if not prompts:
            return self._of_examples(spec, source)
        count = max(len(prompts), len(images))
        prompts, images = prompts * (count // len(prompts)), images * (count // len(images))
        size = (self.config.resolution, self.config.resolution)
        extra = {CONDITIONING_IMAGE: conditioning_images("--validation_images", images, size)}
        return self.preview_of(prompts, extra)

    def _of_examples(self, spec: PipelineSpec, source: Source) -> Preview | None:
        """Draw pictures of the first examples' captions, each following its example's picture."""
        shown: dict[str, np.ndarray] = {}
        for index, example in islice(self.first_examples(spec, source), 2 * PREVIEWED):
            caption = source[index].caption
            text = caption if isinstance(caption, str) else (caption or [""])[0]
            shown.setdefault(text, example[CONDITIONING_IMAGE])
        if not shown:
            return None
        prompts = list(shown)[:PREVIEWED]
        extra = {CONDITIONING_IMAGE: np.stack([shown[prompt] for prompt in prompts])}
        return self.preview_of([Prompt(prompt=prompt) for prompt in prompts], extra)


TASKS.register(ControlNetTask.name, ControlNetTask)
