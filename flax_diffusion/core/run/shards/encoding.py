"""Computation of the posteriors of pictures' latents, by all processes of a run together."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data.bad import BadExamples
from flax_diffusion.core.data.extra import no_draw
from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import DataError, NonFiniteError
from flax_diffusion.core.tasks.task import Task

NOT_FINITE = "the latents of {} are not finite: check the picture, or the autoencoder's precision"


class Encoded(NamedTuple):
    """What comes of some pictures.

    Attributes:
        posteriors: Means and log variances, float32 (P · share, 1 or 2, 2, c, h, w): those of all P processes, one
            process after the other; of the picture and, where it is flipped at random, of its mirror image.
        sizes: Width and height in pixels of the pictures of this process.
    """

    posteriors: np.ndarray
    sizes: list[tuple[int, int]]


@dataclass
class Encoder:
    """Encoder of pictures. All processes of a run call it equally often.

    Attributes:
        task: The task, with the run's options.
        transform: What happens to the pictures.
        source: The pictures.
        backend: The backend of this process.
        bad: The bad examples found so far; None where one ends the run.
        reasons: Why this process could not read a picture, by its name.
    """

    task: Task[TrainConfig]
    transform: ImageTransform
    source: Source
    backend: Backend
    bad: BadExamples | None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> int:
        """Pictures of each process that are encoded at a time."""
        return self.task.config.train_batch_size * (self.backend.device_count // self.backend.process_count)

    def __call__(
        self, pictures: Sequence[tuple[str, int]], pool: ThreadPoolExecutor, size: tuple[int, int] | None = None
    ) -> Encoded:
        """Read and encode some pictures.

        Args:
            pictures: Name and index of those of this process, up to `share`.
            pool: Threads that read them.
            size: Height and width that they get, in pixels; None for a square of the resolution.

        Raises:
            DataError: If one cannot be read, and none may be skipped.
        """
        upright = replace(self.transform, random_flip=False, size=size)
        shape = (upright.channels, *upright.target)
        nothing = np.full(shape, np.nan, np.float32)  # for a picture that cannot be read, as every process then knows

        def read(picture: tuple[str, int]) -> tuple[np.ndarray, tuple[int, int]]:
            name, index = picture
            try:
                pixels, place = upright(decode(self.source[index]), no_draw)
                return pixels, place.original
            except DataError as error:
                if self.bad is None:
                    raise
                self.reasons[name] = str(error)
                return nothing, (0, 0)

        mine = [*pool.map(read, pictures)]
        pixels = np.stack([*(one for one, _ in mine), *[nothing] * (self.share - len(mine))])
        orientations = [pixels, np.ascontiguousarray(pixels[..., ::-1])] if self.transform.random_flip else [pixels]
        posteriors = np.stack([self.backend.posteriors(each) for each in orientations], axis=1)
        return Encoded(posteriors, [original for _, original in mine])

    def good(self, names: Sequence[str], posteriors: np.ndarray) -> list[int]:
        """Return the indices of the pictures that were read and whose posteriors are finite.

        Args:
            names: Names of the pictures.
            posteriors: What comes of them, (N, …), and perhaps of more.

        Raises:
            NonFiniteError: If one is not, and none may be skipped.
            DataError: If too many are not.
        """
        good = []
        for index, name in enumerate(names):
            if np.isfinite(posteriors[index]).all():
                good.append(index)
            elif self.bad is None:
                raise NonFiniteError(NOT_FINITE.format(name))
            else:
                self.bad.add(name, self.reasons.get(name, NOT_FINITE.format(name)))
        return good
