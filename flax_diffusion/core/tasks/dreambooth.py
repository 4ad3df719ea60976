"""Training on a new thing from a few of its pictures: `train dreambooth`."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flax_diffusion.core.backend import Backend, shared_folder
from flax_diffusion.core.config.defaults import with_defaults
from flax_diffusion.core.config.options import EXAMPLES, Reads
from flax_diffusion.core.data.check import check_source
from flax_diffusion.core.data.combined import CombinedSource, PairedSource, open_uncaptioned
from flax_diffusion.core.data.sources.folders import FolderSource, image_files
from flax_diffusion.core.data.sources.given import Examples, open_examples
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.display import console
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.io.files import as_path, is_local, lies_in
from flax_diffusion.core.io.sheets import save_picture, to_pillow
from flax_diffusion.core.tasks.common.dataset import is_given
from flax_diffusion.core.tasks.common.text import LoraConfig, LoraTask
from flax_diffusion.core.tasks.task import TASKS

log = logging.getLogger(__name__)


class Concept(BaseModel):
    """One new thing for DreamBooth to learn, and the class that it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instance_data_dir: Annotated[str, Reads.DATA_FOLDER]  # folder of pictures of the new thing
    instance_prompt: str  # "a photo of sks dog"
    class_data_dir: Annotated[str | None, Reads.DATA_FOLDER] = None  # of its class; what is missing is drawn
    class_prompt: str | None = None  # "a photo of dog"
    repeats: Annotated[int, Field(ge=1)] = 1  # times that each picture occurs in an epoch


@with_defaults(num_train_epochs=1, validation_steps=100, checkpoint_models=True, output_dir="dreambooth-model")
class DreamBoothConfig(LoraConfig):
    """A new thing from a few of its pictures: `train dreambooth`."""

    instance_data_dir: Annotated[str | None, Reads.DATA_FOLDER] = Field(
        None, description="Folder of pictures of the new thing."
    )
    instance_prompt: str | None = Field(None, description="Prompt with the new thing, such as 'a photo of sks dog'.")
    with_prior_preservation: bool = Field(
        False, description="Train on pictures of the class too, so that the model does not forget how it looks."
    )
    class_data_dir: Annotated[str | None, Reads.DATA_FOLDER] = Field(
        None, description="Folder of pictures of the class. The model draws those that it lacks."
    )
    class_prompt: str | None = Field(None, description="Prompt that names the class, such as 'a photo of dog'.")
    num_class_images: int = Field(100, ge=1, description="Number of pictures of each class.")
    prior_loss_weight: float = Field(1.0, ge=0, description="Weight of the class pictures' loss.")
    sample_batch_size: int = Field(4, ge=1, description="Class pictures that each device draws at a time.")
    class_num_inference_steps: int = Field(50, ge=1, description="Denoising steps of the class pictures.")
    class_guidance_scale: float = Field(7.5, ge=0, description="Guidance scale of the class pictures.")
    repeats: int = Field(1, ge=1, description="Times that each picture of the new thing occurs in an epoch.")
    concepts: list[Concept] = Field(
        [], description="Several concepts at once: a list of mappings with the options of one concept, and repeats."
    )
    train_batch_size: int = Field(
        4,
        ge=1,
        description="Images of the new thing per device in one forward pass. As many of the class are added to them.",
    )
    learning_rate: float = Field(5e-6, gt=0, description="Peak learning rate. Where LoRA trains, the default is 5e-4.")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_lora(cls, values: Any) -> Any:
        if isinstance(values, dict) and any(values.get(name) is not None for name in ("lora_rank", "rank")):
            return {"learning_rate": 5e-4} | values
        return values

    @property
    def all_concepts(self) -> list[Concept]:
        """The concepts, whether there is one or a list."""
        if self.concepts:
            return self.concepts
        return [
            Concept(
                instance_data_dir=str(self.instance_data_dir),
                instance_prompt=str(self.instance_prompt),
                class_data_dir=self.class_data_dir,
                class_prompt=self.class_prompt,
                repeats=self.repeats,
            )
        ]

    @model_validator(mode="after")
    def _check_concepts(self) -> DreamBoothConfig:
        if self.pretrained_model_name_or_path is None:
            raise ValueError("dreambooth starts from a model: give --pretrained_model_name_or_path")
        single = {
            "instance_data_dir": self.instance_data_dir,
            "instance_prompt": self.instance_prompt,
            "class_data_dir": self.class_data_dir,
            "class_prompt": self.class_prompt,
        }
        given = [name for name, value in single.items() if value is not None]
        if self.concepts and given:
            raise ValueError(f"--{given[0]} and concepts exclude each other: put it into the list, or drop the list")
        if self.concepts and self.repeats != 1:
            raise ValueError("--repeats and concepts exclude each other: give each concept its own, in the list")
        if not self.concepts:
            for name in ("instance_data_dir", "instance_prompt"):
                if not single[name]:
                    raise ValueError(f"dreambooth needs --{name}, or a list of concepts")
        for concept in self.all_concepts:
            missing = [name for name in ("class_data_dir", "class_prompt") if not getattr(concept, name)]
            if self.with_prior_preservation and missing:
                raise ValueError(f"--with_prior_preservation needs --{missing[0]} for '{concept.instance_prompt}'")
            if not self.with_prior_preservation and len(missing) < 2:
                raise ValueError(
                    f"--class_data_dir and --class_prompt go with --with_prior_preservation: add it, or drop them for "
                    f"'{concept.instance_prompt}'"
                )
            if concept.class_prompt == concept.instance_prompt:
                raise ValueError(
                    f"'{concept.instance_prompt}' names both the new thing and its class: put a rare word into "
                    "--instance_prompt, as in 'a photo of sks dog'"
                )
        return self


class DreamBoothTask(LoraTask[DreamBoothConfig]):
    """Training of Stable Diffusion on pictures of new things, and on pictures of their classes if requested."""

    name = "dreambooth"
    config_class = DreamBoothConfig
    data_options = ("instance_data_dir",)

    def __init__(self, config: DreamBoothConfig):
        super().__init__(config)
        self.rows_per_example = 2 if config.with_prior_preservation else 1

    @classmethod
    def stand_ins(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options that name data, for a plan, which reads none."""
        if given.get("concepts"):
            return {}
        named = {"instance_data_dir": ".", "instance_prompt": "a photo of it"}
        if str(given.get("with_prior_preservation", False)).lower() not in ("false", "no", "off", "0"):
            named |= {"class_data_dir": ".", "class_prompt": "a photo"}
        return named

    def open_source(self) -> Source:
        """Open the pictures of the new things; those of the classes may still have to be drawn."""
        source = _open_instances(self.config, self.examples)
        if self.config.with_prior_preservation:
            check_class_images(self.config)
        return source

    def count_examples(self, source: Source) -> int:
        """Return the examples per epoch: of pairs, those of the longer side."""
        if not self.config.with_prior_preservation:
            return len(source)
        repeats = sum(concept.repeats for concept in self.config.all_concepts)
        return max(len(source), self.config.num_class_images * repeats)

    def complete_source(self, source: Source, backend: Backend) -> Source:
        """Draw the pictures of the classes that are missing, and pair them with the others."""
        if not self.config.with_prior_preservation:
            return source
        draw_missing(self.config, backend)
        return _open_pairs(self.config, source)

    @property
    def prompts(self) -> dict[str, list[str]]:
        """Prompts among the options, by option."""
        concepts, inside = self.config.all_concepts, "concepts." if self.config.concepts else ""
        return {
            f"{inside}instance_prompt": [concept.instance_prompt for concept in concepts],
            f"{inside}class_prompt": [concept.class_prompt for concept in concepts if concept.class_prompt],
        } | super().prompts

    def trained_prompts(self, source: Source) -> list[str]:
        """Return the prompts of the new things."""
        return list(dict.fromkeys(concept.instance_prompt for concept in self.config.all_concepts))


TASKS.register(DreamBoothTask.name, DreamBoothTask)


def _open_instances(config: DreamBoothConfig, examples: Examples | None) -> CombinedSource:
    """Open the pictures of the new things, or take those of one thing that Python gives.

    Raises:
        ConfigError: If the options say that Python gives examples, and it gives none.
        DataError: If a folder is missing or holds none, or lies in that of another thing.
    """
    concepts = config.all_concepts
    if is_given(config.instance_data_dir, examples):
        assert examples is not None
        pictures = open_examples(examples, caption_column=None, num_workers=config.dataloader_num_workers)
        return CombinedSource([pictures], [str(config.instance_prompt)], [config.repeats])
    for one, other in itertools.permutations(concepts, 2):
        inner, outer = one.instance_data_dir, other.instance_data_dir
        if lies_in(inner, outer) and one.instance_prompt != other.instance_prompt:
            raise DataError(
                f"--instance_data_dir {inner} of '{one.instance_prompt}' lies in {outer} of '{other.instance_prompt}', "
                "whose pictures it would become; name folders apart from each other"
            )
    return CombinedSource(
        [
            open_uncaptioned(option, concept.instance_data_dir)
            for option, concept in zip(_options(config, "instance"), concepts, strict=True)
        ],
        [concept.instance_prompt for concept in concepts],
        [concept.repeats for concept in concepts],
    )


def _options(config: DreamBoothConfig, whose: str) -> list[str]:
    """Return the name of each concept's folder option, for messages."""
    if not config.concepts:
        return [f"--{whose}_data_dir"]
    return [f"--concepts.{number}.{whose}_data_dir" for number in range(len(config.concepts))]


def _open_pairs(config: DreamBoothConfig, instances: Source) -> PairedSource:
    """Pair the pictures with those of their classes, of which each folder must hold enough by now."""
    concepts, most = config.all_concepts, config.num_class_images
    classes = CombinedSource(
        [
            open_uncaptioned(option, c.class_data_dir, most)
            for option, c in zip(_options(config, "class"), concepts, strict=True)
        ],
        [str(concept.class_prompt) for concept in concepts],
        [concept.repeats for concept in concepts],
    )
    return PairedSource(instances, classes, config.prior_loss_weight)


def _missing(concept: Concept, wanted: int) -> int:
    """Count the pictures that a concept's class folder lacks, and make the folder if it does not exist.

    Args:
        concept: The concept.
        wanted: Number of pictures that the folder must hold.

    Raises:
        DataError: If the folder cannot be made, or lacks pictures and cannot be written.
    """
    folder = as_path(str(concept.class_data_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--class_data_dir {folder}: cannot be made ({error.strerror}); name another") from error
    have = len(image_files(folder))
    if have < wanted and is_local(folder) and not os.access(folder, os.W_OK):
        raise DataError(
            f"--class_data_dir {folder}: holds {have} of {wanted} pictures and cannot be written; make it writable, or "
            f"give --num_class_images {have}"
        )
    return max(0, wanted - have)


def check_class_images(config: DreamBoothConfig) -> None:
    """Make sure, before the start, that class folders can be filled and that their pictures can be used.

    Args:
        config: The run's options.

    Raises:
        DataError: If a folder cannot be made or written, as in `check_source`, or if the folders of two things overlap.
    """
    _check_apart(config)
    for concept in config.all_concepts:
        _missing(concept, config.num_class_images)
        folder = as_path(str(concept.class_data_dir))
        pictures = FolderSource(folder, image_files(folder)[: config.num_class_images], None)
        if len(pictures):
            check_source(pictures, skip_bad_images=config.skip_bad_images)


def _check_apart(config: DreamBoothConfig) -> None:
    concepts = config.all_concepts
    for one in concepts:
        classes = str(one.class_data_dir)
        for other in concepts:
            things = other.instance_data_dir
            if things != EXAMPLES and (lies_in(classes, things) or lies_in(things, classes)):
                raise DataError(
                    f"--class_data_dir {classes} and --instance_data_dir {things}: one lies in the other, so that "
                    "pictures of the class would be trained as the new thing; name folders apart from each other"
                )
            theirs = str(other.class_data_dir)
            shared = lies_in(theirs, classes) and one.class_prompt == other.class_prompt  # of two things of one class
            if lies_in(classes, theirs) and not shared:
                raise DataError(
                    f"--class_data_dir {classes} of '{one.class_prompt}' lies in {theirs} of "
                    f"'{other.class_prompt}', which would mix the two; name a folder for each class"
                )


def draw_missing(config: DreamBoothConfig, backend: Backend) -> None:
    """Draw the missing pictures of every class folder, up to `num_class_images`; earlier pictures stay.

    Args:
        config: The run's options.
        backend: The backend, with the weights that the run starts from.
    """
    batch_size = config.sample_batch_size * backend.device_count
    for concept in config.all_concepts:
        folder = as_path(str(concept.class_data_dir))
        shared_folder(folder, backend, "class_data_dir")
        short = _missing(concept, config.num_class_images)
        have = config.num_class_images - short
        if not short:
            continue
        main = backend.process_index == 0
        if main:
            log.info("drawing %d pictures of '%s' into %s", short, concept.class_prompt, folder)
        with console.current().counting("drawing pictures of the class", short, "pictures") as add:
            while have < config.num_class_images:
                # Every batch is whole, so that one program is compiled. The seed depends on the number of pictures, so
                # that a run that was interrupted draws no picture twice.
                images = backend.sample(
                    prompts=[str(concept.class_prompt)],
                    num_images=batch_size,
                    num_inference_steps=config.class_num_inference_steps,
                    guidance_scale=config.class_guidance_scale,
                    seed=(config.seed + have) % 2**32,
                    batch_size=batch_size,
                )[: config.num_class_images - have]
                if main:
                    for image in images:
                        save_picture(to_pillow(image), _unused_name(folder))
                have += len(images)
                add(len(images))
        backend.all_processes(True)  # no process reads the folder before it is full


def _unused_name(folder: Path) -> Path:
    names = (folder / f"class-{number:05d}.png" for number in itertools.count())
    return next(path for path in names if not path.exists())
