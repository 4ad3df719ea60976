"""The batches of a run, and warnings about options that have no effect in it."""

from __future__ import annotations

import functools
import logging

import numpy as np
from numpy.typing import DTypeLike

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data import buckets as bucketing
from flax_diffusion.core.data.batches import Precomputed
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.order import Bucketed, Streamed
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.run.schedule.steps import Schedule
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task

log = logging.getLogger(__name__)


def warn_of_vain_options(task: Task[TrainConfig], spec: PipelineSpec, schedule: Schedule, devices: int) -> None:
    """Warn, once before training, of options that change nothing, and of prompts that the text encoder cuts off.

    The captions of a dataset, of which there may be millions, are checked by `check_source`.

    Args:
        task: The task, with the run's options.
        spec: The pipeline, with its tokenizer.
        schedule: The run's steps.
        devices: Number of devices.
    """
    config = task.config
    if config.reduce_dtype != "fp32" and devices == 1:
        log.warning("--reduce_dtype %s: one device sums nothing over devices; drop it", config.reduce_dtype)
    warms_up = config.lr_scheduler not in ("constant", "piecewise_constant")
    if warms_up and config.lr_warmup_steps >= schedule.total_steps:
        log.warning(
            "--lr_warmup_steps %d: the run ends after %d steps, and the learning rate rises to the end; give fewer: %d",
            config.lr_warmup_steps, schedule.total_steps, schedule.total_steps // 10,
        )  # fmt: skip
    tokenize = spec.tokenize
    if tokenize is None:
        return
    for option, prompts in task.prompts.items():
        rests = {prompt: rest for prompt in prompts if (rest := tokenize.cut_off(prompt))}
        if rests:
            prompt, rest = next(iter(rests.items()))
            count = f", and {len(rests)} of {len(prompts)} prompts are longer" if len(prompts) > 1 else ""
            log.warning(
                "--%s '%s': the text encoder takes %d tokens%s; it does not see '%s'",
                option, prompt, tokenize.length, count, rest,
            )  # fmt: skip


def make_loader(
    task: Task[TrainConfig],
    spec: PipelineSpec,
    source: Source,
    schedule: Schedule,
    *,
    num_steps: int,
    made: Precomputed | None = None,
    buckets: Bucketed | None = None,
    process_index: int = 0,
    process_count: int = 1,
    start_example: int = 0,
    dtype: DTypeLike = np.float32,
) -> Loader:
    """Return the loader of one process's batches.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        source: All examples of the run.
        schedule: The run's steps.
        num_steps: Steps to load batches for.
        made: What was computed before training; None for nothing.
        buckets: Order of the examples, where they are divided over buckets; None where they are not.
        process_index: Index of this process, from 0.
        process_count: Number of processes in the run.
        start_example: Examples that the run has used before the first batch.
        dtype: Dtype of the objective's numbers.
    """
    config = task.config
    streamed = make_stream(task, source, schedule, process_count)
    if buckets is not None or streamed is not None:  # a run that took other batches before goes on with a whole one
        start_example = start_example // schedule.step_examples * schedule.step_examples
    make = task.make_example_fn(spec, made, dtype)
    kept = task.latents_dir is not None or make.made.posteriors is not None
    return Loader(
        source,
        make.unscaled,
        seed=config.seed,
        batch_size=schedule.batch_size // process_count,
        accumulation=schedule.accumulation,
        process_index=process_index,
        process_count=process_count,
        start_example=start_example,
        num_steps=num_steps,
        # What is kept comes faster from this process than through a pipe.
        num_workers=0 if kept and make.extra is None else config.dataloader_num_workers,
        skip_bad_images=config.skip_bad_images,
        rows=task.rows_per_example,
        order=buckets or streamed,
        ahead=None if streamed is None else functools.partial(_fetch, task, source, streamed),
    )


def _fetch(task: Task[TrainConfig], source: Source, order: Streamed, first: int, count: int) -> None:
    stream = task.stream_of(source)
    assert stream is not None
    stream.fetch(order.shards_of(first, count))


def make_stream(task: Task[TrainConfig], source: Source, schedule: Schedule, process_count: int = 1) -> Streamed | None:
    """Return the order of examples whose shards are streamed; None where they are not.

    Args:
        task: The task, with the run's options.
        source: The examples.
        schedule: The run's steps.
        process_count: Number of processes in the run.

    Raises:
        ConfigError: If the batch, or the processes, cannot be divided over the shards that are read at a time.
    """
    stream = task.stream_of(source)
    if stream is None:
        return None
    lanes, batch, counts = stream.lanes, schedule.batch_size, stream.counts
    fitting = [one for one in range(1, batch + 1) if batch % one == 0 and one % process_count == 0]
    fitting = [one for one in fitting if one <= len(counts)]
    if lanes not in fitting:
        near = min(fitting, key=lambda one: abs(one - lanes), default=None)
        advice = "give another batch" if near is None else f"the nearest that fits: {near}"
        raise ConfigError(
            f"--stream_shards {lanes}: must divide the {batch} pictures of a batch, be a multiple of "
            f"the {process_count} processes, and be at most the {len(counts)} shards that there are; {advice}"
        )
    if sum(counts) < lanes:
        raise ConfigError(f"--stream_shards {lanes}: there are {sum(counts)} examples; drop it")
    return Streamed(counts=counts, lanes=lanes, batch_examples=batch, seed=task.config.seed)


def make_buckets(
    task: Task[TrainConfig], spec: PipelineSpec, source: Source, schedule: Schedule, *, main: bool = True
) -> Bucketed | None:
    """Divide a run's examples over the buckets of --bucket_resolutions; None where there are none.

    Of a pair of pictures the one of the new thing decides, which is there before those of its class are drawn.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        source: The examples, without those that the models draw.
        schedule: The run's steps.
        main: Whether this is the first process, which logs.

    Raises:
        ConfigError: For sizes that cannot be trained at.
        DataError: If the size of a picture cannot be read, or if they are too few.
    """
    config = task.config
    if not config.bucket_resolutions:
        return None
    sizes = bucketing.parse_sizes(config.bucket_resolutions, config.resolution, spec.size_factor)
    return bucketing.make_order(
        source,
        sizes,
        schedule.step_examples,
        config.seed,
        skip_bad_images=config.skip_bad_images,
        count=schedule.num_examples if task.rows_per_example > 1 else None,
        main=main,
    )
