"""Opening of a set of training images, wherever it is stored."""

from pathlib import Path

import numpy as np

from flax_diffusion.core.data.sources.source import (
    DEFAULT_IMAGE_COLUMN,
    ArraySource,
    ExtraImages,
    Labels,
    Source,
    require_column,
)
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.io.files import as_path

SHAPE_COLUMN = "conditioning_image"
"""The digits' column of their coarse shapes."""
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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
    extra: ExtraImages | None = None,
    stream_shards: int | None = None,
) -> Source:
    """Open a set of training images and check everything that can be checked without decoding a picture.

    Args:
        dataset_name: `digits` (scikit-learn's 1,797 scans of 8x8 pixels, offline), a local folder, `imagefolder`
            (the folder is `train_data_dir`), or the id of a dataset on the Hugging Face Hub.
        dataset_config_name: Configuration of a Hub dataset, or of a local copy of one, if it has several.
        train_data_dir: Folder of images, folder of Parquet files, or Parquet file; see `folders.open_folder`.
        image_column: Column of the picture in Parquet and Hub datasets.
        caption_column: Column of the caption, a text or a list of texts; None trains without captions.
        max_train_samples: Number of examples to take, from the first; None for all.
        cache_dir: Folder for Hub downloads and unpacked Parquet; None for the usual cache folders.
        split: Split to take, of a Hub dataset or of a folder that has several (see `splits.of_split`).
        extra: Place of the second picture of each example; None for one picture each. The digits' column
            `conditioning_image` is their coarse shape (see `coarse_shape`).
        stream_shards: Number of tar or Parquet shards that are read at a time, so that not all are on this machine;
            None for all.

    Returns:
        The source, with at least one record, in an order that is the same in every run.

    Raises:
        DataError: If neither or both of the places are named, or nothing usable is found there.
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
        from flax_diffusion.core.data.sources.folders import open_folder

        return open_folder(
            as_path(train_data_dir),
            image_column=image_column,
            caption_column=caption_column,
            max_samples=max_train_samples,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            config_name=dataset_config_name,
            split=split,
            extra=extra,
            stream_shards=stream_shards,
        )
    if stream_shards is not None:
        raise DataError(f"--stream_shards {stream_shards}: {dataset_name} is not in shards; drop it")
    if dataset_name is None:
        raise DataError("no training data named; give --dataset_name or --train_data_dir")
    if dataset_name == "digits":
        return _digits(caption_column is not None, max_train_samples, extra)
    from flax_diffusion.core.data.sources.hub import open_hub

    return open_hub(
        dataset_name,
        config_name=dataset_config_name,
        image_column=image_column,
        caption_column=caption_column,
        max_samples=max_train_samples,
        cache_dir=cache_dir,
        split=split,
        extra=extra,
    )


def coarse_shape(digits: np.ndarray) -> np.ndarray:
    """Return the coarse shape of digits: cells of 2 x 2 pixels, white where at least half of their area is ink.

    Args:
        digits: The digits, uint8 (N, 8, 8).

    Returns:
        The shapes, uint8 (N, 8, 8), of 0 and 255.
    """
    cells = digits.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))
    return np.where(cells >= 127.5, 255, 0).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)


def _digits(with_captions: bool, max_samples: int | None, extra: ExtraImages | None) -> ArraySource:
    from sklearn.datasets import load_digits

    digits: object = load_digits()
    scans, labels = digits["data"], digits["target"]  # type: ignore[index]  # a Bunch
    # Ink 0..16 becomes grey 0..255. Only 8 falls half-way (127.5); rint takes the even neighbour, 128.
    images = np.rint(scans.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)[:max_samples]
    captions = [f"a handwritten {DIGIT_WORDS[label]}" for label in labels[:max_samples]]
    if extra is not None:
        extra.refuse_folder("digits")
        require_column(extra.column, [SHAPE_COLUMN], option=extra.option, where="digits")
    extras = None if extra is None else coarse_shape(images)
    classes = Labels([DIGIT_WORDS[label] for label in labels[:max_samples]], DIGIT_WORDS)
    return ArraySource(images, captions if with_captions else None, "digits", extras, classes)
