"""The pictures that a run does not train on: a share of its data, or a folder of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flax_diffusion.core.config.options import Reads, TrainConfig, named_inputs
from flax_diffusion.core.data.buckets import read_sizes
from flax_diffusion.core.data.combined import CombinedSource, folders_of
from flax_diffusion.core.data.order import Bucketed
from flax_diffusion.core.data.sources.source import Part, Source, pictures_of
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import lies_in
from flax_diffusion.core.randomness.streams import Stream, example_rng
from flax_diffusion.core.tasks.task import Task

Size = tuple[int, int]
"""Height and width of a picture, in pixels."""


@dataclass(frozen=True)
class HeldOut:
    """Examples for validation.

    Attributes:
        source: The examples, each picture once.
        sizes: Size of the bucket of each; None without buckets.
    """

    source: Source
    sizes: list[Size] | None = None


def divide(task: Task[TrainConfig], source: Source) -> tuple[Source, Source | None]:
    """Divide the examples of a run into those that train and those that do not.

    Args:
        task: The task, with the run's options.
        source: The examples of `open_source`.

    Returns:
        The examples to train on, and those for validation, each of whose pictures is there once; None for none.

    Raises:
        UserError: If nothing is left to train on, or a folder for validation cannot be used.
    """
    config = task.config
    if config.validation_split:
        training, validation = _split(source, config.validation_split, config.seed)
    else:
        training, validation = source, task.open_validation(source)
        if validation is None:
            return training, None
        validation = Part(validation, np.unique(pictures_of(validation)))
        _check_apart(config, training, validation)
    most = config.max_validation_samples
    return training, validation if most is None else Part(validation, np.arange(min(most, len(validation))))


def _split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Hold out a share of the pictures, but at least one, wherever they occur.

    The number that a picture is chosen by depends on the seed and its place alone, not on the size of the data.
    """
    of_example = pictures_of(source)
    pictures = np.unique(of_example)
    count = max(1, round(share * len(pictures)))
    if count >= len(pictures):
        raise ConfigError(
            f"--validation_split {share}: holds out {count} of {len(pictures)} pictures, and leaves none to train on: "
            "give a smaller share, or more pictures"
        )
    numbers = example_rng(seed, Stream.HELD_OUT, 0, 0).random(int(pictures[-1]) + 1)[pictures]
    held = np.sort(pictures[np.argsort(numbers, kind="stable")[:count]])
    return Part(source, np.flatnonzero(~np.isin(of_example, held))), Part(source, held)


def _check_apart(config: TrainConfig, training: Source, validation: Source) -> None:
    """Raise ConfigError if a picture for validation trains too, where the folders do not tell them apart."""
    places = [
        (option, folder.name)
        for option, kind, text in named_inputs(config)
        if kind is not Reads.MODEL
        for folder in folders_of(text)
    ]
    own = [name for option, name in places if option == "validation_data_dir"]
    others = [name for option, name in places if option != "validation_data_dir"]
    if not any(lies_in(one, other) or lies_in(other, one) for one in own for other in others):
        return
    names = {validation[index].name for index in range(len(validation))}
    shared = [name for index in range(len(training)) if (name := training[index].name) in names]
    if shared:
        raise ConfigError(
            f"--validation_data_dir {', '.join(own)}: {len(set(shared))} of its pictures are in the training data too, "
            f"such as {shared[0]}: move them out of there, or use --validation_split"
        )


def held_out(source: Source | None, buckets: Bucketed | None, *, skip_bad_images: bool) -> HeldOut | None:
    """Return the examples for validation, each in the bucket of the nearest shape.

    Args:
        source: The examples; None for none.
        buckets: The buckets of training; None where there are none.
        skip_bad_images: Whether a picture that cannot be read counts as a square; otherwise it is an error.

    Raises:
        DataError: If the size of a picture cannot be read.
    """
    if source is None:
        return None
    if buckets is None:
        return HeldOut(source)
    shapes = np.log([height / width for height, width in buckets.sizes])
    widths, heights = read_sizes(source, skip_bad_images=skip_bad_images).T
    apart = np.abs(np.log(heights / widths)[:, None] - shapes)
    return HeldOut(source, [buckets.sizes[nearest] for nearest in np.argmin(apart, axis=1)])


def with_held_out(
    source: Source, buckets: Bucketed | None, rows: int, validation: HeldOut | None
) -> tuple[Source, Mapping[int, Size] | None]:
    """Return all pictures of a run, for what is computed of them before training.

    Args:
        source: The records that train.
        buckets: Their order, where they are divided over buckets; None where they are not.
        rows: Records of an example.
        validation: The examples for validation; None for none.

    Returns:
        The pictures, and by index the size of each that a step takes; None where all are squares.
    """
    sizes: dict[int, Size] | None = None
    if buckets is not None:
        of_each = buckets.size_of_each().items()
        sizes = {index * rows + row: size for index, size in of_each for row in range(rows)}
    if validation is None:
        return source, sizes
    if sizes is not None and validation.sizes is not None:
        sizes |= {len(source) + index: size for index, size in enumerate(validation.sizes)}
    return CombinedSource([source, validation.source], [None, None], [1, 1]), sizes
