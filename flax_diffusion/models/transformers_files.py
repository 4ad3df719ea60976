"""Weights of the models that Transformers had in Flax: reading, fitting and writing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_diffusion.core.errors import ConfigError, shown
from flax_diffusion.core.io.files import replacing
from flax_diffusion.core.io.torch_names import torch_name, torch_shape
from flax_diffusion.core.spec import weight_files
from flax_diffusion.core.spec.weight_files import Tensor
from flax_diffusion.models import weights

BASE = "model"
FLAX_FILE = "flax_model.msgpack"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def own_tensors(
    tensors: Mapping[str, Tensor],
    template: Mapping[str, Any],
    *,
    renamed: Iterable[tuple[re.Pattern[str], str]],
    other_parts: tuple[str, ...],
) -> dict[str, Tensor]:
    """Return those tensors of a file that are a model's, by its names for them.

    Args:
        tensors: Tensors by PyTorch name.
        template: Tree of the model's parameters.
        renamed: Patterns of names in files and their replacements, tried on names that the model does not have.
        other_parts: Starts of names that are other models'; they are left out.
    """
    known = weights.torch_shapes(template)
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        current = name
        for pattern, replacement in renamed:
            if current not in known:
                current = pattern.sub(replacement, current)
        if current in known or not current.startswith(other_parts or ("\0",)):
            own.setdefault(current, tensor)
    return own


def fit(
    tensors: Mapping[str, Tensor], template: Mapping[str, Any], source: Path, *, allow_misfits: bool
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Build a parameter tree from a file's tensors, in the file's dtypes.

    Args:
        tensors: Tensors by PyTorch name, in PyTorch's layout.
        template: Tree of the model's parameter shapes.
        source: Where the tensors come from, for the error.
        allow_misfits: Leave out tensors whose shape is not the model's.

    Returns:
        The parameters as NumPy arrays, and the paths of those that were left out.

    Raises:
        WeightsError: If the tensors do not fit.
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(template)  # pyright: ignore[reportAssignmentType]
    stored = weight_files.match_names(tensors, map(torch_name, flat))
    misfits = []
    for path, leaf in flat.items():
        name = stored.get(torch_name(path))
        if allow_misfits and name and tuple(tensors[name].shape) != torch_shape(path, tuple(leaf.shape)):
            misfits.append(path)
    left = {stored[torch_name(path)] for path in misfits}
    shapes = {path: leaf for path, leaf in flat.items() if path not in misfits}
    kept = {name: tensor for name, tensor in tensors.items() if name not in left}
    return weights.from_tensors(kept, unflatten_dict(shapes), str(source)), misfits


def size_in_bytes(size: int | str) -> int:
    """Return a size in bytes, given as such or like "10GB".

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", size.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f'max_shard_size is {shown(size)}: give a number of bytes, or one like "10GB"')
    return int(float(match[1]) * _UNITS[match[2]])


def save(
    folder: Path, params: Mapping[str, Any], template: Mapping[str, Any], limit: int, *, safetensors: bool
) -> None:
    """Write a model's weights.

    Args:
        folder: Folder to write to; made if it does not exist.
        params: Parameter tree.
        template: Tree of the model's parameter shapes.
        limit: Bytes of one file; more is split into several safetensors.
        safetensors: Write safetensors with PyTorch's names and layout; else the msgpack of a Flax release.

    Raises:
        ConfigError: If the msgpack would exceed the limit.
    """
    if folder.is_file():
        raise ConfigError(f"{folder} is a file: name a folder to save the model in")
    folder.mkdir(parents=True, exist_ok=True)
    if safetensors:
        weights.save(folder, params, template, BASE, limit)
        return
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if size > limit:
        raise ConfigError(
            f"safe_serialization=False writes one file, and the model has {size} bytes, over max_shard_size={limit}: "
            "leave out safe_serialization, or raise max_shard_size"
        )
    with replacing(folder / FLAX_FILE) as partial:
        Path(partial).write_bytes(flax.serialization.to_bytes(params))
