"""The one training loop, for every task and both backends.

It owns order, time and files: which examples make a step, when to log, sample, save and export. The backend owns
models and devices. Nothing in a step waits for the devices: losses are read a few steps late.
"""

from __future__ import annotations

import functools
import logging
import shlex
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.checkpoints import folders
from flax_diffusion.core.config.options import CONFIG_FILE, TrainConfig, average_of
from flax_diffusion.core.config.profiling import profile_range
from flax_diffusion.core.data.bad import example_name
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.display.console import LAST
from flax_diffusion.core.errors import NonFiniteError
from flax_diffusion.core.io.files import as_path, is_local, temporary_folder, write_json
from flax_diffusion.core.report.board import open_boards
from flax_diffusion.core.run import assembly, nonfinite, output_folder
from flax_diffusion.core.run.preemption import Preempted, Preemption
from flax_diffusion.core.run.result import Ended
from flax_diffusion.core.run.saving import Saver
from flax_diffusion.core.run.schedule.rates import ema_decays, named_rates
from flax_diffusion.core.run.schedule.steps import make_rate
from flax_diffusion.core.run.start import MakeBackend, Start, open_inputs, prepare
from flax_diffusion.core.spec import writing
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task
from flax_diffusion.core.tracking.callbacks import Callback, Callbacks
from flax_diffusion.core.tracking.profile import Profile
from flax_diffusion.core.tracking.tracker import Tracker
from flax_diffusion.core.validation.judge import Judge
from flax_diffusion.core.validation.loss import ValidationLoss

log = logging.getLogger(__name__)

READ_LAG = 2
"""Steps that may be running before the loop waits for a loss; enough to keep the devices busy."""


def fit(
    task: Task[TrainConfig],
    make_backend: MakeBackend,
    preemption: Preemption | None = None,
    callbacks: Sequence[Callback] = (),
) -> Ended:
    """Train, and write a Diffusers pipeline to `config.output_dir`.

    Args:
        task: The task, with the run's options.
        make_backend: Builds the backend.
        preemption: Says when to end early; None for never.
        callbacks: What is told of the run.

    Returns:
        How far the run came.

    Raises:
        UserError: For input that cannot be used, before any long work where that can be known.
        CallbackError: If a callback raised an error, once the state is saved.
        Preempted: If the run is told to end before its first step.
    """
    config, preemption = task.config, preemption or Preemption()
    told = Callbacks(callbacks, preemption.end)
    output_dir = as_path(config.output_dir)
    source, validation, spec, backend = open_inputs(task, make_backend, preemption, trains=True)
    scratch = output_dir / "precomputed" if is_local(output_dir) else temporary_folder()
    start = preemption.interruptible(lambda: prepare(task, spec, source, validation, backend, scratch))
    if config.repeat_step is None:
        output_folder.prepare(output_dir, config, start.resume_from, backend)
    run = _Run(task, spec, backend, preemption, output_dir, start, told)
    try:
        if config.repeat_step is None:
            run.train()
        else:
            run.repeat(config.repeat_step)
    finally:
        run.close()
    if task.precomputed_dir is None:  # else what has this name may be the folder to keep
        shutil.rmtree(scratch, ignore_errors=True)
    told.raise_if_failed(folders.describe_newest(output_dir))
    return Ended(output_dir, run.taken, run.taken >= start.schedule.total_steps, run.tracker.last)


class _Run:
    """A run in progress."""

    def __init__(
        self,
        task: Task[TrainConfig],
        spec: PipelineSpec,
        backend: Backend,
        preemption: Preemption,
        output_dir: Path,
        start: Start,
        callbacks: Callbacks,
    ):
        config = task.config
        self.task, self.config, self.spec, self.backend, self.preemption = task, config, spec, backend, preemption
        self.output_dir, self.start, self.schedule, self.source = output_dir, start, start.schedule, start.source
        self.main = backend.process_index == 0
        self.rate_of = make_rate(config, start.schedule)
        self.first_step, self.nonfinite_steps = start.step, start.nonfinite_steps
        self.taken = self.last_saved = self.last_kept = start.step
        self.pending: deque[tuple[int, float, np.ndarray, Any]] = deque()
        parent = folders.identity_of(start.resume_from) if start.resume_from and self.main else None
        self.saver = Saver(backend, output_dir, config.checkpoints_total_limit, parent)
        trains = config.repeat_step is None
        main, total = self.main and trains, start.schedule.total_steps
        boards = open_boards(task, spec, backend, start) if main else []
        self.tracker = Tracker(
            output_dir, boards, first_step=start.step, total_steps=total, main=main, callbacks=callbacks
        )
        steps = profile_range(config.profile_steps) if trains else None
        self.profile = Profile(steps, backend, output_dir, self.tracker.say)
        self.preview = task.make_preview(spec, self.source) if self.config.draw_samples else None
        self.judges: list[Judge] = []
        if start.validation is not None:
            examples, batch_size = start.validation, start.schedule.batch_size
            self.judges.append(ValidationLoss(task, spec, examples, start.made, backend, batch_size))
        if start.drawn is not None:
            self.judges.append(start.drawn)

    def close(self) -> None:
        """Let a running save end, and close the log."""
        self.saver.close()
        self.profile.close()
        self.tracker.close()
        self.start.pusher.close()

    def train(self) -> None:
        """Take the remaining steps and write the results; if the run is told to end early, only save."""
        if self.main:
            output_folder.write_config(self.task, self.output_dir, resumes=self.start.resume_from is not None)
            writing.save_vocabulary(self.spec, self.output_dir)
        left = self.schedule.total_steps - self.first_step
        if left <= 0:
            self.tracker.say(f"nothing to train: {self._newest()} is there, and {self.schedule.limit}")
        try:
            cut_off = self.first_step and left > 0 and self._wants_sample(self.first_step)
            if cut_off and not self.tracker.has_grid(self.first_step):  # the run ended while it drew this
                self._sample(self.first_step)
            if self.first_step and left > 0:  # likewise
                self._judge()
            with self._loader(self.first_step, max(0, left)) as loader:
                self._steps(loader)
            if loader.skipped:
                names = ", ".join(sorted(loader.skipped))
                self.tracker.say(f"skipped {len(loader.skipped)} unreadable images: {names}", logging.WARNING)
            self._finish()
        except Preempted:
            self._stop()

    def _newest(self) -> str:
        """Return the name of the checkpoint that holds the present state."""
        return folders.checkpoint_folder(self.output_dir, self.last_saved).name

    def repeat(self, step: int) -> None:
        """Compute the loss of one step's batch with the present weights, log it, and keep nothing.

        Args:
            step: Number of the step, from 1.
        """
        with self._loader(step - 1, 1) as loader:
            (batch,) = loader
        self.backend.set_step(step - 1)
        handle, no_decays = self.backend.put(batch), dict.fromkeys(self.config.averages, 0.0)
        metrics = self.backend.read(self.backend.train_step(handle, self.rate_of(step - 1), no_decays))
        names = ", ".join(one["name"] for one in self._examples(batch["example_index"]))
        said = "the batch of step %d, with the weights of step %d: %s; of %s"
        log.info(said, step, self.first_step, nonfinite.said(metrics), names, extra=LAST)

    def _loader(self, done: int, num_steps: int) -> Loader:
        """Return the loader of the batches that follow some steps."""
        return assembly.make_loader(
            self.task,
            self.spec,
            self.source,
            self.schedule,
            process_index=self.backend.process_index,
            process_count=self.backend.process_count,
            start_example=self._seen(done),
            num_steps=num_steps,
            made=self.start.made,
            buckets=self.start.buckets,
        )

    def _steps(self, loader: Loader) -> None:
        """Take the steps of a loader's batches."""
        config = self.config
        if self.taken < self.schedule.total_steps:
            self.tracker.begin(compiles=self.backend.describe().compiles)
        for indices, batch in self.profile.over(self._put_ahead(loader), self.taken + 1):
            done, step = self.taken, self.taken + 1
            rate = self.rate_of(done)
            self.pending.append((step, rate, indices, self.backend.train_step(batch, rate, ema_decays(config, done))))
            self.taken = step
            if config.ema_snapshot_steps and step % config.ema_snapshot_steps == 0:
                self._keep_averages()  # before any checkpoint of this step, from which the run would go on without them
            if self.backend.should_stop(self.preemption.requested, step):
                raise Preempted
            while len(self.pending) > READ_LAG:
                self._report()
            self.saver.raise_if_failed()
            self._tell_saved()
            if step == self.schedule.total_steps:
                continue  # what follows is up to `_finish`
            self._judge()
            if step % config.checkpointing_steps == 0:
                self._save()
            if self._wants_sample(step):
                self._sample(step)
            if self.schedule.ends_epoch(self._seen(step), config.save_model_epochs):
                self._export()
                self.start.pusher.push(step)

    def _wants_sample(self, step: int) -> bool:
        if self.config.validation_steps:
            return step % self.config.validation_steps == 0
        return self.schedule.ends_epoch(self._seen(step), self.config.validation_epochs)

    def _put_ahead(self, loader: Loader) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield the indices of examples and their batch on the devices; the next batch is copied while one is used."""
        batches = iter(loader)

        def following() -> tuple[np.ndarray, Any] | None:
            with self.tracker.waiting():
                batch = self.preemption.interruptible(lambda: next(batches, None))
            return None if batch is None else (batch["example_index"], self.backend.put(batch))

        current = following()
        while current is not None:
            ahead = following()
            yield current
            current = ahead

    def _finish(self) -> None:
        """Save, export and sample at the end of the run."""
        if self.config.ema_snapshot_steps and self.taken not in (self.first_step, self.last_kept):
            self._keep_averages()
        self._judge(at_end=True)
        self._save()
        self._export()
        if self.taken > self.first_step or not self.tracker.has_grid(self.taken):
            self._sample(self.taken)
        self._wait_for_save()
        self.backend.all_processes(True)  # else a process that is done would leave the others alone
        self.start.pusher.finish(self.taken, self.preemption)
        self.tracker.say_end()

    def _stop(self) -> None:
        """Save the present state, and say how to go on."""
        self._save()
        self._wait_for_save()
        self.backend.all_processes(True)
        kept = f"saved as {self._newest()}; go on with" if self.taken else "nothing to save; start again with"
        self.tracker.say(
            f"ended by {self.preemption.signal_name} after step {self.taken}, {kept}: " + self._again(), last=True
        )

    def _again(self, **more: int) -> str:
        """Return what goes on with this run: a command, or a call where Python gives the data."""
        file, options = str(self.output_dir / CONFIG_FILE), {"resume_from_checkpoint": "latest", **more}
        if self.task.examples is not None:
            values = "".join(f", {name}={value!r}" for name, value in options.items())
            return f"train({self.task.name!r}, {file!r}, examples=EXAMPLES{values})"
        words = " ".join(f"--{name} {value}" for name, value in options.items())
        return f"{self.backend.command} --config {shlex.quote(file)} {words}"

    def _seen(self, step: int) -> int:
        """Return the number of examples used up to a step, also after a resume with another batch size."""
        return self.start.examples_seen + (step - self.first_step) * self.schedule.step_examples

    def _report(self) -> None:
        step, rate, indices, handle = self.pending.popleft()
        metrics = self.backend.read(handle)
        if nonfinite.is_finite(metrics):
            self.tracker.step(step, metrics | named_rates(self.spec, rate), self.schedule.step_examples)
        else:
            self._note_nonfinite(step, metrics, indices)

    def _note_nonfinite(self, step: int, metrics: dict[str, float], indices: np.ndarray) -> None:
        """Write the examples of a step that is not finite to a file.

        Raises:
            NonFiniteError: If more steps were not finite than --skip_nonfinite allows.
        """
        self.nonfinite_steps += 1
        of_process = f"-process-{self.backend.process_index}" if self.backend.process_count > 1 else ""
        file = self.output_dir / f"nonfinite-{step}{of_process}.json"
        repeat = self._again(repeat_step=step)
        numbers = {name: str(value) for name, value in metrics.items()}  # JSON has no NaN
        write_json(file, {"step": step, **numbers, "examples": self._examples(indices), "repeat": repeat})
        if self.nonfinite_steps <= self.config.skip_nonfinite:
            said = f"step {step} is not finite ({nonfinite.said(metrics)}) and passed over; its examples are in {file}"
            self.tracker.say(said, logging.WARNING)
            self.tracker.advance(step, self.schedule.step_examples)
            return
        self.saver.wait()  # a running save is of an earlier state
        raise NonFiniteError(
            f"step {step} is not finite ({nonfinite.said(metrics)}); its examples are in {file.name}: lower "
            "--learning_rate, check the data, use --mixed_precision bf16, or pass over some such steps by "
            "--skip_nonfinite; " + folders.describe_newest(self.output_dir)
        )

    def _examples(self, indices: np.ndarray) -> list[dict[str, Any]]:
        return [{"index": index, "name": example_name(self.source, index)} for index in indices.ravel().tolist()]

    def _drain(self) -> None:
        while self.pending:
            self._report()

    def _save(self) -> None:
        """Start to save a checkpoint, unless this state is saved already.

        Losses are read first, so that no state after a non-finite loss is kept.
        """
        self._drain()
        if self.last_saved == self.taken:
            return
        self._wait_for_save()  # whose checkpoint is told of before this one takes its place
        self.tracker.flush()  # a run that goes on from here reports what follows
        done = {"step": self.taken, "examples_seen": self._seen(self.taken), "nonfinite_steps": self.nonfinite_steps}
        beside = self._export_trained if self.config.checkpoint_models else None
        self.saver.start(self.taken, self.start.identity | done, beside)
        self.last_saved = self.taken

    def _wait_for_save(self) -> None:
        self.saver.wait()
        self._tell_saved()

    def _tell_saved(self) -> None:
        self.tracker.checkpoints((folders.step_of(folder), folder) for folder in self.saver.newly_sealed())

    def _sample(self, step: int) -> None:
        if self.preview is None:
            return
        self._drain()
        draw = functools.partial(self.preview.draw, self.backend)
        with self.tracker.doing("drawing samples"):
            self.tracker.grid(step, self.preemption.interruptible(draw), self.preview.columns, self.preview.captions)
        self.tracker.say_grid(step)

    def _judge(self, *, at_end: bool = False) -> None:
        """Report what the run is worth now, by each judge whose turn it is, unless that is known."""
        for judge in self.judges:
            due = at_end or (judge.every is not None and self.taken % judge.every == 0)
            if due and not self.tracker.has_judged(self.taken, judge.names):
                self._drain()
                with self.tracker.doing(f"judging {judge.of}"):
                    self.tracker.judged(self.taken, self.preemption.interruptible(judge), judge.of)

    def _export(self) -> None:
        """Write the result of the run: a pipeline, an autoencoder, or adapters; and those with the other averages."""
        self._drain()
        with self.tracker.doing("exporting"):
            self.task.export(self.backend, self.spec, self.source, self.output_dir)
        self.tracker.say(f"exported at step {self.taken}: {self.output_dir}")
        for average in self.config.averages[1:]:
            folder = self.output_dir / output_folder.AVERAGES / average.removeprefix("ema_")
            with self._with_average(average):
                self._export_trained(folder)
            if self.main:
                writing.complete(folder, self.output_dir)

    @contextmanager
    def _with_average(self, name: str) -> Iterator[None]:
        """Have the backend export a moving average by name."""
        self.backend.average = name
        try:
            yield
        finally:
            self.backend.average = None

    def _keep_averages(self) -> None:
        """Keep the power-function averages of this step; losses are read first, as in `_save`."""
        self._drain()
        for sigma_rel in self.config.ema_sigma_rels:
            folder = temporary_folder()
            with self._with_average(average_of(sigma_rel)):
                self.saver.keep_average(sigma_rel, self.taken, folder, self._export_trained)
        self.last_kept = self.taken

    def _export_trained(self, folder: Path) -> None:
        """Write the models that train."""
        self.task.export_trained(self.backend, self.spec, self.source, folder, only_trained=True)
