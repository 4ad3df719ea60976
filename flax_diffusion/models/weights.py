"""Conversion of weights between Linen's parameter trees and the files of Diffusers and Transformers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from flax_diffusion.core.errors import WeightsError
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import write_json
from flax_diffusion.core.io.torch_names import from_torch_layout, to_torch_layout, torch_name, torch_shape
from flax_diffusion.core.spec import weight_files
from flax_diffusion.core.spec.weight_files import Tensor, file_patterns

MAX_SHARD_BYTES = 10_000_000_000  # Hugging Face's limit for one file


def _flatten(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return flax.traverse_util.flatten_dict(tree)  # pyright: ignore[reportReturnType]


def from_tensors(
    tensors: Mapping[str, Tensor], template: Mapping[str, Any], source: str, dtype: Any = None
) -> dict[str, Any]:
    """Build a parameter tree from stored tensors.

    Args:
        tensors: Tensors by PyTorch name, in PyTorch's layout.
        template: Tree of the model's parameters, or of their shapes.
        source: Where the tensors come from, for the error.
        dtype: Dtype of the parameters; None for that of each tensor.

    Returns:
        NumPy arrays, each copied once from the file.

    Raises:
        WeightsError: If the tensors do not fit; it lists every missing, unexpected and misshapen one.
    """
    flat = _flatten(template)
    paths = {torch_name(path): path for path in flat}
    names = weight_files.match_names(tensors, paths)
    problems = [f"missing {name} {_stored_shape(paths[name], flat)}" for name in paths if name not in names]
    problems += [
        f"unexpected {stored} {tuple(tensors[stored].shape)}" for name, stored in names.items() if name not in paths
    ]
    params = {}
    for name, path in paths.items():
        if name not in names:
            continue
        leaf, tensor = flat[path], tensors[names[name]]
        view = np.broadcast_to(np.float32(0), tensor.shape)
        if _fits(path, view, leaf.shape):
            array = from_torch_layout(path, tensor.array(), len(leaf.shape))
            if not jnp.issubdtype(array.dtype, np.floating):
                problems.append(f"{names[name]} holds {array.dtype}, not floats")
                continue
            # One copy, which also changes the dtype; the mapped file is dropped page by page.
            params[path] = np.array(array, dtype=dtype, order="C")
        else:
            shape = _stored_shape(path, flat)
            problems.append(f"{names[name]} has shape {tuple(tensor.shape)} instead of {shape}")
    if problems:
        raise WeightsError(
            f"{source} does not fit the model's config, use the weights and the config of one model: "
            + "; ".join(problems)
        )
    return flax.traverse_util.unflatten_dict(params)


def torch_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a tree in PyTorch's layout, by PyTorch name."""
    return {torch_name(path): torch_shape(path, tuple(leaf.shape)) for path, leaf in _flatten(tree).items()}


def _stored_shape(path: tuple[str, ...], flat: Mapping[tuple[str, ...], Any]) -> tuple[int, ...]:
    return torch_shape(path, tuple(flat[path].shape))


def _fits(path: tuple[str, ...], view: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor has the parameter's shape once it is in Linen's layout."""
    if view.ndim == 4 and len(shape) == 2 and view.shape[2:] != (1, 1):
        return False
    if view.ndim != len(shape) and not (view.ndim == 4 and len(shape) == 2):
        return False
    return from_torch_layout(path, view, len(shape)).shape == tuple(shape)


def to_torch(params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every parameter's PyTorch name, and a view of it in PyTorch's layout, sorted by name."""
    flat = _flatten(params)
    for name, path in sorted((torch_name(path), path) for path in flat):
        yield name, to_torch_layout(path, np.asarray(flat[path]))


def load(
    folder: Path, template: Mapping[str, Any], base: str, variant: str | None = None, dtype: Any = None
) -> dict[str, Any]:
    """Read a model's weights: safetensors, whole or sharded, else upstream's Flax msgpack.

    Args:
        folder: Folder that holds the files.
        template: Tree of the model's parameter shapes.
        base: File name without extension, "diffusion_pytorch_model" or "model".
        variant: Variant of the files, such as "fp16".
        dtype: Dtype of the parameters; None for that of each tensor in the file.

    Returns:
        The parameter tree as NumPy arrays.

    Raises:
        WeightsError: If there is no file that may be read, or it does not fit the model.
    """
    tensors, file = weight_files.read(folder, base, variant)
    return from_tensors(tensors, template, str(file), dtype)


def save(
    folder: Path,
    params: Mapping[str, Any],
    template: Mapping[str, Any],
    base: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors with PyTorch's names and layout, each file whole or not at all.

    Args:
        folder: Folder to write to, which exists.
        params: Parameter tree.
        template: Tree of the model's parameter shapes.
        base: File name without extension.
        max_shard_bytes: Limit of one file; more is split into several files and an index.

    Raises:
        WeightsError: If the parameters are not those of the model.
    """
    _check_params(params, template)
    shards: list[dict[str, np.ndarray]] = [{}]
    used = total = 0
    for name, array in weight_files.with_copies(to_torch(params)):
        if shards[-1] and used + array.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = array
        used, total = used + array.nbytes, total + array.nbytes

    count = len(shards)
    names = [f"{base}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else [f"{base}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        model_files.write_safetensors(folder / name, shard)
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
