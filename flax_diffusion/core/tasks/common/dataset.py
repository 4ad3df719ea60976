"""Options of tasks that train on a dataset, and opening of the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike
from pydantic import Field, field_validator, model_validator

from flax_diffusion.core.config.options import EXAMPLES, Reads, TrainConfig
from flax_diffusion.core.data.batches import ExampleFn, Precomputed
from flax_diffusion.core.data.combined import CombinedSource, folders_of
from flax_diffusion.core.data.sources.given import Examples, open_examples
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.data.sources.source import ExtraImages, Source
from flax_diffusion.core.errors import ConfigError, naming
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.common.text import PromptsConfig, TextTask


def joined(value: Any) -> Any:
    """Return the folders of a list, as a recipe may have them, as one text; anything else as it is."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return value
    for one in value:
        if "," in one:
            raise ValueError(f"{one}: a folder in a list has no comma in its name: rename it")
    return ",".join(value)


class ValidationConfig(TrainConfig):
    """Options of tasks that may have a folder of pictures for validation."""

    validation_data_dir: Annotated[str | None, Reads.DATA_FOLDERS] = Field(
        None, description="Folder of pictures to compute the loss on, as those of train_data_dir. Several likewise."
    )

    _join_validation = field_validator("validation_data_dir", mode="before")(joined)


class DatasetConfig(ValidationConfig):
    """Options of tasks that train on a dataset."""

    dataset_name: Annotated[str | None, Reads.DATA] = Field(
        None, description="Dataset id on the Hub, or the built-in `digits`."
    )
    dataset_config_name: str | None = Field(None, description="Configuration of that dataset.")
    train_data_dir: Annotated[str | None, Reads.DATA_FOLDERS] = Field(
        None,
        description="Folder of images (with metadata.jsonl/.csv, .txt captions or none), of .parquet files or of "
        "tar shards, also as shards/train-{0000..0127}.tar. Several: "
        "photos:10,drawings:2, where each picture of photos occurs ten times in an epoch.",
    )
    image_column: str = Field("image", description="Column that holds the images.")
    max_train_samples: int | None = Field(None, ge=1, description="Use only the first so many examples.")
    cache_dir: str | None = Field(
        None, description="Folder for downloads from the Hub, unpacked Parquet and indices of tar shards."
    )

    _join = field_validator("train_data_dir", mode="before")(joined)

    @property
    def other_data(self) -> str | None:
        """Place of data that stand in for a dataset; None for none."""
        return None

    @model_validator(mode="after")
    def _check_data(self) -> DatasetConfig:
        if not self.other_data and not self.dataset_name and not self.train_data_dir:
            raise ValueError("no data: give --dataset_name (a Hub id or `digits`) or --train_data_dir (a folder)")
        if self.dataset_name and self.dataset_name != "imagefolder" and self.train_data_dir:
            raise ValueError("--dataset_name and --train_data_dir exclude each other: drop one")
        return self


DATA_OPTIONS = ("dataset_name", "dataset_config_name", "train_data_dir")
"""Options of `DatasetConfig` that name its data; see `Task.data_options`."""


class CaptionsConfig(PromptsConfig, DatasetConfig):
    """Options of tasks that train on a dataset with captions."""

    caption_column: str = Field("text", description="Column that holds the captions.")
    proportion_empty_prompts: float = Field(
        0.0, ge=0, le=1, description="Share of the captions that are replaced by the empty one, which guidance needs."
    )


K = TypeVar("K", bound=CaptionsConfig, covariant=True)


class CaptionsTask(TextTask[K]):
    """Training on a dataset with captions."""

    checks_captions = True
    data_options = DATA_OPTIONS

    def __init__(self, config: K):
        super().__init__(config)
        self.embeds_prompts = config.pre_compute_text_embeddings
        self.precomputed_dtype = config.precomputed_dtype
        self.embeds_empty_prompt = config.proportion_empty_prompts > 0

    @property
    def extra_images(self) -> ExtraImages | None:
        """Place of the second picture of each example; None for one picture each."""
        return None

    def open_source(self) -> Source:
        """Open the dataset."""
        return open_dataset(self.config, self.config.caption_column, self.extra_images, examples=self.examples)

    def open_validation(self, source: Source) -> Source | None:
        """Open the dataset for validation, if there is one."""
        config = self.config
        if config.validation_data_dir is None:
            return None
        return open_dataset(config, config.caption_column, self.extra_images, validation=True)

    def make_example_fn(
        self, spec: PipelineSpec, made: Precomputed | None = None, dtype: DTypeLike = np.float32
    ) -> ExampleFn:
        """Return what makes an example; a share of the captions is left out."""
        share = self.config.proportion_empty_prompts
        return replace(super().make_example_fn(spec, made, dtype), proportion_empty_prompts=share)


def open_dataset(
    config: DatasetConfig,
    caption_column: str | None = None,
    extra: ExtraImages | None = None,
    *,
    stream_shards: int | None = None,
    validation: bool = False,
    examples: Examples | None = None,
) -> Source:
    """Open the dataset that the options name, or the one for validation, or take the examples that Python gives.

    Args:
        config: The options.
        caption_column: Column that holds the captions; None for pictures without.
        extra: Place of the second picture of each example; None for one picture each.
        stream_shards: Number of shards that are read at a time; None for all.
        validation: Whether to open that of --validation_data_dir.
        examples: Examples that Python gives; None for none.

    Raises:
        ConfigError: If the options say that Python gives examples, and it gives none.
        DataError: If it cannot be used.
    """
    if not validation and is_given(config.dataset_name, examples):
        assert examples is not None
        if stream_shards is not None:
            raise ConfigError(f"--stream_shards {stream_shards}: examples of train() are not in shards; drop it")
        return open_examples(
            examples,
            image_column=config.image_column,
            caption_column=caption_column,
            max_samples=config.max_train_samples,
            extra=extra,
            num_workers=config.dataloader_num_workers,
        )
    option, place = "--train_data_dir", config.train_data_dir
    if validation:
        option, place = "--validation_data_dir", config.validation_data_dir
        if extra is not None and extra.folder is not None:
            raise ConfigError(
                f"{option} {place}: --{extra.folder_option} has no pictures for these: use --validation_split, or put "
                f"them beside the others, in the column of --{extra.option}"
            )

    def opened(folder: str | None) -> Source:
        return open_source(
            dataset_name=None if validation else config.dataset_name,
            dataset_config_name=None if validation else config.dataset_config_name,
            train_data_dir=folder,
            image_column=config.image_column,
            caption_column=caption_column,
            max_train_samples=None if validation else config.max_train_samples,
            cache_dir=config.cache_dir,
            extra=extra,
            stream_shards=stream_shards,
        )

    if place is None:
        with naming("--dataset_name"):
            return opened(None)
    with naming(option):
        folders = folders_of(place)
    if stream_shards is not None and (len(folders) > 1 or folders[0].repeats is not None):
        raise ConfigError(f"--stream_shards {stream_shards} goes with one folder of shards: name one, without repeats")
    if len(folders) > 1 and not validation:
        _check_several(config, extra)
    with naming(option):
        sources = [opened(one.name) for one in folders]
    if len(folders) == 1 and folders[0].repeats is None:
        return sources[0]
    return CombinedSource(sources, [None] * len(sources), [one.repeats or 1 for one in folders])


def is_given(name: str | None, examples: Examples | None) -> bool:
    """Return whether the data of a run are examples that Python gives, and not what an option names.

    Args:
        name: Value of the option.
        examples: The examples; None for none.

    Raises:
        ConfigError: If the option says that Python gives examples, and it gives none.
    """
    if name == EXAMPLES and examples is None:
        raise ConfigError(
            "the data of this run are examples that train() was given in Python, and no option can name them: call "
            "train(TASK, CONFIG, examples=EXAMPLES) from Python, with the same examples to resume"
        )
    return name == EXAMPLES


def _check_several(config: DatasetConfig, extra: ExtraImages | None) -> None:
    """Raise ConfigError for options that have no meaning with several folders."""
    if config.max_train_samples is not None:
        raise ConfigError(
            f"--max_train_samples {config.max_train_samples} does not say of which of several folders: drop it, or "
            "name one folder"
        )
    if extra is not None and extra.folder is not None:
        raise ConfigError(
            f"--{extra.folder_option} {extra.folder} has one picture for each name, and several folders may share "
            f"names: put them beside the others, in the column of --{extra.option}"
        )


def stand_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an option that names a dataset, for a plan, which reads none.

    Args:
        given: The given options.
    """
    return {} if given.get("dataset_name") else {"train_data_dir": "."}
