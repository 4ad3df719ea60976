"""Tar shards of images, as WebDataset has them, with random access by an index of where their members are.

The members of an example stand side by side and have one name up to its first dot: `n01/12.jpg`, `n01/12.cls`. What
follows the dot says what a member is: a picture, `cls` the number of its class, `txt` its caption, `json` fields that
have a class or a caption. Nothing is extracted. A member's name is a name and no path, links are not followed, and
sizes are bounded.

An index is made once for each file and kept in the cache folder.

Reference: https://github.com/webdataset/webdataset for the names.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from flax_diffusion.core.data.images.decoding import MAX_FILE_BYTES
from flax_diffusion.core.data.sources.source import (
    DEFAULT_IMAGE_COLUMN,
    DEFAULT_LABEL_COLUMN,
    IMAGE_EXTENSIONS,
    ExtraImages,
    Labels,
    Record,
    whole_caption,
)
from flax_diffusion.core.errors import DataError, shown
from flax_diffusion.core.io.files import absolute, names_in, read_range, replacing, user_cache, version_of
from flax_diffusion.core.io.tar_members import Member, members
from flax_diffusion.core.io.untrusted import parse_json, read_text

log = logging.getLogger(__name__)

CLASS_NAMES = "classnames.txt"
"""File beside the shards with the name of each class in a line, in the order of their numbers."""
_MAX_CLASS_BYTES = 64
_MAX_TEXT_BYTES = 2**20
_INDEX_VERSION = 1
_THREADS = 8
_PATTERN = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_FILES = 10**6


@dataclass(frozen=True)
class TarSource:
    """Examples in tar files. Picklable: each process maps the indices into its memory on its first read.

    Attributes:
        files: The files.
        indices: The index of each file, or the file of this machine that holds it.
        ends: Number of the example after the last of each file.
        text: What holds the caption: None for no captions, "text" for `.txt`, else a field of `.json`.
        copies: Copies of the files, which are read in their place; None for none.
    """

    files: list[Path] = field(repr=False)
    indices: list[Path | pa.Table] = field(repr=False)
    ends: list[int] = field(repr=False)
    text: str | None = None
    copies: list[Path] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        part, place = self._place(index)
        row = {name: column[place].as_py() for name, column in self._columns(part).items()}
        name = f"{self.files[part]}/{row['name']}"
        picture = self._read(part, row["image"], row["image_size"], name)
        caption = None
        if self.text == "text" and row["text"] is not None:
            content = self._read(part, row["text"], row["text_size"], name)
            caption = " ".join(_decoded(content, name).split())
        elif self.text is not None:
            caption = self._field(part, row, self.text, name)
            if not isinstance(caption, str | list):
                raise DataError(f"{name}: its {self.text} is {shown(caption)}; it must be a text", name)
        return Record(picture, whole_caption(caption, name), name)

    def name_of(self, index: int) -> str:
        """Return the name of an example, for messages."""
        part, place = self._place(index)
        return f"{self.files[part]}/{self._columns(part)['name'][place].as_py()}"

    def shard(self, part: int) -> TarSource:
        """Return the examples of one file, by its number."""
        return TarSource([self.files[part]], [self.indices[part]], [self._counts()[part]], self.text)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of an example's file, and its number in that."""
        part = bisect.bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)

    def labels(self, column: str | None) -> Labels:
        """Return the classes: what `.cls` holds, or a field of `.json`.

        Args:
            column: The field; `cls` for `.cls`; None for `.cls` where there is one, else for the field `label`.

        Raises:
            DataError: If an example has none.
        """
        values: list[Any] = []
        for part, count in enumerate(self._counts()):
            columns = self._columns(part)
            numbers = columns["cls"][:count].to_pylist()
            if column == "cls" or (column is None and None not in numbers):
                if None in numbers:
                    name = f"{self.files[part]}/{columns['name'][numbers.index(None)].as_py()}"
                    raise DataError(f"{name}: has no .cls; give --label_column, a field of .json, or add it", name)
                values += numbers
                continue
            wanted = ("name", "json", "json_size")
            rows = [{name: columns[name][place].as_py() for name in wanted} for place in range(count)]
            read = functools.partial(self._labelled, part, column or DEFAULT_LABEL_COLUMN)
            with ThreadPoolExecutor(_THREADS) as pool:
                values += pool.map(read, rows)
        names = class_names(self.files[0].parent)
        if names is not None and (wrong := [one for one in values if isinstance(one, int) and one >= len(names)]):
            file = self.files[0].parent / CLASS_NAMES
            raise DataError(f"{file} names {len(names)} classes, and an example is of class {wrong[0]}: add its name")
        if names is not None:
            values = [names[one] if isinstance(one, int) and one >= 0 else one for one in values]
        return Labels(values, names)

    def _labelled(self, part: int, column: str, row: dict[str, Any]) -> Any:
        name = f"{self.files[part]}/{row['name']}"
        if row["json"] is None:
            raise DataError(f"{name}: has neither .cls nor .json: its class is not known; add one, or remove it", name)
        return self._field(part, row, column, name)

    def _field(self, part: int, row: dict[str, Any], column: str, name: str) -> Any:
        """Return a field of an example's `.json`."""
        if row["json"] is None:
            raise DataError(f"{name}: has no .json with the field {column}; add it or remove the example", name)
        try:
            values = parse_json(_decoded(self._read(part, row["json"], row["json_size"], name), name))
        except ValueError as error:
            raise DataError(f"{name}: its .json cannot be read ({error}); repair or remove it", name) from error
        if not isinstance(values, dict) or column not in values:
            raise DataError(f"{name}: its .json has no field {column}; add it or remove the example", name)
        return values[column]

    def _read(self, part: int, offset: int, size: int, name: str) -> bytes:
        try:
            content = read_range((self.copies or self.files)[part], offset, size)
        except OSError as error:
            raise DataError(f"{name} cannot be read ({error.strerror or error}); check the file", name) from error
        if len(content) != size:
            raise DataError(f"{name}: the file was cut off after it was opened; copy it again", name)
        return content

    def _counts(self) -> list[int]:
        return [end - first for first, end in itertools.pairwise([0, *self.ends])]

    def _columns(self, part: int) -> dict[str, Any]:
        made = self._opened.get(part)
        if made is None:
            index = self.indices[part]
            table = pa.ipc.open_file(pa.memory_map(str(index))).read_all() if isinstance(index, Path) else index
            made = self._opened.setdefault(part, {name: table.column(name) for name in table.column_names})
        return made

    @functools.cached_property
    def _opened(self) -> dict[int, dict[str, Any]]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("files", "indices", "ends", "text", "copies")}


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: its text is not UTF-8 ({error}); repair or remove it", name) from error


def class_names(folder: Path) -> list[str] | None:
    """Return the names of the classes in the file beside the shards; None where there is none.

    Raises:
        DataError: If it cannot be read, or gives a name twice.
    """
    file = folder / CLASS_NAMES
    if not file.exists():
        return None
    try:
        names = [line.strip() for line in read_text(file, _MAX_TEXT_BYTES).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): it must hold the name of a class in each line") from error
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{file} gives the name {twice!r} to two classes: give each a name of its own")
    return names


def named_by(pattern: Path) -> list[Path]:
    """Return the files that a pattern such as `train-{0000..0127}.tar` stands for; none where it is no pattern.

    Raises:
        DataError: If it stands for too many, or one does not exist.
    """
    found = _PATTERN.search(pattern.name)
    if found is None:
        return []
    first, last = found.groups()
    if not int(first) <= int(last) < int(first) + _MAX_FILES:
        raise DataError(f"{pattern}: must count up, such as {{0000..0127}}, over at most {_MAX_FILES} files")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    start, end = found.span()
    numbers = (f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    files = [pattern.with_name(f"{pattern.name[:start]}{number}{pattern.name[end:]}") for number in numbers]
    there = set(names_in(pattern.parent))
    missing = [file for file in files if file.name not in there]
    if missing:
        raise DataError(f"{pattern}: {missing[0]} does not exist, nor do {len(missing) - 1} others; change the numbers")
    return files


def open_tars(
    files: list[Path],
    image_column: str = DEFAULT_IMAGE_COLUMN,
    caption_column: str | None = "text",
    max_samples: int | None = None,
    cache_dir: Path | None = None,
    extra: ExtraImages | None = None,
) -> TarSource:
    """Open tar files of examples.

    Args:
        files: The files, in order.
        image_column: What the names of pictures end in, such as `jpg`; `image` for any kind of picture.
        caption_column: `text` for `.txt`, else a field of `.json`; None for no captions.
        max_samples: Number of examples to take, from the first; None for all.
        cache_dir: Folder for indices; None for the user's cache folder.
        extra: Place of a second picture, which is refused.

    Raises:
        DataError: If a file is no tar, holds no examples, or two pictures of one.
    """
    if extra is not None:
        extra.refuse_folder(str(files[0]))
        raise DataError(f"--{extra.option} {extra.column}: no second picture is read from tar shards; use Parquet")
    folder = cache_dir or user_cache()
    with ThreadPoolExecutor(_THREADS) as pool:
        indices = list(pool.map(lambda file: _index(file, image_column, folder), files))
    counts = [count for _, count in indices]
    total = sum(counts)
    if not total:
        kind = f".{image_column}" if image_column != DEFAULT_IMAGE_COLUMN else "pictures"
        raise DataError(f"{files[0]}: {len(files)} tar files hold no {kind}; give shards of pictures with their .cls")
    ends = [min(end, max_samples or total) for end in itertools.accumulate(counts)]
    source = TarSource(files, [index for index, _ in indices], ends, caption_column)
    if caption_column == "text":
        for part, count in enumerate(counts):
            texts = source._columns(part)["text"]
            if texts.null_count and caption_column is not None:
                place = texts.to_pylist().index(None)
                if place < count:
                    name = f"{files[part]}/{source._columns(part)['name'][place].as_py()}"
                    raise DataError(f"{name} has no .txt; add its caption, or remove it", name)
    return source


def _index(file: Path, image_column: str, folder: Path) -> tuple[Path | pa.Table, int]:
    """Return the index of a file, or where it is kept, and its number of examples."""
    try:
        identity = repr((_INDEX_VERSION, str(absolute(file)), *version_of(file), image_column))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error})") from error
    kept = folder / f"tar-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.arrow"
    if kept.is_file():
        with pa.memory_map(str(kept)) as mapped:
            return kept, pa.ipc.open_file(mapped).read_all().num_rows
    table = pa.Table.from_pylist(list(_examples(file, image_column)), _SCHEMA)
    try:
        with replacing(kept) as partial, pa.ipc.new_file(str(partial), _SCHEMA) as writer:
            writer.write_table(table)
    except OSError as error:
        log.warning("%s: the index of %s cannot be kept (%s), and is made at each start", folder, file, error)
        return table, table.num_rows
    return kept, table.num_rows


_SCHEMA = pa.schema(
    [("name", pa.string()), ("cls", pa.int64())]
    + [(f"{part}{end}", pa.int64()) for part in ("image", "text", "json") for end in ("", "_size")]
)
"""Name of an example's picture, number of its class, and where its members are."""


def _examples(file: Path, image_column: str) -> Iterator[dict[str, Any]]:
    """Yield the row of the index for each example that has a picture."""
    with file.open("rb") as opened:
        stream = cast(BinaryIO, opened)
        for key, group in itertools.groupby(_members(stream, file), lambda member: _split(member.name)[0]):
            row: dict[str, Any] = {}
            for member in group:
                kind, where = _split(member.name)[1].lower(), f"{file}/{member.name}"
                if kind == image_column or (image_column == DEFAULT_IMAGE_COLUMN and f".{kind}" in IMAGE_EXTENSIONS):
                    if "image" in row:
                        raise DataError(
                            f"{file}: {row['name']} and {member.name} are two pictures of one example: name one kind "
                            f"by --image_column {kind}"
                        )
                    _bound(member, MAX_FILE_BYTES, where)
                    row |= {"name": member.name, "image": member.offset, "image_size": member.size}
                elif kind == "cls":
                    row["cls"] = _class(stream, member, where)
                elif kind in ("txt", "json"):
                    _bound(member, _MAX_TEXT_BYTES, where)
                    name = "text" if kind == "txt" else kind
                    row |= {name: member.offset, f"{name}_size": member.size}
            if "image" in row and key:
                yield row


def _members(stream: BinaryIO, file: Path) -> Iterator[Member]:
    try:
        yield from members(stream)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error


def _split(name: str) -> tuple[str, str]:
    """Return the key of an example, and what its member is."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return f"{folder}{slash}{stem}" if stem else "", kind


def _bound(member: Member, most: int, where: str) -> None:
    if member.size > most:
        raise DataError(f"{where} has {member.size} bytes, and may have {most}; remove it", where)


def _class(stream: BinaryIO, member: Member, where: str) -> int:
    _bound(member, _MAX_CLASS_BYTES, where)
    stream.seek(member.offset)
    text = stream.read(member.size)
    try:
        number = int(text)
        if not -(2**31) <= number < 2**31:
            raise ValueError
    except ValueError as error:
        raise DataError(f"{where} holds {shown(text)}; it must hold the number of a class, from 0", where) from error
    return number
