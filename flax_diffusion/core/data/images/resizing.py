"""A square out of a resized picture, in memory bounded by the square and the picture, whatever lies around it.

Pillow resizes the width, rounds to 8 bits, and resizes the height. Its result for a picture of usual shape is cut to a
square. A strip that is thousands of times longer than wide would become gigabytes; its long side is resized here, for
the square alone and to the same values.

Reference: the arithmetic of Pillow's `Resample.c` and `Geometry.c`, with which the tests compare.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

_LEAST_LARGE = 2**22  # pixels, up to which nobody minds
_TIMES_LARGER = 4  # than the square and than the picture: above it, only the square is computed
_BITS = 22  # of a weight's fraction, as Pillow has them
_NEAREST_ERRORS = 2**22  # steps, whose rounding errors Pillow adds up; for more at 512 pixels it needs over 8 GB


def resize_part(
    image: Image.Image, size: tuple[int, int], corner: tuple[int, int], side: int, resample: Image.Resampling
) -> Image.Image:
    """Resize a picture and cut a square out of it.

    Args:
        image: In mode L or RGB.
        size: Width and height to resize to, of which one is `side` and the other no less.
        corner: Left and top of the square in the resized picture.
        side: Of the square, pixels.
        resample: Nearest, bilinear, bicubic or lanczos.

    Returns:
        The square: the same values as `image.resize(size, resample).crop(...)`.
    """
    (width, height), (left, top) = size, corner
    # A result so much larger than the picture is a picture that grows; its other sides are bounded.
    large = _TIMES_LARGER * max(side * side, image.width * image.height, _LEAST_LARGE)
    if width * height <= large:
        resized = image if image.size == size else image.resize(size, resample)
        if (left, top, *size) == (0, 0, side, side):
            return resized
        return resized.crop((left, top, left + side, top + side))
    if height > side:
        first, weights = _weights(image.height, height, top, side, resample)
        band = image.crop((0, first, image.width, first + weights.shape[1]))
        return _weighted(band.resize((side, band.height), resample), weights)
    first, weights = _weights(image.width, width, left, side, resample)
    lying = image.crop((first, 0, first + weights.shape[1], image.height)).transpose(Image.Transpose.TRANSPOSE)
    return _weighted(lying, weights).transpose(Image.Transpose.TRANSPOSE).resize((side, side), resample)


def _weighted(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Sums of a picture's rows."""
    total = np.tensordot(weights, np.asarray(image, np.float64), 1)  # of whole numbers below 2^53, so exact
    return Image.fromarray(np.clip((total + 2 ** (_BITS - 1)) // 2**_BITS, 0, 255).astype(np.uint8))


def _weights(size: int, grown: int, first: int, count: int, resample: Image.Resampling) -> tuple[int, np.ndarray]:
    """How some rows of a picture that grows are made of its rows.

    Args:
        size: Rows of the picture.
        grown: Rows of the larger one.
        first: Of the rows asked for.
        count: Of them.
        resample: The filter.

    Returns:
        The first row that they are made of; their weights times 2^22, (count, rows from there on).
    """
    scale = size / grown
    if resample == Image.Resampling.NEAREST:
        rows = [(source, [1.0]) for source in _nearest(scale, first, count)]
    else:
        rows = [_row(size, (place + 0.5) * scale, *_FILTERS[resample]) for place in range(first, first + count)]
    start = rows[0][0]
    weights = np.zeros((count, rows[-1][0] + len(rows[-1][1]) - start))
    for place, (low, parts) in enumerate(rows):
        scaled = [part * 2**_BITS for part in parts]
        weights[place, low - start : low - start + len(parts)] = [
            int(part - 0.5 if part < 0 else part + 0.5) for part in scaled
        ]
    return start, weights


def _row(size: int, center: float, reach: float, shape: Callable[[float], float]) -> tuple[int, list[float]]:
    low, high = max(0, int(center - reach + 0.5)), min(size, int(center + reach + 0.5))
    parts = [shape(x - center + 0.5) for x in range(low, high)]
    total = 0.0
    for part in parts:  # not `sum`, which rounds otherwise than Pillow's loop
        total += part
    return low, [part / total for part in parts]


def _nearest(scale: float, first: int, count: int) -> list[int]:
    """Pillow adds up the step from row to row, and with it a rounding error."""
    start = max(0, first - _NEAREST_ERRORS)
    steps = np.full(first - start + count, scale)
    steps[0] = (start + 0.5) * scale
    return np.cumsum(steps)[-count:].astype(np.int64).tolist()


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)  # Keys's constant
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


_FILTERS: dict[Image.Resampling, tuple[float, Callable[[float], float]]] = {
    Image.Resampling.BILINEAR: (1.0, _bilinear),
    Image.Resampling.BICUBIC: (2.0, _bicubic),
    Image.Resampling.LANCZOS: (3.0, _lanczos),
}
"""How far a filter reaches, in pixels, and its shape."""
