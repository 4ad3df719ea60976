"""Saves in the background of training: one at a time; a checkpoint counts once it is sealed."""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.checkpoints import folders, snapshots
from flax_diffusion.core.display import console
from flax_diffusion.core.errors import CheckpointError
from flax_diffusion.core.io.files import is_local, remove_tree, walk
from flax_diffusion.core.run import output_folder

_SAVE_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError)
"""Errors of file systems and of the libraries that write to them; a full disk may appear as any of these."""


def free_bytes(folder: Path) -> int | None:
    """Return the bytes that are free where a folder lies; None in an object store."""
    return shutil.disk_usage(folder).free if is_local(folder) else None


class Saver:
    """Writer of a run's checkpoints, which also seals them and deletes old ones.

    Args:
        backend: The backend that holds the train state.
        output_dir: Folder of the run.
        limit: Checkpoints to keep; None for all.
        parent: `folders.identity_of` the checkpoint that the run resumes from; None if it starts new.
    """

    def __init__(self, backend: Backend, output_dir: Path, limit: int | None, parent: str | None = None):
        self.backend, self.output_dir, self.limit, self._parent = backend, output_dir, limit, parent
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._sealed: deque[Path] = deque()
        self._step = self._size = 0  # step of the last checkpoint, and its size in bytes
        self._sealing: Future[None] | None = None

    def start(self, step: int, metadata: dict[str, Any], write_models: Callable[[Path], None] | None = None) -> None:
        """Start a save once the previous one is complete: copy the state now and write it in the background.

        Args:
            step: The optimizer step, which names the checkpoint.
            metadata: The loop's metadata, as JSON.
            write_models: A function that writes more files to the checkpoint's folder; it is waited for.

        Raises:
            CheckpointError: If the previous save, or the start of this one, failed.
        """
        self.wait()
        self._step = step
        folder = folders.checkpoint_folder(self.output_dir, step)
        written = folders.unsealed(folder)
        try:
            if self.backend.process_index == 0:
                folders.make_room(folder)
                self._check_space()
            self.backend.all_processes(True)
            self.backend.save(written, metadata)
            if write_models is not None:
                self.backend.wait()
                write_models(written)
        except _SAVE_ERRORS as error:
            raise self._failed(error) from error
        self._sealing = self._pool.submit(self._complete, folder)

    def keep_average(self, sigma_rel: float, step: int, scratch: Path, write_models: Callable[[Path], None]) -> None:
        """Write a snapshot of a power-function average, and wait for it.

        Args:
            sigma_rel: Relative width of the average.
            step: The optimizer step.
            scratch: An empty folder on this machine, which is deleted.
            write_models: Writes the models that train, with this average, to a folder.

        Raises:
            CheckpointError: If it cannot be written.
        """
        try:
            write_models(scratch)
            if self.backend.process_index == 0:
                snapshots.write(scratch, self.output_dir, sigma_rel, step)
        except _SAVE_ERRORS as error:
            raise CheckpointError(
                f"the average of --ema_sigma_rels {sigma_rel} at step {step} could not be kept in "
                f"{self.output_dir / snapshots.FOLDER}: {_reason(error)}; " + folders.describe_newest(self.output_dir)
            ) from error
        finally:
            remove_tree(scratch)

    def _check_space(self) -> None:
        # Checked before anything is written: the errors of the libraries on a full disk do not tell the reason.
        free = free_bytes(self.output_dir)
        if free is not None:
            needed = max(self._size, self.backend.state_bytes())
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
            console.current().say(f"checkpoint saved: {folder}")
            self._sealed.append(folder)

    def raise_if_failed(self) -> None:
        """Raise the error of a save that has failed, without waiting for one that is running.

        Raises:
            CheckpointError: If a save failed.
        """
        if self._sealing is not None and self._sealing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the running save is sealed.

        Raises:
            CheckpointError: If it failed.
        """
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            try:
                with console.current().doing(f"writing checkpoint-{self._step}", delay=1.0):
                    sealing.result()
            except _SAVE_ERRORS as error:
                raise self._failed(error) from error

    def newly_sealed(self) -> Iterator[Path]:
        """Yield the checkpoints that are whole since the last call, in the first process."""
        while self._sealed:
            yield self._sealed.popleft()

    def close(self) -> None:
        """Wait for the running save to end, whether it succeeds or fails."""
        self._pool.shutdown()

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"checkpoint-{self._step} could not be written to {self.output_dir}: {_reason(error)}; "
            + folders.describe_newest(self.output_dir)
        )


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
