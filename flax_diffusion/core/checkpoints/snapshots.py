"""Snapshots of power-function averages that a run keeps beside its checkpoints, and sums of them.

    ema_snapshots/sigma_rel_0.05/step-1500/snapshot.json     its relative width and step; written last
                                           unet/ …           what trains, as the run exports it, but in float16

They are never deleted, except those of a time to which the run went back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flax_diffusion.core.errors import CheckpointError
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import copy_file, local_copy, remove_tree, walk, write_json

log = logging.getLogger(__name__)

FOLDER = "ema_snapshots"
"""Folder of a run's snapshots in its output folder."""

_COMPLETE = "snapshot.json"
_WEIGHTS = ".safetensors"
_MAX_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Snapshot:
    """A power-function average after some optimizer step.

    Attributes:
        sigma_rel: Its relative width.
        step: The optimizer step.
        folder: Folder of its files.
    """

    sigma_rel: float
    step: int
    folder: Path


def write(exported: Path, output_dir: Path, sigma_rel: float, step: int) -> None:
    """Write a snapshot; one of the same width and step is replaced.

    Args:
        exported: Folder with what trains, as the run exports it, on this machine.
        output_dir: Folder of the run.
        sigma_rel: Relative width of the average.
        step: The optimizer step.
    """
    folder = output_dir / FOLDER / f"sigma_rel_{sigma_rel}" / f"step-{step}"
    _remove(folder)
    for name in walk(exported):
        target = folder / name
        if target.suffix == _WEIGHTS:
            metadata = model_files.safetensors_metadata(exported / name)
            stored = model_files.read_safetensors(exported / name)
            halved = {key: _halved(tensor.array()) for key, tensor in stored.items()}
            model_files.write_safetensors(target, halved, metadata)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(exported / name, target)
    write_json(folder / _COMPLETE, {"sigma_rel": sigma_rel, "step": step})


def _halved(array: np.ndarray) -> np.ndarray:
    """Return numbers in float16 if they are of a wider float and all of them fit."""
    wide = array.dtype in (np.float32, np.float64)
    return array.astype(np.float16) if wide and np.all(np.abs(array) <= _MAX_HALF) else array


def _remove(folder: Path) -> None:
    (folder / _COMPLETE).unlink(missing_ok=True)  # first, so that what a killed process leaves does not count
    remove_tree(folder)


def find(output_dir: Path) -> list[Snapshot]:
    """Return the whole snapshots of a run, ordered by step.

    Raises:
        CheckpointError: If one says nothing of its width and step.
    """
    found = []
    for folder in _folders(output_dir):
        if (folder / _COMPLETE).is_file():
            values = model_files.read_json(folder / _COMPLETE)
            sigma_rel, step = values.get("sigma_rel"), values.get("step")
            if not isinstance(sigma_rel, float) or not isinstance(step, int):
                raise CheckpointError(f"{folder / _COMPLETE}: has no sigma_rel and step: delete its folder")
            found.append(Snapshot(sigma_rel, step, folder))
    return sorted(found, key=lambda one: (one.step, one.sigma_rel))


def _folders(output_dir: Path) -> Iterator[Path]:
    root = output_dir / FOLDER
    for of_width in root.iterdir() if root.is_dir() else ():
        if of_width.is_dir():
            yield from (folder for folder in of_width.iterdir() if folder.name.startswith("step-"))


def forget_after(output_dir: Path, step: int) -> None:
    """Delete the snapshots that are later than the step from which a run goes on, and incomplete ones.

    Args:
        output_dir: Folder of the run.
        step: The optimizer step; 0 for a run that starts from the beginning.
    """
    kept = {one.folder for one in find(output_dir) if one.step <= step}
    for folder in _folders(output_dir):
        if folder not in kept:
            log.info("going on from step %d: %s of an earlier start is deleted", step, folder)
            _remove(folder)


def combine(kept: Sequence[Snapshot], factors: np.ndarray, folder: Path) -> None:
    """Write the weighted sum of snapshots, as the run exports what trains, in float32.

    What is the same in all of them, such as the scale of a LoRA, stays as it is.

    Args:
        kept: The snapshots.
        factors: Their factors, float64 (N,).
        folder: Folder to write to.

    Raises:
        CheckpointError: If their files or tensors differ.
    """
    names = [*walk(kept[-1].folder)]
    for one in kept:
        if {*walk(one.folder)} != {*names}:
            raise CheckpointError(f"{one.folder}: has other files than {kept[-1].folder}: delete one of them")
    for name in names:
        if Path(name).suffix == _WEIGHTS:
            _combine_file([one.folder / name for one in kept], factors, folder / name)
        elif name != _COMPLETE:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(kept[-1].folder / name, folder / name)


def _combine_file(files: Sequence[Path], factors: np.ndarray, target: Path) -> None:
    local = [local_copy(file.parent, (file.name,)) / file.name for file in files]
    stored = [model_files.read_safetensors(file) for file in local]
    shapes = {name: tensor.shape for name, tensor in stored[-1].items()}
    for file, tensors in zip(files, stored, strict=True):
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise CheckpointError(f"{file}: has other tensors than {files[-1]}: delete the snapshot of another model")
    made = {name: _combined([tensors[name].array() for tensors in stored], factors) for name in shapes}
    model_files.write_safetensors(target, made, model_files.safetensors_metadata(local[-1]))


def _combined(arrays: Sequence[np.ndarray], factors: np.ndarray) -> np.ndarray:
    last = arrays[-1]
    if last.dtype not in (np.float16, np.float32, np.float64) or all(np.array_equal(one, last) for one in arrays):
        return last.astype(np.float32) if last.dtype == np.float16 else last
    total = np.zeros(last.shape, np.float64)
    for factor, array in zip(factors, arrays, strict=True):
        total += factor * array
    return total.astype(np.float32)
