"""What becomes of the second picture of an example: what a ControlNet follows, or a mask."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.images.transforms import ImageTransform, Placement, scale_to_unit
from flax_diffusion.core.data.sources.source import Record
from flax_diffusion.core.errors import DataError, naming
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.randomness.streams import Stream

CONDITIONING_IMAGE = "conditioning_pixel_values"
"""Array of a batch with the pictures that a ControlNet follows, float32 (B, 3, H, W) in [0, 1]."""


class MakeExtra(Protocol):
    """Function that makes the arrays of an example's second picture. Picklable."""

    def __call__(
        self, record: Record, transform: ImageTransform, place: Placement, rng: Callable[[Stream], np.random.Generator]
    ) -> dict[str, np.ndarray]:
        """Make the arrays.

        Args:
            record: The record, with its second picture.
            transform: Transform of the first picture.
            place: Part of the first picture that is used; that of the second is the same.
            rng: Function that returns the example's generator of a stream.

        Raises:
            DataError: If there is no second picture, or it cannot be decoded.
        """
        ...


@dataclass(frozen=True)
class ConditioningImage:
    """Maker of the picture that a ControlNet follows: RGB, in 0..1."""

    def __call__(
        self, record: Record, transform: ImageTransform, place: Placement, rng: Callable[[Stream], np.random.Generator]
    ) -> dict[str, np.ndarray]:
        """Return `conditioning_pixel_values`, float32 (3, resolution, resolution) in [0, 1]; see `MakeExtra`."""
        image = decode(second_of(record))
        pixels = transform.cut(image, place, channels=3, interpolation=transform.interpolation)
        return {CONDITIONING_IMAGE: scale_to_unit(pixels)}


def conditioning_images(option: str, names: Sequence[str], transform: ImageTransform) -> np.ndarray:
    """Read pictures for a ControlNet to follow in samples; of each the centre is cut out.

    Args:
        option: Option that names them, for messages.
        names: Paths of the files.
        transform: Transform of the training pictures.

    Returns:
        The pictures, float32 (N, 3, resolution, resolution) in [0, 1].

    Raises:
        DataError: If one cannot be read.
    """
    return np.stack([scale_to_unit(_centre(option, name, transform, channels=3)) for name in names])


def _centre(option: str, name: str, transform: ImageTransform, *, channels: int) -> np.ndarray:
    """Return the resized centre of a picture file, uint8 (resolution, resolution[, 3])."""
    path = as_path(name)
    if not path.is_file():
        raise DataError(f"{option} {name}: does not exist; give a picture")
    with naming(option):
        image = decode(Record(path, None, name))
    place = replace(transform, center_crop=True, random_flip=False).place(image.size, no_draw)
    return transform.cut(image, place, channels=channels, interpolation=transform.interpolation)


def no_draw(stream: Stream) -> np.random.Generator:
    """Raise AssertionError, where nothing may depend on the random numbers of a stream."""
    raise AssertionError(f"{stream.name} is drawn, so that a picture has more than one form")


def second_of(record: Record) -> Record:
    """Return a record's second picture.

    Raises:
        DataError: If there is none.
    """
    if record.extra is None:
        raise DataError(f"{record.name} has no second picture; give it one or remove it")
    return record.extra
