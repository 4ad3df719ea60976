"""What a run shows of its progress: on the console, on its boards, and as sheets of pictures."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flax_diffusion.core.display import console
from flax_diffusion.core.display.steps import Pace, Steps
from flax_diffusion.core.io.metrics_file import METRICS_FILE, MetricsFile
from flax_diffusion.core.io.sheets import contact_sheet, save_picture
from flax_diffusion.core.tracking.boards import Board
from flax_diffusion.core.tracking.callbacks import Callbacks

_WINDOW = 20
"""Steps whose mean time the rates of a step are computed by. One alone may be read late, and the next at once."""


class Tracker:
    """Reports of a run: steps on the console, values and pictures on its boards. Only the first process reports.

    Attributes:
        last: Values of the last step that was reported, by name; empty before it.

    Args:
        output_dir: Folder of the run.
        boards: Where values and pictures go too; none in processes but the first.
        first_step: Steps taken before this start of the run.
        total_steps: Steps of the whole run.
        main: Whether this is the first process.
        callbacks: What is told of steps, pictures and checkpoints; None for nothing.
    """

    def __init__(
        self,
        output_dir: Path,
        boards: Sequence[Board],
        *,
        first_step: int,
        total_steps: int,
        main: bool,
        callbacks: Callbacks | None = None,
    ):
        self.last: dict[str, float] = {}
        self._callbacks = callbacks if callbacks is not None and main else Callbacks()
        self._samples = output_dir / "samples"
        self._main = main
        self._boards = boards
        self._console = console.current()
        self._steps = Steps(self._console, first_step, total_steps)
        self._metrics = MetricsFile(output_dir / METRICS_FILE, first_step, writes=main)
        self._began = time.perf_counter()
        self._pace = Pace(time.perf_counter, _WINDOW)
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside of a `with` block as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def begin(self, *, compiles: bool) -> None:
        """Begin to show the steps.

        Args:
            compiles: Whether the first step is compiled before it is taken.
        """
        self._began = time.perf_counter()
        self._steps.begin("compiling the first step" if compiles else "taking the first step")

    def step(self, step: int, metrics: dict[str, float], images: int) -> None:
        """Report a finished optimizer step.

        Args:
            step: Number of the step, from 1.
            metrics: Values by name, at least `loss` and `learning_rate`; `peak_seconds` becomes `mfu`, its share of
                the time of a step.
            images: Images in the step, over all devices.
        """
        self._pace.step()
        mean = self._pace.seconds
        seconds = max(time.perf_counter() - self._began if mean is None else mean, 1e-9)
        metrics = metrics | {"images_per_second": images / seconds, "data_wait_seconds": self._waited}
        if (at_peak := metrics.pop("peak_seconds", None)) is not None:
            metrics["mfu"] = at_peak / seconds
        self._waited = 0.0
        for board in self._boards:
            board.scalars({f"train/{name}": value for name, value in metrics.items()}, step)
        self._steps.step(step, images, metrics["loss"], metrics["learning_rate"])
        self.last = metrics
        self._callbacks.step(step, metrics)

    def judged(self, step: int, values: dict[str, float], of: str) -> None:
        """Report what a run is worth at a step.

        Args:
            step: The optimizer step.
            values: Values by name.
            of: What they were computed of, for the line that says them.
        """
        self._metrics.add(step, values)
        for board in self._boards:
            board.scalars(values, step)
        self.say(f"step {step}, {of}: {', '.join(f'{name} {value:.6g}' for name, value in values.items())}")

    def has_judged(self, step: int, names: Iterable[str]) -> bool:
        """Return whether values of a step have been reported, in this start of the run or before."""
        return self._metrics.has(step, names)

    def advance(self, step: int, images: int) -> None:
        """Count a step without reporting anything about it, with arguments as of `step`."""
        self._pace.step()
        self._steps.step(step, images)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show inside of a `with` block what goes on between two steps, which is no part of their pace."""
        try:
            with self._console.doing(what):
                yield
        finally:
            for pace in (self._pace, self._steps.pace):
                pace.go_on()

    def grid(
        self, step: int, images: Sequence[np.ndarray] | np.ndarray, columns: int | None, captions: Sequence[str] = ()
    ) -> None:
        """Write sampled images to `samples/` and the boards.

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
        for board in self._boards:
            board.image("samples", picture, step)
        self._callbacks.sample(step, picture, captions)

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

    def checkpoints(self, folders: Iterable[tuple[int, Path]]) -> None:
        """Report checkpoints that are whole, each by its step and folder."""
        for step, folder in folders:
            self._callbacks.checkpoint(step, folder)

    def flush(self) -> None:
        """Write to disk what was reported so far."""
        for board in self._boards:
            board.flush()

    def say(self, text: str, level: int = logging.INFO, *, last: bool = False) -> None:
        """Say a line, with arguments as of `Console.say`."""
        if self._main:
            self._console.say(text, level, last=last)

    def close(self) -> None:
        """End to show the steps, and close the boards."""
        self._console.hide(self._steps)
        for board in self._boards:
            board.close()
