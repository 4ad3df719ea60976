"""Resizing of a picture and cutting of a part, in memory bounded by the part and the original picture.

Pillow resizes the width, rounds to 8 bits, and resizes the height. For a picture of usual shape, the part is cut out of
its result. A strip that is thousands of times longer than wide would take gigabytes. The long side of such a picture is
resized here, only for the part and to the same values.

Reference: the arithmetic of Pillow's `Resample.c` and `Geometry.c`, with which the tests compare.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

_ALWAYS_SMALL = 2**22  # pixels; a resized picture up to this size is always computed whole
_MAX_GROWTH = 4  # above this many times the part and the original picture, only the part is computed
_BITS = 22  # of a weight's fraction, as in Pillow
_MAX_NEAREST_STEPS = 2**22  # steps whose rounding errors are repeated; Pillow needs over 8 GB for more at 512 pixels


def resize_part(
    image: Image.Image,
    size: tuple[int, int],
    corner: tuple[int, int],
    part: tuple[int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """Resize a picture and cut a part out of it.

    Args:
        image: Picture in mode L or RGB.
        size: Width and height to resize to; one is that of the part and the other is not smaller.
        corner: Left and top of the part in the resized picture, pixels.
        part: Width and height of the part, pixels.
        resample: Nearest, bilinear, bicubic or lanczos.

    Returns:
        The part, with the same values as `image.resize(size, resample).crop(…)`.
    """
    (width, height), (left, top), (columns, rows) = size, corner, part
    # Only a picture that grows has a result so much larger than itself; its other sides are bounded.
    large = _MAX_GROWTH * max(columns * rows, image.width * image.height, _ALWAYS_SMALL)
    if width * height <= large:
        resized = image if image.size == size else image.resize(size, resample)
        if (left, top, *size) == (0, 0, *part):
            return resized
        return resized.crop((left, top, left + columns, top + rows))
    if height > rows:
        first, weights = _weights(image.height, height, top, rows, resample)
        band = image.crop((0, first, image.width, first + weights.shape[1]))
        return _weighted(band.resize((columns, band.height), resample), weights)
    first, weights = _weights(image.width, width, left, columns, resample)
    lying = image.crop((first, 0, first + weights.shape[1], image.height)).transpose(Image.Transpose.TRANSPOSE)
    return _weighted(lying, weights).transpose(Image.Transpose.TRANSPOSE).resize(part, resample)


def _weighted(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Return a picture whose rows are weighted sums of a picture's rows."""
    total = np.tensordot(weights, np.asarray(image, np.float64), 1)  # exact: all are whole numbers below 2^53
    return Image.fromarray(np.clip((total + 2 ** (_BITS - 1)) // 2**_BITS, 0, 255).astype(np.uint8))


def _weights(size: int, grown: int, first: int, count: int, resample: Image.Resampling) -> tuple[int, np.ndarray]:
    """Compute the weights of a picture's rows in some rows of the enlarged picture.

    Args:
        size: Number of rows of the picture.
        grown: Number of rows of the enlarged picture.
        first: First of the rows to compute.
        count: Number of rows to compute.
        resample: The filter.

    Returns:
        The first row of the picture that has a weight, and the weights times 2^22, float64 (count, rows from there on).
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
    for part in parts:  # not `sum`, which rounds differently from Pillow's loop
        total += part
    return low, [part / total for part in parts]


def _nearest(scale: float, first: int, count: int) -> list[int]:
    # Pillow adds up the step from row to row, and with it a rounding error.
    start = max(0, first - _MAX_NEAREST_STEPS)
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
"""Radius in pixels and shape of each filter."""
