"""Outputs of the frozen models that are computed once before training: text embeddings, and posteriors of latents.

The step then needs neither these models nor the pictures, which leaves memory for larger batches. The mean and log
variance of the autoencoder's posterior are kept, not a sample of it, so that each epoch draws new latents. For pictures
that are flipped at random, the posteriors of both orientations are kept.

With buckets, a picture has the size of its bucket, and one that occurs in several is encoded for each of them.

With --precomputed_dir all that stays for later runs, of any task and of either backend. A picture is then known by the
checksum of its bytes and by that size, a prompt by its text, and the models by the keys of `lineage`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flax_diffusion.core.backend import Backend, shared_folder
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data import store
from flax_diffusion.core.data.bad import BadExamples, example_name
from flax_diffusion.core.data.batches import Precomputed
from flax_diffusion.core.data.buckets import parse_sizes
from flax_diffusion.core.data.images.decoding import checksum
from flax_diffusion.core.data.images.transforms import sized_name
from flax_diffusion.core.data.sources.source import Record, Source, first_few
from flax_diffusion.core.data.store import Row, Store, Writer
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.families.family import Role
from flax_diffusion.core.io.files import as_path, remove_tree, version_of
from flax_diffusion.core.run import lineage
from flax_diffusion.core.run.shards.encoding import Encoder
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task

log = logging.getLogger(__name__)

PROMPTS_AT_A_TIME = 64
EMBEDDINGS, POSTERIORS, SIZES = "embeddings", "posteriors", "sizes"
_READERS = 16  # threads that read pictures, most of whose time is waiting where these are in an object store


def precompute(
    task: Task[TrainConfig],
    spec: PipelineSpec,
    source: Source,
    backend: Backend,
    scratch: Path,
    sizes: Mapping[int, tuple[int, int]] | None = None,
) -> Precomputed:
    """Compute what the options ask for and is not there yet, and free the models that made it.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        source: All pictures of the run, those for validation among them.
        backend: The backend of this process, with the models loaded.
        scratch: Folder for what is not kept; each process writes its own files.
        sizes: Height and width in pixels of each that a step takes, by its index; None for squares of all of them.

    Returns:
        The tables of what was computed.

    Raises:
        ConfigError: If --precomputed_dir is not the same folder for all processes.
        DataError: For a picture that cannot be read; where such pictures are skipped, for too many of them.
        NonFiniteError: For a picture whose latents are not finite.
    """
    made, bad = Precomputed(), BadExamples(len(source)) if task.config.skip_bad_images else None
    if task.precomputed_dir is not None:
        shared_folder(as_path(task.precomputed_dir), backend, "--precomputed_dir")
    if task.embeds_prompts:
        made = replace(made, embeddings=_embeddings(task, spec, _prompts(task, source, bad), backend, scratch))
        for name in spec.names_of(Role.TEXT_ENCODER):
            backend.release(name)
    if task.latents_dir is not None:
        backend.release(spec.vae_name)
    elif task.caches_latents:
        wanted = _wanted(source, bad, sizes)
        tables = _Pictures(task, spec, source, backend, scratch, wanted, bad).tables()
        made = replace(made, posteriors=tables.get(POSTERIORS, {}), sizes=tables.get(SIZES))
        backend.release(spec.vae_name)
    return made


def _records(source: Source, bad: BadExamples | None) -> Iterator[tuple[int, Record]]:
    """Yield all records with their indices; bad records are left out and counted in `bad`, if it is there."""
    for index in range(len(source)):
        try:
            yield index, source[index]
        except DataError as error:
            if bad is None:
                raise
            bad.add(example_name(source, index), str(error))


def _prompts(task: Task[TrainConfig], source: Source, bad: BadExamples | None) -> list[str]:
    captions = (record.caption for _, record in _records(source, bad))
    listed = ([caption] if isinstance(caption, str) else caption or [] for caption in captions)
    prompts = dict.fromkeys(prompt for several in listed for prompt in several)
    if task.embeds_empty_prompt:
        prompts[""] = None
    return list(prompts)


@dataclass(frozen=True)
class _Place:
    """Where the rows of a kind are, seen from one process.

    Attributes:
        folder: The folder of the shards.
        kept: Whether all processes write into it, for later runs too; otherwise it is this process's own.
        backend: The backend of this process.
    """

    folder: Path
    kept: bool
    backend: Backend

    @classmethod
    def of(cls, task: Task[TrainConfig], kind: str, key: Any, scratch: Path, backend: Backend) -> _Place:
        """Return the place of a kind of rows, which holds only whole shards then.

        Args:
            task: The task, with the run's options.
            kind: What the rows are.
            key: Function that returns what they depend on.
            scratch: Folder for what is not kept.
            backend: The backend of this process.
        """
        if task.precomputed_dir is None:
            folder = scratch / str(backend.process_index) / kind
            remove_tree(folder)  # of a run that was killed
            return cls(folder, False, backend)
        parent = as_path(task.precomputed_dir)
        depends_on = key()
        if backend.process_index == 0:
            store.write_manifest(parent, kind, depends_on)
        backend.all_processes(True)
        folder = store.folder_of(parent, kind, depends_on)
        store.remove_damaged(folder, backend.process_index, backend.process_count)
        backend.all_processes(True)
        return cls(folder, True, backend)

    def agree(self, missing: Iterable[str], what: str) -> None:
        """Make sure that all processes miss the same rows, because they compute them together.

        Raises:
            DataError: If they do not. Every process raises it.
        """
        if not self.kept or self.backend.process_count == 1:
            return
        digest = int(hashlib.sha256("\0".join(missing).encode()).hexdigest()[:6], 16)
        same = digest == self.backend.broadcast_from_first(digest)
        if not self.backend.all_processes(same):
            raise DataError(f"the {what} differ between the processes of this run: all must see the same files")

    def told(self, what: str, count: int, missing: int) -> None:
        """Log how many rows are computed."""
        if self.backend.process_index == 0:
            there = f", {count - missing} of {count} are in {self.folder}" if self.kept else ""
            log.info("encoding %d %s%s", missing, what, there)


def _embeddings(
    task: Task[TrainConfig], spec: PipelineSpec, prompts: list[str], backend: Backend, scratch: Path
) -> Mapping[str, Mapping[str, np.ndarray]]:
    """Return what the text encoders make of prompts, by array and by prompt."""

    def key() -> dict[str, Any]:
        return lineage.embeddings_key(spec, task.config, task.precomputed_dtype)

    place = _Place.of(task, EMBEDDINGS, key, scratch, backend)
    there = Store(place.folder)
    missing = [prompt for prompt in prompts if prompt not in there]
    place.agree(missing, "captions")
    place.told("prompts", len(prompts), len(missing))
    if missing:
        writes = not place.kept or backend.process_index == 0  # every process encodes all of them
        writer = Writer(place.folder, bfloat16=task.precomputed_dtype == "bfloat16")
        for several, arrays in _embedded(missing, backend):
            if writes:
                writer.add([Row(prompt) for prompt in several], arrays)
        writer.flush()
        backend.all_processes(True)
        there = Store(place.folder)
    return there.tables({prompt: prompt for prompt in prompts})


def _embedded(prompts: list[str], backend: Backend) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
    for first in range(0, len(prompts), PROMPTS_AT_A_TIME):
        several = prompts[first : first + PROMPTS_AT_A_TIME]
        size = min(PROMPTS_AT_A_TIME, len(prompts))  # one shape for all, so that one program is compiled
        made = backend.embed_prompts((several * size)[:size])
        yield several, {name: rows[: len(several)] for name, rows in made.items()}


@dataclass(frozen=True)
class _Picture:
    """A picture at a size.

    Attributes:
        row: Its identity.
        index: Index of its record in the source.
        size: Height and width of its bucket, in pixels; None for a square of the resolution.
    """

    row: Row
    index: int
    size: tuple[int, int] | None


def _wanted(
    source: Source, bad: BadExamples | None, sizes: Mapping[int, tuple[int, int]] | None
) -> dict[str, _Picture]:
    """Return the pictures of a run at the sizes that it has them, by their `sized_name`.

    Args:
        source: All examples of the run.
        bad: The bad examples found so far; None where one ends the run.
        sizes: As in `precompute`.
    """
    wanted = {}
    for index, record in _records(source, bad):
        if sizes is None or index in sizes:  # else a step takes none of its bucket
            size = None if sizes is None else sizes[index]
            name = sized_name(record.name, size)
            wanted[name] = _Picture(Row(name, record.name), index, size)
    return wanted


@dataclass
class _Pictures:
    """Pictures, whose posteriors are computed.

    Attributes:
        task: The task, with the run's options.
        spec: The pipeline.
        source: All examples of the run.
        backend: The backend of this process.
        scratch: Folder for what is not kept.
        wanted: The pictures by their `sized_name`, which is the key of their rows where none are kept.
        bad: The bad examples found so far; None where one ends the run.
    """

    task: Task[TrainConfig]
    spec: PipelineSpec
    source: Source
    backend: Backend
    scratch: Path
    wanted: Mapping[str, _Picture]
    bad: BadExamples | None

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.task, self.task.make_transform(self.spec), self.source, self.backend, self.bad)

    def tables(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        """Return posteriors and sizes by name, and compute those that are not there."""

        def key() -> dict[str, Any]:
            config = self.task.config
            buckets = parse_sizes(config.bucket_resolutions, config.resolution, self.spec.size_factor)
            return lineage.posteriors_key(self.spec, config, self.encoder.transform, buckets)

        place = _Place.of(self.task, POSTERIORS, key, self.scratch, self.backend)
        there = Store(place.folder)
        pictures = self._identified(there) if place.kept else self.wanted
        missing = list({one.row.key: one for one in pictures.values() if one.row.key not in there}.values())
        place.agree((one.row.key for one in missing), "pictures")
        place.told("pictures", len(pictures), len(missing))
        if place.kept and self.backend.process_index == 0:
            _tell_of_changes(there, [one.row for one in missing])
        if missing:
            self._encode(missing, Writer(place.folder), place.kept)
            self.backend.all_processes(True)
            there = Store(place.folder)
        return there.tables({name: one.row.key for name, one in pictures.items()})

    def _identified(self, there: Store) -> dict[str, _Picture]:
        """Return the pictures by checksums, for which a file is read unless it is as it was when it was last read."""
        known = {(row.name, row.version): _digest_in(row) for row in there.rows() if row.version is not None}

        def identify(picture: _Picture) -> _Picture:
            name, version, digest = picture.row.name, None, None
            try:
                record = self.source[picture.index]
                image = record.image
                if not isinstance(image, (bytes, np.ndarray, Image.Image)):
                    version = version_of(image)
                    digest = known.get((name, version))
                digest = digest or checksum(record)
            except (DataError, OSError):  # encoding it says why
                return replace(picture, row=Row(f"unreadable {name}", name))
            return replace(picture, row=Row(sized_name(digest, picture.size), name, version))

        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(self.wanted, pool.map(identify, self.wanted.values()), strict=True))

    def _encode(self, pictures: list[_Picture], writer: Writer, kept: bool) -> None:
        """Compute the posteriors of pictures, a size after the other, and write them.

        Args:
            pictures: The pictures.
            writer: Writer of the shards.
            kept: Whether this process writes its share of them; otherwise it writes all.
        """
        for size in dict.fromkeys(one.size for one in pictures):
            self._encode_size(size, [one for one in pictures if one.size == size], writer, kept)
        writer.flush()

    def _encode_size(self, size: tuple[int, int] | None, pictures: list[_Picture], writer: Writer, kept: bool) -> None:
        """Compute and write the posteriors of pictures of one size; see `_encode`."""
        share, processes = self.encoder.share, self.backend.process_count
        at_once, start = share * processes, share * self.backend.process_index
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(pictures), at_once):
                several = pictures[first : first + at_once]
                made = self.encoder([(one.row.name, one.index) for one in several[start : start + share]], pool, size)
                rows = [one.row for one in several]
                good = self.encoder.good([row.name for row in rows], made.posteriors)
                if kept or processes == 1:
                    good = [index for index in good if start <= index < start + share]
                    sizes = np.array([made.sizes[index - start] for index in good], np.int32).reshape(-1, 2)
                    arrays = {POSTERIORS: made.posteriors[good], SIZES: sizes}
                else:  # the sizes of the pictures that other processes read are not known here
                    arrays = {POSTERIORS: made.posteriors[good]}
                writer.add([rows[index] for index in good], arrays)


def _digest_in(row: Row) -> str:
    """Return the checksum of a picture in the key of its row, which may also have a size."""
    return row.key.partition(" ")[0]


def _tell_of_changes(there: Store, missing: list[Row]) -> None:
    """Log which pictures have other bytes than those of their name that were encoded before."""
    known = {(row.name, _digest_in(row)) for row in there.rows()}
    names = {name for name, _ in known}
    changed = [row.name for row in missing if row.name in names and (row.name, _digest_in(row)) not in known]
    if changed:
        log.info("changed since they were encoded: %d pictures, %s", len(changed), first_few(changed))
