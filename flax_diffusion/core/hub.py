"""Model folders, local or on the Hugging Face Hub, and the safetensors format, in NumPy alone."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flax_diffusion.core.errors import WeightsError

# Names in a safetensors header. BF16, which NumPy lacks, is stored as its 16 bits.
DTYPES: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a mapped file.

    Args:
        dtype: as the header names it.
        shape: as the header gives it.
        data: the mapped values; for BF16 their bits.
    """

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def array(self) -> np.ndarray:
        """Return the values: a view of the file, except for BF16, which is widened to float32."""
        if self.dtype == "BF16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        return self.data


def resolve(
    path_or_hub_id: str | Path,
    subfolder: str | None = None,
    revision: str | None = None,
    allow_patterns: Sequence[str] = (),
) -> Path:
    """Return a local folder with the named files.

    Args:
        path_or_hub_id: an existing folder, or `owner/name` on the Hub.
        subfolder: folder inside it.
        revision: branch, tag or commit on the Hub.
        allow_patterns: file names or globs in the (sub)folder to download.

    Returns:
        The (sub)folder, in place or in the Hub's cache.

    Raises:
        WeightsError: if neither a folder nor a repository of that name can be had.
    """
    folder = Path(path_or_hub_id)
    if not folder.is_dir():
        folder = _download(str(path_or_hub_id), subfolder, revision, allow_patterns)
    folder = folder / subfolder if subfolder else folder
    if not folder.is_dir():
        raise WeightsError(f"{path_or_hub_id} has no folder {subfolder!r}: check the name of the subfolder")
    return folder


def _download(name: str, subfolder: str | None, revision: str | None, allow_patterns: Sequence[str]) -> Path:
    """Return the Hub's cached snapshot of a repository, downloading what is new."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise WeightsError(f"there is no folder {name}: check the path")
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in allow_patterns]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns or None))
    except LocalEntryNotFoundError as error:
        raise WeightsError(
            f"{name} is neither a folder nor in the Hub's cache, and the Hub cannot be reached: "
            "give a folder, or download it while online"
        ) from error
    except NoRevision as error:
        raise WeightsError(f"{name} has no revision {revision!r} on the Hub: check its branches") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise WeightsError(
            f"{name} is neither a folder nor a repository on the Hub that you may read: check the name, "
            "or log in with `hf auth login`"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        WeightsError: if the file does not exist or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist: name a folder that holds a model") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a {type(value).__name__}, not a JSON object: fetch the file again")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an indented JSON file, whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name in its folder, flush it to disk and rename it.

    Args:
        path: final name.
        write: writes the content to the file it is given.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        mode = os.umask(0)  # mkstemp makes files private; give this one the usual mode
        os.umask(mode)
        os.chmod(temporary, 0o666 & ~mode)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Map a safetensors file; nothing is read until it is used.

    Raises:
        WeightsError: if the file is not a whole safetensors file.

    Reference: the format's description at huggingface.co/docs/safetensors.
    """
    broken = WeightsError(f"{path} is not a whole safetensors file: fetch or save it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise broken
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise broken from None
    header.pop("__metadata__", None)
    if 8 + length == size:
        return {}
    mapped = np.memmap(path, np.uint8, "r", offset=8 + length)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise WeightsError(f"{path} holds {name} in {entry['dtype']}: save it in float16, bfloat16 or float32")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        if end > mapped.size or end - start != int(np.prod(shape)) * np.dtype(dtype).itemsize:
            raise broken
        tensors[name] = StoredTensor(entry["dtype"], shape, mapped[start:end].view(dtype).reshape(shape))
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, one tensor at a time, whole or not at all.

    Args:
        path: final name.
        tensors: arrays of the dtypes in DTYPES; a bfloat16 array is one whose dtype is so named.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items() if name != "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Transformers refuses files without a format
    offset = 0
    for name, tensor in tensors.items():
        dtype = "BF16" if tensor.dtype.name == "bfloat16" else names[tensor.dtype]
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).data if tensor.dtype.name != "bfloat16" else tensor.tobytes())

    write_atomically(path, write)
