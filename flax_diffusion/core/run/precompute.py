"""Outputs of the frozen models that are computed once before training: text embeddings, and posteriors of latents.

The step then needs neither these models nor the pictures, which leaves memory for larger batches. The mean and log
variance of the autoencoder's posterior are kept, not a sample of it, so that each epoch draws new latents. For pictures
that are flipped at random, the posteriors of both orientations are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data.bad import BadExamples, example_name
from flax_diffusion.core.data.batches import Precomputed
from flax_diffusion.core.data.extra import no_draw
from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.sources.source import Record, Source
from flax_diffusion.core.data.table import write_tables
from flax_diffusion.core.errors import DataError, NonFiniteError
from flax_diffusion.core.families.family import Role
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task

log = logging.getLogger(__name__)

PROMPTS_AT_A_TIME = 64
POSTERIORS = "posteriors"
_NOT_FINITE = "the latents of {} are not finite: check the picture, or the autoencoder's precision"


def precompute(
    task: Task[TrainConfig], spec: PipelineSpec, source: Source, backend: Backend, folder: Path
) -> Precomputed:
    """Compute what the options ask for, and free the models that made it.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        source: All examples of the run.
        backend: The backend of this process, with the models loaded.
        folder: Folder for the files; each process writes its own.

    Returns:
        The tables of what was computed.

    Raises:
        DataError: For a picture that cannot be read; where such pictures are skipped, for too many of them.
        NonFiniteError: For a picture whose latents are not finite.
    """
    config, made, end = task.config, Precomputed(), str(backend.process_index)
    bad = BadExamples(len(source)) if config.skip_bad_images else None
    if task.embeds_prompts:
        prompts = _prompts(task, source, bad)
        tables = write_tables(folder, end, len(prompts), _embedded(prompts, backend))
        made = replace(made, embeddings=tables)
        for name in spec.names_of(Role.TEXT_ENCODER):
            backend.release(name)
    if task.caches_latents:
        named = {record.name: index for index, record in _records(source, bad)}
        batches = _encoded(config, source, named, task.make_transform(spec), backend, bad)
        tables = write_tables(folder, end, len(named), batches)
        made = replace(made, posteriors=tables.get(POSTERIORS, {}))
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


def _embedded(prompts: list[str], backend: Backend) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
    for first in range(0, len(prompts), PROMPTS_AT_A_TIME):
        several = prompts[first : first + PROMPTS_AT_A_TIME]
        size = min(PROMPTS_AT_A_TIME, len(prompts))  # one shape for all, so that one program is compiled
        made = backend.embed_prompts((several * size)[:size])
        yield several, {name: rows[: len(several)] for name, rows in made.items()}


def _encoded(
    config: TrainConfig,
    source: Source,
    named: Mapping[str, int],
    transform: ImageTransform,
    backend: Backend,
    bad: BadExamples | None,
) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
    upright = replace(transform, random_flip=False)

    shape = (transform.channels, transform.resolution, transform.resolution)
    nothing = np.full(shape, np.nan, np.float32)  # for a picture that cannot be read, which every process then knows
    reasons: dict[str, str] = {}  # why this process could not read a picture, by its name

    def read(name: str) -> np.ndarray:
        try:
            return upright(decode(source[named[name]]), no_draw).pixel_values
        except DataError as error:
            if bad is None:
                raise
            reasons[name] = str(error)
            return nothing

    names, share = list(named), config.train_batch_size * (backend.device_count // backend.process_count)
    size, start = share * backend.process_count, share * backend.process_index
    log.info("encoding %d pictures", len(names))
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(names), size):
            several = names[first : first + size]
            mine = several[start : start + share]
            pixels = np.stack([*pool.map(read, mine), *[nothing] * (share - len(mine))])
            orientations = [pixels, np.ascontiguousarray(pixels[..., ::-1])] if transform.random_flip else [pixels]
            posteriors = np.stack([backend.posteriors(each) for each in orientations], axis=1)
            good = []
            for place, name in enumerate(several):
                if np.isfinite(posteriors[place]).all():
                    good.append(place)
                elif bad is None:
                    raise NonFiniteError(_NOT_FINITE.format(name))
                else:
                    bad.add(name, reasons.get(name, _NOT_FINITE.format(name)))
            yield [several[place] for place in good], {POSTERIORS: posteriors[good]}
