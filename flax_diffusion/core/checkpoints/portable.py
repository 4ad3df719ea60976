"""Checkpoints from which either backend can resume.

The JAX side writes Orbax folders, sharded and in the background; the PyTorch side writes one safetensors file. Both are
read here into the same NumPy arrays, with names that belong to no framework:

    params/unet/conv_in.weight   a trained weight, by component and PyTorch name, in PyTorch's layout
    ema/…  mu/…  nu/…            its moving average and AdamW's moments
    ema_0.9999/…                 one of several averages, whose names are `TrainConfig.averages`
    count                        optimizer updates so far (steps that fp16 skipped do not count)
    loss_scale  good_steps       state of fp16's loss scaling
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.errors import CheckpointError
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import absolute, is_local, write_json
from flax_diffusion.core.io.torch_names import to_torch_layout, torch_name
from flax_diffusion.core.io.untrusted import parse_json, read_text

Arrays = dict[str, np.ndarray]

_NAMED_AVERAGE = "ema_"

ARRAYS, METADATA = "state.safetensors", "metadata.json"
SCALARS = {("opt_state", "0", "count"): "count", ("loss_scale", "scale"): "loss_scale"}
SCALARS[("loss_scale", "good_steps")] = "good_steps"


def portable_name(path: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """Return the portable name of a leaf of the JAX side's train state; None for `step`.

    Args:
        path: Keys from the root, such as ("opt_state", "0", "mu", "unet", "conv_in", "kernel").

    Returns:
        The name, and the leaf's path inside its component if the leaf has a weight's layout, else ().
    """
    if path == ("step",):  # it is in the metadata
        return None
    if path in SCALARS:
        return SCALARS[path], ()
    if path[:2] == ("opt_state", "0"):
        path = path[2:]
    elif path[0] == "ema" and path[1].startswith(_NAMED_AVERAGE):
        path = path[1:]
    kind, component, *inside = path
    if inside[-1] in ("codes", "absmax"):  # of 8-bit moments, which keep their own layout
        return f"{kind}_{inside[-1]}/{component}/{torch_name(inside[:-1])}", ()
    return f"{kind}/{component}/{torch_name(inside)}", tuple(inside)


def from_tree(leaves: Iterable[tuple[tuple[str, ...], np.ndarray]]) -> Arrays:
    """Return the leaves of the JAX side's train state under portable names, in PyTorch's layout.

    Args:
        leaves: The path of each leaf, as of `portable_name`, and its values.
    """
    arrays = {}
    for path, leaf in leaves:
        named = portable_name(path)
        if named is not None:
            name, inside = named
            arrays[name] = to_torch_layout(inside, leaf) if inside else leaf
    return arrays


def is_portable(folder: Path) -> bool:
    """Return whether a checkpoint was written by the PyTorch side."""
    return (folder / ARRAYS).is_file()


def write(folder: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write the PyTorch side's checkpoint.

    Args:
        folder: Folder of the checkpoint, which must not exist yet.
        arrays: Arrays by portable name.
        metadata: The loop's metadata, as JSON.
    """
    folder.mkdir(parents=True)
    model_files.write_safetensors(folder / ARRAYS, arrays)
    write_json(folder / METADATA, dict(metadata))


_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)
"""Errors from reading a folder that is no checkpoint, or one of another form."""


@contextmanager
def _complete(folder: Path) -> Iterator[None]:
    try:
        yield
    except _MALFORMED as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint ({error}); resume from another") from error


def read(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read a checkpoint of either backend.

    Returns:
        The arrays by portable name, and the loop's metadata.

    Raises:
        CheckpointError: If the folder is not a complete checkpoint.
    """
    with _complete(folder):
        if is_portable(folder):
            stored = model_files.read_safetensors(folder / ARRAYS)
            arrays = {name: tensor.array() for name, tensor in stored.items()}
        else:
            arrays = from_tree((path, np.asarray(array.read().result())) for path, array in _open_orbax(folder))
    return arrays, read_metadata(folder)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read the loop's metadata from a checkpoint of either backend.

    Raises:
        CheckpointError: If there is none.
    """
    with _complete(folder):
        file = folder / METADATA
        return dict(parse_json(read_text(file if file.is_file() else folder / "metadata" / "metadata")))


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes of the arrays in a checkpoint of either backend.

    Raises:
        CheckpointError: If the folder is not a complete checkpoint.
    """
    with _complete(folder):
        if is_portable(folder):
            return {name: tensor.shape for name, tensor in model_files.read_safetensors(folder / ARRAYS).items()}
        named = from_tree((path, np.broadcast_to(np.float32(0), array.shape)) for path, array in _open_orbax(folder))
        return {name: array.shape for name, array in named.items()}


def _open_orbax(folder: Path) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Open the leaves that Orbax stored, without Orbax, which would import jax."""
    import tensorstore

    tree = parse_json(read_text(folder / "state" / "_METADATA"))
    state = folder / "state"
    where = f"file://{absolute(state)}/" if is_local(state) else f"{state}/"
    for leaf in tree["tree_metadata"].values():
        if leaf["value_metadata"]["value_type"] == "jax.Array":  # anything else is an empty node of the tree
            path = tuple(key["key"] for key in leaf["key_metadata"])
            kvstore = {"driver": "ocdbt", "base": where, "path": ".".join(path) + "/"}
            yield path, tensorstore.open({"driver": "zarr", "kvstore": kvstore, "open": True}).result()
