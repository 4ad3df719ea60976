"""Latents in ArrayRecord shards, which a run reads in place of pictures.

    FOLDER/
        manifest.json                              what the latents depend on, the classes, what the shards hold
        latents-00017-of-00128.array_record        records of one size, in the order of the examples

A record is, with all numbers little-endian:

    bytes 0 to 3        number of the class, int32
    bytes 4 to 127      name of the example in UTF-8, filled up with zeros; of a longer one the end, after "…"
    bytes from 128      mean and log variance of the picture's latents, (orientations, 2, c, h, w), float32 or bfloat16:
                        those of the picture and, where there are two orientations, of its mirror image

A shard is there whole or not at all, and the manifest comes last: a folder without one is not finished.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import itertools
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_diffusion.core.data.sources.source import Record
from flax_diffusion.core.data.store import narrowed, widened
from flax_diffusion.core.errors import ConfigError, DataError, differences, first_differences, shown
from flax_diffusion.core.io.files import is_local, local_copy, names_in
from flax_diffusion.core.io.untrusted import parse_json, read_text

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
"""What the manifest will say of the latents, in a folder that is not finished."""
FORMAT = 1
HEAD_BYTES = 128
_NAME_BYTES = HEAD_BYTES - 4
_STORED = {"float32": "<f4", "bfloat16": "<u2"}
"""NumPy's dtypes of the file's. NumPy has no bfloat16: its bits are read as integers, then widened."""
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_ONE_BY_ONE = "group_size:1,uncompressed"  # each record can be read alone; latents are noise to a compressor
_CHUNK_HEAD_BYTES = 512  # of what ArrayRecord writes around a record, and more
_OPENING = threading.Lock()
_COMMAND = "`python -m flax_diffusion.precompute` with the options that it was made with"


def shard_name(number: int, count: int) -> str:
    """Return the name of a shard.

    Args:
        number: Its number, from 0.
        count: Number of shards.
    """
    return f"latents-{number:05}-of-{count:05}.array_record"


class Unpacked(NamedTuple):
    """What a record holds.

    Attributes:
        label: Number of the class.
        name: Name of the example.
        posterior: Mean and log variance of the latents, float32 (1 or 2, 2, c, h, w).
    """

    label: int
    name: str
    posterior: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Form of the records.

    Attributes:
        dtype: "float32" or "bfloat16".
        shape: Shape of the posteriors, (1 or 2, 2, c, h, w).
    """

    dtype: str
    shape: tuple[int, ...]

    @functools.cached_property
    def record_bytes(self) -> int:
        """Size of a record."""
        return HEAD_BYTES + int(np.prod(self.shape)) * np.dtype(_STORED[self.dtype]).itemsize

    def packed(self, label: int, name: str, posterior: np.ndarray) -> bytes:
        """Return a record.

        Args:
            label: Number of the class.
            name: Name of the example.
            posterior: Mean and log variance of the latents, float32 (1 or 2, 2, c, h, w).
        """
        stored = narrowed(posterior) if self.dtype == "bfloat16" else posterior.astype("<f4")
        return b"".join([int(label).to_bytes(4, "little"), _name(name).ljust(_NAME_BYTES, b"\0"), stored.tobytes()])

    def unpacked(self, record: bytes) -> Unpacked:
        """Return what a record holds.

        Raises:
            ValueError: If it is of another size, or its name is no text.
        """
        if len(record) != self.record_bytes:
            raise ValueError(f"a record has {len(record)} bytes, not {self.record_bytes}")
        stored = np.frombuffer(record, _STORED[self.dtype], offset=HEAD_BYTES).reshape(self.shape)
        name = record[4:HEAD_BYTES].rstrip(b"\0").decode()
        label = int.from_bytes(record[:4], "little", signed=True)
        return Unpacked(label, name, widened(stored) if self.dtype == "bfloat16" else stored)


def _name(name: str) -> bytes:
    """Return a name in UTF-8, its end if it is too long."""
    encoded = name.encode()
    if len(encoded) <= _NAME_BYTES:
        return encoded
    end = encoded[len(encoded) - _NAME_BYTES + len("…".encode()) :]
    return "…".encode() + end.decode(errors="ignore").encode()


def write_shard(file: Path, records: Sequence[bytes]) -> None:
    """Write a shard.

    Args:
        file: The file, on this machine.
        records: The records.
    """
    writer = _array_record().ArrayRecordWriter(str(file), _ONE_BY_ONE)
    for record in records:
        writer.write(record)
    writer.close()


def _array_record() -> Any:
    """Return the package's module.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:  # there is none for Windows
        raise ConfigError(
            f"--latents_dir: the package array_record is missing ({error}): pip install array_record, which is there "
            "for Linux and Macs of Apple's chips, or use --precomputed_dir"
        ) from error


@dataclass(frozen=True)
class Manifest:
    """What a folder of latents says of itself.

    Attributes:
        folder: The folder.
        of: What the latents depend on, their form, and of how many examples they are, as JSON.
        layout: Form of the records.
        classes: Names of the classes.
        records: Number of records of each shard; None in a folder that is not finished.
        sizes: Size of each shard, bytes; None in a folder that is not finished.
    """

    folder: Path
    of: Mapping[str, Any]
    layout: Layout
    classes: tuple[str, ...]
    records: tuple[int, ...] | None
    sizes: tuple[int, ...] | None

    @classmethod
    def read(cls, folder: Path, name: str = MANIFEST) -> Manifest | None:
        """Read a manifest.

        Args:
            folder: The folder.
            name: `MANIFEST` or `UNFINISHED`.

        Returns:
            The manifest, or None where the folder has none.

        Raises:
            DataError: If it cannot be read.
        """
        file = folder / name
        if not file.exists():
            return None
        try:
            values = parse_json(read_text(file))
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {shown(values['format'])}, and this version reads {FORMAT}")
            layout = Layout(values["dtype"], tuple(_count(side) for side in values["shape"]))
            if layout.dtype not in _STORED or len(layout.shape) != 5 or layout.shape[:2] not in ((1, 2), (2, 2)):
                raise ValueError(f"dtype {shown(layout.dtype)} and shape {shown(layout.shape)} are none of latents")
            classes = tuple(values["classes"])
            if not classes or not all(isinstance(one, str) for one in classes):
                raise ValueError("classes must be names")
            own = name == MANIFEST
            records, sizes = (
                tuple(_count(one) for one in values[key]) if own else None for key in ("records", "bytes")
            )
            if own and (len(values["records"]) != values["shards"] or len(values["bytes"]) != values["shards"]):
                raise ValueError("it does not say of each shard what it holds")
            of = {key: value for key, value in values.items() if key not in ("records", "bytes")}
            return cls(folder, of, layout, classes, records, sizes)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} cannot be read ({error}): restore it, or compute the latents again") from error

    def check(self, of: Mapping[str, Any]) -> None:
        """Refuse latents that depend on something else than those of this run.

        Args:
            of: What those of this run depend on, some or all of `Manifest.of`.

        Raises:
            ConfigError: If something differs.
        """
        found = differences({name: self.of.get(name) for name in of}, of)
        if found:
            raise ConfigError(
                f"{self.folder} holds latents that differ from those of this run: {first_differences(found)}; give the "
                "options and the data that they were made with, or name another folder"
            )


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{shown(value)} is no number of things")
    return value


@dataclass(frozen=True)
class LatentSource:
    """Examples in shards of latents. Picklable: each process opens a shard on its first read.

    Attributes:
        manifest: The folder's manifest.
        numbers: Number that the model gives to each class of the manifest.
        classes: Names of the model's classes.
        count: Number of examples, from the first.
    """

    manifest: Manifest
    numbers: tuple[int, ...] = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        part = bisect.bisect_right(self._starts, index) - 1
        place = index - self._starts[part]
        try:
            made = self.manifest.layout.unpacked(self._reader(part).read([place])[0])
        except (RuntimeError, ValueError, IndexError) as error:
            where = f"{self._file(part)} record {place}"
            raise DataError(
                f"{where} cannot be read ({error}): copy the shard again, or delete it and compute it again "
                f"by {_COMMAND}",
                where,
            ) from error
        if not 0 <= made.label < len(self.numbers):
            where = f"{self._file(part)} record {place}"
            raise DataError(
                f"{where}: its class is {made.label}, and the classes are 0 to {len(self.numbers) - 1}: compute the "
                "latents again",
                where,
            )
        return Record(b"", None, made.name, label=self.numbers[made.label], posterior=made.posterior)

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.manifest.records or ())][:-1]

    @functools.cached_property
    def _readers(self) -> dict[int, Any]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("manifest", "numbers", "classes", "count")}

    def _file(self, part: int) -> Path:
        records = self.manifest.records or ()
        return self.manifest.folder / shard_name(part, len(records))

    def _reader(self, part: int) -> Any:
        """Return the reader of a shard, which threads share."""
        if part not in self._readers:
            with _OPENING:
                if part not in self._readers:
                    self._readers[part] = self._opened(part)
        return self._readers[part]

    def _opened(self, part: int) -> Any:
        """Open a shard; the package reads files on this machine alone, so one in an object store is copied."""
        records = self.manifest.records or ()
        file = self._file(part)
        local = local_copy(self.manifest.folder, (file.name,)) / file.name
        reader = _array_record().ArrayRecordReader(
            str(local), _RANDOM_ACCESS, file_reader_buffer_size=self.manifest.layout.record_bytes + _CHUNK_HEAD_BYTES
        )
        if reader.num_records() != records[part]:  # the package takes a file that was cut off for an empty one
            raise ValueError(f"it has {reader.num_records()} records, and its manifest says {records[part]}")
        return reader


def open_latents(folder: Path, known: Sequence[str] = (), max_samples: int | None = None) -> LatentSource:
    """Open a folder of latents.

    Args:
        folder: The folder, on this machine or in an object store, whose shards are then copied here as they are read.
        known: Names of the classes of a model. Where these have all the names of the data, their numbers are taken.
        max_samples: Number of examples to take, from the first; None for all.

    Raises:
        DataError: If the folder is not finished, or a shard is missing or of another size.
    """
    manifest, names = Manifest.read(folder), names_in(folder)
    if manifest is None:
        begun = Manifest.read(folder, UNFINISHED)
        if begun is None:
            raise DataError(
                f"{folder} holds no latents: make them by `python -m flax_diffusion.precompute class_conditional` with "
                "--train_data_dir and this option"
            )
        whole = sum(name.endswith(".array_record") for name in names)
        raise DataError(
            f"{folder} is not finished, {whole} of {begun.of['shards']} shards are there: make the others by {_COMMAND}"
        )
    _array_record()
    assert manifest.records is not None
    assert manifest.sizes is not None
    there = set(names)
    for number, size in enumerate(manifest.sizes):
        name = shard_name(number, len(manifest.sizes))
        if name not in there:
            raise DataError(f"{folder / name} is missing: copy it again, or compute it again by {_COMMAND}")
        if is_local(folder) and (found := (folder / name).stat().st_size) != size:
            raise DataError(
                f"{folder / name} has {found} bytes, not {size}: copy it again, or delete it and compute it "
                f"again by {_COMMAND}"
            )
    if not is_local(folder):
        log.info("%s: %.1f GB of latents are copied to this machine", folder, sum(manifest.sizes) / 1e9)
    examples = sum(manifest.records)
    return _of_model(LatentSource(manifest, (), manifest.classes, min(examples, max_samples or examples)), known)


def _of_model(source: LatentSource, known: Sequence[str]) -> LatentSource:
    own = source.classes
    classes = tuple(known) if set(own) <= set(known) else own
    number = {name: place for place, name in enumerate(classes)}
    return replace(source, numbers=tuple(number[name] for name in own), classes=classes)
