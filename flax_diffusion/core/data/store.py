"""Rows of arrays that stay between runs: a folder of shards, each of which is there whole or not at all.

    FOLDER/<kind>-<fingerprint>/
        manifest.json                   what the rows depend on; the fingerprint is a checksum of it
        shard-<checksum>.safetensors    some rows: by array a tensor (rows, …), and the rows' keys in the header

A shard is named by the checksum of its bytes and is never changed. So several processes, and several runs, can write
into one folder at the same time, and a row that two of them make is there twice, which does no harm.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_diffusion.core.errors import differences, first_differences
from flax_diffusion.core.io.files import local_copy, names_in, replacing, write_json
from flax_diffusion.core.io.untrusted import parse_json, read_text

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHARDS = "shard-*.safetensors"
SHARD_BYTES = 2**26
"""Size of a full shard. A killed run loses at most so much of what it has computed."""
SHARD_ROWS = 2**13
"""Largest number of rows in a shard, whose keys are all in its header."""

_FORMAT = 1  # a number in the manifest; another one has another fingerprint
_CHECKSUM_DIGITS = 16
_MAX_HEADER_BYTES = 2**27
_THREADS = 4
_BFLOAT16 = "BF16"
_DTYPES = {"F32": "<f4", "F64": "<f8", "I32": "<i4", _BFLOAT16: "<u2"}
"""NumPy's dtypes of the file's. NumPy has no bfloat16: its bits are read as integers, then widened."""
_WRITTEN = {np.dtype(code): name for name, code in _DTYPES.items()}


class Row(NamedTuple):
    """Identity of a row.

    Attributes:
        key: What the row was made of, such as a checksum or a caption. Rows are found by it.
        name: Name of what it was made of; "" for none.
        version: Size in bytes and time of change of the file of that name; None where it is no file.
    """

    key: str
    name: str = ""
    version: tuple[int, int] | None = None


class Shard(NamedTuple):
    """A shard that was opened.

    Attributes:
        file: The file, on this machine.
        rows: Its rows in order.
        tensors: Dtype in the file, shape and place in bytes of each array.
    """

    file: Path
    rows: list[Row]
    tensors: dict[str, tuple[str, tuple[int, ...], int]]


@dataclass(frozen=True)
class Table(Mapping[str, np.ndarray]):
    """One array of several shards by name; its rows are not to be written to.

    Picklable: each process maps a file into its memory on its first read.

    Attributes:
        array: Name of the array.
        shards: The files, with the array's dtype in the file, its shape and its place in bytes.
        starts: Number of the first row of each shard.
        places: Number of the row by name.
    """

    array: str
    shards: Sequence[tuple[Path, str, tuple[int, ...], int]] = field(repr=False)
    starts: Sequence[int] = field(repr=False)
    places: Mapping[str, int] = field(repr=False)

    def __getitem__(self, name: str) -> np.ndarray:
        number = self.places[name]
        part = bisect.bisect_right(self.starts, number) - 1
        if part not in self._maps:
            file, dtype, shape, offset = self.shards[part]
            # As a plain array, whose rows are taken in a fraction of the time.
            self._maps[part] = np.asarray(np.memmap(file, _DTYPES[dtype], "r", offset, shape))
        row = self._maps[part][number - self.starts[part]]
        return widened(row) if self.shards[part][1] == _BFLOAT16 else row

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @functools.cached_property
    def _maps(self) -> dict[int, np.ndarray]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {"array": self.array, "shards": self.shards, "starts": self.starts, "places": self.places}


class Store:
    """What a folder holds at the moment of opening.

    Args:
        folder: The folder, on this machine or in an object store, of which all shards are then copied to this machine.
            It need not exist.
    """

    def __init__(self, folder: Path):
        names = shard_names(folder)
        local = local_copy(folder, (SHARDS,)) if names else folder
        with ThreadPoolExecutor(_THREADS) as pool:
            self.shards = list(pool.map(open_shard, (local / name for name in names)))
        self._starts = [0, *itertools.accumulate(len(shard.rows) for shard in self.shards)]
        rows = (row for shard in self.shards for row in shard.rows)
        self._numbers: dict[str, int] = {}
        for number, row in enumerate(rows):
            self._numbers.setdefault(row.key, number)

    def __contains__(self, key: str) -> bool:
        return key in self._numbers

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all shards."""
        for shard in self.shards:
            yield from shard.rows

    def tables(self, keys: Mapping[str, str]) -> dict[str, Table]:
        """Return the tables of some rows, by array.

        Args:
            keys: Keys of the rows by the names that the tables give them. Keys that are not there are left out.
        """
        places = {name: self._numbers[key] for name, key in keys.items() if key in self._numbers}
        arrays = self.shards[0].tensors if self.shards else {}
        return {
            array: Table(array, [(one.file, *one.tensors[array]) for one in self.shards], self._starts[:-1], places)
            for array in arrays
        }


class Writer:
    """Writer of shards.

    Args:
        folder: Folder of the shards, which exists or is made.
        bfloat16: Whether floating-point numbers are stored in bfloat16.
    """

    def __init__(self, folder: Path, *, bfloat16: bool = False):
        self._folder, self._bfloat16 = folder, bfloat16
        self._rows: list[Row] = []
        self._arrays: list[Mapping[str, np.ndarray]] = []
        self._bytes = 0

    def add(self, rows: Sequence[Row], arrays: Mapping[str, np.ndarray]) -> None:
        """Add rows, which are written once there are enough for a shard, or once the next ones have other shapes.

        Args:
            rows: Who they are.
            arrays: By name, the rows (N, …): float32, float64 or int32.
        """
        if not rows:
            return
        if self._arrays and any(array.shape[1:] != self._arrays[0][name].shape[1:] for name, array in arrays.items()):
            self.flush()
        self._rows += rows
        self._arrays.append({name: self._stored(array) for name, array in arrays.items()})
        self._bytes += sum(array.nbytes for array in self._arrays[-1].values())
        if self._bytes >= SHARD_BYTES or len(self._rows) >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are not written yet."""
        if not self._rows:
            return
        names = sorted(self._arrays[0])
        content = _serialized(
            {name: np.concatenate([arrays[name] for arrays in self._arrays]) for name in names}, self._rows
        )
        with replacing(self._folder / f"shard-{_checksum(content)}.safetensors") as partial:
            partial.write_bytes(content)
        self._rows, self._arrays, self._bytes = [], [], 0

    def _stored(self, array: np.ndarray) -> np.ndarray:
        if self._bfloat16 and array.dtype.kind == "f":
            return narrowed(array.astype(np.float32))
        return np.array(array)


def _serialized(arrays: Mapping[str, np.ndarray], rows: Sequence[Row]) -> bytes:
    """Return a safetensors file. The package itself writes no bfloat16 from NumPy.

    Args:
        arrays: The tensors by name; uint16 holds the bits of bfloat16.
        rows: Identity of each row, for the header.
    """
    header: dict[str, Any] = {"__metadata__": {"rows": json.dumps(rows)}}
    place = 0
    for name, array in arrays.items():
        offsets = [place, place + array.nbytes]
        header[name] = {"dtype": _WRITTEN[array.dtype], "shape": array.shape, "data_offsets": offsets}
        place += array.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *(array.tobytes() for array in arrays.values())])


def narrowed(array: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bfloat16 of float32 numbers, uint16; of two that are as near, the even one."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype("<u2")


def widened(bits: np.ndarray) -> np.ndarray:
    """Return float32 numbers from the bits of bfloat16."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_CHECKSUM_DIGITS]


def shard_names(folder: Path) -> list[str]:
    """Return the names of the shards in a folder, in order; none where there is no folder."""
    return [name for name in names_in(folder) if fnmatch(name, SHARDS)]


def open_shard(file: Path) -> Shard:
    """Read a shard's header.

    Args:
        file: The file, on this machine.

    Raises:
        ValueError: If it is not a whole shard.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"its header would be {length} bytes long")
        head = stream.read(length)
    try:
        header = parse_json(head.decode())
        rows = [
            Row(key, name, None if version is None else (int(version[0]), int(version[1])))
            for key, name, version in json.loads(header.pop("__metadata__")["rows"])
        ]
        tensors, size = {}, 8 + length
        for name, tensor in header.items():
            shape = tuple(int(side) for side in tensor["shape"])
            begin, end = (int(place) for place in tensor["data_offsets"])
            if shape[0] != len(rows) or end - begin != np.dtype(_DTYPES[tensor["dtype"]]).itemsize * np.prod(shape):
                raise ValueError(f"{name} has shape {shape}, and there are {len(rows)} rows")
            tensors[name] = (tensor["dtype"], shape, 8 + length + begin)
            size = max(size, 8 + length + end)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"its header cannot be read ({error})") from error
    if file.stat().st_size != size:
        raise ValueError(f"it is {file.stat().st_size} bytes long, not {size}")
    return Shard(file, rows, tensors)


def remove_damaged(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Delete the shards whose bytes are not those of their checksum, with a warning for each.

    Args:
        folder: The folder.
        part: Index of the share of the shards to look at, from 0.
        parts: Number of shares.
    """
    names = shard_names(folder)[part::parts]
    local = local_copy(folder, (SHARDS,)) if names else folder

    def damage(name: str) -> str | None:
        file = local / name
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()[:_CHECKSUM_DIGITS]
        if found != name.removeprefix("shard-").removesuffix(".safetensors"):
            return f"its checksum is {found}"
        try:
            open_shard(file)
        except ValueError as error:  # a file that somebody else made
            return str(error)
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        for name, reason in zip(names, pool.map(damage, names), strict=True):
            if reason is not None:
                log.warning("%s is damaged (%s): what it held is computed again", folder / name, reason)
                (folder / name).unlink()


def folder_of(parent: Path, kind: str, key: Mapping[str, Any]) -> Path:
    """Return the folder of rows of a kind that depend on a key.

    Args:
        parent: Folder of all rows.
        kind: What the rows are, the start of the folder's name.
        key: What they depend on, as JSON.
    """
    return parent / f"{kind}-{_fingerprint(key)}"


def _fingerprint(key: Mapping[str, Any]) -> str:
    text = json.dumps({"format": _FORMAT, "key": key}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_keys(parent: Path, kind: str) -> dict[Path, dict[str, Any]]:
    """Return what the rows of a kind depend on, by folder.

    Args:
        parent: Folder of all rows.
        kind: What the rows are.

    Raises:
        ValueError: If a manifest cannot be read, or is not that of its folder; the message names it.
    """
    keys = {}
    folders = sorted(path for path in parent.iterdir() if path.name.startswith(f"{kind}-")) if parent.is_dir() else ()
    for folder in folders:
        manifest = folder / MANIFEST
        if not manifest.exists():  # a folder of something else, or its writer was killed before it wrote a shard
            continue
        try:
            key = parse_json(read_text(manifest))["key"]
            is_own = folder.name == folder_of(parent, kind, key).name
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} cannot be read ({error})") from error
        if not is_own or not isinstance(key, dict):
            raise ValueError(f"{manifest} is not the one that was written there")
        keys[folder] = key
    return keys


def write_manifest(parent: Path, kind: str, key: Mapping[str, Any]) -> None:
    """Write the manifest of a folder of rows, unless it is there.

    If there are rows of this kind that depend on something else, what differs from the most similar ones is logged.

    Args:
        parent: Folder of all rows.
        kind: What the rows are.
        key: What they depend on, as JSON.
    """
    folder, others = folder_of(parent, kind, key), read_keys(parent, kind)
    if folder in others:
        return
    if others:
        told = {other: differences(was, key) for other, was in others.items()}
        nearest = min(told, key=lambda other: len(told[other]))
        log.info(
            "%s are made anew in %s, because they differ from those in %s: %s",
            kind, folder, nearest.name, first_differences(told[nearest]),
        )  # fmt: skip
    write_json(folder / MANIFEST, {"format": _FORMAT, "kind": kind, "key": key})
