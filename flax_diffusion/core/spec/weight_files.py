"""Reader of the weights in a model's folder, without a framework: safetensors, or msgpack of a Flax release.

A Flax release wrote one msgpack file a model. Transformers' Flax classes also split one into shards
(`max_shard_size`), or wrote safetensors with Linen's names and layout (`safe_serialization`).
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np

from flax_diffusion.core.errors import WeightsError, shown
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.hub_options import DEFAULT_HUB, HubOptions
from flax_diffusion.core.io.torch_names import LEAVES, to_torch_layout, torch_name, torch_shape
from flax_diffusion.core.io.untrusted import LFS_POINTER

log = logging.getLogger(__name__)

FLAX_FILES = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
FLAX_PATTERNS = tuple(
    pattern
    for name in FLAX_FILES
    for pattern in (name, name.replace(".msgpack", "-?????-of-?????.msgpack"), f"{name}.index.json")
)
"""Names of a Flax release's files: the single file, a glob of the shards, and the index of the shards."""

# Name parts in old files and their present form, tried on names that the model does not have.
ALIASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.query\."), ".to_q."),
    (re.compile(r"\.key\."), ".to_k."),
    (re.compile(r"\.value\."), ".to_v."),
    (re.compile(r"\.proj_attn\."), ".to_out.0."),
    (re.compile(r"\.Conv2d_0\."), ".conv."),
    (re.compile(r"^(embeddings|encoder|final_layer_norm)\."), r"text_model.\1."),  # CLIP of Transformers 5
)
COPIED = re.compile(r"^(transformer_blocks)\.(\d+)(\.norm1\.emb\..*)$")
"""Names of the embedder of time and class, of which each block of a DiT has a copy in files: there is one here, by the
name of the first block's."""
BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.norm1\.")

IGNORED = re.compile(r"(^|\.)position_ids$")  # CLIP's buffer 0, 1, 2 …, in files before Transformers 4.31

# Errors of msgpack and NumPy for a file that is not Flax's msgpack.
_NOT_MSGPACK = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, MemoryError,
    msgpack.UnpackException,
)  # fmt: skip
_CHUNKED = "__msgpack_chunked_array__"  # how Flax divides arrays over a gigabyte
_ARRAY = 1  # Flax's msgpack type of an array
_DTYPES = re.compile(r"b?float\d+|u?int\d+|bool")


class Tensor(Protocol):
    """A tensor of a weights file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        ...

    def array(self) -> np.ndarray:
        """Return the values."""
        ...


class _InMemory:
    """A tensor that is not in a mapped file."""

    def __init__(self, values: np.ndarray):
        self.values = values
        self.shape = tuple(values.shape)

    def array(self) -> np.ndarray:
        """Return the values."""
        return self.values


class _InLinenLayout:
    """A tensor of a safetensors file that holds Linen's tree."""

    def __init__(self, stored: Tensor, where: tuple[str, ...]):
        self._stored, self._where = stored, where
        self.shape = torch_shape(where, stored.shape)

    def array(self) -> np.ndarray:
        """Return the values in PyTorch's layout."""
        return to_torch_layout(self._where, self._stored.array())


def in_memory(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return arrays in the form of a file's tensors."""
    return {name: _InMemory(array) for name, array in arrays.items()}


def match_names(stored: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Match the names in a file with the model's, with the help of `ALIASES`.

    Args:
        stored: Names in the file.
        known: Names that the model has.

    Returns:
        Name in the file by the model's name, or by the name in the file where nothing matches.
    """
    known, names = set(known), {}
    for name in stored:
        current = name
        for pattern, replacement in ALIASES:
            if current not in known:
                current = pattern.sub(replacement, current)
        if not (current not in known and IGNORED.search(name)):
            names.setdefault(current, name)
    return names


def without_copies(tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Leave the copies of `COPIED` out of the tensors of a file.

    Args:
        tensors: Tensors by their names in the file.
        source: The file, for the error.

    Raises:
        WeightsError: If a copy has other values than the first one.
    """
    kept, firsts = {}, {}
    for name, tensor in tensors.items():
        match = COPIED.match(name)
        first = f"{match[1]}.0{match[3]}" if match else name
        if first == name or first not in tensors:
            kept[name] = tensor
            continue
        if first not in firsts:
            firsts[first] = tensors[first].array()
        if tensor.shape != firsts[first].shape or tensor.array().tobytes() != firsts[first].tobytes():
            raise WeightsError(
                f"{source}: {first} and {name} differ, and all blocks share them here: use weights whose blocks were "
                "trained with one embedder of time and class"
            )
    return kept


def with_copies(arrays: Iterable[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """Return the arrays of a file, sorted by name, where each block has its copy: the inverse of `without_copies`.

    Args:
        arrays: Arrays by PyTorch name.
    """
    own = dict(arrays)
    blocks = sorted({match[1] for name in own if (match := BLOCK.match(name))})
    for name in [name for name in own if COPIED.match(name)]:
        own |= {COPIED.sub(rf"\1.{block}\3", name): own[name] for block in blocks}
    return sorted(own.items())


def base_name(kind: str) -> str:
    """Return the name, without extension, of the weights file of a model of a given PyTorch class."""
    named_by_transformers = kind.startswith(("CLIP", "T5")) or kind == "StableDiffusionSafetyChecker"
    return "model" if named_by_transformers else "diffusion_pytorch_model"


def file_patterns(base: str, variant: str | None) -> list[str]:
    """Return the names of safetensors files: the single file, a glob of the shards, and the index of the shards.

    Args:
        base: File name without extension.
        variant: Variant such as "fp16"; None for the plain files.
    """
    dot = f".{variant}" if variant else ""
    return [
        f"{base}{dot}.safetensors",
        f"{base}{dot}-?????-of-?????.safetensors",
        f"{base}.safetensors.index{dot}.json",
    ]


def variant_of(names: Iterable[str], base: str, variant: str | None) -> str | None:
    """Return which variant of a component to read: the requested one if it has files, else None.

    Args:
        names: Names of the files in the component's folder.
        base: File name without extension.
        variant: Requested variant.
    """
    patterns = file_patterns(base, variant)
    there = any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
    return variant if there else None


def has_weights(folder: Path, base: str, variant: str | None) -> bool:
    """Return whether a folder holds safetensors of this name and variant."""
    single, _, index = file_patterns(base, variant)
    return (folder / single).is_file() or (folder / index).is_file()


def fetch(
    source: str | Path,
    subfolder: str | None,
    revision: str | None,
    base: str,
    variant: str | None,
    other_files: Sequence[str] = (),
    hub: HubOptions = DEFAULT_HUB,
) -> Path:
    """Return a local folder with a model's weights: safetensors, or a Flax release's if there are none.

    Args:
        source: Folder, or id on the Hub.
        subfolder: Folder inside it.
        revision: Branch, tag or commit on the Hub.
        base: File name without extension.
        variant: Variant such as "fp16"; None for the plain files.
        other_files: Names or globs of other files to fetch.
        hub: How files come from the Hub.
    """
    names = [*other_files, *file_patterns(base, variant)]
    folder = model_files.resolve(source, subfolder, revision, names, hub)
    if has_weights(folder, base, variant):
        return folder
    return model_files.resolve(source, subfolder, revision, [*names, *FLAX_PATTERNS], hub)


def files_of(folder: Path, base: str, variant: str | None = None) -> list[Path]:
    """Return the files that `read` reads, sorted by name."""
    names = file_patterns(base, variant) if has_weights(folder, base, variant) else FLAX_PATTERNS
    return sorted(file for file in folder.iterdir() if any(fnmatch.fnmatch(file.name, name) for name in names))


def read(folder: Path, base: str, variant: str | None = None) -> tuple[dict[str, Tensor], Path]:
    """Open a model's weights: safetensors, whole or sharded, else a Flax release's msgpack.

    Args:
        folder: Folder with the files.
        base: File name without extension, "diffusion_pytorch_model" or "model".
        variant: Variant such as "fp16"; None for the plain files.

    Returns:
        The tensors in PyTorch's layout by their names in the file, without copies, and the file or its index.

    Raises:
        WeightsError: If there is no file that can be read, or copies of a tensor differ.
    """
    tensors, file = _read(folder, base, variant)
    return without_copies(tensors, file), file


def _read(folder: Path, base: str, variant: str | None) -> tuple[dict[str, Tensor], Path]:
    single, _, index = file_patterns(base, variant)
    if (folder / single).is_file():
        return _read_safetensors(folder / single), folder / single
    if (folder / index).is_file():
        return _read_shards(folder / index, _read_safetensors), folder / index
    for name in FLAX_FILES:
        whole, index = folder / name, f"{name}.index.json"
        if not (whole.is_file() or (folder / index).is_file()):
            continue
        if variant is not None and has_weights(folder, base, None):
            break  # whoever wants these asks for no variant
        if variant is not None:
            log.warning("%s: its %s is read, as Flax's files have no variant %s", folder, name, variant)
        if whole.is_file():
            return _read_msgpack(whole), whole
        return _read_shards(folder / index, _read_msgpack), folder / index
    raise WeightsError(_nothing_to_read(folder, single))


def _read_shards(index: Path, read_one: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read the shards that an index lists, each by the reader of its format."""
    tensors: dict[str, Tensor] = {}
    for shard in _shards(index):
        if not index.with_name(shard).is_file():
            raise WeightsError(f"{index} names {shard}, which is missing: fetch the folder again")
        tensors.update(read_one(index.with_name(shard)))
    return tensors


def _shards(index: Path) -> list[str]:
    """Return the names of the shards that an index lists; they are in the same folder."""
    listed = model_files.read_json(index).get("weight_map")
    names: list[Any] = list(listed.values()) if isinstance(listed, dict) else [None]
    wrong = [name for name in names if not isinstance(name, str) or name != Path(name).name]
    if wrong:
        raise WeightsError(f"{index} names {shown(wrong[0])}, which is not a file next to it: fetch the folder again")
    return sorted(set(names))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Open a safetensors file; names and layout become PyTorch's where the file says that they are Flax's."""
    tensors = model_files.read_safetensors(path)
    if model_files.safetensors_metadata(path).get("format") != "flax":
        return dict(tensors)
    paths = {tuple(name.split(".")): tensor for name, tensor in tensors.items()}
    return {_torch_name(where): _InLinenLayout(tensor, where) for where, tensor in paths.items()}


def _torch_name(where: tuple[str, ...]) -> str:
    """Return PyTorch's name of a leaf of Linen's tree; a leaf that no parameter has keeps its own."""
    return torch_name(where) if where[-1] in LEAVES else ".".join(where)


def _read_msgpack(path: Path) -> dict[str, Tensor]:
    """Read a Flax msgpack file and return its arrays by PyTorch name.

    Raises:
        WeightsError: If it holds anything else.
    """
    data = path.read_bytes()
    if data.startswith(LFS_POINTER):
        raise WeightsError(f"{path} is a pointer of Git LFS, without the weights: run `git lfs pull` in its folder")
    try:
        flat = dict(_leaves(msgpack.unpackb(data, ext_hook=_array_of, raw=False)))
    except _NOT_MSGPACK as error:
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path} is not a whole Flax msgpack file ({reason}): fetch it again") from error
    arrays = {}
    for where, array in flat.items():
        if not (where and all(isinstance(key, str) for key in where) and isinstance(array, np.ndarray)):
            place = "/".join(map(str, where)) or "its whole content"
            raise WeightsError(f"{path} holds {shown(array)} as {place}, must be an array: fetch it again")
        arrays[_torch_name(where)] = to_torch_layout(where, array)
    return in_memory(arrays)


def _array_of(code: int, data: bytes) -> np.ndarray:
    if code != _ARRAY:
        raise ValueError(f"msgpack type {code} is not an array")
    shape, dtype, values = msgpack.unpackb(data, raw=True)
    name = dtype.decode()
    if not _DTYPES.fullmatch(name):
        raise ValueError(f"array of {name}")
    if name == "bfloat16":
        from ml_dtypes import bfloat16

        return np.frombuffer(values, bfloat16).reshape(shape)
    return np.frombuffer(values, name).reshape(shape)


def _leaves(tree: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and value of each leaf of nested mappings; arrays in chunks are put together."""
    if not isinstance(tree, dict):
        yield where, tree
    elif _CHUNKED in tree:
        shape = tuple(tree["shape"][str(axis)] for axis in range(len(tree["shape"])))
        chunks = [tree["chunks"][str(number)] for number in range(len(tree["chunks"]))]
        yield where, np.concatenate(chunks).reshape(shape)
    else:
        for key, value in tree.items():
            yield from _leaves(value, (*where, key))


def _nothing_to_read(folder: Path, wanted: str) -> str:
    """Explain what a folder without the wanted weights holds instead."""
    present = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".msgpack"))
    if any(name.endswith(".bin") for name in present) and not any(name.endswith(".safetensors") for name in present):
        return (
            f"{folder} holds pickled weights only ({', '.join(present)}), which are not read because unpickling can "
            "run code: convert them with Diffusers or Transformers, from_pretrained and then save_pretrained"
        )
    fix = "set variant to match one of them" if present else "check the path and the subfolder"
    return f"{folder} holds no {wanted} (it holds {', '.join(present) or 'no weights'}): {fix}"
