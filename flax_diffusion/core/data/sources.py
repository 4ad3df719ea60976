"""Where training images come from: one random-access, picklable interface over folders, Parquet, the Hub, digits."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from flax_diffusion.core.errors import DataError
from flax_diffusion.core.files import as_path

DEFAULT_IMAGE_COLUMN = "image"
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, slots=True)
class Record:
    """One example as stored: the picture is not decoded yet."""

    image: bytes | Path | Image.Image | np.ndarray  # encoded file, path of one, decoded, or uint8 (H, W[, 3 or 4])
    caption: str | list[str] | None
    name: str  # for messages
    weight: float = 1.0  # of its loss


class Source(Protocol):
    """Random access to records. Picklable, and cheap to open again in a worker process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@dataclass(frozen=True)
class ArraySource:
    """Pictures held in memory."""

    images: np.ndarray = field(repr=False)  # uint8 (N, H, W[, 3])
    captions: list[str] | None = field(repr=False)
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        caption = None if self.captions is None else self.captions[index]
        return Record(self.images[index], caption, f"{self.name}[{index}]")


def open_source(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | Path | None = None,
    image_column: str = DEFAULT_IMAGE_COLUMN,
    caption_column: str | None = "text",
    max_train_samples: int | None = None,
    cache_dir: str | Path | None = None,
    split: str = "train",
) -> Source:
    """Open a set of training images, and find now whatever can be found wrong without decoding a picture.

    Args:
        dataset_name: `digits` (scikit-learn's 1,797 scans of 8x8 pixels, offline), a local folder, `imagefolder`
            (the folder is `train_data_dir`), or the id of a dataset on the Hugging Face Hub.
        dataset_config_name: configuration of a Hub dataset, or of a copy of one, that has several.
        train_data_dir: folder of images, or folder or file of Parquet; see `folders.open_folder`.
        image_column: column of the picture in Parquet and Hub datasets.
        caption_column: column of the caption, a string or a list of them; None trains without captions.
        max_train_samples: use only that many, the first ones.
        cache_dir: where Hub downloads and unpacked Parquet are kept; None for the library's own place.
        split: of a Hub dataset; in a folder, the subfolder of that name where all images lie in subfolders.

    Returns:
        The source, of at least one record, in an order that does not change from run to run.

    Raises:
        DataError: neither or both places named, or nothing usable found there.
    """
    if dataset_name == "imagefolder":
        if train_data_dir is None:
            raise DataError("--dataset_name imagefolder needs --train_data_dir, the folder of images")
        dataset_name = None
    elif dataset_name is not None and train_data_dir is not None:
        raise DataError(
            f"--dataset_name {dataset_name} and --train_data_dir {train_data_dir} exclude each other: drop one"
        )
    if dataset_name is not None and dataset_name != "digits" and as_path(dataset_name).is_dir():
        dataset_name, train_data_dir = None, dataset_name
    if dataset_config_name is not None and dataset_name == "digits":
        raise DataError(f"--dataset_config_name {dataset_config_name}: the digits have one only; leave it out")
    if max_train_samples is not None and max_train_samples < 1:
        raise DataError(f"--max_train_samples {max_train_samples}: must be 1 or more, or left out for all")

    if train_data_dir is not None:
        from flax_diffusion.core.data.folders import open_folder

        return open_folder(
            as_path(train_data_dir),
            image_column=image_column,
            caption_column=caption_column,
            max_samples=max_train_samples,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            config_name=dataset_config_name,
            split=split,
        )
    if dataset_name is None:
        raise DataError("no training data named; give --dataset_name or --train_data_dir")
    if dataset_name == "digits":
        return _digits(caption_column is not None, max_train_samples)
    from flax_diffusion.core.data.hub import open_hub

    return open_hub(
        dataset_name,
        config_name=dataset_config_name,
        image_column=image_column,
        caption_column=caption_column,
        max_samples=max_train_samples,
        cache_dir=cache_dir,
        split=split,
    )


def require_column(
    column: str, columns: Iterable[str], *, option: str, where: str, likely: Sequence[str] | None = None
) -> None:
    """Refuse a column that is not there.

    Args:
        column: asked for.
        columns: that there are.
        option: by which it was asked for.
        where: file or dataset, for the message.
        likely: of them, those that may have been meant; None for all.

    Raises:
        DataError: naming the columns there are, and the option with the one that was meant, if that can be told.
    """
    columns = list(columns)
    if column in columns:
        return
    likely = columns if likely is None else likely
    match = likely if len(likely) == 1 else difflib.get_close_matches(column, likely, n=1)
    fix = f"give --{option} {match[0]}" if match else f"give one of them as --{option}"
    raise DataError(f"--{option} is {column}, but {where} has the columns {', '.join(columns) or '(none)'}; {fix}")


def whole_caption(caption: str | list[str | None] | None, name: str) -> str | list[str] | None:
    """Refuse a list of captions that is empty, or has an empty place.

    Args:
        caption: of a row; None for data without captions.
        name: of the row, for the message.

    Returns:
        The caption as it is.

    Raises:
        DataError: naming the row.
    """
    if caption is None or isinstance(caption, str):
        return caption
    texts = [one for one in caption if one is not None]
    if not texts:
        raise DataError(f"{name} has no caption; give it one or remove it", name)
    if len(texts) < len(caption):
        raise DataError(f"{name} has a null among its captions; remove it", name)
    return texts


def first_few(names: list[str]) -> str:
    """Join the first three names for a message."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _digits(with_captions: bool, max_samples: int | None) -> ArraySource:
    from sklearn.datasets import load_digits

    digits: object = load_digits()
    scans, labels = digits["data"], digits["target"]  # type: ignore[index]  # a Bunch
    # Ink 0..16 to grey 0..255. Only 8 falls half-way (127.5); rint takes the even neighbour, 128.
    images = np.rint(scans.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)[:max_samples]
    captions = [f"a handwritten {DIGIT_WORDS[label]}" for label in labels[:max_samples]]
    return ArraySource(images, captions if with_captions else None, "digits")
