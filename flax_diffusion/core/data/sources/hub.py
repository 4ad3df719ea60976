"""Datasets of the Hugging Face Hub, loaded with its `datasets` library."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.config import DOWNLOADED_DATASETS_PATH, HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE

from flax_diffusion.core.data.sources.labels import named
from flax_diffusion.core.data.sources.source import (
    DEFAULT_IMAGE_COLUMN,
    DEFAULT_LABEL_COLUMN,
    ExtraImages,
    Labels,
    Record,
    require_column,
    whole_caption,
)
from flax_diffusion.core.errors import DataError

_CACHES = (HF_DATASETS_CACHE, DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)


@dataclass(frozen=True)
class HubSource:
    """Rows of a Hub dataset; the pictures stay encoded until they are decoded for training."""

    dataset: datasets.Dataset = field(repr=False)
    name: str
    image_column: str
    caption_column: str | None
    folders: tuple[Path, ...] | None = field(default=(), repr=False)  # rows may name files only in these; None: in any
    extra_column: str | None = None  # column of the second picture
    whole: datasets.Dataset | None = field(default=None, repr=False)  # the rows with all columns

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        row: dict[str, Any] = self.dataset[index]
        name = f"{self.name}[{index}]"
        image = self._image(row[self.image_column], name, "image")
        caption = None if self.caption_column is None else row[self.caption_column]
        extra = None
        if self.extra_column is not None:
            extra_name = f"{name} {self.extra_column}"
            extra = Record(self._image(row[self.extra_column], name, self.extra_column), None, extra_name)
        return Record(image, whole_caption(caption, name), name, extra=extra)

    def labels(self, column: str | None) -> Labels:
        """Return the classes of the rows, by the names that the dataset has for them.

        Args:
            column: The column, of numbers or texts; None for `label`.

        Raises:
            DataError: If there is no such column, or a row has no class.
        """
        table = self.dataset if self.whole is None else self.whole
        column = column or DEFAULT_LABEL_COLUMN
        require_column(column, table.column_names, option="label_column", where=f"dataset {self.name}")
        values = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        return named(values, getattr(table.features[column], "names", None), f"dataset {self.name}")

    def _image(self, image: Any, name: str, what: str) -> bytes | Path:
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise DataError(f"{name} holds no {what}; use another dataset, or skip bad images", name)
        return self._inside(image["path"], name) if image["bytes"] is None else image["bytes"]

    def _inside(self, path: str, name: str) -> Path:
        where = Path(os.path.abspath(path))
        if self.folders is not None and not any(where.is_relative_to(folder) for folder in self.folders):
            raise DataError(
                f"{name} is the file {path}, which was not downloaded with the dataset; use another dataset", name
            )
        return where


def open_hub(
    name: str,
    *,
    config_name: str | None = None,
    image_column: str = DEFAULT_IMAGE_COLUMN,
    caption_column: str | None = "text",
    max_samples: int | None = None,
    cache_dir: str | Path | None = None,
    split: str = "train",
    extra: ExtraImages | None = None,
) -> HubSource:
    """Open a dataset, downloaded or from the cache, and check its columns.

    Args:
        name: Id of the dataset.
        config_name: Configuration of the dataset, if it has several.
        image_column: Column of the picture.
        caption_column: Column of the caption, a text or a list of texts; None for no captions.
        max_samples: Number of rows to take, from the first; None for all.
        cache_dir: Folder for downloads; None for the library's own.
        split: Split to take.
        extra: Column of the second picture of each example; None for one picture each.

    Returns:
        The source.

    Raises:
        DataError: If the dataset cannot be loaded, or columns or captions are missing.
    """
    try:
        dataset = datasets.load_dataset(
            name, config_name, split=split, cache_dir=None if cache_dir is None else str(cache_dir)
        )
    except Exception as error:  # the library raises errors of its network, file-system and parsing layers
        raise DataError(
            f"dataset {name} (split {split}) cannot be loaded ({type(error).__name__}: {error}); check the id, the "
            "split and the network, or give a local folder with --train_data_dir"
        ) from error
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"dataset {name}, split {split} is not a table of rows; name one split")
    if len(dataset) == 0:
        raise DataError(f"dataset {name}, split {split} holds no rows; take another split")
    downloads = tuple(Path(os.path.abspath(folder)) for folder in (*_CACHES, cache_dir) if folder is not None)
    return of_table(
        dataset,
        name,
        image_column=image_column,
        caption_column=caption_column,
        max_samples=max_samples,
        extra=extra,
        folders=downloads,
    )


def of_table(
    dataset: datasets.Dataset,
    name: str,
    *,
    image_column: str = DEFAULT_IMAGE_COLUMN,
    caption_column: str | None = "text",
    max_samples: int | None = None,
    extra: ExtraImages | None = None,
    folders: tuple[Path, ...] | None = None,
) -> HubSource:
    """Take the rows of a table as examples, and check its columns.

    Args:
        dataset: The table, with at least one row.
        name: Its name, for messages.
        image_column: Column of the picture.
        caption_column: Column of the caption, a text or a list of texts; None for no captions.
        max_samples: Number of rows to take, from the first; None for all.
        extra: Column of the second picture of each example; None for one picture each.
        folders: Folders in which the files of pictures may lie; None for any.

    Returns:
        The source.

    Raises:
        DataError: If columns or captions are missing.
    """
    columns = {"image_column": image_column} | ({} if caption_column is None else {"caption_column": caption_column})
    if extra is not None:
        extra.refuse_folder(f"dataset {name}")
        columns[extra.option] = extra.column
    for option, column in columns.items():
        likely = [one for one in dataset.column_names if option == "image_column" or one != image_column]
        require_column(column, dataset.column_names, option=option, where=f"dataset {name}", likely=likely)
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    whole, dataset = dataset, dataset.select_columns(list(dict.fromkeys(columns.values())))
    pictures = {"image_column": image_column} | ({} if extra is None else {extra.option: extra.column})
    _check_types(dataset, name, pictures, caption_column)
    for column in pictures.values():
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    extra_column = None if extra is None else extra.column
    return HubSource(dataset, name, image_column, caption_column, folders, extra_column, whole)


def _check_types(dataset: datasets.Dataset, name: str, pictures: dict[str, str], caption_column: str | None) -> None:
    for option, column in pictures.items():
        kind = dataset.features[column]
        if not isinstance(kind, datasets.Image) and getattr(kind, "dtype", None) not in ("string", "binary"):
            raise DataError(f"--{option} {column} of dataset {name} is {kind}; it must hold images")
    if caption_column is None:
        return
    kind = dataset.features[caption_column]
    if getattr(getattr(kind, "feature", kind), "dtype", None) not in ("string", "large_string"):
        raise DataError(
            f"--caption_column {caption_column} of dataset {name} is {kind}; it must be text or a list of texts"
        )
    missing = dataset.data.column(caption_column).null_count
    if missing:
        raise DataError(f"{missing} rows of dataset {name} have no {caption_column}; use another caption_column")
