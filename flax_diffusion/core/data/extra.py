"""What becomes of the second picture of an example: what a ControlNet follows, or a mask."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.images.transforms import (
    EightBit,
    ImageTransform,
    Placement,
    eight_bit,
    scale,
    scale_to_unit,
)
from flax_diffusion.core.data.sources.source import Record
from flax_diffusion.core.errors import DataError, naming
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.randomness.streams import Stream, example_rng

CONDITIONING_IMAGE = "conditioning_pixel_values"
"""Array of a batch with the pictures that a ControlNet follows, float32 (B, 3, H, W) in [0, 1]."""


MASK, MASKED_NOISE = "mask", "masked_latent_noise"
"""Arrays of a batch for inpainting: see `Mask`."""


class MakeExtra(Protocol):
    """Function that makes the arrays of an example's second picture. Picklable."""

    def __call__(
        self, record: Record, transform: ImageTransform, place: Placement, rng: Callable[[Stream], np.random.Generator]
    ) -> dict[str, np.ndarray | EightBit]:
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
    ) -> dict[str, np.ndarray | EightBit]:
        """Return `conditioning_pixel_values`, (3, H, W) in [0, 1] once it is scaled; see `MakeExtra`."""
        image = decode(second_of(record))
        pixels = transform.cut(image, place, channels=3, interpolation=transform.interpolation)
        return {CONDITIONING_IMAGE: eight_bit(pixels, unit=True)}


def conditioning_images(option: str, names: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """Read pictures for a ControlNet to follow in samples; of each the centre is cut out.

    Args:
        option: Option that names them, for messages.
        names: Paths of the files.
        size: Height and width of the samples, in pixels.

    Returns:
        The pictures, float32 (N, 3, height, width) in [0, 1].

    Raises:
        DataError: If one cannot be read.
    """
    return np.stack([scale_to_unit(np.asarray(_centre(_opened(option, name), size))) for name in names])


def images_to_draw_over(option: str, names: Sequence[str], size: tuple[int, int], channels: int) -> np.ndarray:
    """Read pictures that samples are drawn over; of each the centre is cut out.

    Args:
        option: Option that names them, for messages.
        names: Paths of the files.
        size: Height and width of the samples, in pixels.
        channels: 1 for grey pictures, 3 for RGB.

    Returns:
        The pictures, float32 (N, channels, height, width) in [-1, 1].

    Raises:
        DataError: If one cannot be read.
    """
    images = [_centre(_opened(option, name), size) for name in names]
    return np.stack([scale(np.asarray(image.convert("L") if channels == 1 else image)) for image in images])


def images_to_fill(
    names: Mapping[str, Sequence[str]], size: tuple[int, int], latents: tuple[int, int, int] | None, seed: int
) -> dict[str, np.ndarray]:
    """Read pictures to fill in, and their masks, for samples; of each the centre is cut out.

    Args:
        names: Paths of the pictures and of the masks, each by the option that names them, for messages.
        size: Height and width of the samples, in pixels.
        latents: Shape (C, h, w) of a sample's latents; None in pixel space.
        seed: Seed of the noise.

    Returns:
        `pixel_values`, float32 (N, 3, height, width) in [-1, 1]; `mask`, float32 (N, 1, height, width), 1 where to fill
        in and else 0; with latents, `masked_latent_noise`, float32 (N, C, h, w).

    Raises:
        DataError: If one cannot be read, or a mask is of another size than its picture.
    """
    (of_image, images), (of_mask, masks) = names.items()
    pixels, holes = [], []
    for image_name, mask_name in zip(images, masks, strict=True):
        image, mask = _opened(of_image, image_name), _opened(of_mask, mask_name)
        if image.size != mask.size:
            raise DataError(
                f"{of_mask} {mask_name}: is {mask.width}x{mask.height}, and {image_name} {image.width}x{image.height}; "
                "give both in one size"
            )
        pixels.append(scale(np.asarray(_centre(image, size))))
        holes.append(np.asarray(_centre(mask.convert("L"), size, Image.Resampling.NEAREST)) >= 128)
    arrays = {"pixel_values": np.stack(pixels), MASK: np.stack(holes)[:, None].astype(np.float32)}
    if latents is not None:
        rngs = [example_rng(seed, Stream.MASKED_LATENT, 0, place) for place in range(len(images))]
        arrays[MASKED_NOISE] = np.stack([rng.standard_normal(latents, dtype=np.float32) for rng in rngs])
    return arrays


def check_there(option: str, names: Sequence[str]) -> None:
    """Raise DataError for a picture that is not there.

    Args:
        option: Option that names them, for the message.
        names: Paths of the files.
    """
    for name in names:
        if not as_path(name).is_file():
            raise DataError(f"{option} {name}: does not exist; give a picture")


def _opened(option: str, name: str) -> Image.Image:
    """Return a picture that an option names."""
    check_there(option, [name])
    with naming(option):
        return decode(Record(as_path(name), None, name))


def _centre(
    image: Image.Image, size: tuple[int, int], resampling: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Return the largest centre of a picture that has the shape of (height, width), in that size."""
    return ImageOps.fit(image, (size[1], size[0]), resampling)


def no_draw(stream: Stream) -> np.random.Generator:
    """Raise AssertionError, where nothing may depend on the random numbers of a stream."""
    raise AssertionError(f"{stream.name} is drawn, so that a picture has more than one form")


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Maker of the mask of what an inpainting model fills in.

    Attributes:
        from_files: Whether the second picture is the mask, whose light parts are filled in; otherwise it is drawn.
        latents: Shape (C, h, w) of the latents of the rest of a square picture; None in pixel space.
    """

    from_files: bool
    latents: tuple[int, int, int] | None

    def __call__(
        self, record: Record, transform: ImageTransform, place: Placement, rng: Callable[[Stream], np.random.Generator]
    ) -> dict[str, np.ndarray | EightBit]:
        """Make the arrays; see `MakeExtra`.

        Returns:
            `mask`, float32 (1, H, W), 1 where to fill in and else 0; with latents,
            `masked_latent_noise`, float32 (C, h, w), which samples the posterior of the rest.
        """
        if self.from_files:
            image = decode(second_of(record))
            mask = transform.cut(image, place, channels=1, interpolation="nearest") >= 128
        else:
            mask = draw_mask(transform.target, rng(Stream.MASK))
        made: dict[str, np.ndarray | EightBit] = {MASK: mask[None].astype(np.float32)}
        if self.latents is not None:
            shape = latent_shape(self.latents, transform)
            made[MASKED_NOISE] = rng(Stream.MASKED_LATENT).standard_normal(shape, dtype=np.float32)
        return made


def latent_shape(of_square: tuple[int, int, int], transform: ImageTransform) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of what is noised of a picture of the transform's target.

    Args:
        of_square: That of a square picture of the transform's resolution.
        transform: The transform.
    """
    channels, side, _ = of_square
    height, width = (side * pixels // transform.resolution for pixels in transform.target)
    return channels, height, width


def draw_mask(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw what to fill in: all of the picture in a quarter of the cases, else a rectangle or an ellipse.

    Args:
        size: Height and width of the picture, in pixels.
        rng: Generator.

    Returns:
        The mask, bool (height, width).

    Reference:
        `random_mask` of Diffusers' scripts for inpainting, for the shapes and their shares.
    """
    everything, ellipse = rng.random() < 0.25, rng.random() < 0.5
    height, width = (int(side) for side in rng.integers(1, np.add(size, 1), 2))
    top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
    if everything:
        return np.ones(size, bool)
    rows = (np.arange(size[0]) + 0.5 - top) / height * 2 - 1  # -1..1 inside
    columns = (np.arange(size[1]) + 0.5 - left) / width * 2 - 1
    if ellipse:
        return rows[:, None] ** 2 + columns**2 <= 1
    return (np.abs(rows) <= 1)[:, None] & (np.abs(columns) <= 1)


def second_of(record: Record) -> Record:
    """Return a record's second picture.

    Raises:
        DataError: If there is none.
    """
    if record.extra is None:
        raise DataError(f"{record.name} has no second picture; give it one or remove it")
    return record.extra
