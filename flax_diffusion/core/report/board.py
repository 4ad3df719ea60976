"""The board that keeps the page of a run up to date, for less than a hundredth of the run's time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.display import block, console
from flax_diffusion.core.io.files import as_path, write_text
from flax_diffusion.core.report.curves import Curve
from flax_diffusion.core.report.facts import facts_of
from flax_diffusion.core.report.files import DATA, PAGE
from flax_diffusion.core.report.page import as_page
from flax_diffusion.core.report.pictures import Grids
from flax_diffusion.core.report.reading import SAMPLES, Kept, Run, distinct_names, judged, read_kept
from flax_diffusion.core.report.seen import Seen, first_batch
from flax_diffusion.core.run import assembly, lineage
from flax_diffusion.core.run.start import Start
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task
from flax_diffusion.core.tracking import boards
from flax_diffusion.core.tracking.boards import Board

log = logging.getLogger(__name__)

SHARE = 200
"""The run goes on for so many times the time that the page took, until it is written again."""
LEAST_SECONDS = 10.0
"""Least time between two writes of the page."""


def open_boards(task: Task[TrainConfig], spec: PipelineSpec, backend: Backend, start: Start) -> list[Board]:
    """Open all that a run reports to: the boards of --report_to, and its page unless that is `none`.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        backend: The backend of this process.
        start: The inputs of the run's first step.

    Raises:
        ConfigError: If a board cannot be opened.
    """
    config = task.config
    folder, options, first = as_path(config.output_dir), lineage.recipe_values(config), start.step + 1
    opened = boards.open_boards(task, folder / config.logging_dir, first, options)
    if config.report_to == ["none"]:
        return opened

    def see() -> list[Seen]:
        schedule, source = start.schedule, start.source
        order = start.buckets or assembly.make_stream(task, source, schedule, backend.process_count)
        count = schedule.batch_size // backend.process_count
        return first_batch(task, spec, source, order, start.examples_seen, count)

    facts = facts_of(task, spec, backend, start)
    console.current().say(block.row("page", str(folder / PAGE)))
    return [*opened, PageBoard(folder, folder / config.logging_dir / DATA, facts, options, first, see)]


class PageBoard:
    """The page of a run, and the file beside it with what no other file holds.

    The page is written at the end, and before that when the run has gone on for `SHARE` times as long as its upkeep
    took since it was written last. That file is written with it, and whenever the run saves, so that a run that is
    killed and goes on keeps its curves. What cannot be written is logged, and the run goes on.

    Args:
        folder: Folder of the run.
        file: The file beside it.
        facts: What `facts_of` returns.
        options: The options to show, without secrets.
        first_step: First step that is reported. What an earlier start of the run reported from it on is left out.
        see: Returns what the model sees in its first step; it is called for a run that starts anew.
        clock: Returns seconds.
    """

    def __init__(
        self,
        folder: Path,
        file: Path,
        facts: Mapping[str, Any],
        options: Mapping[str, Any],
        first_step: int,
        see: Callable[[], Sequence[Seen]],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._folder, self._file, self._options, self._clock = folder, file, dict(options), clock
        self._begun = self._due_from = clock()
        self._upkeep = self._unpaid = 0.0
        self._failed = False
        before = (read_kept(file) if first_step > 1 else None) or Kept()
        self._before = {name: float(before.facts.get(name, 0.0)) for name in ("seconds", "upkeep")}
        self._kept = Kept({"begun": time.time()} | before.facts | dict(facts))
        self._kept.curves = {name: curve.before(first_step) for name, curve in before.curves.items()}
        self._kept.seen = before.seen or self._seen(see)
        self._step = first_step - 1
        self._grids = Grids(folder / SAMPLES)
        self._spent(self._begun)

    def _seen(self, see: Callable[[], Sequence[Seen]]) -> list[Seen]:
        try:
            return list(see())
        except Exception as error:  # whatever it is, the run goes on, and says itself what it cannot use
            log.warning("%s is without what the model saw (%s: %s)", self._folder / PAGE, type(error).__name__, error)
            return []

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add values by name, of a step.

        Args:
            values: Value by name.
            step: The optimizer step.
        """
        curves = self._kept.curves
        for name, value in values.items():
            curve = curves.get(name)
            if curve is None:
                curve = curves[name] = Curve()
            curve.add(step, value)
        self._step = max(self._step, step)
        self._write_if_due()

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Note that there is another grid, whose file the page reads."""
        self._step = max(self._step, step)
        self._write_if_due()

    def flush(self) -> None:
        """Write the file beside the page, and the page if it is due."""
        begun = self._clock()
        self._write_data("running")
        self._spent(begun)
        self._write_if_due()

    def close(self) -> None:
        """Write the page and the file beside it, as they stay."""
        total = int(self._kept.facts["total"])
        state = "ended" if self._step >= total else "stopped"
        self._write_both(state)

    @property
    def upkeep(self) -> float:
        """Seconds that the page has taken so far."""
        return self._upkeep

    def _write_if_due(self) -> None:
        # The first page takes as long as the ones that follow, which is not known then: LEAST_SECONDS stand for it.
        if self._clock() - self._due_from >= max(LEAST_SECONDS, SHARE * self._unpaid):
            self._unpaid = 0.0
            self._write_both("running")
            self._due_from = self._clock()

    def _spent(self, begun: float) -> None:
        seconds = self._clock() - begun
        self._upkeep += seconds
        self._unpaid += seconds

    def _facts(self, state: str) -> dict[str, Any]:
        passed = {"seconds": self._clock() - self._begun, "upkeep": self._upkeep}
        told = {name: round(self._before[name] + seconds, 3) for name, seconds in passed.items()}
        return self._kept.facts | told | {"step": self._step, "state": state, "updated": time.time()}

    def _write_both(self, state: str) -> None:
        begun = self._clock()
        self._trying(self._folder / PAGE, lambda: as_page([self._run(state)]))
        self._write_data(state)
        self._spent(begun)

    def _run(self, state: str) -> Run:
        (name,) = distinct_names([self._folder])
        kept = Kept(self._facts(state), self._kept.curves | judged(self._folder), self._kept.seen)
        grids = self._grids.all()
        return Run(name, kept, self._options, grids, self._grids.count)

    def _write_data(self, state: str) -> None:
        self._kept.facts = self._kept.facts | self._facts(state)
        self._trying(self._file, self._kept.as_json)

    def _trying(self, file: Path, make: Callable[[], str]) -> None:
        """Write a file; if that fails, say so once."""
        try:
            write_text(file, make())
        except Exception as error:  # a full disk, say; whatever it is, the run goes on
            if not self._failed:
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                log.warning("%s cannot be written (%s); the run goes on", file, reason)
            self._failed = True
