"""Weights between Linen's parameter trees and the files of Diffusers and Transformers."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import flax.serialization
import flax.traverse_util
import jax.numpy as jnp
import msgpack
import numpy as np

from flax_diffusion.core import hub
from flax_diffusion.core.errors import WeightsError, shown
from flax_diffusion.core.files import write_json
from flax_diffusion.core.torch_names import LEAVES, from_torch_layout, to_torch_layout, torch_name, torch_shape

# Spellings of old files, tried on names that the model does not have.
ALIASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.query\."), ".to_q."),
    (re.compile(r"\.key\."), ".to_k."),
    (re.compile(r"\.value\."), ".to_v."),
    (re.compile(r"\.proj_attn\."), ".to_out.0."),
    (re.compile(r"\.Conv2d_0\."), ".conv."),
    (re.compile(r"^(embeddings|encoder|final_layer_norm)\."), r"text_model.\1."),  # CLIP of Transformers 5
)
IGNORED = re.compile(r"(^|\.)position_ids$")  # CLIP's buffer 0, 1, 2 …, in files before Transformers 4.31

# What msgpack and Flax raise of a file that is not one of theirs, or is one of something else.
_NO_MSGPACK = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, OverflowError, RecursionError,
    MemoryError, msgpack.UnpackException,
)  # fmt: skip
FLAX_FILES = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
MAX_SHARD_BYTES = 10_000_000_000  # Hugging Face's limit for one file


class Tensor(Protocol):
    """What is read from a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        ...

    def array(self) -> np.ndarray:
        """Return its values."""
        ...


def _flatten(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return flax.traverse_util.flatten_dict(tree)  # pyright: ignore[reportReturnType]


def _same_names(stored: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Map the model's names to those in the file, through the aliases where need be."""
    known, names = set(known), {}
    for name in stored:
        current = name
        for pattern, replacement in ALIASES:
            if current not in known:
                current = pattern.sub(replacement, current)
        if not (current not in known and IGNORED.search(name)):
            names.setdefault(current, name)
    return names


def from_tensors(
    tensors: Mapping[str, Tensor], template: Mapping[str, Any], source: str, *, torch_layout: bool = True
) -> dict[str, Any]:
    """Build a parameter tree from stored tensors.

    Args:
        tensors: by PyTorch name.
        template: the tree of the model's parameters, or of their shapes and dtypes.
        source: where the tensors are from, for the error.
        torch_layout: whether they have PyTorch's layout (else Linen's).

    Returns:
        NumPy arrays, each one copy from the file, in the template's dtypes.

    Raises:
        WeightsError: lists every missing, unexpected and misshapen tensor.
    """
    flat = _flatten(template)
    paths = {torch_name(path): path for path in flat}
    names = _same_names(tensors, paths)
    problems = [f"missing {name} {_stored_shape(paths[name], flat)}" for name in paths if name not in names]
    problems += [
        f"unexpected {stored} {tuple(tensors[stored].shape)}" for name, stored in names.items() if name not in paths
    ]
    layout: Callable[..., np.ndarray] = from_torch_layout if torch_layout else lambda path, array, ndim: array
    params = {}
    for name, path in paths.items():
        if name not in names:
            continue
        leaf, tensor = flat[path], tensors[names[name]]
        view = np.broadcast_to(np.float32(0), tensor.shape)
        if _fits(layout, path, view, leaf.shape):
            array = layout(path, tensor.array(), len(leaf.shape))
            if not jnp.issubdtype(array.dtype, np.floating):
                problems.append(f"{names[name]} holds {array.dtype}, not floats")
                continue
            # One copy, which also changes the dtype; the mapped file is dropped page by page.
            params[path] = np.array(array, dtype=leaf.dtype, order="C")
        else:
            shape = _stored_shape(path, flat) if torch_layout else leaf.shape
            problems.append(f"{names[name]} has shape {tuple(tensor.shape)} instead of {shape}")
    if problems:
        raise WeightsError(
            f"{source} does not fit the model's config, use the weights and the config of one model: "
            + "; ".join(problems)
        )
    return flax.traverse_util.unflatten_dict(params)


def torch_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every parameter's PyTorch name and its shape in PyTorch's layout."""
    return {torch_name(path): torch_shape(path, tuple(leaf.shape)) for path, leaf in _flatten(tree).items()}


def _stored_shape(path: tuple[str, ...], flat: Mapping[tuple[str, ...], Any]) -> tuple[int, ...]:
    return torch_shape(path, tuple(flat[path].shape))


def _fits(layout: Callable[..., np.ndarray], path: tuple[str, ...], view: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor has the parameter's shape once it is in Linen's layout."""
    if view.ndim == 4 and len(shape) == 2 and view.shape[2:] != (1, 1):
        return False
    if view.ndim != len(shape) and not (view.ndim == 4 and len(shape) == 2):
        return False
    return layout(path, view, len(shape)).shape == tuple(shape)


def to_torch(params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield PyTorch's names and views in PyTorch's layout of all parameters, sorted by name."""
    flat = _flatten(params)
    for name, path in sorted((torch_name(path), path) for path in flat):
        yield name, to_torch_layout(path, np.asarray(flat[path]))


def file_patterns(base: str, variant: str | None) -> list[str]:
    """Return the names of safetensors files, with `*` for shard numbers, and of their index."""
    dot = f".{variant}" if variant else ""
    return [
        f"{base}{dot}.safetensors",
        f"{base}{dot}-?????-of-?????.safetensors",
        f"{base}.safetensors.index{dot}.json",
    ]


def has_weights(folder: Path, base: str, variant: str | None) -> bool:
    """Tell whether a folder holds safetensors of this name and variant."""
    single, _, index = file_patterns(base, variant)
    return (folder / single).is_file() or (folder / index).is_file()


def load(folder: Path, template: Mapping[str, Any], base: str, variant: str | None = None) -> dict[str, Any]:
    """Read a model's weights: safetensors, whole or sharded, else upstream's Flax msgpack.

    Args:
        folder: holds the files.
        template: the tree of the model's parameter shapes and dtypes.
        base: file name without extension, "diffusion_pytorch_model" or "model".
        variant: such as "fp16".

    Returns:
        The parameter tree as NumPy arrays.

    Raises:
        WeightsError: if there is no file that may be read, or if it does not fit the model.
    """
    single, _, index = file_patterns(base, variant)
    if (folder / single).is_file():
        return from_tensors(hub.read_safetensors(folder / single), template, str(folder / single))
    if (folder / index).is_file():
        tensors: dict[str, Tensor] = {}
        for shard in _shards(folder / index):
            if not (folder / shard).is_file():
                raise WeightsError(f"{folder / index} names {shard}, which is missing: fetch the folder again")
            tensors.update(hub.read_safetensors(folder / shard))
        return from_tensors(tensors, template, str(folder / index))
    for name in FLAX_FILES:
        if variant is None and (folder / name).is_file():
            return from_tensors(_read_msgpack(folder / name), template, str(folder / name), torch_layout=False)
    raise WeightsError(_nothing_to_read(folder, single))


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index divides a model into, which lie beside it."""
    listed = hub.read_json(index).get("weight_map")
    names: list[Any] = list(listed.values()) if isinstance(listed, dict) else [None]
    wrong = [name for name in names if not isinstance(name, str) or name != Path(name).name]
    if wrong:
        raise WeightsError(f"{index} names {shown(wrong[0])}, which is no file beside it: fetch the folder again")
    return sorted(set(names))


def _read_msgpack(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a Flax msgpack file by PyTorch name.

    Raises:
        WeightsError: if it holds anything else.
    """
    try:
        tree: Any = flax.serialization.msgpack_restore(path.read_bytes())
        flat = _flatten(tree)
    except _NO_MSGPACK as error:
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path} is not a whole Flax msgpack file ({reason}): fetch it again") from error
    for where, array in flat.items():
        if not (all(isinstance(key, str) for key in where) and isinstance(array, np.ndarray)):
            place = "/".join(str(key) for key in where)
            raise WeightsError(f"{path} holds {shown(array)} as {place}, must be an array: fetch it again")
    names = {where: torch_name(where) if where[-1] in LEAVES else ".".join(where) for where in flat}
    return {names[where]: _InMemory(array) for where, array in flat.items()}


class _InMemory:
    """A tensor that is not in a mapped file."""

    def __init__(self, values: np.ndarray):
        self.values = values
        self.shape = tuple(values.shape)

    def array(self) -> np.ndarray:
        """Return its values."""
        return self.values


def in_memory(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return arrays as `from_tensors` takes them."""
    return {name: _InMemory(array) for name, array in arrays.items()}


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


def save(
    folder: Path,
    params: Mapping[str, Any],
    template: Mapping[str, Any],
    base: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors with PyTorch's names and layout, each file whole or not at all.

    Args:
        folder: an existing folder.
        params: the parameters.
        template: the tree of the model's parameter shapes.
        base: file name without extension.
        max_shard_bytes: more than this is split into several files and an index.

    Raises:
        WeightsError: if the parameters are not those of the model.
    """
    _check_params(params, template)
    shards: list[dict[str, np.ndarray]] = [{}]
    used = total = 0
    for name, array in to_torch(params):
        if shards[-1] and used + array.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = array
        used, total = used + array.nbytes, total + array.nbytes

    count = len(shards)
    names = [f"{base}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else [f"{base}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        hub.write_safetensors(folder / name, shard)
    single, pattern, index = file_patterns(base, None)
    if count > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        names.append(index)
    # An earlier save of another number of files must not be read instead of this one.
    for path in {folder / single, folder / index, *folder.glob(pattern)} - {folder / name for name in names}:
        path.unlink(missing_ok=True)


def _check_params(params: Mapping[str, Any], template: Mapping[str, Any]) -> None:
    """Raise WeightsError unless two trees have the same names and shapes."""
    ours = {path: tuple(leaf.shape) for path, leaf in _flatten(template).items()}
    given = {path: tuple(np.shape(leaf)) for path, leaf in _flatten(params).items()}
    problems = [
        f"{'/'.join(path)}: given {given.get(path, 'nothing')}, the model has {ours.get(path, 'none')}"
        for path in sorted(ours.keys() | given.keys())
        if ours.get(path) != given.get(path)
    ]
    if problems:
        raise WeightsError("the parameters are not this model's, save them with their own: " + "; ".join(problems))
