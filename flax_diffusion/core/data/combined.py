"""Sources that combine other sources: with one prompt for all pictures, or with pictures in pairs."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flax_diffusion.core.data.sources.folders import open_folder
from flax_diffusion.core.data.sources.source import Record, Source
from flax_diffusion.core.errors import naming
from flax_diffusion.core.io.files import as_path


@dataclass(frozen=True)
class PromptedSource:
    """The pictures of several sources, one source after the other, each with its own prompt.

    Attributes:
        sources: The sources.
        captions: The prompt of each source, or a list from which one is drawn for each example.
        repeats: Times that each picture of a source occurs in an epoch.
        ends: Index after the last picture of each source.
    """

    sources: Sequence[Source]
    captions: Sequence[str | list[str]]
    repeats: Sequence[int]
    ends: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = (len(source) * times for source, times in zip(self.sources, self.repeats, strict=True))
        object.__setattr__(self, "ends", list(itertools.accumulate(sizes)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        part = bisect.bisect_right(self.ends, index)
        source = self.sources[part]
        place = index - (self.ends[part - 1] if part else 0)
        return replace(source[place % len(source)], caption=self.captions[part])


@dataclass(frozen=True)
class PairedSource:
    """Pairs of pictures: record 2i shows the new thing, record 2i + 1 its class; the shorter source starts over.

    The loss is the mean over the former plus `prior_loss_weight` times the mean over the latter. As weights in one mean
    over both, these are 2 and 2 · `prior_loss_weight`.

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
            return replace(self.classes[pair % len(self.classes)], weight=2 * self.prior_loss_weight)
        return replace(self.instances[pair % len(self.instances)], weight=2.0)


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
