"""The batches of a run, and what of its options is in vain."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import DTypeLike

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data.batches import Precomputed
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.run.schedule import Schedule
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task

log = logging.getLogger(__name__)


def say_what_is_in_vain(task: Task[TrainConfig], spec: PipelineSpec, schedule: Schedule) -> None:
    """Warn, once before training, of a warm-up that does not end and of prompts that the text encoder cuts off.

    Captions of a dataset, of which there may be millions, are `check_source`'s.
    """
    config = task.config
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
    process_index: int = 0,
    process_count: int = 1,
    start_example: int = 0,
    dtype: DTypeLike = np.float32,
) -> Loader:
    """Return the batches of one process of a run; the objective's numbers are of `dtype`."""
    config = task.config
    return Loader(
        source,
        task.make_example_fn(spec, made, dtype),
        seed=config.seed,
        batch_size=schedule.batch_size // process_count,
        accumulation=schedule.accumulation,
        process_index=process_index,
        process_count=process_count,
        start_example=start_example,
        num_steps=num_steps,
        num_workers=config.dataloader_num_workers,
        skip_bad_images=config.skip_bad_images,
        rows=task.rows_per_example,
    )
