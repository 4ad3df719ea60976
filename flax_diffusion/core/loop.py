"""The one training loop, for every task and both backends.

It owns order, time and files: which examples make a step, when to log, sample, save and export. The backend owns
models and devices. Nothing in a step waits for the devices: losses are read a few steps late.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flax_diffusion.core import checkpoints, output_folder, pipeline, recipe, reconstruction
from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config import DiffusionConfig, LoraConfig, TextConfig, TrainConfig
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.errors import CheckpointError, NonFiniteError
from flax_diffusion.core.files import as_path, is_local, temporary_folder, write_text
from flax_diffusion.core.pipeline import PipelineSpec
from flax_diffusion.core.precompute import precompute
from flax_diffusion.core.rates import ema_decay
from flax_diffusion.core.tracking import Tracker

log = logging.getLogger(__name__)

READ_LAG = 2
"""Steps that may be under way before the loop waits for a loss; enough to keep the devices busy."""


def fit(task: str, config: TrainConfig, make_backend: Callable[[TrainConfig, PipelineSpec], Backend]) -> Path:
    """Trains, and leaves a Diffusers pipeline in `config.output_dir`.

    Args:
        task: Name of the task, kept in the run's config file.
        config: The run's options.
        make_backend: Builds the backend for a config and a pipeline; checks options it does not have.

    Returns:
        The output folder.

    Raises:
        UserError: For input that cannot be used, before any long work where that can be known.
    """
    output_dir = as_path(config.output_dir)
    resume_from = output_folder.check(output_dir, config)
    source = recipe.open_run_source(config)
    spec = recipe.make_spec(config, source)
    backend = make_backend(config, spec)
    output_folder.clear(output_dir, config, backend)
    num_examples = recipe.count_examples(config, source)
    schedule = recipe.make_schedule(config, num_examples, backend.device_count)
    parameters = backend.init_state()
    source = recipe.complete_source(config, source, backend)
    scratch = output_dir / "precomputed" if is_local(output_dir) else temporary_folder()
    made = precompute(config, spec, source, backend, scratch)
    first_step, first_example = 0, 0
    if resume_from is not None:
        metadata = _check_resume(backend.restore(resume_from), resume_from, task, config, num_examples)
        first_step, first_example = metadata["step"], metadata["examples_seen"]
    main = backend.process_index == 0
    if main:
        values = {"task": task} | config.model_dump(mode="json")
        write_text(output_dir / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        pipeline.save_tokenizer(spec, output_dir)
        log.info(
            "%s: %s of %d images, %d trained parameters, %d devices, %d images a step, steps %d to %d",
            task, spec.kind, num_examples, parameters, backend.device_count, schedule.step_examples,
            first_step + 1, schedule.total_steps,
        )  # fmt: skip

    loader = recipe.make_loader(
        config,
        spec,
        source,
        schedule,
        process_index=backend.process_index,
        process_count=backend.process_count,
        start_example=first_example,
        num_steps=max(0, schedule.total_steps - first_step),
        made=made,
    )
    tracker = Tracker(
        output_dir,
        config.logging_dir if config.report_to == "tensorboard" else None,
        first_step=first_step,
        total_steps=schedule.total_steps,
        main=main,
    )
    preview = None
    if spec.autoencoder_loss is not None:
        preview = reconstruction.Preview(source, recipe.make_example_fn(config, spec), config)
    run = _Run(task, config, spec, backend, schedule, tracker, output_dir, first_step, first_example, preview)
    try:
        with loader:
            run.steps(loader)
        if loader.skipped:
            tracker.say(f"skipped {len(loader.skipped)} unreadable images: {', '.join(sorted(loader.skipped))}")
        run.finish()
    finally:
        tracker.close()
    shutil.rmtree(scratch, ignore_errors=True)
    return output_dir


@dataclass
class _Run:
    """A run under way."""

    task: str
    config: TrainConfig
    spec: PipelineSpec
    backend: Backend
    schedule: recipe.Schedule
    tracker: Tracker
    output_dir: Path
    first_step: int
    first_example: int
    preview: reconstruction.Preview | None  # what an autoencoder's progress is seen by

    def __post_init__(self) -> None:
        self.rate_of = recipe.make_rate(self.config, self.schedule)
        self.pending: deque[tuple[int, float, Any]] = deque()
        self.last_saved = self.first_step

    def steps(self, loader: Loader) -> None:
        """Takes every step that is left."""
        config = self.config
        for done, batch in enumerate(_put_ahead(self.backend, loader), start=self.first_step):
            rate, step = self.rate_of(done), done + 1
            self.pending.append((step, rate, self.backend.train_step(batch, rate, ema_decay(config, done))))
            while len(self.pending) > READ_LAG:
                self._report()
            if config.validation_steps:
                sample = step % config.validation_steps == 0
            else:
                sample = self.schedule.ends_epoch(self._seen(step), config.validation_epochs)
            if step == self.schedule.total_steps:
                break
            if step % config.checkpointing_steps == 0:
                self._save(step)
            if sample:
                self._sample(step)
            if self.schedule.ends_epoch(self._seen(step), config.save_model_epochs):
                self._export()

    def finish(self) -> None:
        """Saves, samples and exports the end of the run."""
        self._drain()
        last = max(self.schedule.total_steps, self.first_step)
        if self.last_saved < last:
            self._save(last)
        self._export()
        self._sample(last)
        self.backend.wait()
        self._rotate()
        self.tracker.say(f"pipeline, checkpoints and samples are in {self.output_dir}")

    def _seen(self, step: int) -> int:
        """Examples that the run has used up to a step, also across a resume with another batch size."""
        return self.first_example + (step - self.first_step) * self.schedule.step_examples

    def _report(self) -> None:
        step, rate, handle = self.pending.popleft()
        metrics = self.backend.read(handle)
        if not math.isfinite(metrics["loss"]):
            self.backend.wait()  # a save in flight is of a state before this one
            have = checkpoints.committed(self.output_dir)
            raise NonFiniteError(
                f"the loss is {metrics['loss']} at step {step}: lower --learning_rate, check the data, or use "
                f"--mixed_precision bf16; {f'{have[-1].name} is good' if have else 'no checkpoint was saved yet'}"
            )
        self.tracker.step(step, metrics | {"learning_rate": rate}, self.schedule.step_examples)

    def _drain(self) -> None:
        while self.pending:
            self._report()

    def _save(self, step: int) -> None:
        """Starts a checkpoint. Losses are read first, so that no state after a non-finite one is kept."""
        self._drain()
        self.backend.wait()
        self._rotate()
        metadata = {
            "step": step,
            "examples_seen": self._seen(step),
            "num_examples": self.schedule.num_examples,
            "task": self.task,
            "seed": self.config.seed,
        }
        folder = checkpoints.checkpoint_folder(self.output_dir, step)
        self.backend.save(folder, metadata)
        if self.config.checkpoint_models:
            self.backend.wait()
            self._export_trained(folder, only_trained=True)
        self.last_saved = step

    def _rotate(self) -> None:
        if self.backend.process_index == 0:
            checkpoints.rotate(self.output_dir, self.config.checkpoints_total_limit)

    def _sample(self, step: int) -> None:
        config = self.config
        if self.preview is not None:
            self._drain()
            self.tracker.grid(step, reconstruction.compare(self.backend, self.preview), 8)
            return
        assert isinstance(config, DiffusionConfig)
        text = isinstance(config, TextConfig)
        prompts = config.validation_prompts if text else []
        if text and not prompts:
            return
        self._drain()
        images = self.backend.sample(
            prompts=prompts,
            num_images=config.eval_batch_size,
            num_inference_steps=config.validation_num_inference_steps,
            guidance_scale=config.validation_guidance_scale if text else 1.0,
            seed=config.seed,
        )
        self.tracker.grid(step, images, config.eval_batch_size if text else None)

    def _export(self) -> None:
        """Writes what the run is for: a pipeline, an autoencoder, or adapters."""
        self._drain()
        self._export_trained(self.output_dir)
        if self.preview is not None:
            reconstruction.write_scaling_factor(self.backend, self.preview, self.spec, self.output_dir)
        elif self.backend.process_index == 0 and not self.spec.adapted:
            pipeline.write_index(self.spec, self.output_dir)

    def _export_trained(self, folder: Path, *, only_trained: bool = False) -> None:
        if not self.spec.adapted:
            self.backend.export(folder, only_trained=only_trained)
            return
        arrays = self.backend.trained_arrays()
        if self.backend.process_index == 0:
            form = self.config.lora_format if isinstance(self.config, LoraConfig) else "peft"
            pipeline.write_adapters(self.spec, arrays, folder, form)


def _put_ahead(backend: Backend, loader: Loader) -> Iterator[Any]:
    """Device batches, with the copy of the next one started before the current one is used."""
    batches = (backend.put(batch) for batch in loader)
    current = next(batches, None)
    while current is not None:
        following = next(batches, None)
        yield current
        current = following


def _check_resume(
    metadata: dict[str, Any], folder: Path, task: str, config: TrainConfig, num_examples: int
) -> dict[str, Any]:
    """Refuses to go on where the next batch could not be the one that the interrupted run would have taken."""
    now = {"task": task, "num_examples": num_examples, "seed": config.seed}
    for name, value in now.items():
        if metadata[name] != value:
            raise CheckpointError(
                f"{folder.name} was made with {name} {metadata[name]}, this run has {value}: resume with the same, or "
                "start a new run in another --output_dir"
            )
    return metadata
