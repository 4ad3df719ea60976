"""Transformation of a decoded picture to the array for the model: resize, crop, flip, scale."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from flax_diffusion.core.data.images.resizing import resize_part
from flax_diffusion.core.errors import unknown
from flax_diffusion.core.randomness.streams import Stream

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_BLOCK_PIXELS = 2**18
"""Pixels of one channel that are scaled at a time: a block that stays in the processor's cache between the steps."""


def sized_name(name: str, size: tuple[int, int] | None) -> str:
    """Return the name of a picture at the size of its bucket, such as `a.png 1152x896`.

    Args:
        name: The picture's own name, or a checksum.
        size: Height and width of its bucket, in pixels; None without buckets, where the name stays.
    """
    return name if size is None else f"{name} {shown_size(size)}"


def shown_size(size: tuple[int, int]) -> str:
    """Return a height and a width as options have them, width x height."""
    height, width = size
    return f"{width}x{height}"


class Placement(NamedTuple):
    """The part of a picture that is used, all in pixels."""

    original: tuple[int, int]  # (width, height) before resizing
    size: tuple[int, int]  # (width, height) after resizing
    corner: tuple[int, int]  # (top, left) of the part, before the flip
    flipped: bool
    target: tuple[int, int]  # (height, width) of the part

    @property
    def crop_top_left(self) -> tuple[int, int]:
        """Top and left of the part in the resized picture, which is mirrored first where it is mirrored at all."""
        top, left = self.corner
        return top, self.size[0] - left - self.target[1] if self.flipped else left


class EightBit(NamedTuple):
    """Pixels of 8 bits, to be scaled later: between processes they move in a quarter of the bytes."""

    pixels: np.ndarray  # uint8 (…, H, W, C)
    unit: bool = False  # whether they are scaled to 0..1; otherwise to -1..1

    def scaled(self) -> np.ndarray:
        """Return the pixels as float32 (…, C, H, W); see `scale` and `scale_to_unit`."""
        *several, height, width, channels = self.pixels.shape
        scaled = np.empty((*several, channels, height, width), np.float32)
        pictures, results = self.pixels.reshape(-1, height, width, channels), scaled.reshape(-1, *scaled.shape[-3:])
        count = max(1, _BLOCK_PIXELS // (height * width))
        for first in range(0, len(pictures), count):
            for channel in range(channels):
                block = results[first : first + count, channel]
                block[...] = pictures[first : first + count, ..., channel]
                if self.unit:
                    block /= np.float32(255)
                else:  # as (x / 255 - 0.5) / 0.5: to double and to halve are exact, and commute with rounding
                    block /= np.float32(127.5)
                    block -= np.float32(1)
        return scaled


class Transformed(NamedTuple):
    """A picture ready for the model, and the part of the original that it is."""

    pixel_values: np.ndarray  # float32 (C, H, W) in [-1, 1]
    place: Placement


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Transform that resizes, crops, flips and scales a picture, with the same pixels as torchvision on PIL images.

    `crop` scales the picture until it just covers the target, and cuts the target out of it; `stretch` scales both
    sides. The target is a square of `resolution`, unless there is a `size`.
    """

    resolution: int
    size: tuple[int, int] | None = None  # (height, width) of the target; None for a square
    resize_mode: Literal["crop", "stretch"] = "crop"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    center_crop: bool = False  # otherwise at random
    random_flip: bool = False  # left to right, half of the time
    channels: Literal[1, 3] = 3  # 1: grey

    def __call__(self, image: Image.Image, rng: Callable[[Stream], np.random.Generator]) -> Transformed:
        """Transform one picture.

        Args:
            image: Picture in mode RGB.
            rng: Function that returns the example's generator of a stream; `CROP` and `FLIP` are used where needed.

        Returns:
            The array, and the part of the picture that it shows.

        Reference:
            torchvision's Resize, CenterCrop or RandomCrop, RandomHorizontalFlip, ToTensor, Normalize, in
            the order of HF's example scripts.
        """
        place = self.place(image.size, rng)
        pixels = self.cut(image, place, channels=self.channels, interpolation=self.interpolation)
        return Transformed(scale(pixels), place)

    @property
    def target(self) -> tuple[int, int]:
        """Height and width of the result, in pixels."""
        return self.size or (self.resolution, self.resolution)

    def place(self, size: tuple[int, int], rng: Callable[[Stream], np.random.Generator]) -> Placement:
        """Choose the part of a picture that is used.

        Args:
            size: Width and height of the picture, in pixels.
            rng: As for a call.
        """
        width, height = self._resized(*size)
        return Placement(size, (width, height), self._corner(width, height, rng), self.flips(rng), self.target)

    def cut(self, image: Image.Image, place: Placement, *, channels: int, interpolation: str) -> np.ndarray:
        """Resize, crop and mirror a picture, or a second one of the same example, which may have another size.

        Args:
            image: Picture in mode RGB.
            place: Where to.
            channels: 1 for grey, 3 for RGB.
            interpolation: Filter that resizes, one of `FILTERS`.

        Returns:
            The pixels, uint8 (H, W) or (H, W, 3).
        """
        if channels == 1:
            image = image.convert("L")
        top, left = place.corner
        image = resize_part(image, place.size, (left, top), (self.target[1], self.target[0]), FILTERS[interpolation])
        if place.flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)

    def flips(self, rng: Callable[[Stream], np.random.Generator]) -> bool:
        """Draw from `FLIP` whether a picture is flipped.

        Args:
            rng: Function that returns the example's generator of a stream.
        """
        return self.random_flip and rng(Stream.FLIP).random() < 0.5

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after resizing, before the target is cut out."""
        rows, columns = self.target
        if self.resize_mode == "stretch":
            return columns, rows
        if self.resize_mode != "crop":
            raise unknown("resize_mode", self.resize_mode, ("crop", "stretch"))
        # torchvision truncates the long side.
        if width * rows <= height * columns:
            return columns, max(rows, int(columns * height / width))
        return max(columns, int(rows * width / height)), rows

    def _corner(self, width: int, height: int, rng: Callable[[Stream], np.random.Generator]) -> tuple[int, int]:
        spare = (height - self.target[0], width - self.target[1])
        if spare == (0, 0):
            return spare
        if self.center_crop:
            return round(spare[0] / 2.0), round(spare[1] / 2.0)  # half to even, as in torchvision
        top, left = rng(Stream.CROP).integers((spare[0] + 1, spare[1] + 1))
        return int(top), int(left)


def eight_bit(pixels: np.ndarray, *, unit: bool = False) -> EightBit:
    """Return the pixels of a picture, grey or of several channels, to be scaled later.

    Args:
        pixels: Pixels, uint8 (H, W) or (H, W, C).
        unit: Whether they are scaled to 0..1; otherwise to -1..1.
    """
    return EightBit(pixels[..., None] if pixels.ndim == 2 else pixels, unit)


def scale(pixels: np.ndarray) -> np.ndarray:
    """Map 8-bit pixels to the range of the models.

    Args:
        pixels: Pixels, uint8 (H, W) or (H, W, C).

    Returns:
        The pixels x as float32 (C, H, W) in [-1, 1]: (x / 255 - 0.5) / 0.5 computed in float32.
    """
    return eight_bit(pixels).scaled()


def scale_to_unit(pixels: np.ndarray) -> np.ndarray:
    """Map 8-bit pixels to 0..1.

    Args:
        pixels: Pixels, uint8 (H, W) or (H, W, C).

    Returns:
        The pixels x as float32 (C, H, W) in [0, 1]: x / 255 computed in float32.
    """
    return eight_bit(pixels, unit=True).scaled()
