"""Order of the examples: which one is at a position of the run's stream, as a pure function of the seed.

Position p holds example `order(epoch)[p % N]` of epoch `p // N`. So a batch may contain the end of an epoch and the
start of the next, no example is left out, and shapes stay the same, even if the dataset has fewer examples than a
batch. With buckets, whose pictures have several shapes, see `Bucketed`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from grain.experimental import index_shuffle

from flax_diffusion.core.randomness.streams import Stream, example_rng

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
class Place:
    """What is at a position.

    Attributes:
        epoch: Number of the pass over the data, from 0.
        index: Index of the example, from 0.
        bucket: Index of the bucket of the position's batch; 0 without buckets.
        size: Height and width of the pictures of that batch, in pixels; None without buckets.
    """

    epoch: int
    index: int
    bucket: int = 0
    size: tuple[int, int] | None = None


class Order(Protocol):
    """An order. Picklable."""

    def at(self, position: int) -> Place:
        """Return what is at a position of the stream, from 0."""
        ...

    def following(self, place: Place, attempt: int) -> int:
        """Return the index of an example that takes the place of one that cannot be used.

        Args:
            place: Where that one is.
            attempt: Number of examples that were tried before; for 0 it is the one itself.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Order in which every batch has pictures of all shapes, which are cut to squares.

    Attributes:
        count: Number of examples in the source.
        seed: Seed of the run.
        shuffle: Whether each epoch has a new order; otherwise every epoch has the source's order.
    """

    count: int
    seed: int
    shuffle: bool = True

    def at(self, position: int) -> Place:
        """Return what is at a position of the stream, from 0."""
        return Place(*example_at(position, count=self.count, seed=self.seed, shuffle=self.shuffle))

    def following(self, place: Place, attempt: int) -> int:
        """Return the index of the example that follows in the source; see `Order.following`."""
        return (place.index + attempt) % self.count


@dataclass(frozen=True, kw_only=True)
class Bucketed:
    """Order in which all pictures of a step have one size.

    Each epoch mixes the pictures of each bucket, divides them into steps, and mixes the steps. Pictures that are too
    few for one more step are left out of that epoch.

    Attributes:
        sizes: Height and width of the pictures of each bucket, in pixels.
        members: Indices of the examples of each bucket, int64 (n,), in ascending order.
        step_examples: Examples per optimizer step.
        seed: Seed of the run.
    """

    sizes: Sequence[tuple[int, int]]
    members: Sequence[np.ndarray] = field(repr=False)
    step_examples: int
    seed: int

    @property
    def steps(self) -> int:
        """Number of steps of an epoch."""
        return sum(len(own) // self.step_examples for own in self.members)

    def size_of_each(self) -> dict[int, tuple[int, int]]:
        """Return height and width, in pixels, of the pictures of each example, by its index."""
        return {index: size for size, own in zip(self.sizes, self.members, strict=True) for index in own.tolist()}

    def at(self, position: int) -> Place:
        """Return what is at a position of the stream, from 0."""
        step, number = divmod(position, self.step_examples)
        epoch, place = divmod(step, self.steps)
        buckets, indices = self._epoch(epoch)
        bucket = int(buckets[place])
        return Place(epoch, int(indices[place, number]), bucket, self.sizes[bucket])

    def following(self, place: Place, attempt: int) -> int:
        """Return the index of the example that follows in the same bucket; see `Order.following`."""
        own = self.members[place.bucket]
        return int(own[(np.searchsorted(own, place.index) + attempt) % len(own)])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bucket of each step of an epoch, (steps,), and the indices of its examples, (steps, G)."""
        made = self._epochs.get(epoch)
        if made is not None:
            return made
        buckets, indices = [], []
        for bucket, own in enumerate(self.members):
            full = len(own) // self.step_examples
            mixed = example_rng(self.seed, Stream.SHUFFLE, epoch, bucket + 1).permutation(own)
            buckets.append(np.full(full, bucket))
            indices.append(mixed[: full * self.step_examples].reshape(full, self.step_examples))
        order = example_rng(self.seed, Stream.SHUFFLE, epoch, 0).permutation(self.steps)
        made = np.concatenate(buckets)[order], np.concatenate(indices)[order]
        for old in sorted(self._epochs)[:-1]:  # one is kept, from which other threads may still read
            self._epochs.pop(old, None)
        self._epochs[epoch] = made
        return made

    @functools.cached_property
    def _epochs(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """Order in which examples come from a few shards at a time.

    Each epoch mixes the shards, and the examples of each shard, and divides this row of examples into `lanes` parts of
    one length, of which each fills its own rows of every batch, one shard after the other. So a batch has examples of
    `lanes` shards, a host that makes some rows reads the shards of their lanes alone, and the order does not depend on
    the hosts. Fewer than `lanes` examples, others in each epoch, are left out.

    Attributes:
        counts: Number of examples of each shard.
        lanes: Number of lanes, which divides `batch_examples`.
        batch_examples: Examples per micro-batch of all processes.
        seed: Seed of the run.
    """

    counts: tuple[int, ...] = field(repr=False)
    lanes: int
    batch_examples: int
    seed: int

    def at(self, position: int) -> Place:
        """Return what is at a position of the stream, from 0."""
        batch, row = divmod(position, self.batch_examples)
        lane, own = divmod(row, self._rows)
        return self._of_lane(lane, batch * self._rows + own)[0]

    def following(self, place: Place, attempt: int) -> int:
        """Return the index of the example that follows in the same shard; see `Order.following`."""
        shard = int(np.searchsorted(self._starts, place.index, side="right")) - 1
        start = int(self._starts[shard])
        return start + (place.index - start + attempt) % self.counts[shard]

    def shards_of(self, first: int, count: int) -> list[int]:
        """Return the shards of some positions: those that are read there, then those that follow them in their lanes.

        Args:
            first: The first position.
            count: Number of positions, all in one micro-batch.
        """
        batch, row = divmod(first, self.batch_examples)
        lanes = range(row // self._rows, (row + count - 1) // self._rows + 1)
        now, soon = [], []
        for lane in lanes:
            place = batch * self._rows
            _, shard, left = self._of_lane(lane, place)
            now.append(shard)
            soon.append(self._of_lane(lane, place + left)[1])
        return list(dict.fromkeys([*now, *soon]))

    @property
    def lane_examples(self) -> int:
        """Examples of a lane in an epoch."""
        return sum(self.counts) // self.lanes

    @property
    def _rows(self) -> int:
        return self.batch_examples // self.lanes

    def _of_lane(self, lane: int, number: int) -> tuple[Place, int, int]:
        """Return what a lane reads, from which shard, and after how many examples it goes on to another.

        Args:
            lane: Number of the lane.
            number: Number in the lane's stream, from 0.
        """
        epoch, place = divmod(number, self.lane_examples)
        shards, ends = self._epoch(epoch)
        row = lane * self.lane_examples + place
        which = int(np.searchsorted(ends, row, side="right"))
        shard = int(shards[which])
        inside = row - int(ends[which]) + self.counts[shard]
        left = min(int(ends[which]) - row, self.lane_examples - place)
        return Place(epoch, int(self._starts[shard] + self._mixed(epoch, shard)[inside])), shard, left

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.counts])[:-1]

    @functools.cached_property
    def _epoch(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """Function that returns the shards of an epoch in order, (S,), and the number of examples up to each."""

        def mixed(epoch: int) -> tuple[np.ndarray, np.ndarray]:
            shards = example_rng(self.seed, Stream.SHUFFLE, epoch, 0).permutation(len(self.counts))
            return shards, np.cumsum(np.asarray(self.counts)[shards])

        return lru_cache(maxsize=4)(mixed)

    @functools.cached_property
    def _mixed(self) -> Callable[[int, int], np.ndarray]:
        """Function that returns the examples of a shard in an epoch's order, by their numbers in it."""

        def mixed(epoch: int, shard: int) -> np.ndarray:
            return example_rng(self.seed, Stream.SHUFFLE, epoch, shard + 1).permutation(self.counts[shard])

        return lru_cache(maxsize=4 * self.lanes)(mixed)
