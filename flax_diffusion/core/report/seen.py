"""What the model saw in its first step: pictures after the augmentation, with what it was told of each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TypedDict

import numpy as np

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data.batches import CLASS_LABELS, ExampleFn
from flax_diffusion.core.data.extra import CONDITIONING_IMAGE, MASK
from flax_diffusion.core.data.order import Mixed, Order, Place
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.randomness.streams import rngs_of
from flax_diffusion.core.report.pictures import embedded_pixels
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task

SHOWN = 12
"""Most pictures that are shown of a batch."""

_LIMIT = 40_000  # bytes of each on the page
_BESIDE = {CONDITIONING_IMAGE: "the picture that the model follows", MASK: "the mask of what it fills in"}


class Seen(TypedDict):
    """A picture of the first batch, as JSON.

    Attributes:
        name: Name of its file, without folders, or its number.
        caption: The caption that the model was given, or the name of the class; "" for none.
        rest: The end of the caption that the text encoders do not see; "" for none.
        beside: What is shown at the right of the picture; "" for nothing.
        address: The picture as an address that holds it; "" where the run reads latents.
        size: Width and height in it, in pixels.
    """

    name: str
    caption: str
    rest: str
    beside: str
    address: str
    size: tuple[int, int]


def first_batch(
    task: Task[TrainConfig], spec: PipelineSpec, source: Source, order: Order | None, start: int, count: int
) -> list[Seen]:
    """Return the first pictures of a batch as the model is given them; one that cannot be used is left out.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        source: All examples of the run.
        order: Order of the examples; None for that without buckets and streams.
        start: Position of the first one.
        count: Number of examples of the batch in this process.
    """
    rows = task.rows_per_example
    order = order or Mixed(count=len(source) // rows, seed=task.config.seed)
    make = task.make_example_fn(spec)
    places = [order.at(start + number) for number in range(min(count, max(1, SHOWN // rows)))]

    def see(place: Place, index: int) -> Seen | None:
        try:
            return _see(make, spec, source, task.config.seed, place, index)
        except (DataError, OSError):  # of which the run itself says more when it comes to it
            return None

    pairs = [(place, place.index * rows + row) for place in places for row in range(rows)]
    with ThreadPoolExecutor(8) as pool:  # a picture in an object store is waited for
        return [one for one in pool.map(see, *zip(*pairs, strict=True)) if one is not None]


def _see(make: ExampleFn, spec: PipelineSpec, source: Source, seed: int, place: Place, index: int) -> Seen:
    """Return one example; see `first_batch`."""
    record = source[index]
    example = make(source, seed, place.epoch, index, place.size)
    caption = rest = beside = address = ""
    if make.labels is not None:
        label = int(example[CLASS_LABELS])
        caption = "(no class: it was left out)" if label == spec.null_class else spec.classes[label]
    elif make.tokenize is not None:
        caption = make.caption(record, rngs_of(seed, place.epoch, index))
        rest = make.tokenize.cut_off(caption)
        caption = caption or "(the empty caption)"
    size = (0, 0)
    if "pixel_values" in example:
        parts = [np.rint((example["pixel_values"] + 1) * 127.5)]
        for name, what in _BESIDE.items():
            if name in example:
                parts.append(np.rint(example[name] * 255))
                beside = what
        channels = max(len(part) for part in parts)
        pixels = np.concatenate([np.repeat(part, channels // len(part), 0) for part in parts], 2)
        address, size = embedded_pixels(pixels.astype(np.uint8).transpose(1, 2, 0), _LIMIT)
    name = PurePosixPath(record.name).name
    return Seen(name=name, caption=caption, rest=rest, beside=beside, address=address, size=size)
