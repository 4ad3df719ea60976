"""Real pictures, or pictures that were drawn before, as batches of one size."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from flax_diffusion.core.data.extra import no_draw
from flax_diffusion.core.data.images.decoding import decode, size_of
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import DataError, naming
from flax_diffusion.core.io.files import as_path

_THREADS = 16  # which read and decode


def open_pictures(name: str, option: str) -> Source:
    """Open a folder of pictures, a Parquet file or folder, or scikit-learn's digits.

    Args:
        name: The folder, the file, or `digits`.
        option: Name of the option that gives it, for messages.

    Raises:
        DataError: If there is no such thing, or nothing usable in it.
    """
    if name != "digits" and not as_path(name).exists():
        raise DataError(f"{option} {name}: does not exist; give a folder of pictures")
    with naming(option):
        return open_source(dataset_name="digits", caption_column=None) if name == "digits" else _folder(name)


def _folder(name: str) -> Source:
    return open_source(train_data_dir=name, caption_column=None)


def size_of_first(source: Source) -> tuple[int, int]:
    """Return height and width of the first picture, in pixels.

    Raises:
        DataError: If it cannot be read.
    """
    width, height = size_of(source[0])
    return height, width


def batches(
    source: Source,
    size: tuple[int, int],
    channels: Literal[1, 3],
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"],
    batch_size: int,
    *,
    resize: bool = True,
    count: int | None = None,
) -> Iterator[np.ndarray]:
    """Yield the pictures, scaled until they just cover a size and cut out at the centre.

    Args:
        source: The pictures.
        size: Height and width, pixels.
        channels: 1 for grey, 3 for RGB.
        interpolation: Filter that resizes.
        batch_size: Number of pictures in a batch.
        resize: Whether pictures of another size are taken; otherwise they are an error.
        count: Number of pictures to take, from the first; None for all.

    Yields:
        Pictures, uint8 (B, H, W, channels), in the order of the source.

    Raises:
        DataError: If a picture cannot be read, or has another size where that is an error.
    """
    transform = ImageTransform(resolution=size[0], size=size, interpolation=interpolation, center_crop=True)

    def read(index: int) -> np.ndarray:
        record = source[index]
        image = decode(record)
        if not resize and image.size != (size[1], size[0]):
            raise DataError(
                f"{record.name} has {image.width}x{image.height} pixels, the first picture {size[1]}x{size[0]}: give "
                "--resolution, to which all are scaled and cut"
            )
        place = transform.place(image.size, no_draw)
        return transform.cut(image, place, channels=channels, interpolation=interpolation).reshape(*size, channels)

    total = len(source) if count is None else count
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures") as pool:
        for first in range(0, total, batch_size):
            yield np.stack([*pool.map(read, range(first, min(first + batch_size, total)))])
