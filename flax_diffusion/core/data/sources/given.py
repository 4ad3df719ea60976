"""Examples that `train` is given in Python: a sequence, any other iterable, or a table of the library `datasets`."""

from __future__ import annotations

import io
import itertools
import pickle
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from flax_diffusion.core.data.images.decoding import checksum, decode
from flax_diffusion.core.data.sources.labels import labels_of
from flax_diffusion.core.data.sources.source import (
    DEFAULT_IMAGE_COLUMN,
    DEFAULT_LABEL_COLUMN,
    ExtraImages,
    Labels,
    Record,
    Source,
    whole_caption,
)
from flax_diffusion.core.errors import ConfigError, DataError, shown
from flax_diffusion.core.io.files import as_path

if TYPE_CHECKING:
    import datasets

NAME = "examples"
"""Name of the argument of `train`, and of what it holds in messages."""

Examples = Iterable[Mapping[str, Any]]
"""What `train` takes; see `open_examples`."""

_PICTURES = "a Pillow image, an array, the path of a file, or the bytes of one"
_END = object()
_LOADING = threading.Lock()  # Pillow reads a file's pixels late, and not in two threads at once


def open_examples(
    examples: Examples,
    *,
    image_column: str = DEFAULT_IMAGE_COLUMN,
    caption_column: str | None = "text",
    max_samples: int | None = None,
    extra: ExtraImages | None = None,
    num_workers: int = 0,
) -> Source:
    """Take examples that Python gives.

    Each is a mapping with a picture, and perhaps a caption (a text or several), a class and a second picture, by the
    names of columns. A picture is a Pillow image, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8 or of
    floats in [0, 1], the path of a file, or the bytes of one.

    A sequence, which has a length and takes indices, is read lazily: in several threads, once before the first step to
    check it, and then whenever an example is used. Anything else that can be iterated over is read to its end at once.
    Its files stay as they are, and all other pictures are held in memory as uint8, a byte for each pixel and channel.
    A table of the library `datasets` stays where it is; its columns are checked at once.

    Args:
        examples: The examples.
        image_column: Name of the picture.
        caption_column: Name of the caption; None for no captions.
        max_samples: Number of examples to take, from the first; None for all. It may end an endless generator.
        extra: Name of the second picture; None for one picture each.
        num_workers: Number of processes that make examples, to which these are then copied.

    Returns:
        The source, with at least one record.

    Raises:
        ConfigError: If they cannot be copied to other processes, of which there are some.
        DataError: If they are no examples, or none are there; for anything but a sequence also if one cannot be used.
    """
    _check_kind(examples, image_column)
    columns = _Columns(image_column, caption_column, extra)
    if extra is not None:
        extra.refuse_folder(NAME)
    table, sequence = _as_table(examples), _as_sequence(examples)
    if sequence is not None and not len(sequence):
        raise DataError(f"{NAME}: there are none; give at least one")
    if table is not None:
        from flax_diffusion.core.data.sources.hub import of_table

        names: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column, "extra": extra}
        source = GivenSource(of_table(table, NAME, **names, max_samples=max_samples))
    elif sequence is not None:
        count = len(sequence) if max_samples is None else min(len(sequence), max_samples)
        source = GivenSource(_Sequence(sequence, columns, count))
    else:
        held = _held(examples, columns, max_samples)
        source = GivenSource(_Sequence(held, columns, len(held)))
    if num_workers:
        _check_picklable(source, num_workers)
    return source


def _check_kind(examples: Any, image_column: str) -> None:
    """Raise DataError for what can hold no examples."""
    library = sys.modules.get("datasets")  # who has a table of it has imported it
    if library is not None and isinstance(examples, library.DatasetDict | library.IterableDatasetDict):
        raise DataError(f"{NAME}: is a dictionary of the splits {', '.join(map(str, examples))}: give one of them")
    iterable = isinstance(examples, Iterable) or _as_sequence(examples) is not None
    if not iterable or isinstance(examples, str | bytes | Mapping):
        raise DataError(
            f"{NAME} {shown(examples)}: must be a sequence or a generator of mappings such as "
            f"{{'{image_column}': picture}}, or a Dataset of the library datasets, and is a {type(examples).__name__}"
        )


def _as_table(examples: Any) -> datasets.Dataset | None:
    """Return examples that are a table, which gives them as it holds them; None for others."""
    library = sys.modules.get("datasets")
    is_table = library is not None and isinstance(examples, library.Dataset)
    return examples if is_table and examples.format["type"] is None else None


def _as_sequence(examples: Any) -> Sequence[Mapping[str, Any]] | None:
    """Return examples that have a length and take indices; None for others."""
    return examples if hasattr(examples, "__len__") and hasattr(examples, "__getitem__") else None


@dataclass(frozen=True)
class _Columns:
    """Names under which an example holds its parts; see `open_examples`."""

    image: str
    caption: str | None
    second: ExtraImages | None

    def record(self, example: object, name: str) -> Record:
        """Return an example as a record.

        Raises:
            DataError: If it lacks a part, or has one that cannot be used.
        """
        picture = _picture(self.part(example, self.image, "image_column", name), self.image, name)
        caption = extra = None
        if self.caption is not None:
            caption = _caption(self.part(example, self.caption, "caption_column", name), self.caption, name)
        if self.second is not None:
            column = self.second.column
            value = self.part(example, column, self.second.option, name)
            extra = Record(_picture(value, column, name), None, f"{name} {column}")
        return Record(picture, caption, name, extra=extra)

    def part(self, example: object, column: str, option: str, name: str) -> Any:
        """Return a part of an example.

        Raises:
            DataError: If it is not there.
        """
        if not isinstance(example, Mapping):
            kind = type(example).__name__
            raise DataError(f"{name}: must be a mapping such as {{'{self.image}': picture}}, and is a {kind}", name)
        if example.get(column) is None:
            there = ", ".join(str(one) for one, value in example.items() if value is not None) or "nothing"
            raise DataError(f"{name} has no '{column}', only {there}: add it, or name another part by --{option}", name)
        return example[column]


def _caption(value: Any, column: str, name: str) -> str | list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) or one is None for one in texts):
        raise DataError(f"{name}: its '{column}' is {shown(value)}; it must be a text or a list of texts", name)
    caption = whole_caption(value if isinstance(value, str) else [*texts], name)
    assert caption is not None
    return caption


def _picture(value: Any, column: str, name: str) -> bytes | Path | Image.Image | np.ndarray:
    if isinstance(value, str):
        return as_path(value)
    if isinstance(value, bytes | Path):
        return value
    where = f"{name}: its '{column}'"
    if isinstance(value, Image.Image):
        try:
            with _LOADING:
                value.load()
        except Exception as error:  # its format's plug-in may raise anything
            raise DataError(f"{where} cannot be decoded ({error}); replace or remove it", name) from error
        if value.mode == "F":
            raise DataError(f"{where} has floating-point pixels, with no defined white; convert it to 8 bits", name)
        return value
    if not hasattr(value, "__array__"):
        raise DataError(f"{where} is {shown(value)}; it must be {_PICTURES}", name)
    try:
        array = np.asarray(value)
    except Exception as error:  # such as a tensor that needs its gradient, or lies on a device
        raise DataError(f"{where} is no array in this machine's memory ({error}); convert it to NumPy", name) from error
    return _eight_bit(array, where, name)


def _eight_bit(array: np.ndarray, where: str, name: str) -> np.ndarray:
    """Return a picture as uint8 (H, W), (H, W, 3) or (H, W, 4)."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)) or not array.size:
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        fix = "; move the channels to the end" if first else ""
        raise DataError(
            f"{where} has the shape {array.shape}; it must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4){fix}", name
        )
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # nan too
            raise DataError(
                f"{where} has floats from {low:g} to {high:g}; they must be in [0, 1]: scale them, or give uint8", name
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise DataError(f"{where} is an array of {array.dtype}; it must be uint8, or floats in [0, 1]", name)
    return array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array


@dataclass(frozen=True)
class _Sequence:
    """Examples with random access. The first `count` of them count."""

    examples: Sequence[Mapping[str, Any]] = field(repr=False)
    columns: _Columns
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        name = f"{NAME}[{index}]"
        return self.columns.record(self._read(index, name), name)

    def _read(self, index: int, name: str) -> Mapping[str, Any]:
        try:
            return self.examples[index]
        except Exception as error:  # whatever the sequence does to read one
            raise DataError(f"{name} cannot be read ({type(error).__name__}: {error})", name) from error

    def labels(self, column: str | None) -> Labels:
        """Return the classes of all examples, each of which is read for it.

        Raises:
            DataError: If an example has none.
        """
        column, values = column or DEFAULT_LABEL_COLUMN, []
        for index in range(self.count):
            name = f"{NAME}[{index}]"
            value = self.columns.part(self._read(index, name), column, "label_column", name)
            values.append(int(value) if isinstance(value, np.integer) else value)
        return Labels(values, None)


@dataclass(frozen=True)
class GivenSource:
    """Given examples, which only their content tells from others, as all are named by their index.

    Attributes:
        source: The examples.
    """

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.source[index]

    def labels(self, column: str | None) -> Labels:
        """Return the classes of all examples; see `labels.labels_of`."""
        return labels_of(self.source, column)

    def described(self, index: int) -> Record:
        """Return an example with a checksum of its pictures."""
        record = self.source[index]
        pictures = [record] if record.extra is None else [record, record.extra]
        try:
            return replace(record, content=" ".join(map(checksum, pictures)))
        except OSError as error:
            raise DataError(f"{record.name} cannot be read ({error}); replace or remove it", record.name) from error


def _held(examples: Examples, columns: _Columns, most: int | None) -> list[dict[str, Any]]:
    """Read examples to their end, and return them as they are held."""
    held: list[dict[str, Any]] = []
    iterator = itertools.islice(examples, most)
    while True:
        name = f"{NAME}[{len(held)}]"
        try:
            example = next(iterator, _END)
        except Exception as error:  # whatever the generator does
            raise DataError(f"{name} cannot be read ({type(error).__name__}: {error})", name) from error
        if example is _END:
            break
        record = columns.record(example, name)
        assert isinstance(example, Mapping)
        held.append({**example, columns.image: _in_memory(record)})
        if columns.second is not None and record.extra is not None:
            held[-1][columns.second.column] = _in_memory(record.extra)
    if not held:
        raise DataError(f"{NAME}: there are none; give at least one")
    return held


def _in_memory(record: Record) -> bytes | Path | np.ndarray:
    """Return a picture that no later use of what it came from changes."""
    image = record.image
    if isinstance(image, Image.Image):
        return np.asarray(decode(record))
    return image.copy() if isinstance(image, np.ndarray) else image


class _Nowhere(io.RawIOBase):
    """File that keeps nothing."""

    def write(self, data: Any, /) -> int:
        return len(data)


def _check_picklable(source: Source, num_workers: int) -> None:
    try:
        pickle.Pickler(_Nowhere(), protocol=5).dump(source)
    except Exception as error:  # pickling runs code of whatever the examples hold
        raise ConfigError(
            f"--dataloader_num_workers {num_workers}: the {NAME} cannot be copied to other processes "
            f"({type(error).__name__}: {error}): give 0, so that threads decode them, or make them picklable"
        ) from error
