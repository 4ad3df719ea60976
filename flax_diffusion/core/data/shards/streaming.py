"""Pictures in tar and Parquet shards that are not all on this machine at a time.

A shard is brought here before one of its examples is first read, and removed once others need its place.
What is brought is a copy of a tar shard in an object store, and the unpacked rows of a Parquet shard.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.data.sources.parquet import ParquetSource, count_rows, open_parquet
from flax_diffusion.core.data.sources.source import ExtraImages, Labels, Record, Source
from flax_diffusion.core.data.sources.tar import TarSource, open_tars
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.io.files import copy_file, is_local, replacing, temporary_folder

log = logging.getLogger(__name__)

_FETCHERS = 4
"""Threads that bring shards."""
_KEPT_OF_EACH = 3
"""Shards that are kept for each that is read at a time: that one, the next, and one that was just read."""


@dataclass
class _Here:
    """A shard on this machine, or on its way.

    Attributes:
        source: Its examples and the files that are deleted with it, once it is here.
        readers: Reads of it that are under way.
    """

    source: Future[tuple[Source, list[Path]]]
    readers: int = 0


class ShardCache:
    """The shards that are on this machine; all threads share it.

    Args:
        open_shard: Brings a shard, by its number, and returns its examples and the files that are deleted with it.
        most: Number of shards to keep. More are there only while all of these are being read.
    """

    def __init__(self, open_shard: Callable[[int], tuple[Source, list[Path]]], most: int):
        self._open, self._most = open_shard, most
        self._lock = threading.Lock()
        self._here: OrderedDict[int, _Here] = OrderedDict()  # the one that was used last comes last
        self._pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards")

    @contextmanager
    def reading(self, number: int) -> Iterator[Source]:
        """Yield the examples of a shard, which stays here meanwhile."""
        with self._lock:
            here = self._wanted(number)
            here.readers += 1
        try:
            yield here.source.result()[0]
        finally:
            with self._lock:
                here.readers -= 1
                if here.source.done() and here.source.exception() is not None and self._here.get(number) is here:
                    del self._here[number]  # the next read tries again

    def fetch(self, numbers: Iterable[int]) -> None:
        """Start to bring shards that will be read."""
        with self._lock:
            for number in numbers:
                self._wanted(number)

    def _wanted(self, number: int) -> _Here:
        """Return a shard that is here or on its way; the lock is held."""
        here = self._here.get(number)
        if here is None:
            for other in [*self._here]:
                if len(self._here) < self._most:
                    break
                old = self._here[other]
                if not old.readers and old.source.done():
                    del self._here[other]
                    if old.source.exception() is None:
                        for file in old.source.result()[1]:
                            file.unlink(missing_ok=True)
            here = self._here[number] = _Here(self._pool.submit(self._open, number))
        self._here.move_to_end(number)
        return here


@dataclass(frozen=True)
class StreamedSource:
    """Examples of shards of which a few are on this machine at a time.

    Attributes:
        whole: All examples, which tells their classes and names without the shards.
        ends: Number of the example after the last of each shard.
        open_shard: Brings a shard, by its number and the folder for it, and returns its examples and the files that are
            deleted with it.
        lanes: Number of shards that are read at a time.
    """

    whole: TarSource | ParquetSource = field(repr=False)
    ends: tuple[int, ...] = field(repr=False)
    open_shard: Callable[[int, Path], tuple[Source, list[Path]]] = field(repr=False)
    lanes: int

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        number = self.shard_of(index)
        with self._cache.reading(number) as source:
            return source[index - (self.ends[number - 1] if number else 0)]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of examples of each shard."""
        return tuple(end - start for start, end in itertools.pairwise((0, *self.ends)))

    def shard_of(self, index: int) -> int:
        """Return the number of an example's shard."""
        return bisect.bisect_right(self.ends, index)

    def fetch(self, numbers: Iterable[int]) -> None:
        """Start to bring shards that will be read."""
        self._cache.fetch(numbers)

    def described(self, index: int) -> Record:
        """Return an example without its picture, for which no shard is brought."""
        return Record(b"", None, self.whole.name_of(index))

    def labels(self, column: str | None) -> Labels:
        """Return the classes of all examples, for which no shard is brought."""
        return self.whole.labels(column)

    @functools.cached_property
    def _cache(self) -> ShardCache:
        folder = temporary_folder()
        return ShardCache(lambda number: self.open_shard(number, folder), _KEPT_OF_EACH * self.lanes)


def openers(shards: int) -> dict[str, Callable[..., Source]]:
    """Return functions that open tar and Parquet shards to be streamed, by the extension of the files.

    Args:
        shards: Number of shards that are read at a time.
    """
    return {".tar": functools.partial(stream_tars, shards), ".parquet": functools.partial(stream_parquet, shards)}


def stream_tars(lanes: int, files: list[Path], *arguments: Any) -> StreamedSource:
    """Open tar shards to be streamed.

    Args:
        lanes: Number of shards that are read at a time.
        files: The files, in order.
        arguments: The other ones of `open_tars`.

    Raises:
        DataError: As `open_tars`.
    """
    whole = open_tars(files, *arguments)

    def open_shard(number: int, folder: Path) -> tuple[Source, list[Path]]:
        own = whole.shard(number)
        file = files[number]
        if is_local(file):
            return own, []
        copy = folder / f"{number}.tar"
        try:
            with replacing(copy) as partial:
                copy_file(file, partial)
        except OSError as error:
            raise DataError(f"{file} cannot be copied to {folder} ({error.strerror or error})") from error
        return replace(own, copies=[copy]), [copy]

    return StreamedSource(whole, tuple(whole.ends), open_shard, lanes)


def stream_parquet(
    lanes: int,
    files: list[Path],
    image_column: str,
    caption_column: str | None,
    max_samples: int | None,
    cache_dir: Path | None,
    extra: ExtraImages | None,
) -> StreamedSource:
    """Open Parquet shards to be streamed.

    Args:
        lanes: Number of shards that are read at a time.
        files: The files, in order.
        image_column: As of `open_parquet`.
        caption_column: As of `open_parquet`.
        max_samples: As of `open_parquet`.
        cache_dir: Not used: unpacked rows are deleted after use, and lie in a temporary folder.
        extra: As of `open_parquet`.

    Raises:
        DataError: As `open_parquet`.
    """
    starts = count_rows(files, image_column, caption_column, max_samples, extra)
    column = None if extra is None else extra.column

    def open_shard(number: int, folder: Path) -> tuple[Source, list[Path]]:
        rows = int(starts[number + 1] - starts[number])
        own = open_parquet([files[number]], image_column, caption_column, rows, folder, extra)
        return own, [own.arrow_file]

    # Its rows are never read: only their classes and names are asked for.
    whole = ParquetSource(Path(), files, starts, np.asarray(starts), column)
    return StreamedSource(whole, tuple(int(end) for end in starts[1:]), open_shard, lanes)
