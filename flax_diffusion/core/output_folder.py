"""The folder that a run leaves everything in: whether it is free, and what an earlier run left there."""

from __future__ import annotations

from pathlib import Path

from flax_diffusion.core import checkpoints
from flax_diffusion.core.adapters import EMBEDDINGS_FILE, LORA_FILE
from flax_diffusion.core.backend import Backend, shared_folder
from flax_diffusion.core.config import TrainConfig
from flax_diffusion.core.errors import CheckpointError, ConfigError
from flax_diffusion.core.files import remove_tree
from flax_diffusion.core.tracking import EVENT_FILES

LATEST = "latest"
_NOTHING, _FAILED = -1, -2  # instead of a step

_WRITTEN = ("config.yaml", "model_index.json", LORA_FILE, EMBEDDINGS_FILE)
_WRITTEN_FOLDERS = ("samples", "unet", "vae", "vqvae", "text_encoder", "tokenizer", "scheduler")


def check(output_dir: Path, config: TrainConfig) -> None:
    """Makes sure that the folder can be written, holds what is to be resumed, and that no other run is in the way.

    Raises:
        ConfigError: If another run is in the folder, or it cannot be written.
        CheckpointError: If a checkpoint is named that is not there.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output_dir {output_dir}: is a file; name a folder")
    if config.resume_from_checkpoint is None:
        if has_run(output_dir) and not config.overwrite_output_dir:
            raise ConfigError(
                f"--output_dir {output_dir}: holds another run; go on with it by --resume_from_checkpoint latest, "
                "delete it by --overwrite_output_dir, or name another folder"
            )
    elif config.resume_from_checkpoint != LATEST:
        checkpoints.find(output_dir, config.resume_from_checkpoint)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir}: cannot be made: {error.strerror}") from error


def checkpoint_to_resume(output_dir: Path, request: str | None, backend: Backend) -> Path | None:
    """The checkpoint to go on from, all of whose files the first process has read.

    Args:
        output_dir: Folder of the run.
        request: `latest`, the name of a checkpoint in `output_dir`, a path to one, or None.
        backend: Of this process.

    Returns:
        The folder, or None to start from the beginning: no request, or `latest` of a run that has none yet.

    Raises:
        CheckpointError: In every process, if something is wrong with the one that is named, or with all.
    """
    if request is None:
        return None
    folder = None if request == LATEST else checkpoints.find(output_dir, request)
    found, failure = _FAILED, None
    if backend.process_index == 0:
        try:
            if folder is None:
                folder = checkpoints.newest_whole(output_dir)
            else:
                checkpoints.require_whole(folder)
            found = _NOTHING if folder is None else checkpoints.step_of(folder)
        except CheckpointError as error:
            failure = error
    found = backend.from_first(found)
    if found == _FAILED:
        raise failure or CheckpointError(f"the first process found no checkpoint in {output_dir} to go on from")
    if found == _NOTHING:
        return None
    return folder or checkpoints.checkpoint_folder(output_dir, found)


def has_run(output_dir: Path) -> bool:
    """Whether a folder holds what a run leaves."""
    saved = checkpoints.committed(output_dir) + checkpoints.set_aside(output_dir)
    return bool(saved) or any((output_dir / name).exists() for name in _WRITTEN)


def clear(output_dir: Path, config: TrainConfig, backend: Backend) -> None:
    """Deletes an earlier run where that is asked for, and what a killed one left, once every process has looked.

    Raises:
        ConfigError: If a process does not see what the first one writes.
    """
    shared_folder(output_dir, backend, "--output_dir")
    if backend.process_index == 0:
        if config.overwrite_output_dir and config.resume_from_checkpoint is None and has_run(output_dir):
            for path in checkpoints.committed(output_dir):
                checkpoints.remove(path)
            for path in (*checkpoints.set_aside(output_dir), *map(output_dir.joinpath, _WRITTEN_FOLDERS)):
                remove_tree(path)
            written = [output_dir / name for name in _WRITTEN]
            for path in (*written, *(output_dir / config.logging_dir).glob(EVENT_FILES)):
                path.unlink(missing_ok=True)
        checkpoints.clear_leftovers(output_dir)
    backend.everywhere(True)
