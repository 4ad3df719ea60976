"""Writing of folders of latents, which a run then reads in place of pictures.

Each process computes whole shards, and none writes one that another does. All encode together, so each takes as many
batches as the one that has most. A note beside each shard says that it is whole; a command that was killed goes on
with the shards that have none, and all notes are deleted once the manifest is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.backend import Backend, shared_folder
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data.bad import BadExamples, example_name
from flax_diffusion.core.data.shards.latents import (
    FORMAT,
    MANIFEST,
    UNFINISHED,
    LatentSource,
    Layout,
    Manifest,
    shard_name,
    write_shard,
)
from flax_diffusion.core.data.sources.labels import LabelledSource
from flax_diffusion.core.data.sources.source import Record, Source
from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.io.files import as_path, names_in, replacing, write_json
from flax_diffusion.core.io.untrusted import parse_json, read_text
from flax_diffusion.core.run import lineage
from flax_diffusion.core.run.shards.encoding import Encoder
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task

log = logging.getLogger(__name__)

SHARD_BYTES = 2**28
"""Size that a shard has at most. A process that is killed loses at most one."""


def check(task: Task[TrainConfig], spec: PipelineSpec, source: Source) -> None:
    """Make sure that the latents that a run reads are those that it would compute of the pictures.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        source: The latents.

    Raises:
        ConfigError: If they are of another autoencoder, another resolution or the like.
    """
    assert isinstance(source, LatentSource)
    manifest = source.manifest
    manifest.check({"key": _key(task, spec), "shape": [manifest.layout.shape[0], 2, *spec.sample_shape]})
    if task.config.random_flip and manifest.layout.shape[0] == 1:
        raise ConfigError(
            f"--random_flip: {manifest.folder} holds the latents of one orientation: drop it, or compute them with "
            "--random_flip into another folder"
        )


def _key(task: Task[TrainConfig], spec: PipelineSpec) -> dict[str, Any]:
    transform = replace(task.make_transform(spec), random_flip=False)  # the shape says whether mirror images are there
    return lineage.posteriors_key(spec, task.config, transform)


def write_latents(task: Task[TrainConfig], spec: PipelineSpec, source: Source, backend: Backend) -> None:
    """Compute the latents of all pictures, as far as they are not there, and write them in shards.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        source: The pictures, with their classes.
        backend: The backend of this process, with the models loaded.

    Raises:
        ConfigError: If the folder holds other latents, or is not the same for all processes.
        DataError: For a picture that cannot be read; where such pictures are skipped, for too many of them.
        NonFiniteError: For a picture whose latents are not finite.
    """
    folder = as_path(str(task.latents_dir))
    shared_folder(folder, backend, "--latents_dir")
    assert isinstance(source, LabelledSource)
    layout = Layout(task.latents_dtype, (2 if task.config.random_flip else 1, 2, *spec.sample_shape))
    per_shard = max(1, SHARD_BYTES // layout.record_bytes)
    count = math.ceil(len(source) / per_shard)
    of = {
        "format": FORMAT, "key": _key(task, spec), "classes": list(source.classes), "dtype": layout.dtype,
        "shape": list(layout.shape), "examples": len(source), "data": lineage.data_digest(source), "shards": count,
    }  # fmt: skip
    of = json.loads(json.dumps(of))  # as it is when it is read again
    done = _begin(folder, of, backend)
    if done is None:
        if backend.process_index == 0:
            log.info("all latents are in %s", folder)
        return
    missing = [number for number in range(count) if number not in done]
    _agree(missing, backend)
    if backend.process_index == 0:
        log.info("encoding %d pictures, %d of %d shards are in %s", len(source), len(done), count, folder)
    shards = {number: range(number * per_shard, min(len(source), (number + 1) * per_shard)) for number in missing}
    bad = BadExamples(len(source)) if task.config.skip_bad_images else None
    encoder = Encoder(task, task.make_transform(spec), source, backend, bad)
    for number, records in _computed(shards, encoder, layout):
        file = folder / shard_name(number, count)
        with replacing(file) as partial:
            write_shard(partial, records)
            size = partial.stat().st_size
        write_json(_note(folder, number), {"records": len(records), "bytes": size})
        log.info("%s: %d pictures", file.name, len(records))
    backend.all_processes(True)
    if backend.process_index == 0:
        _finish(folder, of)
    backend.all_processes(True)


def _begin(folder: Path, of: dict[str, Any], backend: Backend) -> set[int] | None:
    """Make a folder ready to be filled.

    Args:
        folder: The folder.
        of: What its manifest will say of the latents.
        backend: The backend of this process.

    Returns:
        Numbers of the shards that are there; None if it is finished.

    Raises:
        ConfigError: If it holds other latents, or something else.
    """
    finished = Manifest.read(folder)
    begun = finished or Manifest.read(folder, UNFINISHED)
    names = names_in(folder)
    if begun is not None:
        begun.check(of)
    elif any(name.endswith(".array_record") for name in names):
        raise ConfigError(f"{folder} holds shards and neither {MANIFEST} nor {UNFINISHED}: name another folder")
    there = {number for number in range(of["shards"]) if shard_name(number, of["shards"]) in names}
    backend.all_processes(True)
    if finished is None:
        if backend.process_index == 0 and begun is None:
            write_json(folder / UNFINISHED, of)
        there = {number for number in there if _note(folder, number).name in names}
    elif backend.process_index == 0:
        if len(there) == of["shards"]:
            _remove_notes(folder)
        else:
            _reopen(finished, there)
    backend.all_processes(True)
    return None if finished is not None and len(there) == of["shards"] else there


def _reopen(finished: Manifest, there: set[int]) -> None:
    """Make a finished folder of which shards were deleted one that is not finished."""
    folder = finished.folder
    assert finished.records is not None
    assert finished.sizes is not None
    for number in there:
        write_json(_note(folder, number), {"records": finished.records[number], "bytes": finished.sizes[number]})
    write_json(folder / UNFINISHED, dict(finished.of))
    (folder / MANIFEST).unlink()


def _note(folder: Path, number: int) -> Path:
    """Return the file that says that a shard is whole, and what it holds."""
    return folder / f"latents-{number:05}.json"


def _agree(missing: list[int], backend: Backend) -> None:
    """Raise DataError in all processes if they do not miss the same shards."""
    digest = int(hashlib.sha256(repr(missing).encode()).hexdigest()[:6], 16)
    if not backend.all_processes(digest == backend.broadcast_from_first(digest)):
        raise DataError("the shards of --latents_dir differ between the processes of this run: give the command again")


class _Held:
    """Pictures of which those of a batch are held, so that each is read once.

    Args:
        source: The pictures.
    """

    def __init__(self, source: Source):
        self._source = source
        self._records: dict[int, Record] = {}

    def read(self, indices: Sequence[int], pool: ThreadPoolExecutor) -> None:
        """Read some pictures, which are held in place of the ones before; those that cannot be read are not."""

        def read(index: int) -> Record | None:
            with contextlib.suppress(DataError):  # it is raised again where the picture is used
                return self._source[index]
            return None

        found = zip(indices, pool.map(read, indices), strict=True)
        self._records = {index: record for index, record in found if record is not None}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return self._records.get(index) or self._source[index]


def _computed(shards: dict[int, range], encoder: Encoder, layout: Layout) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the number and the records of each shard of this process.

    Args:
        shards: Indices of the examples of each shard that is missing.
        encoder: The encoder.
        layout: Form of the records.
    """
    held = _Held(encoder.source)
    encoder = replace(encoder, source=held)
    backend, share = encoder.backend, encoder.share
    numbers = sorted(shards)
    parts = [numbers[index :: backend.process_count] for index in range(backend.process_count)]
    rounds = [sum(math.ceil(len(shards[number]) / share) for number in part) for part in parts]
    start, left = share * backend.process_index, max(rounds)
    with ThreadPoolExecutor() as pool:
        for number in parts[backend.process_index]:
            records: list[bytes] = []
            for first in range(0, len(shards[number]), share):
                indices = shards[number][first : first + share]
                held.read(indices, pool)
                pictures = [(example_name(held, index), index) for index in indices]
                made = encoder(pictures, pool).posteriors[start : start + share]
                left -= 1
                for place in encoder.good([name for name, _ in pictures], made):
                    records.append(_record(held, pictures[place], made[place], layout))
            yield number, records
        for _ in range(left):  # the other processes are not done, and encode together with this one
            encoder([], pool)


def _record(source: Source, picture: tuple[str, int], posterior: np.ndarray, layout: Layout) -> bytes:
    name, index = picture
    label = source[index].label
    assert label is not None
    return layout.packed(label, name, posterior)


def _finish(folder: Path, of: dict[str, Any]) -> None:
    """Write the manifest, and delete what is of use only before."""
    notes = [parse_json(read_text(_note(folder, number))) for number in range(of["shards"])]
    told = {name: [note[name] for note in notes] for name in ("records", "bytes")}
    write_json(folder / MANIFEST, of | told)
    _remove_notes(folder)


def _remove_notes(folder: Path) -> None:
    for name in names_in(folder):
        if name == UNFINISHED or (name.startswith("latents-") and name.endswith(".json")):
            (folder / name).unlink()
