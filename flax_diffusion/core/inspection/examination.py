"""Every picture of a dataset decoded, and every caption tokenized: what is broken, equal, small or cut off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from flax_diffusion.core.data.bad import example_name
from flax_diffusion.core.data.captions import TokenizePrompt
from flax_diffusion.core.data.check import reads_locally
from flax_diffusion.core.data.images.decoding import checksum, decode
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import DataError

_THREADS, _THREADS_IN_STORE = 4, 32  # a picture in an object store is waited for most of the time


@dataclass(frozen=True)
class Caption:
    """A caption of a picture.

    Attributes:
        text: The caption.
        tokens: Number of its tokens, with those that mark its start and end; None where there is no tokenizer.
        rest: The part that the text encoders do not see; "" for none.
    """

    text: str
    tokens: int | None
    rest: str


@dataclass(frozen=True)
class Seen:
    """What one example showed.

    Attributes:
        index: Its index in the source.
        name: Its name.
        reason: Why it cannot be used; None where it can.
        size: Width and height of its picture in pixels, upright; None where it cannot be used.
        checksum: Checksum of its picture's file, or of its pixels where it is no file.
        captions: Its captions.
        label: Number of its class; None without classes.
    """

    index: int
    name: str
    reason: str | None = None
    size: tuple[int, int] | None = None
    checksum: str = ""
    captions: tuple[Caption, ...] = ()
    label: int | None = None


@dataclass
class Examination:
    """What the examples of a dataset showed.

    Attributes:
        examples: Number of examples in the dataset.
        seen: What those that were looked at showed, in order; a picture that occurs several times is there once.
        times: How often each picture occurs among those that were looked at, by name.
    """

    examples: int
    seen: list[Seen] = field(default_factory=list)
    times: Counter[str] = field(default_factory=Counter)

    @property
    def broken(self) -> list[Seen]:
        """Examples that cannot be used."""
        return [one for one in self.seen if one.reason is not None]

    @property
    def good(self) -> list[Seen]:
        """Examples that can be used."""
        return [one for one in self.seen if one.reason is None]

    @property
    def sizes(self) -> np.ndarray:
        """Widths and heights of the good pictures in pixels, int64 (N, 2)."""
        return np.array([one.size for one in self.good], np.int64).reshape(-1, 2)

    def duplicates(self) -> list[list[str]]:
        """Return the names of pictures that are equal byte by byte, one list for each picture, the longest first."""
        names: dict[str, list[str]] = {}
        for one in self.good:
            names.setdefault(one.checksum, []).append(one.name)
        return sorted((equal for equal in names.values() if len(equal) > 1), key=lambda equal: -len(equal))


def examine(source: Source, tokenize: TokenizePrompt | None, limit: int | None) -> Examination:
    """Decode the pictures of a dataset and tokenize its captions; a bar on stderr shows progress.

    Args:
        source: The examples.
        tokenize: The captions' tokenizers; None for none.
        limit: Largest number of examples to look at, which are evenly spaced; None for all.
    """
    count = len(source) if limit is None else min(limit, len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64)).tolist()
    found, names = Examination(len(source)), set[str]()

    def look(index: int) -> Seen:
        return _look(source, index, tokenize)

    with ThreadPoolExecutor(_THREADS if reads_locally(source) else _THREADS_IN_STORE) as pool:
        for one in tqdm(pool.map(look, _first_of_each(source, indices, names, found)), "inspecting", unit="picture"):
            found.seen.append(one)
    return found


def _first_of_each(source: Source, indices: Sequence[int], names: set[str], found: Examination) -> Iterator[int]:
    """Yield the indices of the examples whose pictures did not occur before, and count how often each occurs."""
    for index in indices:
        name = example_name(source, index)
        found.times[name] += 1
        if name not in names:
            names.add(name)
            yield index


def _look(source: Source, index: int, tokenize: TokenizePrompt | None) -> Seen:
    name = example_name(source, index)
    try:
        record = source[index]
        size = decode(record).size
        if record.extra is not None:
            decode(record.extra)
        captions = [record.caption] if isinstance(record.caption, str) else record.caption or []
        told = tuple(_told(caption, tokenize) for caption in captions)
        return Seen(index, name, None, size, checksum(record), told, record.label)
    except (DataError, OSError) as error:
        return Seen(index, name, str(error))


def _told(caption: str, tokenize: TokenizePrompt | None) -> Caption:
    if tokenize is None:
        return Caption(caption, None, "")
    return Caption(caption, tokenize.count(caption), tokenize.cut_off(caption))
