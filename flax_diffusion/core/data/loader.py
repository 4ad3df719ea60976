"""Batches by position: the run's whole stream of examples is a pure function of the seed, entered anywhere.

Position p holds example `order(epoch)[p % N]` of epoch `p // N`. Step k takes positions [start + k*G, start +
(k+1)*G), G the global batch; so batches run across the end of an epoch, no example is left out, and shapes stay
the same, also where the data hold fewer examples than a batch. To resume, give the position to start at.
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

MAX_CONSECUTIVE_BAD = 100  # examples in a row; more means that the dataset is broken, not an image
# Up to here an epoch's order is a true permutation, held in memory; beyond, Grain's block cipher over the indices,
# which holds nothing but, on small sets, takes milliseconds an index.
_PERMUTED = 2**20
_CIPHER_ROUNDS = 4


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return example_rng(seed, Stream.SHUFFLE, epoch, 0).permutation(count)


@lru_cache(maxsize=4)
def _cipher_seed(seed: int, epoch: int) -> int:
    return int(example_rng(seed, Stream.SHUFFLE, epoch, 0).integers(2**32))


def example_at(position: int, *, count: int, seed: int, shuffle: bool) -> tuple[int, int]:
    """Return which example stands at a position of the stream.

    Args:
        position: In the stream, from 0.
        count: Examples in the source.
        seed: Of the run.
        shuffle: Else every epoch has the source's order.

    Returns:
        The epoch and the example's index in the source.
    """
    epoch, place = divmod(position, count)
    if not shuffle:
        return epoch, place
    if count <= _PERMUTED:
        return epoch, int(_permutation(count, seed, epoch)[place])
    return epoch, index_shuffle(place, max_index=count - 1, seed=_cipher_seed(seed, epoch), rounds=_CIPHER_ROUNDS)


@dataclass(frozen=True)
class _MicroBatches:
    """Random access to the micro-batches of one process: what Grain reads, in whichever process and thread."""

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
        """Return the arrays, and for each bad example passed over its name and what is wrong with it."""
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
        raise DataError(
            f"{limit} examples in a row cannot be used; look over the dataset. The last one: {skipped[-1][1]}"
        )


def _read(micro_batches: _MicroBatches, options: grain.ReadOptions, places: slice) -> grain.DatasetIterator:
    """The micro-batches at some places, made ahead by threads."""
    return iter(grain.MapDataset.source(micro_batches).slice(places).to_iter_dataset(options))


class Loader:
    """Iterates over the batches of one process, from any position of the stream.

    Each iteration starts at `start_example`. Worker processes are spawned, so a script that uses them needs the
    usual `if __name__ == "__main__":`. Close it, or use it in a `with`, to stop workers at once.

    Args:
        source: Of the records; picklable where there are workers.
        example_fn: Makes one example; picklable where there are workers.
        seed: Of the run.
        batch_size: Examples a micro-batch of this process.
        accumulation: Micro-batches a step.
        process_index: Which of the hosts this is; each takes its contiguous part of every micro-batch.
        process_count: Hosts.
        start_example: Position to start at: examples seen so far by all processes together.
        num_steps: Steps to give; None for no end.
        shuffle: A new order every epoch; else the source's.
        num_workers: Processes that make batches; 0 makes them in this one.
        num_threads: That make micro-batches in each of those processes; 0 makes them when asked for.
        prefetch: Micro-batches held ready in each of those processes.
        skip_bad_images: Put the next good example in place of one that cannot be used; else that is an error.
        rows: Records that make one example; each is a row of the batch, which so has batch_size times as many.
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
            # Python's own limit on a length; there is no end.
            length=sys.maxsize if num_steps is None else num_steps * accumulation,
        )
        self._options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads) if num_threads else 0
        )
        self._num_workers = num_workers
        self._open: weakref.WeakSet[_Steps] = weakref.WeakSet()

    def __iter__(self) -> "_Steps":
        """Give one dictionary a step, of arrays (accumulation, batch_size, ...).

        Raises:
            DataError: An example cannot be made, whichever process made it; too many cannot, where such are skipped;
                or a process is dead.
        """
        make = partial(_read, self._micro_batches, self._options)
        micro_batches = Workers(make, self._num_workers) if self._num_workers else make(slice(None))
        steps = _Steps(micro_batches, self.accumulation, self._bad)
        self._open.add(steps)
        return steps

    @property
    def skipped(self) -> dict[str, str]:
        """The name of each bad example met so far, and what is wrong with it."""
        return self._bad.reasons

    def close(self) -> None:
        """Stop worker processes and threads, and end the iterations under way."""
        for steps in list(self._open):
            steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Steps(Iterator[dict[str, np.ndarray]]):
    """One iteration: joins micro-batches to steps and keeps the account of bad examples passed over."""

    def __init__(self, micro_batches: grain.DatasetIterator | Workers, accumulation: int, bad: BadExamples):
        self._micro_batches: grain.DatasetIterator | Workers | None = micro_batches
        self._accumulation = accumulation
        self._bad = bad
        # Python runs this when nobody holds the iteration any more; and at exit, before it takes apart the modules that
        # Grain's own clean-up needs, and before it waits for processes that would wait for it.
        self._stop = Finalize(self, micro_batches.close, exitpriority=100)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._micro_batches is None:
            raise StopIteration
        try:
            step = [self._account(*next(self._micro_batches)) for _ in range(self._accumulation)]
        except BaseException:  # the end as well: whatever it is, workers stop now
            self.close()
            raise
        return {key: np.stack([arrays[key] for arrays in step]) for key in step[0]}

    def _account(self, arrays: dict[str, np.ndarray], skipped: list[tuple[str, str]]) -> dict[str, np.ndarray]:
        for name, reason in skipped:
            self._bad.add(name, reason)
        return arrays

    def close(self) -> None:
        """Stop what runs ahead for this iteration."""
        self._stop()
        self._micro_batches = None
