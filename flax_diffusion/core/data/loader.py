"""Loader of batches: the run's whole stream of examples is a pure function of the seed and can start at any position.

Step k takes the positions [start + k*G, start + (k+1)*G) of an `Order`, where G is the global batch size. To resume,
give the position to start at.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Self

import grain
import numpy as np

from flax_diffusion.core.data.bad import BadExamples, example_name
from flax_diffusion.core.data.batches import MakeExample, Unscaled, scaled, stacked
from flax_diffusion.core.data.order import Mixed, Order
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.data.workers import Workers
from flax_diffusion.core.errors import DataError

MAX_CONSECUTIVE_BAD = 100  # examples in a row; more mean that the whole dataset is broken


@dataclass(frozen=True)
class _MicroBatches:
    """Random access to the micro-batches of one process, for Grain to read in any process and thread.

    Those of workers move to the main process in 8 bits, and are scaled there (`scales` is False).
    """

    source: Source
    example_fn: MakeExample
    order: Order
    seed: int
    batch_size: int
    process_index: int
    process_count: int
    start_example: int
    skip_bad_images: bool
    rows: int
    length: int
    scales: bool
    ahead: Callable[[int, int], None] | None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Unscaled, list[tuple[str, str]]]:
        """Return the arrays, and the name and the error message of each bad example that was skipped."""
        skipped: list[tuple[str, str]] = []
        first = self.start_example + (index * self.process_count + self.process_index) * self.batch_size
        if self.ahead is not None:
            self.ahead(first, self.batch_size)
        places = [first + place for place in range(self.batch_size)]
        examples = [self._example(place, row, skipped) for place in places for row in range(self.rows)]
        batch = stacked(examples)
        return scaled(batch) if self.scales else batch, skipped

    def _example(self, position: int, row: int, skipped: list[tuple[str, str]]) -> Unscaled:
        place = self.order.at(position)
        limit = min(len(self.source) // self.rows, MAX_CONSECUTIVE_BAD + 1) if self.skip_bad_images else 1
        for attempt in range(limit):
            record = self.order.following(place, attempt) * self.rows + row
            try:
                return self.example_fn(self.source, self.seed, place.epoch, record, place.size)
            except DataError as error:
                if not self.skip_bad_images:
                    raise
                skipped.append((example_name(self.source, record), str(error)))
        raise DataError(f"{limit} examples in a row cannot be used; check the dataset. The last one: {skipped[-1][1]}")


def _read(micro_batches: _MicroBatches, options: grain.ReadOptions, places: slice) -> grain.DatasetIterator:
    """Return an iterator over the micro-batches at some places, which threads make ahead of time."""
    return iter(grain.MapDataset.source(micro_batches).slice(places).to_iter_dataset(options))


class Loader:
    """Iterable over the batches of one process, from any position of the stream.

    Each iteration starts at `start_example`. Worker processes are spawned, so a script that uses them needs the
    usual `if __name__ == "__main__":`. Close the loader, or use it in a `with`, to stop workers at once.

    Args:
        source: The records; picklable if there are workers.
        example_fn: Function that makes one example; picklable if there are workers. Pictures that it leaves in 8 bits
            are scaled here.
        seed: Seed of the run.
        batch_size: Examples per micro-batch of this process.
        accumulation: Micro-batches per step.
        process_index: Index of this process; each process takes its contiguous part of every micro-batch.
        process_count: Number of processes in the run.
        start_example: Position to start at: the number of examples seen so far by all processes together.
        num_steps: Number of steps to yield; None for no end.
        shuffle: Whether each epoch has a new order; otherwise every epoch has the source's order.
        order: Order of the examples in place of that; None for that.
        num_workers: Worker processes that make batches; 0 makes them in this process.
        num_threads: Threads that make micro-batches in each of those processes; 0 makes them on demand.
        prefetch: Micro-batches kept ready in each of those processes.
        skip_bad_images: Whether the next good example takes the place of one that cannot be used; otherwise that is
            an error.
        rows: Records that make one example. Each is a row of the batch, which so has `rows * batch_size` rows.
        ahead: Called with the first position and the number of examples of each micro-batch before it is made, to bring
            what it needs; None for nothing.

    Raises:
        DataError: If the source is empty.
    """

    def __init__(
        self,
        source: Source,
        example_fn: MakeExample,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        process_index: int = 0,
        process_count: int = 1,
        start_example: int = 0,
        num_steps: int | None = None,
        shuffle: bool = True,
        order: Order | None = None,
        num_workers: int = 0,
        num_threads: int = 2,
        prefetch: int = 2,
        skip_bad_images: bool = False,
        rows: int = 1,
        ahead: Callable[[int, int], None] | None = None,
    ):
        if len(source) == 0:
            raise DataError("the dataset holds no examples")
        self.accumulation = accumulation
        self.global_batch_size = batch_size * accumulation * process_count
        self._bad = BadExamples(len(source))
        self._micro_batches = _MicroBatches(
            source=source,
            example_fn=example_fn,
            order=order or Mixed(count=len(source) // rows, seed=seed, shuffle=shuffle),
            seed=seed,
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
            start_example=start_example,
            skip_bad_images=skip_bad_images,
            rows=rows,
            # Python's own limit on a length stands for no end.
            length=sys.maxsize if num_steps is None else num_steps * accumulation,
            scales=num_workers == 0,
            ahead=ahead,
        )
        self._options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads) if num_threads else 0
        )
        self._num_workers = num_workers
        self._open: weakref.WeakSet[_Steps] = weakref.WeakSet()

    def __iter__(self) -> "_Steps":
        """Start an iteration, which yields one dictionary per step, of arrays (accumulation, rows * batch_size, …).

        Raises:
            DataError: If an example cannot be made, in any process; if too many cannot, where bad ones are skipped; or
                if a worker process died.
        """
        make = partial(_read, self._micro_batches, self._options)
        micro_batches = Workers(make, self._num_workers) if self._num_workers else make(slice(None))
        steps = _Steps(micro_batches, self.accumulation, self._bad)
        self._open.add(steps)
        return steps

    @property
    def skipped(self) -> dict[str, str]:
        """Names of the bad examples found so far, each with the message of its error."""
        return self._bad.reasons

    def close(self) -> None:
        """Stop worker processes and threads, and end the running iterations."""
        for steps in list(self._open):
            steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Steps(Iterator[dict[str, np.ndarray]]):
    """One iteration, which joins micro-batches to steps and records the bad examples that were skipped."""

    def __init__(self, micro_batches: grain.DatasetIterator | Workers, accumulation: int, bad: BadExamples):
        self._micro_batches: grain.DatasetIterator | Workers | None = micro_batches
        self._accumulation = accumulation
        self._bad = bad
        # Python runs this when the iteration is no longer referenced; and at exit, before it takes apart the modules
        # that Grain's own clean-up needs, and before it waits for processes that would wait for it.
        self._stop = Finalize(self, micro_batches.close, exitpriority=100)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._micro_batches is None:
            raise StopIteration
        try:
            step = [self._record(*next(self._micro_batches)) for _ in range(self._accumulation)]
        except BaseException:  # also at StopIteration: workers stop in any case
            self.close()
            raise
        return scaled(stacked(step))

    def _record(self, arrays: Unscaled, skipped: list[tuple[str, str]]) -> Unscaled:
        for name, reason in skipped:
            self._bad.add(name, reason)
        return arrays

    def close(self) -> None:
        """Stop the processes and threads that work ahead for this iteration."""
        self._stop()
        self._micro_batches = None
