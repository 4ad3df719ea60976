"""Reader of the tensors in a file of `torch.save`, without PyTorch, and without running what the file says.

A pickle makes objects by calling what it names. Here it can name only the few things that tensors are made of, and
for each it gets a stand-in that holds no code of the file's: where a tensor's values lie, and in which order. Any
other name ends the reading. The values themselves lie outside of the pickle: since PyTorch 1.6 in members of a zip
archive, before that one after another at the end of the file.

Errors are ValueError, or OSError from reading the file, as of `untrusted`.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flax_diffusion.core.errors import shown

MAX_PICKLE_BYTES = 2**24
"""Largest part of a zip archive that says which tensors there are; a hundred bytes a tensor are usual."""

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which files of before PyTorch 1.6 begin
_DTYPES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1", "BoolStorage": "?",
}  # fmt: skip
_OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE",
    "BINSTRING", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND",
    "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID",
))  # fmt: skip
"""Steps of the pickles that tensors are in. Others make objects in more ways, or of a size that a few bytes state."""
_BROKEN = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, OverflowError,
    MemoryError, RuntimeError, UnicodeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What `pickle` and `zipfile` raise for files that are not whole, or were never what they seem."""


@dataclass(frozen=True, slots=True)
class _Storage:
    """Values in one piece."""

    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor: which values of a storage, in which order."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in values

    def of(self, values: np.ndarray) -> np.ndarray:
        """Return the tensor, given all values of its storage.

        Raises:
            ValueError: If it reaches beyond them.
        """
        last = self.offset + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))
        if 0 in self.shape:
            return np.empty(self.shape, values.dtype)
        if last >= len(values):
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its {len(values)} values")
        strides = tuple(stride * values.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False)


class _StorageType:
    """Stand-in for a class of storages. It has no attributes that a pickle could set."""

    __slots__ = ("_name",)

    def __init__(self, name: str):
        self._name = name

    def __str__(self) -> str:
        return self._name


class _MakeTensor:
    """Stand-in for the function that makes a tensor of a storage."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise ValueError("a tensor is not made of a storage and whole numbers")
        if len(shape) != len(strides) or len(shape) > 8:
            raise ValueError(f"a tensor has shape {shown(shape)} and strides {shown(strides)}")
        return _View(storage, offset, tuple(shape), tuple(strides))


class _MakeParameter:
    """Stand-in for the function that makes a parameter of a tensor."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return the stand-in for one of the names that tensors need.

        Raises:
            ValueError: For any other name.
        """
        match module_name, global_name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return _MakeTensor()
            case "torch._utils", "_rebuild_parameter":
                return _MakeParameter()
            case "torch", _ if global_name in _DTYPES:
                return _StorageType(global_name)
        raise ValueError(f"it names {module_name}.{global_name}, which is no part of a tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        """Return where the values lie that a tensor is made of.

        Raises:
            ValueError: If the description is none of a storage.
        """
        match pid:
            case ("storage", _StorageType() as kind, str(key), _, int(count), *rest) if rest in ([], [None]):
                return _Storage(key, np.dtype(_DTYPES[str(kind)]), count)
        raise ValueError(f"it refers to {shown(pid)}, which is no storage")


def read_torch_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a state dict.

    Args:
        path: A file that `torch.save` has written, in the form of PyTorch 1.6 or that of before.

    Returns:
        The tensors by name, of the file's dtypes.

    Raises:
        ValueError: If it holds anything but tensors by name, or is not whole.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _read_zip(file) if is_zip else _read_old(file)
    except _BROKEN as error:
        raise ValueError(f"it is no whole file of torch.save ({type(error).__name__}: {error})") from error


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        main = next((name for name in members if name.endswith("/data.pkl") and name.count("/") == 1), None)
        if main is None:
            raise ValueError("it is a zip archive without data.pkl")
        if members[main].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl is larger than {MAX_PICKLE_BYTES} bytes")
        folder = main.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its values have the higher byte first")
        views = _views(_load(io.BytesIO(archive.read(main))))
        values = {}
        for storage in {view.storage for view in views.values()}:
            member = members[f"{folder}data/{storage.key}"]
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != storage.count * storage.dtype.itemsize:
                raise ValueError(f"its member {member.filename} has not the size of {storage.count} values")
            values[storage.key] = np.frombuffer(archive.read(member), storage.dtype)
    return {name: view.of(values[view.storage.key]) for name, view in views.items()}


def _read_old(file: BinaryIO) -> dict[str, np.ndarray]:
    start = [_load(file) for _ in range(2)]
    if start != [_MAGIC, _PROTOCOL]:
        raise ValueError("it does not begin as files of torch.save do")
    system = _load(file)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise ValueError("its values have the higher byte first")
    views = _views(_load(file))
    storages = {view.storage.key: view.storage for view in views.values()}
    values: dict[str, np.ndarray] = {}
    for key in _load(file):
        if key not in storages:
            raise ValueError(f"its storage {shown(key)} belongs to no tensor")
        storage = storages[key]
        if int.from_bytes(file.read(8), "little") != storage.count:
            raise ValueError(f"its storage {key} has not the size of {storage.count} values")
        data = file.read(storage.count * storage.dtype.itemsize)
        if len(data) != storage.count * storage.dtype.itemsize:
            raise EOFError("the values end too soon")
        values[key] = np.frombuffer(data, storage.dtype)
    return {name: view.of(values[view.storage.key]) for name, view in views.items()}


def _load(file: BinaryIO) -> Any:
    """Return what the next pickle of a file holds, once its steps are known to be harmless."""
    start = file.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name not in _OPCODES:
            raise ValueError(f"its pickle has the step {opcode.name}, which tensors do not need")
        if opcode.name.endswith("PUT") and int(argument or 0) > number:  # pickle would make room for this many objects
            raise ValueError(f"its pickle keeps object {argument} after {number} steps")
    file.seek(start)
    return _Unpickler(file).load()


def _views(loaded: Any) -> dict[str, _View]:
    """Return what a pickle holds, once it is tensors by name."""
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds {shown(loaded)}, not tensors by name")
    for name, view in loaded.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            raise ValueError(f"it holds {shown(view)} as {shown(name)}, not a tensor")
    return dict(loaded)
