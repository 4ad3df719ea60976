"""What a run shows of its progress: its steps, TensorBoard and picture grids."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flax_diffusion.core.display import console
from flax_diffusion.core.display.steps import Steps
from flax_diffusion.core.io.files import copy_files, is_local, temporary_folder
from flax_diffusion.core.io.metrics_file import METRICS_FILE, MetricsFile
from flax_diffusion.core.io.sheets import contact_sheet, save_picture

EVENT_FILES = "events.out.tfevents.*"
"""Glob of TensorBoard's file names."""


class TensorBoard:
    """Writer of scalars and images as TensorBoard event files, which needs only the tensorboard package.

    Args:
        folder: Folder for the files; the files of earlier runs stay.
        first_step: First step that is written. Readers ignore what an earlier run wrote from this step on.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]  (the class is made at run time)
        self._summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
        self._folder = folder
        self._local = folder if is_local(folder) else temporary_folder()
        self._writer = EventFileWriter(str(self._local))
        start = event_pb2.SessionLog(status="START")  # pyright: ignore[reportAttributeAccessIssue]
        self._writer.add_event(self._event(wall_time=time.time(), step=first_step, session_log=start))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add one point to each curve.

        Args:
            values: Value by name of the curve.
            step: The optimizer step.
        """
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Add a picture.

        Args:
            tag: Name under which TensorBoard shows it.
            picture: The picture.
            step: The optimizer step.
        """
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        image = self._summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=len(picture.getbands()),
            encoded_image_string=buffer.getvalue(),
        )
        summary = self._summary(value=[self._summary.Value(tag=tag, image=image)])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self.flush()

    def flush(self) -> None:
        """Write everything added so far to disk."""
        self._writer.flush()
        self._upload()

    def close(self) -> None:
        """Write what is left to disk and close the file."""
        self._writer.close()
        self._upload()

    def _upload(self) -> None:
        # Event files grow, and objects in a store cannot: they are written again each time.
        if self._local != self._folder:
            copy_files(self._local, self._folder)


class Tracker:
    """Reports of a run: its steps on the console, TensorBoard and pictures. Only the first process reports anything.

    Args:
        output_dir: Folder of the run.
        logging_dir: Folder for TensorBoard inside it; None for no TensorBoard.
        first_step: Steps taken before this start of the run.
        total_steps: Steps of the whole run.
        main: Whether this is the first process.
    """

    def __init__(self, output_dir: Path, logging_dir: str | None, *, first_step: int, total_steps: int, main: bool):
        self._samples = output_dir / "samples"
        self._main = main
        self._board = TensorBoard(output_dir / logging_dir, first_step + 1) if main and logging_dir else None
        self._console = console.current()
        self._steps = Steps(self._console, first_step, total_steps)
        self._metrics = MetricsFile(output_dir / METRICS_FILE, first_step, writes=main)
        self._last = time.perf_counter()

    def begin(self, *, compiles: bool) -> None:
        """Begin to show the steps.

        Args:
            compiles: Whether the first step is compiled before it is taken.
        """
        self._steps.begin("compiling the first step" if compiles else "taking the first step")

    def step(self, step: int, metrics: dict[str, float], images: int) -> None:
        """Report a finished optimizer step.

        Args:
            step: Number of the step, from 1.
            metrics: Values by name, at least `loss` and `learning_rate`.
            images: Images in the step, over all devices.
        """
        now = time.perf_counter()
        metrics = metrics | {"images_per_second": images / max(now - self._last, 1e-9)}
        self._last = now
        if self._board:
            self._board.scalars({f"train/{name}": value for name, value in metrics.items()}, step)
        self._steps.step(step, images, metrics["loss"], metrics["learning_rate"])

    def judged(self, step: int, values: dict[str, float], of: str) -> None:
        """Report what a run is worth at a step.

        Args:
            step: The optimizer step.
            values: Values by name.
            of: What they were computed of, for the line that says them.
        """
        self._metrics.add(step, values)
        if self._board:
            self._board.scalars(values, step)
        self.say(f"step {step}, {of}: {', '.join(f'{name} {value:.6g}' for name, value in values.items())}")
        self._last = time.perf_counter()

    def has_judged(self, step: int, names: Iterable[str]) -> bool:
        """Return whether values of a step have been reported, in this start of the run or before."""
        return self._metrics.has(step, names)

    def advance(self, step: int, images: int) -> None:
        """Count a step without reporting anything about it, with arguments as of `step`."""
        self._steps.step(step, images)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show inside of a `with` block what goes on between two steps, which is no part of their pace."""
        try:
            with self._console.doing(what):
                yield
        finally:
            self._steps.pace.go_on()

    def grid(
        self, step: int, images: Sequence[np.ndarray] | np.ndarray, columns: int | None, captions: Sequence[str] = ()
    ) -> None:
        """Write sampled images to `samples/` and TensorBoard.

        Args:
            step: The optimizer step.
            images: Pictures, each uint8 (H, W, C).
            columns: Pictures per row; None for a grid as square as possible.
            captions: Text under each picture, which the file holds as text too; empty for none.
        """
        if not self._main:
            return
        picture = contact_sheet(images, columns, captions)
        texts = {"step": str(step)} | ({"captions": json.dumps(list(captions), ensure_ascii=False)} if captions else {})
        save_picture(picture, self._grid_file(step), texts)
        if self._board:
            self._board.image("samples", picture, step)
        self._last = time.perf_counter()

    def has_grid(self, step: int) -> bool:
        """Return whether the pictures of a step have been written."""
        return self._grid_file(step).exists()

    def say_grid(self, step: int) -> None:
        """Say where the pictures of a step are."""
        self.say(f"samples of step {step}: {self._grid_file(step)}")

    def say_end(self) -> None:
        """Say where the results of the run are, as its last line."""
        kinds = "pipeline, checkpoints and samples" if self._samples.exists() else "pipeline and checkpoints"
        self.say(f"{kinds} are in {self._samples.parent}", last=True)

    def _grid_file(self, step: int) -> Path:
        return self._samples / f"{step:08d}.png"

    def flush(self) -> None:
        """Write to disk what was reported so far."""
        if self._board:
            self._board.flush()

    def say(self, text: str, level: int = logging.INFO, *, last: bool = False) -> None:
        """Say a line, with arguments as of `Console.say`."""
        if self._main:
            self._console.say(text, level, last=last)

    def close(self) -> None:
        """End to show the steps, and close the event file."""
        self._console.hide(self._steps)
        if self._board:
            self._board.close()
