"""Pictures inside of a page: which grids of samples it holds, and how they become small enough."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flax_diffusion.core.io.files import names_in

log = logging.getLogger(__name__)

BUDGET = 13_000_000
"""Bytes of a page for the grids of all runs."""
MOST_GRIDS = 64
"""Number of grids of a run that a page holds beside the last one; more are thinned evenly."""

_SAME_SIZE = 100_000  # bytes of a PNG file that is embedded as it is: of flat colours it is smaller than a JPEG
_FLAT_PIXELS = 128 * 128  # pixels up to which a picture is embedded without loss
_LONGEST = 2048  # pixels of a side
_SHORTEST = 64  # pixels of a side below which a picture stays as it is, however many bytes it takes
_QUALITY, _LOW_QUALITY = 88, 60  # of JPEG; the second takes about half of the bytes
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Grid:
    """A grid of samples.

    Attributes:
        step: The step at which it was drawn.
        address: The picture as an address that holds it.
        size: Width and height, in pixels.
        captions: Text of each of its pictures; empty for none.
    """

    step: int
    address: str
    size: tuple[int, int]
    captions: tuple[str, ...]


class Grids:
    """The grids of a run that a page holds: the first, the last and evenly spaced ones between them.

    Each is read once, unless there come to be so many that each has to be smaller.

    Args:
        folder: Folder of their files.
        budget: Bytes for all of them.
    """

    def __init__(self, folder: Path, budget: int = BUDGET):
        self._folder, self._budget = folder, budget
        self._read: dict[str, Grid | None] = {}
        self._limit = 0
        self.count = 0

    def all(self) -> list[Grid]:
        """Return those that are there now; `count` then says how many there are in all."""
        names = [name for name in names_in(self._folder) if name.endswith(".png") and name[:-4].isdecimal()]
        self.count = len(names)
        chosen = evenly_spaced(names)
        limit = self._budget // max(8, 1 << (len(chosen) - 1).bit_length()) if chosen else 0
        if limit != self._limit:
            self._limit, self._read = limit, {}
        self._read = {
            name: self._read[name] if name in self._read else _read(self._folder / name, limit) for name in chosen
        }
        return [grid for grid in self._read.values() if grid is not None]


def evenly_spaced(names: Sequence[str]) -> list[str]:
    """Return at most `MOST_GRIDS` of some names, the first among them, and the last.

    Of more names it returns every second, every fourth and so on, so that none comes back that was left out before.
    """
    stride = 1
    while len(names) > stride * MOST_GRIDS:
        stride *= 2
    return list(dict.fromkeys([*names[::stride], *names[-1:]]))


def _read(file: Path, limit: int) -> Grid | None:
    """Return the grid of a file; None where it cannot be read, which is logged."""
    try:
        content = file.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            told = getattr(image, "text", {}).get("captions", "[]")  # this stands before the pixels
            captions = tuple(str(caption) for caption in json.loads(told))
            if len(content) <= min(_SAME_SIZE, limit * 3 // 4) and max(image.size) <= _LONGEST:
                return Grid(int(file.stem), _address(content, "png"), image.size, captions)
            address, size = embedded(image, limit)
            return Grid(int(file.stem), address, size, captions)
    except _UNREADABLE as error:
        log.warning("%s is left out of the page: it cannot be read (%s)", file, error)
        return None


def embedded(image: Image.Image, limit: int) -> tuple[str, tuple[int, int]]:
    """Return a picture as an address that holds it, and its width and height in it.

    Args:
        image: The picture.
        limit: Bytes that the address may take. A picture that takes more loses quality, and then size.
    """
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    if image.width * image.height <= _FLAT_PIXELS:
        return _address(_file(image, "PNG"), "png"), image.size
    image, quality = _scaled(image, _LONGEST / max(image.size)), _QUALITY
    content = _file(image, "JPEG", quality=quality)
    while (excess := (len(content) * 4 / 3 + 40) / limit) > 1 and max(image.size) > _SHORTEST:
        if quality == _LOW_QUALITY or excess > 2:
            image = _scaled(image, min(0.9, (2 / excess) ** 0.5))
        quality = _LOW_QUALITY
        content = _file(image, "JPEG", quality=quality)
    return _address(content, "jpeg"), image.size


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    """Return a picture that is smaller by a factor; as it is, if the factor is not less than 1."""
    if factor >= 1:
        return image
    width, height = (max(1, round(factor * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def embedded_pixels(pixels: np.ndarray, limit: int) -> tuple[str, tuple[int, int]]:
    """Return uint8 (H, W, 1 or 3) pixels as `embedded` does."""
    return embedded(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), limit)


def _file(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
