"""Captions from metadata.jsonl and metadata.csv, read strictly: nobody would notice a caption that was cut off."""

import csv
import difflib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from flax_diffusion.core.data.sources.source import (
    DEFAULT_IMAGE_COLUMN,
    DEFAULT_LABEL_COLUMN,
    ExtraImages,
    first_few,
    require_column,
)
from flax_diffusion.core.errors import DataError, shown
from flax_diffusion.core.io.untrusted import open_text, parse_json, path_below, path_inside

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
MAX_METADATA_BYTES = 2**31
_MOST_COMPARED = 10_000  # largest number of names that a missing one is compared with, letter by letter

Caption = str | list[str] | None

log = logging.getLogger(__name__)


def read_metadata(
    root: Path, metadata: Sequence[str], images: Sequence[str], image_column: str, caption_column: str
) -> dict[str, Caption]:
    """Read the captions of a folder of images.

    Each picture is one example. If several rows of one file name a picture, it has several captions, of which one is
    drawn each time. Two files must give a picture the same captions.

    Args:
        root: The folder.
        metadata: Its metadata files, relative to it.
        images: Its pictures, relative to it.
        image_column: Column of the file's name; `image`, the default, means `file_name` if there is one.
        caption_column: Column of the caption.

    Returns:
        The caption or captions of each picture, by its path relative to `root`, in the order of the rows.

    Raises:
        DataError: If a file is not CSV or JSON lines, columns or pictures are missing, a path leaves the folder, or two
            files contradict each other.
    """
    captions: dict[str, Caption] = {}
    named_in: dict[str, str] = {}
    known, rows = set(images), 0
    for file in metadata:
        where = str(root / file)
        own = _captions(root, file, image_column, caption_column)
        rows += sum(len(several) for several in own.values())
        _require_files(root, where, os.path.dirname(file), [name for name in own if name not in known], images)
        for name, several in own.items():
            caption = _merged(several)
            if captions.setdefault(name, caption) != caption:
                raise DataError(
                    f"{named_in[name]} and {where} give {name} different captions, {shown(captions[name])} and "
                    f"{shown(caption)}; remove one of the rows"
                )
            named_in.setdefault(name, where)
    if rows > len(captions):
        log.info("%s: %d rows name %d pictures, each of which is one example", root, rows, len(captions))
    return captions


def read_extras(
    root: Path, metadata: Sequence[str], images: Sequence[str], image_column: str, extra: ExtraImages
) -> dict[str, str]:
    """Read which second picture belongs to each picture of a folder.

    Args:
        root: The folder.
        metadata: Its metadata files, relative to it.
        images: Its pictures, relative to it.
        image_column: As in `read_metadata`.
        extra: Column of the second pictures' files, relative to the metadata's own folder.

    Returns:
        Path of the second picture by path of the first, both relative to `root`.

    Raises:
        DataError: If the column or a file is missing, a path leaves the folder, or a picture has two second ones.
    """
    found: dict[str, str] = {}
    known = set(images)
    for file in metadata:
        where, folder = str(root / file), os.path.dirname(file)
        rows, columns = _rows(root / file)
        first = _file_column(columns, image_column, where)
        spellings = (f"{extra.column}_file_name", extra.column)
        second = next((column for column in spellings if column in columns), None)
        if second is None:
            others = [column for column in columns if column != first]
            require_column(extra.column, columns, option=extra.option, where=where, likely=others)
            continue
        for number, row in enumerate(rows, 1):
            name, own = (
                _inside(folder, row.get(column), f"{where}, row {number}", str(column)) for column in (first, second)
            )
            if found.setdefault(name, own) != own:
                raise DataError(
                    f"{where}, row {number} gives {name} the {extra.column} {own}, and a row before it "
                    f"{found[name]}; remove one of the rows"
                )
        _require_files(root, where, folder, [name for name in found.values() if name not in known], images)
    return found


def read_labels(root: Path, metadata: Sequence[str], image_column: str, column: str | None) -> dict[str, Any] | None:
    """Read the classes of a folder of images.

    Args:
        root: The folder.
        metadata: Its metadata files, relative to it.
        image_column: As in `read_metadata`.
        column: Column of the classes; None for `label`, where there is one.

    Returns:
        The class of each picture that has one, by its path relative to `root`. In CSV numbers are numbers too. None
        where no file has the column, which was not asked for.

    Raises:
        DataError: If the column that was asked for is missing, or two rows give a picture different classes.
    """
    wanted = column or DEFAULT_LABEL_COLUMN
    found: dict[str, Any] = {}
    has_column = False
    for file in metadata:
        where = str(root / file)
        rows, columns = _rows(root / file)
        if wanted not in columns:
            if column is not None:
                require_column(column, columns, option="label_column", where=where)
            continue
        has_column, first = True, _file_column(columns, image_column, where)
        for number, row in enumerate(rows, 1):
            name = _inside(os.path.dirname(file), row.get(first), f"{where}, row {number}", str(first))
            label = row.get(wanted)
            if isinstance(label, str):
                label = int(label) if label.isdecimal() and file.endswith(".csv") else label or None
            if found.setdefault(name, label) != label:
                raise DataError(
                    f"{where}, row {number} gives {name} the class {shown(label)}, and a row before it "
                    f"{shown(found[name])}; remove one of the rows"
                )
    return found if has_column else None


def _merged(captions: list[Caption]) -> Caption:
    given = [one if isinstance(one, list) else [one] for one in captions if one is not None]
    distinct = list(dict.fromkeys(text for several in given for text in several))
    if len(captions) == 1 or not distinct:
        return captions[0]
    return distinct[0] if len(distinct) == 1 else distinct


def _captions(root: Path, file: str, image_column: str, caption_column: str) -> dict[str, list[Caption]]:
    """Return the captions of the rows of a file, by the path of the picture that they name."""
    where = str(root / file)
    rows, columns = _rows(root / file)
    file_column = _file_column(columns, image_column, where)
    others = [column for column in columns if column != file_column]
    require_column(caption_column, columns, option="caption_column", where=where, likely=others)
    captions: dict[str, list[Caption]] = {}
    for number, row in enumerate(rows, 1):
        name = _inside(os.path.dirname(file), row.get(file_column), f"{where}, row {number}", "file_name")
        captions.setdefault(name, []).append(_checked_caption(row.get(caption_column), f"{where}, row {number}"))
    return captions


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a metadata file, and its columns."""
    rows = _read_csv(path) if path.name.endswith(".csv") else _read_jsonl(path)
    return rows, list(dict.fromkeys(key for row in rows for key in row))


def _file_column(columns: list[str], image_column: str, where: str) -> str:
    """Return the column that names the files of the pictures."""
    spellings = (f"{image_column}_file_name", image_column)
    file_column = next((column for column in spellings if column in columns), None)
    if image_column == DEFAULT_IMAGE_COLUMN:
        file_column = "file_name" if "file_name" in columns else file_column
    elif file_column is None:
        require_column(image_column, columns, option="image_column", where=where)
    if file_column is None:
        raise DataError(f"{where} has no column file_name; it has {', '.join(columns) or 'no rows'}")
    return file_column


def _inside(folder: str, name: Any, where: str, column: str) -> str:
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: {column} is {shown(name)}; it must be a path relative to the metadata file")
    try:
        return path_inside(os.path.join(folder, name))
    except ValueError as error:
        raise DataError(f"{where}: {column} {name}: {error}; use a path below it") from error


def _checked_caption(caption: Any, where: str) -> Caption:
    several = isinstance(caption, list) and caption and all(isinstance(one, str) for one in caption)
    if caption is None:
        return None
    if not (isinstance(caption, str) or several):
        raise DataError(f"{where}: the caption is {shown(caption)}; it must be text or a list of texts")
    try:
        "".join(caption).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the caption is {shown(caption)}, which is not valid Unicode text; repair it"
        ) from error
    return caption


def _require_files(root: Path, where: str, folder: str, names: list[str], images: Sequence[str]) -> None:
    absent = [name for name in names if not _is_below(root, name)]
    if not absent:
        return
    found = _Nearest(images, folder)
    described = [f"{os.path.relpath(name, folder or '.')}{found.phrase(name)}" for name in absent[:4]]
    raise DataError(
        f"{where} names {len(absent)} files that do not exist: {first_few(described)}; names are relative to the "
        "metadata file, and upper and lower case differ: correct the rows, or restore the files"
    )


def _is_below(root: Path, name: str) -> bool:
    try:
        return path_below(root, name).is_file()
    except (OSError, ValueError):  # ValueError also for a name that no file can have
        return False


class _Nearest:
    """Search for the file that a misspelt name most likely means.

    Args:
        images: The pictures that exist, relative to the dataset's folder.
        folder: Folder of the metadata file, relative to the dataset's folder.
    """

    def __init__(self, images: Sequence[str], folder: str):
        self._folder = folder
        self._images = images
        self._written = {_plain(name): name for name in reversed(images)}
        self._stems = {os.path.splitext(name)[0]: image for name, image in self._written.items()}
        self._ends = {PurePosixPath(name).name: image for name, image in self._written.items()}

    def phrase(self, name: str) -> str:
        """Return the phrase " (there is 'x')", where x is how the metadata file would name the nearest image, or ""."""
        plain = _plain(name)
        asked = _plain(os.path.relpath(name, self._folder or "."))
        last = PurePosixPath(plain).name
        image = (
            self._written.get(plain)
            or self._written.get(asked)  # as if relative to the dataset's folder
            or self._stems.get(os.path.splitext(plain)[0])
            or self._stems.get(plain)
            or self._ends.get(last)
        )
        if image is None and len(self._images) <= _MOST_COMPARED:
            match = difflib.get_close_matches(os.path.splitext(plain)[0], list(self._stems), n=1, cutoff=0.8)
            image = self._stems[match[0]] if match else None
        if image is None:
            return ""
        there = os.path.relpath(image, self._folder or ".")
        if name != image and unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", image):
            return f" (there is {there!r}, whose accents are stored in another way: NFC and NFD)"
        return f" (there is {there!r})"


def _plain(name: str) -> str:
    """Return a name in a form without differences of case, backslashes, outer spaces and forms of accents."""
    return unicodedata.normalize("NFC", name.replace("\\", "/").strip()).casefold()


def _read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        with open_text(path, MAX_METADATA_BYTES, newline="") as file:
            # Strict: otherwise an unclosed quote would make one caption of all rows after it.
            rows = [row for row in csv.reader(file, strict=True) if any(value.strip() for value in row)]
    except (csv.Error, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); it must be CSV in UTF-8, with a quote inside quotes written twice"
        ) from error
    if not rows:
        return []
    header = rows[0]
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise DataError(f"{path} has two columns {twice[0]}; rename or remove one")
    separator = next((sign for sign in ";\t|" if sign in header[0]), None) if len(header) == 1 else None
    if separator is not None:
        raise DataError(f"{path} separates its columns by {separator!r}; save it with commas")
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(header):
            raise DataError(
                f"{path}, row {number} has {len(row)} values for {len(header)} columns: {shown(','.join(row))}; put a "
                "text with commas in double quotes, and leave no column out"
            )
    return [dict(zip(header, row, strict=True)) for row in rows[1:]]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    def rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, unique=True)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is not JSON ({error}); write one object per line") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is {line.strip()[:40]}; write one object per line")
            yield row

    try:
        with open_text(path, MAX_METADATA_BYTES) as file:
            return list(rows(file))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); it must be UTF-8") from error
