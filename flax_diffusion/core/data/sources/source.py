"""Where training images come from: one random-access, picklable interface over folders, Parquet, the Hub, digits."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from flax_diffusion.core.errors import DataError

DEFAULT_IMAGE_COLUMN = "image"


@dataclass(frozen=True, slots=True)
class Record:
    """One example as stored: the picture is not decoded yet."""

    image: bytes | Path | Image.Image | np.ndarray  # encoded file, path of one, decoded, or uint8 (H, W[, 3 or 4])
    caption: str | list[str] | None
    name: str  # for messages
    weight: float = 1.0  # of its loss


class Source(Protocol):
    """Random access to records. Picklable, and cheap to open again in a worker process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@dataclass(frozen=True)
class ArraySource:
    """Pictures held in memory."""

    images: np.ndarray = field(repr=False)  # uint8 (N, H, W[, 3])
    captions: list[str] | None = field(repr=False)
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        caption = None if self.captions is None else self.captions[index]
        return Record(self.images[index], caption, f"{self.name}[{index}]")


def require_column(
    column: str, columns: Iterable[str], *, option: str, where: str, likely: Sequence[str] | None = None
) -> None:
    """Refuse a column that is not there.

    Args:
        column: Asked for.
        columns: That there are.
        option: By which it was asked for.
        where: File or dataset, for the message.
        likely: Of them, those that may have been meant; None for all.

    Raises:
        DataError: Naming the columns there are, and the option with the one that was meant, if that can be told.
    """
    columns = list(columns)
    if column in columns:
        return
    likely = columns if likely is None else likely
    match = likely if len(likely) == 1 else difflib.get_close_matches(column, likely, n=1)
    fix = f"give --{option} {match[0]}" if match else f"give one of them as --{option}"
    raise DataError(f"--{option} is {column}, but {where} has the columns {', '.join(columns) or '(none)'}; {fix}")


def whole_caption(caption: str | list[str | None] | None, name: str) -> str | list[str] | None:
    """Refuse a list of captions that is empty, or has an empty place.

    Args:
        caption: Of a row; None for data without captions.
        name: Of the row, for the message.

    Returns:
        The caption as it is.

    Raises:
        DataError: Naming the row.
    """
    if caption is None or isinstance(caption, str):
        return caption
    texts = [one for one in caption if one is not None]
    if not texts:
        raise DataError(f"{name} has no caption; give it one or remove it", name)
    if len(texts) < len(caption):
        raise DataError(f"{name} has a null among its captions; remove it", name)
    return texts


def first_few(names: list[str]) -> str:
    """Join the first three names for a message."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
