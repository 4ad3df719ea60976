"""Classes of pictures: from a column, or from the folders that they lie in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.data.sources.source import Labels, Record, Source, description_of, first_few, pictures_of
from flax_diffusion.core.data.sources.splits import is_split
from flax_diffusion.core.errors import DataError, shown


@dataclass(frozen=True)
class LabelledSource:
    """Pictures with the number of the class of each.

    Attributes:
        source: The pictures.
        labels: Their classes, int32 (N,).
        classes: Names of the classes.
    """

    source: Source
    labels: np.ndarray = field(repr=False)
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return replace(self.source[index], label=int(self.labels[index]))

    def pictures(self) -> np.ndarray:
        """Return the number of each example's picture; see `source.pictures_of`."""
        return pictures_of(self.source)

    def described(self, index: int) -> Record:
        """Return an example, without its picture where the source can tell the rest of it at once."""
        return replace(description_of(self.source)(index), label=int(self.labels[index]))


def with_labels(source: Source, column: str | None, known: Sequence[str] = ()) -> LabelledSource:
    """Return pictures with their classes.

    Args:
        source: The pictures, of a kind that can tell classes.
        column: Column that holds the classes; None for `label` or, in folders without such a column, for the names of
            the folders that the pictures lie in.
        known: Names of the classes of a model. Where these have all the names of the data, their numbers are taken.

    Raises:
        DataError: If a picture has no class, or one that is neither a name nor a number from 0.
    """
    values, names = labels_of(source, column)
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | int) or (isinstance(value, int) and value < 0):
            name = source[index].name
            raise DataError(f"{name}: its class is {shown(value)}; it must be a name or a number from 0", name)
    if any(isinstance(value, str) for value in values):
        names = sorted({str(value) for value in values}) if names is None else names
        names = known if set(names) <= set(known) else names
        number = {name: place for place, name in enumerate(names)}
        numbers = [number[str(value)] for value in values]
    else:
        numbers = [int(value) for value in values]
        names = [str(number) for number in range(max(numbers) + 1)] if names is None else names
    return LabelledSource(source, np.array(numbers, np.int32), tuple(names))


def labels_of(source: Source, column: str | None) -> Labels:
    """Return the classes of all pictures of a source.

    Args:
        source: The source.
        column: Column that holds them; None for what is usual.

    Raises:
        DataError: If it does not tell them.
    """
    tell = getattr(source, "labels", None)
    if tell is None:
        raise DataError(f"{type(source).__name__}: has no classes; use a dataset with a column of them, or folders")
    return tell(column)


def named(values: Sequence[Any], names: Sequence[str] | None, where: str) -> Labels:
    """Return classes that a table holds as numbers, by the names that it has for these.

    Args:
        values: The column.
        names: Names of the classes; None for none.
        where: The table, for messages.

    Raises:
        DataError: If a number has no name.
    """
    if names is None:
        return Labels(values, None)
    found: list[str | int] = []
    for row, value in enumerate(values):
        if isinstance(value, int) and not 0 <= value < len(names):
            raise DataError(f"{where} row {row}: its class is {value}, and the classes are 0 to {len(names) - 1}")
        found.append(names[value] if isinstance(value, int) else value)
    return Labels(found, names)


def joined(parts: Sequence[Labels], repeats: Sequence[int]) -> Labels:
    """Return the classes of several sources, one after the other.

    Args:
        parts: Those of each source.
        repeats: Times that each picture of a source occurs.
    """
    values = [value for part, times in zip(parts, repeats, strict=True) for value in [*part.values] * times]
    names = [part.names for part in parts]
    if any(own is None for own in names):
        return Labels(values, None)
    first = list(names[0] or ())
    if all(list(own or ()) == first for own in names):
        return Labels(values, first)
    return Labels(values, sorted({name for own in names for name in own or ()}))


def of_folders(root: Path, files: Sequence[str], pictures_in: Callable[[Path], Sequence[str]]) -> Labels:
    """Return the folder of each picture as its class, in the order of the folders' names.

    Args:
        root: The dataset's folder, whose folders are the classes, or hold one of `train` and its kin that has them.
        files: The pictures, relative to it.
        pictures_in: Returns the pictures in a folder.

    Raises:
        DataError: If a picture lies in no folder, or a folder holds none.
    """
    parts = [file.split("/")[:-1] for file in files]
    first = {part[0] for part in parts if part}
    if len(first) == 1 and is_split(*first) and all(len(part) > 1 for part in parts):
        root, parts = root / first.pop(), [part[1:] for part in parts]
    outside = [file for file, part in zip(files, parts, strict=True) if not part]
    if outside:
        raise DataError(
            f"{len(outside)} of {len(files)} pictures in {root} lie in no folder of a class: {first_few(outside)}; put "
            "the pictures of each class into a folder, or give --label_column"
        )
    values = [part[0] for part in parts]
    met = set(values)
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    empty = [name for name in names if name not in met and not pictures_in(root / name)]
    if empty:
        raise DataError(f"{root / empty[0]}: is the folder of a class and holds no pictures; add some, or remove it")
    return Labels(values, names)


def of_rows(found: Mapping[str, Any], files: Sequence[str], root: Path, column: str) -> Labels:
    """Return the classes that metadata give the pictures of a folder.

    Args:
        found: Class by picture, of the rows that have one.
        files: The pictures, relative to the folder.
        root: The folder, for messages.
        column: The column, for messages.

    Raises:
        DataError: If a picture has none.
    """
    missing = [file for file in files if found.get(file) is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} pictures in {root} have no {column}: {first_few(missing)}; add it to "
            "their rows, or remove the pictures"
        )
    return Labels([found[file] for file in files], None)
