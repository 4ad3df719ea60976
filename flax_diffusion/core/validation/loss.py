"""The loss on pictures that do not train, at the same noise and times whenever it is computed.

So two values differ by the weights alone. Nothing of it is drawn from what training draws from, and no dropout is on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data.batches import Precomputed
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.order import Place
from flax_diffusion.core.randomness.streams import VALIDATION_EPOCH
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task
from flax_diffusion.core.validation.held_out import HeldOut, Size

_READ_LAG = 2
"""Batches that may be running before a value is waited for."""

LOSS, LOSS_EMA = "validation_loss", "validation_loss_ema"
"""Names of the values, with the weights and with the main moving average."""


class ValidationOrder:
    """Order of the examples: each once, and a bucket after the other. Picklable.

    The last batch of a bucket is filled up with its last example.

    Attributes:
        indices: Index of the example at each position, int64 (batches · batch_size,).
        counts: Whether the example at a position counts, bool; those that fill up do not.

    Args:
        count: Number of examples.
        batch_size: Examples per batch, over all devices.
        sizes: Size of each example's bucket; None without buckets.
    """

    def __init__(self, count: int, batch_size: int, sizes: Sequence[Size] | None):
        self._batch_size = batch_size
        groups: dict[Size | None, list[int]] = {}
        for index in range(count):
            groups.setdefault(None if sizes is None else sizes[index], []).append(index)
        self._sizes, self._members = [*groups], [np.array(own, np.int64) for own in groups.values()]
        filled = [-len(own) % batch_size for own in self._members]
        parts = [np.append(own, [own[-1]] * rest) for own, rest in zip(self._members, filled, strict=True)]
        self.indices = np.concatenate(parts).astype(np.int64)
        self.counts = np.concatenate(
            [np.arange(len(part)) < len(own) for part, own in zip(parts, self._members, strict=True)]
        )
        self._bucket_of_batch = np.repeat(np.arange(len(parts)), [len(part) // batch_size for part in parts])

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self._bucket_of_batch)

    def at(self, position: int) -> Place:
        """Return what is at a position; see `data.order.Order`."""
        bucket = int(self._bucket_of_batch[position // self._batch_size])
        return Place(VALIDATION_EPOCH, int(self.indices[position]), bucket, self._sizes[bucket])

    def following(self, place: Place, attempt: int) -> int:
        """Return the index of the example that takes the place of one that cannot be used."""
        own = self._members[place.bucket]
        return int(own[(np.searchsorted(own, place.index) + attempt) % len(own)])


class ValidationLoss:
    """The loss of a run on its validation examples; see `Judge`.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        examples: The examples.
        made: What was computed of them before training; None for nothing.
        backend: The backend of this process.
        batch_size: Examples per batch, over all devices.
        dtype: Dtype of the objective's numbers.
    """

    def __init__(
        self,
        task: Task[TrainConfig],
        spec: PipelineSpec,
        examples: HeldOut,
        made: Precomputed | None,
        backend: Backend,
        batch_size: int,
        dtype: DTypeLike = np.float32,
    ):
        self._backend, self._averages, self._batch_size = backend, task.config.averages, batch_size
        self._count = len(examples.source)
        self.every: int | None = task.config.validation_loss_steps
        self.names = [LOSS, LOSS_EMA] if self._averages else [LOSS]
        self.of = f"{self._count} validation pictures"
        self._order = ValidationOrder(self._count, batch_size, examples.sizes)
        self._share = batch_size // backend.process_count
        self._loader = Loader(
            examples.source,
            task.make_example_fn(spec, made, dtype).for_validation().unscaled,
            seed=task.config.seed,
            batch_size=self._share,
            process_index=backend.process_index,
            process_count=backend.process_count,
            num_steps=self._order.batches,
            skip_bad_images=task.config.skip_bad_images,
            order=self._order,
        )

    def __call__(self) -> dict[str, float]:
        """Compute the mean of the examples' weighted losses, by name of the weights that it is computed with.

        Raises:
            DataError: If an example cannot be made.
        """
        averages = [None, *self._averages[:1]]
        losses = [self._backend.validation_loss(average) for average in averages]
        sums: list[list[float]] = [[] for _ in averages]
        pending: deque[list[Any]] = deque()

        def read() -> None:
            for own, handle in zip(sums, pending.popleft(), strict=True):
                own.append(self._backend.read(handle)["loss"] * self._batch_size)

        with self._loader as batches:
            for number, batch in enumerate(batches):
                first = number * self._batch_size + self._backend.process_index * self._share
                counts = self._order.counts[first : first + self._share]
                placed = self._backend.put(batch | {"loss_weights": batch["loss_weights"] * counts})
                pending.append([loss(placed) for loss in losses])
                if len(pending) > _READ_LAG:
                    read()
        while pending:
            read()
        return {name: math.fsum(own) / self._count for name, own in zip(self.names, sums, strict=True)}
