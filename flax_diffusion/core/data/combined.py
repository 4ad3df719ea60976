"""Sources that combine other sources: one after the other, or with pictures in pairs."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import NamedTuple

import numpy as np

from flax_diffusion.core.data.sources.folders import open_folder
from flax_diffusion.core.data.sources.labels import joined, labels_of
from flax_diffusion.core.data.sources.source import Labels, Record, Source, description_of
from flax_diffusion.core.errors import ConfigError, naming
from flax_diffusion.core.io.files import as_path, lies_in


class Folder(NamedTuple):
    """A folder of pictures among several.

    Attributes:
        name: Its path.
        repeats: Times that each of its pictures occurs in an epoch; None where it does not say.
    """

    name: str
    repeats: int | None


def folders_of(text: str) -> list[Folder]:
    """Return the folders that an option names.

    Args:
        text: A folder, or several as `FOLDER:REPEATS,FOLDER:REPEATS`, where `:REPEATS` may be left out.

    Raises:
        ConfigError: If it can be read in two ways, if a number is none of repeats, or if folders overlap.
    """
    plain = [Folder(text, None)]
    rest = text.partition("://")[2] or text
    if "," not in rest and ":" not in rest:
        return plain
    is_one = os.path.exists(text)  # which is also False where a long list is no possible name
    try:
        folders = [_folder(item, text) for item in text.split(",")]
    except ConfigError:
        if is_one:
            return plain
        raise
    if is_one and folders != plain and all(as_path(one.name).exists() for one in folders):
        raise ConfigError(f"{text}: is the name of a folder, and a list of others that there are: rename the former")
    if is_one:
        return plain
    for one, other in permutations(folders, 2):
        if lies_in(one.name, other.name):
            raise ConfigError(
                f"{one.name} lies in {other.name}, so that its pictures would occur for both: name folders apart from "
                "each other"
            )
    return folders


def _folder(item: str, text: str) -> Folder:
    name, colon, repeats = item.strip().rpartition(":")
    if not colon or not repeats.removeprefix("-").replace(".", "", 1).isdecimal():
        name, repeats = item.strip(), ""
    if not name:
        raise ConfigError(f"{text!r}: must be a folder, or several such as photos:10,drawings:2; one has no name")
    if repeats and not (repeats.isdecimal() and int(repeats)):
        raise ConfigError(f"{item.strip()}: pictures occur a whole number of times in an epoch, such as {name}:1")
    return Folder(name, int(repeats) if repeats else None)


@dataclass(frozen=True)
class CombinedSource:
    """The pictures of several sources, one source after the other.

    Attributes:
        sources: The sources.
        captions: The prompt of each source, or a list from which one is drawn for each example; None for those that its
            pictures have.
        repeats: Times that each picture of a source occurs in an epoch.
        ends: Index after the last picture of each source.
    """

    sources: Sequence[Source]
    captions: Sequence[str | list[str] | None]
    repeats: Sequence[int]
    ends: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = (len(source) * times for source, times in zip(self.sources, self.repeats, strict=True))
        object.__setattr__(self, "ends", list(itertools.accumulate(sizes)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        return self._at(index, lambda source: source.__getitem__)

    def described(self, index: int) -> Record:
        """Return an example as its source describes it; see `source.Source`."""
        return self._at(index, description_of)

    def _at(self, index: int, reader: Callable[[Source], Callable[[int], Record]]) -> Record:
        part = bisect.bisect_right(self.ends, index)
        source = self.sources[part]
        place = index - (self.ends[part - 1] if part else 0)
        record, caption = reader(source)(place % len(source)), self.captions[part]
        return record if caption is None else replace(record, caption=caption)

    def pictures(self) -> np.ndarray:
        """Return the number of each example's picture, int64 (N,), which is that of the first example with it."""
        starts = [0, *self.ends[:-1]]
        each = zip(starts, self.sources, self.repeats, strict=True)
        return np.concatenate([start + np.tile(np.arange(len(own)), times) for start, own, times in each])

    def labels(self, column: str | None) -> Labels:
        """Return the classes of all pictures, as each source tells them.

        Args:
            column: The column; None for what is usual.

        Raises:
            DataError: If a source does not tell them.
        """
        return joined([labels_of(source, column) for source in self.sources], self.repeats)


@dataclass(frozen=True)
class PairedSource:
    """Pairs of pictures: record 2i shows the new thing, record 2i + 1 its class; the shorter source starts over.

    The loss is the mean over the former plus `prior_loss_weight` times the mean over the latter. As weights in one mean
    over both, these are 2 and 2 · `prior_loss_weight`. The two means are logged as `instance_loss` and `prior_loss`.

    Attributes:
        instances: Pictures of the new thing.
        classes: Pictures of its class.
        prior_loss_weight: Weight of the class pictures' loss.
    """

    instances: Source
    classes: Source
    prior_loss_weight: float

    def __len__(self) -> int:
        return 2 * max(len(self.instances), len(self.classes))

    def __getitem__(self, index: int) -> Record:
        pair, of_class = divmod(index, 2)
        if of_class:
            record = self.classes[pair % len(self.classes)]
            return replace(record, weight=2 * self.prior_loss_weight, part_weights={"instance": 0.0, "prior": 2.0})
        record = self.instances[pair % len(self.instances)]
        return replace(record, weight=2.0, part_weights={"instance": 2.0, "prior": 0.0})


def open_uncaptioned(option: str, folder: str | None, most: int | None = None) -> Source:
    """Open a folder of pictures without captions.

    Args:
        option: The option that names the folder, for messages.
        folder: Path of the folder.
        most: Largest number of pictures to take; None for all.

    Raises:
        DataError: If the folder does not exist or holds no pictures.
    """
    with naming(option):
        return open_folder(as_path(str(folder)), caption_column=None, max_samples=most)
