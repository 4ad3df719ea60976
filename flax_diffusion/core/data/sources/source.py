"""The interface of all sources of training images, with random access and picklable, and what they share."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from flax_diffusion.core.errors import DataError

DEFAULT_IMAGE_COLUMN = "image"
DEFAULT_LABEL_COLUMN = "label"
IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm",
    ".jfif", ".jpe", ".apng", ".avifs", ".dib", ".j2c", ".j2k", ".jpc", ".jpf", ".jpx", ".pbm", ".pnm",
    ".mpo",
)  # fmt: skip
"""Extensions that Pillow knows of the formats that `images.decode` reads; .mpo is a JPEG followed by more pictures."""


PART_WEIGHTS = "_loss_weights"
"""End of the names of a batch's arrays with the weights of its examples in a part of the loss, which is only logged."""


@dataclass(frozen=True, slots=True)
class Record:
    """One example as it is stored, with its picture not decoded yet."""

    # Encoded file, its path, decoded, or uint8 (H, W[, 3 or 4]); b"" where there is a posterior in its place.
    image: bytes | Path | Image.Image | np.ndarray
    caption: str | list[str] | None
    name: str  # for messages
    weight: float = 1.0  # weight of the loss
    part_weights: Mapping[str, float] = field(default_factory=dict)  # weights in parts of the loss, by their name
    extra: "Record | None" = None  # a second picture of the example: what a ControlNet follows, or a mask
    label: int | None = None  # number of its class
    posterior: np.ndarray | None = None  # of its latents and perhaps their mirror image's, (1 or 2, 2, c, h, w)
    content: str = ""  # checksum of its pictures, where neither their names nor the rest tells datasets apart


@dataclass(frozen=True, kw_only=True)
class ExtraImages:
    """Place of the second picture of each example, in a column or in a folder.

    Attributes:
        column: Column that holds the pictures. In metadata it names their files, as `<column>_file_name` does.
        folder: Folder that holds them by the names of the first pictures; None for the column.
        option: Name of the option that gives the column, for messages.
        folder_option: Name of the option that gives the folder, for messages.
    """

    column: str
    folder: Path | None = None
    option: str
    folder_option: str

    def refuse_folder(self, where: str) -> None:
        """Refuse the folder where examples have no file names, which `where` describes for the message.

        Raises:
            DataError: If there is a folder.
        """
        if self.folder is not None:
            raise DataError(
                f"--{self.folder_option} {self.folder}: goes with a folder of pictures, and {where} has rows; give the "
                f"column by --{self.option}"
            )


class Labels(NamedTuple):
    """Classes of all pictures of a source.

    Attributes:
        values: Class of each picture: its name, or its number from 0.
        names: Names of all classes in the order of their numbers; None where only the values tell them.
    """

    values: Sequence[str | int]
    names: Sequence[str] | None


class Source(Protocol):
    """Sequence of records with random access. Picklable, and cheap to open again in a worker process.

    One that can tell the classes of its pictures has a method `labels` too, of the name of a column or None for
    `DEFAULT_LABEL_COLUMN`, which returns `Labels`. One that has a picture more than once has a method `pictures`; see
    `pictures_of`. `described` of an index returns a record without its picture where the source can tell the rest of it
    at once, or with a `content`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@dataclass(frozen=True)
class ArraySource:
    """Pictures held in memory."""

    images: np.ndarray = field(repr=False)  # uint8 (N, H, W[, 3])
    captions: list[str] | None = field(repr=False)
    name: str
    extras: np.ndarray | None = field(default=None, repr=False)  # uint8 (N, H, W[, 3])
    classes: Labels | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        caption = None if self.captions is None else self.captions[index]
        name = f"{self.name}[{index}]"
        extra = None if self.extras is None else Record(self.extras[index], None, name)
        return Record(self.images[index], caption, name, extra=extra)

    def labels(self, column: str | None) -> Labels:
        """Return the classes of the pictures, whose only column is `label`.

        Raises:
            DataError: If there are none, or for another column.
        """
        columns = [] if self.classes is None else [DEFAULT_LABEL_COLUMN]
        require_column(column or DEFAULT_LABEL_COLUMN, columns, option="label_column", where=self.name)
        assert self.classes is not None
        return self.classes


def require_column(
    column: str, columns: Iterable[str], *, option: str, where: str, likely: Sequence[str] | None = None
) -> None:
    """Refuse a column that does not exist.

    Args:
        column: The requested column.
        columns: The columns that exist.
        option: Name of the option that requests it.
        where: File or dataset, for the message.
        likely: Columns that the user may have meant; None for all.

    Raises:
        DataError: If the column does not exist. The message lists the columns, and suggests the closest likely one.
    """
    columns = list(columns)
    if column in columns:
        return
    likely = columns if likely is None else likely
    match = likely if len(likely) == 1 else difflib.get_close_matches(column, likely, n=1)
    fix = f"give --{option} {match[0]}" if match else f"give one of them as --{option}"
    raise DataError(f"--{option} is {column}, but {where} has the columns {', '.join(columns) or '(none)'}; {fix}")


def whole_caption(caption: str | list[str | None] | None, name: str) -> str | list[str] | None:
    """Refuse a list of captions that is empty or contains None.

    Args:
        caption: Caption or captions of a row; None for data without captions.
        name: Name of the row, for the message.

    Returns:
        The caption as it is.

    Raises:
        DataError: If the list is refused.
    """
    if caption is None or isinstance(caption, str):
        return caption
    texts = [one for one in caption if one is not None]
    if not texts:
        raise DataError(f"{name} has no caption; give it one or remove it", name)
    if len(texts) < len(caption):
        raise DataError(f"{name} has a null among its captions; remove it", name)
    return texts


def description_of(source: Source) -> Callable[[int], Record]:
    """Return the function of an index that describes an example; see `Source`."""
    return getattr(source, "described", source.__getitem__)


def pictures_of(source: Source) -> np.ndarray:
    """Return the number of each example's picture, int64 (N,): that of the first example that has it."""
    tell = getattr(source, "pictures", None)
    return np.arange(len(source)) if tell is None else tell()


@dataclass(frozen=True)
class Part:
    """Some of the examples of a source.

    Attributes:
        source: The source.
        indices: Indices of its examples, int64 (N,).
    """

    source: Source
    indices: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]

    def described(self, index: int) -> Record:
        """Return an example as its source describes it; see `Source`."""
        return description_of(self.source)(int(self.indices[index]))


def first_few(names: list[str]) -> str:
    """Join the first three names for a message."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
