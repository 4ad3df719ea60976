"""Loader of batches: the run's whole stream of examples is a pure function of the seed and can start at any position.

Position p holds example `order(epoch)[p % N]` of epoch `p // N`. Step k takes positions [start + k*G, start +
(k+1)*G), where G is the global batch size. So a batch may contain the end of an epoch and the start of the next, no
example is left out, and shapes stay the same, even if the dataset has fewer examples than a batch. To resume, give the
position to start at.
"""

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Self

import grain
import numpy as np
from grain.experimental import index_shuffle

from flax_diffusion.core.data.bad import BadExamples, example_name
from flax_diffusion.core.data.batches import MakeExample
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.data.workers import Workers
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.randomness.streams import Stream, example_rng

MAX_CONSECUTIVE_BAD = 100  # examples in a row; more mean that the whole dataset is broken
# Up to this many examples, an epoch's order is a true permutation, held in memory. For more, it is Grain's block cipher
# over the indices, which needs no memory but takes milliseconds per index on small datasets.
_MAX_PERMUTED = 2**20
_CIPHER_ROUNDS = 4


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return example_rng(seed, Stream.SHUFFLE, epoch, 0).permutation(count)


@lru_cache(maxsize=4)
def _cipher_seed(seed: int, epoch: int) -> int:
    return int(example_rng(seed, Stream.SHUFFLE, epoch, 0).integers(2**32))


def example_at(position: int, *, count: int, seed: int, shuffle: bool) -> tuple[int, int]:
    """Return which example is at a position of the stream.

    Args:
        position: Position in the stream, from 0.
        count: Number of examples in the source.
        seed: Seed of the run.
        shuffle: Whether each epoch has a new order; otherwise every epoch has the source's order.

    Returns:
        The epoch and the example's index in the source.
    """
    epoch, place = divmod(position, count)
    if not shuffle:
        return epoch, place
    if count <= _MAX_PERMUTED:
        return epoch, int(_permutation(count, seed, epoch)[place])
    return epoch, index_shuffle(place, max_index=count - 1, seed=_cipher_seed(seed, epoch), rounds=_CIPHER_ROUNDS)


@dataclass(frozen=True)
class _MicroBatches:
    """Random access to the micro-batches of one process, for Grain to read in any process and thread."""

    source: Source
    example_fn: MakeExample
    seed: int
    batch_size: int
    process_index: int
    process_count: int
    start_example: int
    shuffle: bool
    skip_bad_images: bool
    rows: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
        """Return the arrays, and the name and the error message of each bad example that was skipped."""
        skipped: list[tuple[str, str]] = []
        first = self.start_example + (index * self.process_count + self.process_index) * self.batch_size
        places = [first + place for place in range(self.batch_size)]
        examples = [self._example(place, row, skipped) for place in places for row in range(self.rows)]
        return {key: np.stack([example[key] for example in examples]) for key in examples[0]}, skipped

    def _example(self, position: int, row: int, skipped: list[tuple[str, str]]) -> dict[str, np.ndarray]:
        count = len(self.source) // self.rows
        epoch, index = example_at(position, count=count, seed=self.seed, shuffle=self.shuffle)
        limit = min(count, MAX_CONSECUTIVE_BAD + 1) if self.skip_bad_images else 1
        for attempt in range(limit):
            record = (index + attempt) % count * self.rows + row
            try:
                return self.example_fn(self.source, self.seed, epoch, record)
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
        example_fn: Function that makes one example; picklable if there are workers.
        seed: Seed of the run.
        batch_size: Examples per micro-batch of this process.
        accumulation: Micro-batches per step.
        process_index: Index of this process; each process takes its contiguous part of every micro-batch.
        process_count: Number of processes in the run.
        start_example: Position to start at: the number of examples seen so far by all processes together.
        num_steps: Number of steps to yield; None for no end.
        shuffle: Whether each epoch has a new order; otherwise every epoch has the source's order.
        num_workers: Worker processes that make batches; 0 makes them in this process.
        num_threads: Threads that make micro-batches in each of those processes; 0 makes them on demand.
        prefetch: Micro-batches kept ready in each of those processes.
        skip_bad_images: Whether the next good example takes the place of one that cannot be used; otherwise that is
            an error.
        rows: Records that make one example. Each is a row of the batch, which so has `rows * batch_size` rows.

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
        num_workers: int = 0,
        num_threads: int = 2,
        prefetch: int = 2,
        skip_bad_images: bool = False,
        rows: int = 1,
    ):
        if len(source) == 0:
            raise DataError("the dataset holds no examples")
        self.accumulation = accumulation
        self.global_batch_size = batch_size * accumulation * process_count
        self._bad = BadExamples(len(source))
        self._micro_batches = _MicroBatches(
            source=source,
            example_fn=example_fn,
            seed=seed,
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
            start_example=start_example,
            shuffle=shuffle,
            skip_bad_images=skip_bad_images,
            rows=rows,
            # Python's own limit on a length stands for no end.
            length=sys.maxsize if num_steps is None else num_steps * accumulation,
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
        return {key: np.stack([arrays[key] for arrays in step]) for key in step[0]}

    def _record(self, arrays: dict[str, np.ndarray], skipped: list[tuple[str, str]]) -> dict[str, np.ndarray]:
        for name, reason in skipped:
            self._bad.add(name, reason)
        return arrays

    def close(self) -> None:
        """Stop the processes and threads that work ahead for this iteration."""
        self._stop()
        self._micro_batches = None
