"""Saves beside training: one at a time, and a checkpoint counts when it is sealed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.checkpoints import folders
from flax_diffusion.core.errors import CheckpointError
from flax_diffusion.core.io.files import is_local, walk
from flax_diffusion.core.run import output_folder

_FAILURES = (OSError, ValueError, RuntimeError, SafetensorError)
"""What file systems and the libraries that write to them raise; a full disk is each of them somewhere."""


class Saver:
    """Writes, seals and rotates the checkpoints of a run.

    Args:
        backend: Has the state.
        output_dir: Of the run.
        limit: Checkpoints to keep; None for all.
        parent: `checkpoints.identity_of` the one that the run goes on from.
    """

    def __init__(self, backend: Backend, output_dir: Path, limit: int | None, parent: str | None = None):
        self.backend, self.output_dir, self.limit, self._parent = backend, output_dir, limit, parent
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._step = self._size = 0  # of the last checkpoint; bytes
        self._sealing: Future[None] | None = None

    def start(self, step: int, metadata: dict[str, Any], beside: Callable[[Path], None] | None = None) -> None:
        """Copies the state and goes on with the rest in the background, once the save before it is complete.

        Args:
            step: Names the checkpoint.
            metadata: Of the loop.
            beside: Writes more into the checkpoint's folder; it is waited for.

        Raises:
            CheckpointError: If the save before it, or the start of this one, failed.
        """
        self.wait()
        self._step = step
        folder = folders.checkpoint_folder(self.output_dir, step)
        written = folders.unsealed(folder)
        try:
            if self.backend.process_index == 0:
                folders.make_room(folder)
                self._check_space()
            self.backend.everywhere(True)
            self.backend.save(written, metadata)
            if beside is not None:
                self.backend.wait()
                beside(written)
        except _FAILURES as error:
            raise self._failed(error) from error
        self._sealing = self._pool.submit(self._complete, folder)

    def _check_space(self) -> None:
        """Finds out before anything is written whether it fits: of libraries that run into it no reason can be read."""
        if is_local(self.output_dir):
            needed, free = max(self._size, self.backend.state_bytes()), shutil.disk_usage(self.output_dir).free
            if free < needed:
                raise OSError(
                    errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, it takes {needed:,} bytes and {free:,} are free"
                )

    def _complete(self, folder: Path) -> None:
        self.backend.wait()
        if self.backend.process_index == 0:
            written = folders.unsealed(folder)
            if is_local(written):
                self._size = sum((written / name).stat().st_size for name in walk(written))
            folders.seal(folder, self._parent)
            self._parent = folders.identity_of(folder)
            folders.rotate(self.output_dir, self.limit, folder)
            output_folder.discard_replaced(self.output_dir)

    def poll(self) -> None:
        """Raises, without waiting, what went wrong in a save."""
        if self._sealing is not None and self._sealing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the save under way is sealed.

        Raises:
            CheckpointError: If it failed.
        """
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            try:
                sealing.result()
            except _FAILURES as error:
                raise self._failed(error) from error

    def close(self) -> None:
        """Lets the save under way end, however it ends."""
        self._pool.shutdown()

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"checkpoint-{self._step} could not be written to {self.output_dir}: {_reason(error)}; "
            + folders.newest_named(self.output_dir)
        )


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
