"""Options of tasks that train on a dataset, and opening of the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from flax_diffusion.core.config.options import Reads, TrainConfig
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import naming


class DatasetConfig(TrainConfig):
    """Options of tasks that train on a dataset."""

    dataset_name: Annotated[str | None, Reads.DATA] = Field(
        None, description="Dataset id on the Hub, or the built-in `digits`."
    )
    dataset_config_name: str | None = Field(None, description="Configuration of that dataset.")
    train_data_dir: Annotated[str | None, Reads.DATA_FOLDER] = Field(
        None, description="Folder of images (with metadata.jsonl/.csv, .txt captions or none) or of .parquet files."
    )
    image_column: str = Field("image", description="Column that holds the images.")
    max_train_samples: int | None = Field(None, ge=1, description="Use only the first so many examples.")
    cache_dir: str | None = Field(None, description="Folder for downloads from the Hub.")

    @model_validator(mode="after")
    def _check_data(self) -> DatasetConfig:
        if not self.dataset_name and not self.train_data_dir:
            raise ValueError("no data: give --dataset_name (a Hub id or `digits`) or --train_data_dir (a folder)")
        if self.dataset_name and self.dataset_name != "imagefolder" and self.train_data_dir:
            raise ValueError("--dataset_name and --train_data_dir exclude each other: drop one")
        return self


def open_dataset(config: DatasetConfig, caption_column: str | None = None) -> Source:
    """Open the dataset that the options name.

    Args:
        config: The options.
        caption_column: Column that holds the captions; None for pictures without.

    Raises:
        DataError: If it cannot be used.
    """
    with naming("--train_data_dir" if config.train_data_dir else "--dataset_name"):
        return open_source(
            dataset_name=config.dataset_name,
            dataset_config_name=config.dataset_config_name,
            train_data_dir=config.train_data_dir,
            image_column=config.image_column,
            caption_column=caption_column,
            max_train_samples=config.max_train_samples,
            cache_dir=config.cache_dir,
        )


def stand_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an option that names a dataset, for a plan, which reads none.

    Args:
        given: The given options.
    """
    return {} if given.get("dataset_name") else {"train_data_dir": "."}
