"""Recording of what the devices do in some steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.io.files import copy_files, is_local, temporary_folder

FOLDER = "profile"
"""Folder of the recordings, in that of the run."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Profile:
    """Recording of the steps that --profile_steps names, by one process.

    Args:
        steps: The first and the last of them; None for none.
        backend: The backend.
        output_dir: Folder of the run.
        say: Says a line to the user.
    """

    def __init__(self, steps: tuple[int, int] | None, backend: Backend, output_dir: Path, say: Callable[[str], None]):
        self._steps, self._backend, self._say = steps, backend, say
        self._folder = output_dir / FOLDER
        self._recording = ExitStack()

    def over(self, batches: Iterator[T], step: int) -> Iterator[T]:
        """Yield the batches of steps, and record those that are named.

        Args:
            batches: A batch for each step; the next one is asked for once the step of the last is started.
            step: Number of the first of these steps, from 1.
        """
        if self._steps is None or self._backend.process_index != 0 or step > self._steps[1]:
            yield from batches
            return
        first, last = max(self._steps[0], step), self._steps[1]
        for number, batch in enumerate(batches, step):
            if number == first:
                self._recording.enter_context(self._recorded(first, last))
            yield batch
            if number == last:
                self.close()

    def close(self) -> None:
        """End a recording that is under way."""
        self._recording.close()

    @contextmanager
    def _recorded(self, first: int, last: int) -> Iterator[None]:
        local = self._folder if is_local(self._folder) else temporary_folder()
        local.mkdir(parents=True, exist_ok=True)
        with ExitStack() as recording:
            recording.enter_context(self._backend.profiled(local))
            yield
            try:
                recording.close()
                if local != self._folder:
                    copy_files(local, self._folder)
            except (OSError, RuntimeError) as error:  # a recording is not worth the run
                log.warning("steps %d to %d are not recorded in %s: %s", first, last, self._folder, error)
                return
        self._say(
            f"steps {first} to {last} are recorded in {self._folder}: open it by tensorboard --logdir, or its trace "
            "file in https://ui.perfetto.dev"
        )
