"""Folders of what is computed before training: a run's own, or that of --precomputed_dir, which stays."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data import store
from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.io.files import as_path, is_local, remove_tree
from flax_diffusion.core.tasks.task import Task

log = logging.getLogger(__name__)

EMBEDDINGS, POSTERIORS = "embeddings", "posteriors"
"""Kinds of rows: of text embeddings, and of posteriors of latents."""


def check_folder(task: Task[TrainConfig]) -> None:
    """Make sure that the folder of `--precomputed_dir` can be written, and that what it holds can be read.

    Args:
        task: The task, with the run's options.

    Raises:
        ConfigError: If it cannot.
    """
    if task.precomputed_dir is None:
        return
    folder = as_path(task.precomputed_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_local(folder):
            tempfile.TemporaryFile(dir=folder).close()
        for kind in (EMBEDDINGS, POSTERIORS):
            store.read_keys(folder, kind)
    except OSError as error:
        raise ConfigError(
            f"--precomputed_dir {folder}: cannot be written ({error.strerror or error}); name another folder"
        ) from error
    except ValueError as error:
        raise ConfigError(f"--precomputed_dir {folder}: {error}; delete its folder, or name another one") from error


@dataclass(frozen=True)
class Place:
    """Where the rows of a kind are, seen from one process.

    Attributes:
        folder: The folder of the shards.
        kept: Whether all processes write into it, for later runs too; otherwise it is this process's own.
        backend: The backend of this process.
    """

    folder: Path
    kept: bool
    backend: Backend

    @classmethod
    def of(cls, task: Task[TrainConfig], kind: str, key: Any, scratch: Path, backend: Backend) -> Place:
        """Return the place of a kind of rows, which holds only whole shards then.

        Args:
            task: The task, with the run's options.
            kind: What the rows are.
            key: Function that returns what they depend on.
            scratch: Folder for what is not kept.
            backend: The backend of this process.
        """
        if task.precomputed_dir is None:
            folder = scratch / str(backend.process_index) / kind
            remove_tree(folder)  # of a run that was killed
            return cls(folder, False, backend)
        parent = as_path(task.precomputed_dir)
        depends_on = key()
        if backend.process_index == 0:
            store.write_manifest(parent, kind, depends_on)
        backend.all_processes(True)
        folder = store.folder_of(parent, kind, depends_on)
        store.remove_damaged(folder, backend.process_index, backend.process_count)
        backend.all_processes(True)
        return cls(folder, True, backend)

    def agree(self, missing: Iterable[str], what: str) -> None:
        """Make sure that all processes miss the same rows, because they compute them together.

        Raises:
            DataError: If they do not. Every process raises it.
        """
        if not self.kept or self.backend.process_count == 1:
            return
        digest = int(hashlib.sha256("\0".join(missing).encode()).hexdigest()[:6], 16)
        same = digest == self.backend.broadcast_from_first(digest)
        if not self.backend.all_processes(same):
            raise DataError(f"the {what} differ between the processes of this run: all must see the same files")

    def told(self, what: str, count: int, missing: int) -> None:
        """Log how many rows are computed."""
        if self.backend.process_index == 0:
            there = f", {count - missing} of {count} are in {self.folder}" if self.kept else ""
            log.info("encoding %d %s%s", missing, what, there)
