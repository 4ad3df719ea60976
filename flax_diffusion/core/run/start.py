"""The start of a run: its inputs are opened and checked, the quick checks first, and nothing is deleted yet."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_diffusion.core.backend import Backend, shared_folder
from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data import buckets as bucketing
from flax_diffusion.core.data import store
from flax_diffusion.core.data.batches import Precomputed
from flax_diffusion.core.data.check import check_source
from flax_diffusion.core.data.order import Bucketed
from flax_diffusion.core.data.shards.latents import LatentSource
from flax_diffusion.core.data.sources.source import Part, Source
from flax_diffusion.core.data.workers import check_count
from flax_diffusion.core.display import block, console
from flax_diffusion.core.display.console import LAST
from flax_diffusion.core.errors import CheckpointError, ConfigError
from flax_diffusion.core.io.files import as_path, is_local
from flax_diffusion.core.run import assembly, lineage, output_folder
from flax_diffusion.core.run.hub.pusher import Pusher
from flax_diffusion.core.run.precompute import EMBEDDINGS, POSTERIORS, precompute
from flax_diffusion.core.run.preemption import Preemption
from flax_diffusion.core.run.saving import free_bytes
from flax_diffusion.core.run.schedule.steps import Schedule, make_rate, make_schedule
from flax_diffusion.core.run.shards import latents as shards
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task
from flax_diffusion.core.validation.drawn import DrawnPictures
from flax_diffusion.core.validation.held_out import HeldOut, divide, held_out, with_held_out

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The inputs of a run's first step.

    Attributes:
        source: All examples.
        made: What was computed before training.
        buckets: Order of the examples, where they are divided over buckets; None where they are not.
        validation: Examples that do not train; None for none.
        drawn: Judge of pictures that are drawn; None for none.
        schedule: The run's steps.
        pusher: Pushes results to the Hub.
        parameters: Number of trained parameters.
        identity: What a checkpoint must have in common with a run that resumes from it.
        resume_from: Folder of the checkpoint to resume from; None for a new run.
        step: Optimizer steps taken so far.
        examples_seen: Examples used so far.
        nonfinite_steps: Steps so far whose loss or gradient was not finite.
    """

    source: Source
    made: Precomputed
    buckets: Bucketed | None
    validation: HeldOut | None
    drawn: DrawnPictures | None
    schedule: Schedule
    pusher: Pusher
    parameters: int
    identity: dict[str, Any]
    resume_from: Path | None
    step: int = 0
    examples_seen: int = 0
    nonfinite_steps: int = 0


MakeBackend = Callable[[TrainConfig, PipelineSpec], Backend]
"""Builder of a backend for a config and a pipeline, which refuses options that the backend does not have."""


def open_inputs(
    task: Task[TrainConfig], make_backend: MakeBackend, preemption: Preemption, *, trains: bool
) -> tuple[Source, Source | None, PipelineSpec, Backend]:
    """Open the data and read the configs of the models, but no weights.

    Args:
        task: The task, with the run's options.
        make_backend: Builds the backend.
        preemption: Says when to end early. It is told whether there are other processes.
        trains: Whether the run's folder is written.

    Returns:
        The examples that train, without those that the models draw; those for validation, or None; the pipeline; and
        the backend of this process.

    Raises:
        UserError: For input that cannot be used.
        Preempted: If it is told to end.
    """

    def read() -> tuple[Source, Source | None, PipelineSpec]:
        check_count(task.config.dataloader_num_workers)
        if trains:
            output_folder.check(as_path(task.config.output_dir), task.config)
        _check_folder(task)
        if task.latents_dir is not None and not trains:  # which gets all of the pictures; a run divides them
            _check_writable(as_path(task.latents_dir), "--latents_dir")
            source = task.open_pictures()
            return source, None, task.make_spec(source)
        source = task.open_source()
        return *divide(task, source), task.make_spec(source)

    here = console.current()
    with here.doing("opening data and models"):
        source, validation, spec = preemption.interruptible(read)
        backend = make_backend(task.config, spec)
    here.main = backend.process_index == 0
    preemption.single_process = backend.process_count == 1
    return source, validation, spec, backend


def _check_folder(task: Task[TrainConfig]) -> None:
    """Make sure that the folder of `--precomputed_dir` can be written, and that what it holds can be read.

    Args:
        task: The task, with the run's options.

    Raises:
        ConfigError: If it cannot.
    """
    if task.precomputed_dir is None:
        return
    folder = as_path(task.precomputed_dir)
    _check_writable(folder, "--precomputed_dir")
    try:
        for kind in (EMBEDDINGS, POSTERIORS):
            store.read_keys(folder, kind)
    except ValueError as error:
        raise ConfigError(f"--precomputed_dir {folder}: {error}; delete its folder, or name another one") from error


def _check_writable(folder: Path, option: str) -> None:
    """Make a folder, and raise ConfigError, with the option's name, if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_local(folder):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{option} {folder}: cannot be written ({error.strerror or error}); name another folder"
        ) from error


def _check_data(
    task: Task[TrainConfig], spec: PipelineSpec, source: Source, validation: Source | None, backend: Backend
) -> None:
    main = backend.process_index == 0
    whole = source.source if isinstance(source, Part) else source
    if isinstance(whole, LatentSource):
        shards.check(task, spec, whole)
        return
    streams = task.stream_of(source) is not None
    if streams and main:
        log.info("examples are streamed: each is checked when it is read")
    skips, tokenize = task.config.skip_bad_images, spec.tokenize if task.checks_captions else None
    for own in (None if streams else source, validation):
        if own is not None:
            check_source(own, skip_bad_images=skips, all_processes=backend.all_processes, main=main, tokenize=tokenize)


def fill(task: Task[TrainConfig], make_backend: MakeBackend, preemption: Preemption | None = None) -> Path:
    """Compute what can be computed before training into its folder, and train nothing.

    The folder is that of `--latents_dir` or `--precomputed_dir`.

    Args:
        task: The task, with the run's options.
        make_backend: Builds the backend.
        preemption: Says when to end early; None for never.

    Returns:
        The folder.

    Raises:
        UserError: As `open_inputs` and `precompute`.
        Preempted: If it is told to end. The shards that are written then stay.
    """
    preemption = preemption or Preemption()
    folder = task.latents_dir or task.precomputed_dir
    if folder is None:
        raise ConfigError(
            f"precompute {task.name}: there is no folder to fill: add --precomputed_dir FOLDER, with --cache_latents "
            "or --pre_compute_text_embeddings, or in class_conditional --latents_dir FOLDER"
        )
    source, validation, spec, backend = open_inputs(task, make_backend, preemption, trains=False)
    main = backend.process_index == 0

    def work() -> None:
        _check_data(task, spec, source, validation, backend)
        buckets = None
        if task.config.bucket_resolutions:  # of which a run's steps say how pictures are divided over them
            schedule = make_schedule(task.config, task.count_examples(source), backend.device_count)
            buckets = assembly.make_buckets(task, spec, source, schedule, main=main)
        examples = held_out(validation, buckets, skip_bad_images=task.config.skip_bad_images)
        _load(spec, backend)
        if task.latents_dir is not None:
            shards.write_latents(task, spec, task.complete_source(source, backend), backend)
            return
        complete = _completed(task, source, backend, buckets)
        pictures, sizes = with_held_out(complete, buckets, task.rows_per_example, examples)
        precompute(task, spec, pictures, backend, as_path(folder), sizes)
        backend.all_processes(True)  # else a process that is done would leave the others alone

    preemption.interruptible(work)
    if main:
        log.info("latents and text embeddings are in %s", folder, extra=LAST)
    return as_path(folder)


def prepare(
    task: Task[TrainConfig],
    spec: PipelineSpec,
    source: Source,
    validation: Source | None,
    backend: Backend,
    scratch: Path,
) -> Start:
    """Check the checkpoint to resume from, load the weights, and compute what can be computed before training.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        source: The examples, without those that the models draw.
        validation: The examples for validation; None for none.
        backend: The backend of this process.
        scratch: Folder for what is computed before training.

    Returns:
        The inputs of the run's first step.

    Raises:
        UserError: For input that cannot be used, before any long work where that can be known.
    """
    config = task.config
    output_dir = as_path(config.output_dir)
    shared_folder(output_dir, backend, "--output_dir")
    main, here = backend.process_index == 0, console.current()
    pusher = Pusher(task, spec, backend)
    pusher.open()
    _check_data(task, spec, source, validation, backend)
    num_examples = task.count_examples(source)
    here.say(block.row("pictures", f"{num_examples:,}"))
    identity = lineage.identity(task.name, config, spec, source, num_examples)
    resume_from = output_folder.checkpoint_to_resume(output_dir, config.resume_from_checkpoint, backend)
    step = seen = nonfinite = 0
    if resume_from is not None:
        metadata = portable.read_metadata(resume_from)
        lineage.check(metadata, identity, resume_from.name)
        try:
            step, seen, nonfinite = (int(metadata[name]) for name in ("step", "examples_seen", "nonfinite_steps"))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{resume_from}: its metadata lacks {error}; resume from another") from error
    schedule = make_schedule(config, num_examples, backend.device_count, step, seen)
    make_rate(config, schedule)  # this checks --lr_step_rules
    buckets = assembly.make_buckets(task, spec, source, schedule, main=main)
    examples = held_out(validation, buckets, skip_bad_images=config.skip_bad_images)
    assembly.make_stream(task, source, schedule, backend.process_count)
    if main:
        assembly.warn_of_vain_options(task, spec, schedule, backend.device_count)
    evaluated = task.evaluation()
    drawn = None if evaluated is None else DrawnPictures(evaluated, task, spec, backend)
    parameters = _load(spec, backend)
    _say_length(config, schedule, backend, step)
    if resume_from is not None:
        backend.check(resume_from)
    source = _completed(task, source, backend, buckets)
    pictures, sizes = with_held_out(source, buckets, task.rows_per_example, examples)
    made = precompute(task, spec, pictures, backend, scratch, sizes)
    if resume_from is not None:
        with here.doing(f"reading {resume_from.name}"):
            backend.restore(resume_from)
    return Start(
        source, made, buckets, examples, drawn, schedule, pusher, parameters, identity, resume_from, step, seen,
        nonfinite,
    )  # fmt: skip


def _load(spec: PipelineSpec, backend: Backend) -> int:
    """Load the weights, say what was loaded, and return the number of trained parameters."""
    here = console.current()
    with here.doing("loading the weights"):
        parameters = backend.init_state()
    described = backend.describe()
    frozen = f"{described.frozen_parameters:,} stay as they are"
    here.say(block.row("model", f"{spec.kind}: {parameters:,} parameters train, {frozen}"))
    processes = f" of {backend.process_count} processes" if backend.process_count > 1 else ""
    here.say(block.row("devices", f"{backend.device_count} x {described.device}{processes}"))
    return parameters


def _say_length(config: TrainConfig, schedule: Schedule, backend: Backend, step: int) -> None:
    """Say how long a run is, and what its checkpoints need.

    Args:
        config: Options of the run.
        schedule: The run's steps.
        backend: The backend, with the weights loaded.
        step: Steps taken before this start of the run.
    """
    here, total = console.current(), schedule.total_steps
    epoch = max(1, round(schedule.num_examples / schedule.step_examples))
    accumulated = f", {schedule.accumulation} passes of {schedule.batch_size}" if schedule.accumulation > 1 else ""
    here.say(
        block.row("steps", f"{step + 1:,} to {total:,}, of {schedule.step_examples:,} pictures{accumulated}; "
                  f"{epoch:,} an epoch")
    )  # fmt: skip
    count = block.checkpoints(step, total, config.checkpointing_steps)
    kept = min(count, config.checkpoints_total_limit or count)
    size, free = backend.state_bytes(), free_bytes(as_path(config.output_dir))
    room = "" if free is None else f"; {block.size(free)} are free"
    limit = f" ({kept} are kept)" if kept < count else ""
    said = f"{count:,} of about {block.size(size)}{limit}, every {config.checkpointing_steps:,} steps{room}"
    here.say(block.row("checkpoints", said))
    needed = size * (kept + (kept < count))  # an old one is deleted once the next is whole
    if free is not None and needed > free:
        log.warning(
            "the checkpoints need about %s, and %s are free in %s: give --checkpoints_total_limit, or a larger "
            "--checkpointing_steps, or free some space",
            block.size(needed), block.size(free), config.output_dir,
        )  # fmt: skip


def _completed(task: Task[TrainConfig], source: Source, backend: Backend, buckets: Bucketed | None) -> Source:
    """Return the examples, with those that the models draw; of pairs, log which pictures are smaller than their bucket.

    Args:
        task: The task, with the run's options.
        source: The examples, without those that the models draw.
        backend: The backend, with the weights loaded.
        buckets: Order of the examples; None without buckets.
    """
    source = task.complete_source(source, backend)
    if buckets is not None and task.rows_per_example > 1 and backend.process_index == 0:
        skips = task.config.skip_bad_images
        bucketing.warn_of_small(source, buckets, task.rows_per_example, skip_bad_images=skips)
    return source
