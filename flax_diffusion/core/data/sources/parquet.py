"""Parquet files of images, unpacked once to an Arrow file that every worker maps into memory.

Parquet has no random access below a row group, which often has hundreds of megabytes. A shuffled epoch would decompress
a row group for each example.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flax_diffusion.core.data.sources.labels import named
from flax_diffusion.core.data.sources.source import (
    DEFAULT_IMAGE_COLUMN,
    DEFAULT_LABEL_COLUMN,
    ExtraImages,
    Labels,
    Record,
    first_few,
    require_column,
    whole_caption,
)
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.io.files import absolute, is_local, user_cache, version_of
from flax_diffusion.core.io.untrusted import LFS_POINTER, path_below

_ROWS_PER_BATCH = 256  # rows per record batch of the Arrow file


@dataclass(frozen=True)
class ParquetSource:
    """Rows of Parquet files, read from their unpacked copy."""

    arrow_file: Path
    files: list[Path] = field(repr=False)  # the Parquet files, for names
    starts: np.ndarray = field(repr=False)  # int64 (files + 1,), first row of each file
    batches: np.ndarray = field(repr=False)  # int64 (record batches + 1,), first row of each batch
    extra_column: str | None = None  # column of the second picture, for names

    def __len__(self) -> int:
        return int(self.batches[-1])

    def __getitem__(self, index: int) -> Record:
        number = int(np.searchsorted(self.batches, index, side="right")) - 1
        reader, lock = _reader(self.arrow_file)
        with lock:  # the reader is not safe to share between threads
            batch = reader.get_batch(number)
        row = index - int(self.batches[number])
        file, name = self._file_of(index), self.name_of(index)
        try:
            image = batch.column("image")[row].as_py()
            caption = batch.column("caption")[row].as_py() if "caption" in batch.schema.names else None
            extra = None if self.extra_column is None else batch.column("extra")[row].as_py()
        except UnicodeDecodeError as error:  # Arrow does not check the text that it copies
            raise DataError(f"{name} holds text that is not UTF-8 ({error}); repair or remove the row", name) from error
        second = None
        if self.extra_column is not None:
            second = Record(_image(extra, file, name, self.extra_column), None, f"{name} {self.extra_column}")
        return Record(_image(image, file, name, "image"), whole_caption(caption, name), name, extra=second)

    def name_of(self, index: int) -> str:
        """Return the name of an example, for messages."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.files[part]} row {index - int(self.starts[part])}"

    def _file_of(self, index: int) -> Path:
        return self.files[int(np.searchsorted(self.starts, index, side="right")) - 1]

    def labels(self, column: str | None) -> Labels:
        """Return the classes of the rows, by the names that Hugging Face's `datasets` has written for them.

        Args:
            column: The column, of numbers or texts; None for `label`.

        Raises:
            DataError: If there is no such column, or a row has no class.
        """
        column = column or DEFAULT_LABEL_COLUMN
        values: list[Any] = []
        names: list[str] | None = None
        for file, (first, last) in zip(self.files, pairwise(self.starts.tolist()), strict=True):
            with _opened(file) as parquet:
                schema = parquet.schema_arrow
                others = [name for name in schema.names if not _is_image_struct(schema.field(name).type)]
                require_column(column, schema.names, option="label_column", where=str(file), likely=others)
                kind = schema.field(column).type
                if not (pa.types.is_integer(kind) or _is_text(kind)):
                    raise DataError(f"--label_column {column} in {file} is of type {kind}; it must be numbers or text")
                try:
                    rows = parquet.read(columns=[column]).column(column)
                except (pa.ArrowException, OSError) as error:
                    raise _unreadable(file, error) from error
                values += rows.slice(0, last - first).to_pylist()
            notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            names = notes.get("info", {}).get("features", {}).get(column, {}).get("names", names)
        return named(values, names, first_few([str(file) for file in self.files]))


def _image(cell: Any, file: Path, name: str, what: str) -> bytes | Path:
    """Return the picture in a cell: encoded bytes, or the path of a file below the Parquet file's folder."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        try:
            return path_below(file.parent, cell)
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: {what} path {cell}: {error}; use a path below it", name) from error
    if cell is None:
        raise DataError(f"{name} holds no {what}; remove the row", name)
    return cell


def open_parquet(
    files: list[Path],
    image_column: str = DEFAULT_IMAGE_COLUMN,
    caption_column: str | None = "text",
    max_samples: int | None = None,
    cache_dir: Path | None = None,
    extra: ExtraImages | None = None,
) -> ParquetSource:
    """Open Parquet files whose pictures are encoded bytes, paths, or Hugging Face's struct of the two.

    Args:
        files: The files, in order.
        image_column: Column of the picture.
        caption_column: Column of the caption, a text or a list of texts; None for no captions.
        max_samples: Number of rows to take, from the first; None for all.
        cache_dir: Folder for the unpacked copy, which is as large as the images; None for the user's cache folder.
        extra: Column of the second picture of each example; None for one picture each.

    Returns:
        The source.

    Raises:
        DataError: If a file is not Parquet, a column is missing or of another type, or a caption is missing.
    """
    starts = count_rows(files, image_column, caption_column, max_samples, extra)
    columns = _columns(image_column, caption_column, extra)
    arrow_file = _unpacked(files, columns, starts, cache_dir)
    reader, lock = _reader(arrow_file)
    with lock:
        sizes = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
    return ParquetSource(arrow_file, files, starts, np.cumsum([0, *sizes]), None if extra is None else extra.column)


def count_rows(
    files: list[Path], image_column: str, caption_column: str | None, max_samples: int | None, extra: ExtraImages | None
) -> np.ndarray:
    """Check the columns of Parquet files, and return the first row of each file and the number of rows.

    Args:
        files: The files, in order.
        image_column: As of `open_parquet`.
        caption_column: As of `open_parquet`.
        max_samples: As of `open_parquet`.
        extra: As of `open_parquet`.

    Returns:
        The numbers, int64 (files + 1,).

    Raises:
        DataError: As `open_parquet`.
    """
    columns = _columns(image_column, caption_column, extra)
    options = {role: f"{role}_column" for role in columns}
    if extra is not None:
        extra.refuse_folder(str(files[0]))
        options["extra"] = extra.option
    counts = [_check(file, columns, options) for file in files]
    starts = np.minimum(np.cumsum([0, *counts]), max_samples or sum(counts))
    if starts[-1] == 0:
        raise DataError(f"{first_few([str(file) for file in files])} holds no rows")
    return starts


def _columns(image_column: str, caption_column: str | None, extra: ExtraImages | None) -> dict[str, str]:
    """Return the columns by role."""
    columns = {"image": image_column} | ({} if caption_column is None else {"caption": caption_column})
    return columns if extra is None else columns | {"extra": extra.column}


@lru_cache(maxsize=256)
def _reader(path: Path) -> tuple[pa.RecordBatchFileReader, Lock]:
    return pa.ipc.open_file(pa.memory_map(str(path))), Lock()


def _check(file: Path, columns: dict[str, str], options: dict[str, str]) -> int:
    """Check the columns of one file, by role, and return its number of rows; options name them by role."""
    try:
        with _opened(file) as parquet:
            schema, count = parquet.schema_arrow, parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error
    for role, column in columns.items():
        option = options[role]
        likely = [name for name in schema.names if role == "image" or name != columns["image"]]
        require_column(column, schema.names, option=option, where=str(file), likely=likely)
        kind = schema.field(column).type
        if role != "caption" and not (_is_bytes(kind) or _is_text(kind) or _is_image_struct(kind)):
            raise DataError(f"--{option} {column} in {file} is of type {kind}; it must hold image files or their paths")
        if role == "caption" and not (_is_text(kind) or (_is_list(kind) and _is_text(kind.value_type))):
            raise DataError(f"--{option} {column} in {file} is of type {kind}; it must be text or a list of texts")
    return count


def _unreadable(file: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{file} does not exist, or is a link to nothing; download it again")
    with file.open("rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            return DataError(f"{file} is a Git LFS pointer; `git lfs pull` downloads the file")
    return DataError(f"{file} is not a readable Parquet file ({error}); download it again")


def _batches(parquet: pq.ParquetFile, file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from parquet.iter_batches(_ROWS_PER_BATCH, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _opened(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file if is_local(file) else file.open("rb"))


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_image_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and bool({"bytes", "path"} & {part.name for part in kind})


def _unpacked(files: list[Path], columns: dict[str, str], starts: np.ndarray, cache_dir: Path | None) -> Path:
    """Return the Arrow file of these rows and columns; write it if no earlier run did."""
    versions = [(str(absolute(file)), *version_of(file)) for file in files]
    identity = repr((versions, sorted(columns.items()), starts.tolist()))
    folder = cache_dir or user_cache()
    target = folder / f"parquet-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.arrow"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written under another name until it is whole: another process may be doing the same.
        handle, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
        os.close(handle)
        try:
            _unpack(files, columns, starts, partial)
            os.replace(partial, target)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot unpack Parquet into {folder} ({error}); free some space there or give another cache_dir"
        ) from error
    return target


def _unpack(files: list[Path], columns: dict[str, str], starts: np.ndarray, path: str) -> None:
    writer = schema = None
    try:
        for file, (first, last) in zip(files, pairwise(starts.tolist()), strict=True):
            with _opened(file) as parquet:
                row = 0
                for batch in _batches(parquet, file, list(columns.values())):
                    batch = batch.slice(0, last - first - row)
                    if batch.num_rows == 0:
                        break
                    arrays = [batch.column(column) for column in columns.values()]
                    if "caption" in columns and arrays[1].null_count:
                        place = row + arrays[1].is_null().to_pylist().index(True)
                        raise DataError(f"{file} row {place} has no {columns['caption']}; give it one or remove it")
                    batch = pa.RecordBatch.from_arrays(arrays, list(columns))
                    if writer is None:
                        writer, schema = pa.ipc.new_file(path, batch.schema), batch.schema
                    if batch.schema != schema:
                        raise DataError(
                            f"{file} has other column types than {files[0]}; write both with the same types"
                        )
                    writer.write_batch(batch)
                    row += batch.num_rows
    finally:
        if writer is not None:
            writer.close()
