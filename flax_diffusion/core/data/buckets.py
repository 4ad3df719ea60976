"""Buckets: pictures of several shapes are trained at several sizes, so that little of each is cut off."""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from flax_diffusion.core.data.bad import example_name
from flax_diffusion.core.data.images.decoding import size_of
from flax_diffusion.core.data.images.transforms import shown_size
from flax_diffusion.core.data.order import Bucketed
from flax_diffusion.core.data.sources.source import Source, first_few
from flax_diffusion.core.errors import ConfigError, DataError, nearest_multiples

log = logging.getLogger(__name__)

AUTO = "auto"
_LONGEST = 2.0
"""Largest ratio of the sides of a picture in `auto_sizes`."""
_SHAPES = 17
"""Most sizes of `auto_sizes`; the shapes of neighbours differ by 9%."""
_LEAST = 0.75
"""Smallest share of the pixels of a square of the resolution."""
_UNREADABLE = (2**20, 2**20)
"""Width and height that stand for those of a picture that cannot be read: a square that is not called small."""
_NAMED = 4  # of which `first_few` shows three, and says that there are more
_READERS = 16  # threads that read headers, most of whose time is waiting where these are in an object store


def auto_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """Return up to 17 sizes of pictures, from twice as wide as high to twice as high as wide.

    Args:
        resolution: Height and width of the square among them, in pixels; none has more pixels.
        multiple: Number of which all sides are multiples, and the resolution too.

    Returns:
        Heights and widths in pixels, from the widest to the highest.
    """
    sides = range(multiple, 2 * resolution, multiple)
    known = [(side, other) for side in sides for other in sides if _LEAST <= side * other / resolution**2 <= 1]

    def nearest(shape: float) -> tuple[int, int]:
        # A tenth of the pixels is worth as much as a shape that is nearer by a fortieth.
        return min(
            known, key=lambda size: abs(math.log(size[0] / size[1]) - shape) - size[0] * size[1] / resolution**2 / 4
        )

    half = [nearest(shape) for shape in np.linspace(0, math.log(_LONGEST), _SHAPES // 2 + 1)]
    sizes = {(resolution, resolution), *half, *((width, height) for height, width in half)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


def parse_sizes(given: Sequence[str], resolution: int, multiple: int) -> list[tuple[int, int]]:
    """Return the sizes that --bucket_resolutions names.

    Args:
        given: "auto" alone, or sizes as "WIDTHxHEIGHT" in pixels.
        resolution: The run's resolution, in pixels.
        multiple: Number of which all sides must be multiples.

    Returns:
        Heights and widths in pixels, from the widest to the highest.

    Raises:
        ConfigError: For anything else, a side that is no such multiple, or two sizes of one shape.
    """
    if list(given) == [AUTO]:
        return auto_sizes(resolution, multiple)
    sizes = []
    for text in given:
        width, _, height = text.lower().partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise ConfigError(f"--bucket_resolutions {text}: must be auto alone, or width x height such as 1152x896")
        for side in (int(width), int(height)):
            if side % multiple:
                raise ConfigError(
                    f"--bucket_resolutions {text}: {side} must be a multiple of {multiple}, by which this pipeline "
                    f"divides it: {nearest_multiples(side, multiple)}"
                )
        sizes.append((int(height), int(width)))
    sizes.sort(key=lambda size: size[0] / size[1])
    for (height, width), (other, across) in pairwise(sizes):
        if height * across == width * other:
            raise ConfigError(
                f"--bucket_resolutions {width}x{height} and {across}x{other} are of one shape: drop one of them"
            )
    return sizes


def read_sizes(source: Source, *, skip_bad_images: bool) -> np.ndarray:
    """Read the sizes of all pictures from their headers.

    Args:
        source: The examples.
        skip_bad_images: Whether a picture that cannot be read counts as a square; otherwise it is an error.

    Returns:
        Widths and heights in pixels, int64 (N, 2).

    Raises:
        DataError: If a picture cannot be read.
    """

    def read(index: int) -> tuple[int, int]:
        try:
            return size_of(source[index])
        except DataError:
            if not skip_bad_images:
                raise
            return _UNREADABLE  # the loader counts it, and takes another

    with ThreadPoolExecutor(_READERS) as pool:
        return np.array(list(pool.map(read, range(len(source)))), np.int64)


def divide(pictures: np.ndarray, sizes: Sequence[tuple[int, int]], step_examples: int) -> list[np.ndarray]:
    """Divide pictures over buckets, to the one of the nearest shape.

    So that no step lacks pictures, each bucket gets a multiple of `step_examples`, but for the largest: of the pictures
    whose shape is nearly as near to another bucket, some go there.

    Args:
        pictures: Widths and heights of the pictures, (N, 2).
        sizes: Heights and widths of the buckets, from the widest to the highest.
        step_examples: Examples per optimizer step.

    Returns:
        Indices of the pictures of each bucket, int64 (n,), in ascending order.

    Raises:
        DataError: If there are fewer pictures than a step takes.
    """
    count = len(pictures)
    if count < step_examples:
        raise DataError(
            f"--bucket_resolutions: {count} pictures are fewer than the {step_examples} of one optimizer step: lower "
            "the batch size, or drop it"
        )
    shapes = np.log(pictures[:, 1] / pictures[:, 0])
    order = np.argsort(shapes, kind="stable")
    own = np.log([height / width for height, width in sizes])
    natural = np.searchsorted(shapes[order], (own[1:] + own[:-1]) / 2)
    largest = int(np.argmax(np.diff([0, *natural, count])))
    rest = np.where(np.arange(len(natural)) < largest, 0, count % step_examples)
    cuts = np.rint((natural - rest) / step_examples).astype(np.int64) * step_examples + rest
    cuts = np.clip(np.maximum.accumulate(cuts), rest, rest + count // step_examples * step_examples)
    return [np.sort(part) for part in np.split(order, cuts)]


def make_order(
    source: Source,
    sizes: Sequence[tuple[int, int]],
    step_examples: int,
    seed: int,
    *,
    skip_bad_images: bool,
    count: int | None = None,
    main: bool = True,
) -> Bucketed:
    """Read the sizes of all pictures, divide them over buckets, and log how many are in each.

    The pictures that are smaller than their bucket are named, unless each example has a second one: `warn_of_small`
    names both, once both are there.

    Args:
        source: The pictures whose shapes decide.
        sizes: Heights and widths of the buckets, from the widest to the highest.
        step_examples: Examples per optimizer step.
        seed: Seed of the run.
        skip_bad_images: As in `read_sizes`.
        count: Number of examples, where each has a second picture that takes the bucket of the first: example i has the
            picture i, and the pictures start over. None for an example for each picture.
        main: Whether this is the first process, which logs.

    Raises:
        DataError: If a picture cannot be read, or if they are too few.
    """
    pictures = read_sizes(source, skip_bad_images=skip_bad_images)
    if count is not None:
        pictures = np.resize(pictures, (count, 2))  # which repeats them
    members = divide(pictures, sizes, step_examples)
    filled = [(size, own) for size, own in zip(sizes, members, strict=True) if len(own) >= step_examples]
    order = Bucketed(
        sizes=[size for size, _ in filled], members=[own for _, own in filled], step_examples=step_examples, seed=seed
    )
    if main:
        what = "pictures" if count is None else "pairs of pictures"
        told = ", ".join(f"{shown_size(size)} {len(own)}" for size, own in filled)
        log.info("%d buckets, each compiled when it is first met, and their %s: %s", len(filled), what, told)
        if count is None:
            small = _small(pictures, order, 1)
            _warn([example_name(source, index) for index in small[:_NAMED]], len(small), len(source))
    return order


def warn_of_small(source: Source, order: Bucketed, rows: int, *, skip_bad_images: bool) -> None:
    """Read the sizes of all pictures, and name those that are smaller than their bucket.

    Args:
        source: All examples of the run, of which several can have the same picture.
        order: Their order.
        rows: Records of an example.
        skip_bad_images: As in `read_sizes`.

    Raises:
        DataError: If a picture cannot be read.
    """
    pictures = read_sizes(source, skip_bad_images=skip_bad_images)
    names = [example_name(source, index) for index in range(len(source))]
    small = dict.fromkeys(names[index] for index in _small(pictures, order, rows))
    _warn(list(small), len(small), len(set(names)))


def _small(pictures: np.ndarray, order: Bucketed, rows: int) -> list[int]:
    """Return the indices of the records whose pictures are smaller than their bucket, in ascending order.

    Args:
        pictures: Widths and heights of the records' pictures, (N, 2).
        order: The order of the examples.
        rows: Records of an example.
    """
    found: list[int] = []
    for (height, width), own in zip(order.sizes, order.members, strict=True):
        records = (own[:, None] * rows + np.arange(rows)).ravel()
        found += records[(pictures[records, 0] < width) | (pictures[records, 1] < height)].tolist()
    return sorted(found)


def _warn(names: list[str], small: int, count: int) -> None:
    """Log the names of pictures that are smaller than their bucket, of which there are `small` among `count`."""
    if small:
        log.warning(
            "%d of %d pictures are smaller than their bucket, and are enlarged: %s", small, count, first_few(names)
        )
