"""The folder that a run leaves everything in: whether it is free, and what an earlier run left there."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.checkpoints import folders
from flax_diffusion.core.config.options import CONFIG_FILE, Reads, TrainConfig, named_inputs
from flax_diffusion.core.errors import CheckpointError, ConfigError
from flax_diffusion.core.families.family import subfolders
from flax_diffusion.core.io.files import as_path, is_local, lies_in, move, remove_tree, unused
from flax_diffusion.core.io.tracking import EVENT_FILES
from flax_diffusion.core.spec.adapters import EMBEDDINGS_FILE, LORA_FILE

log = logging.getLogger(__name__)

LATEST = "latest"
REPLACED = "replaced-run"
"""Where a run that is to be overwritten waits until the new one has saved a checkpoint."""

_NOTHING, _FAILED = -1, -2  # instead of a step

_RESULTS = ("model_index.json", LORA_FILE, EMBEDDINGS_FILE)


def check(output_dir: Path, config: TrainConfig) -> None:
    """Makes sure that the folder can be written, holds what is to be resumed, and that nothing else is in the way.

    Raises:
        ConfigError: If another run is in the folder, if what the run reads lies in it or it in the run's data, or if it
            cannot be written.
        CheckpointError: If a checkpoint is named that is not there.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output_dir {output_dir}: is a file; name a folder")
    check_apart(output_dir, config)
    if config.resume_from_checkpoint is None:
        if has_run(output_dir) and not config.overwrite_output_dir:
            raise ConfigError(
                f"--output_dir {output_dir}: holds another run; go on with it by --resume_from_checkpoint latest, "
                "delete it by --overwrite_output_dir, or name another folder"
            )
    elif config.resume_from_checkpoint != LATEST:
        folders.find(output_dir, config.resume_from_checkpoint)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if is_local(output_dir):
            tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ConfigError(
            f"--output_dir {output_dir}: cannot be written ({error.strerror}); name another folder"
        ) from error


def check_apart(output_dir: Path, config: TrainConfig) -> None:
    """Makes sure that what a run writes is not what it reads.

    Raises:
        ConfigError: Naming the two folders of which one lies in the other.
    """
    for option, kind, name in named_inputs(config):
        if kind is not Reads.DATA_FOLDER and not as_path(name).exists():  # an id of the Hub
            continue
        if lies_in(name, str(output_dir)):
            raise ConfigError(
                f"--{option} {name}: lies in --output_dir {output_dir}, where the run writes and deletes; name another "
                "--output_dir"
            )
        if kind is not Reads.MODEL and lies_in(str(output_dir), name):
            raise ConfigError(
                f"--output_dir {output_dir}: lies in --{option} {name}, so that the run's samples would become data; "
                "name a folder outside it"
            )


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
    folder = None if request == LATEST else folders.find(output_dir, request)
    found, failure = _FAILED, None
    if backend.process_index == 0:
        try:
            folders.finish_seals(output_dir)
            if folder is None:
                folder = folders.newest_whole(output_dir)
            else:
                folders.require_whole(folder)
            found = _NOTHING if folder is None else folders.step_of(folder)
        except CheckpointError as error:
            failure = error
    found = backend.from_first(found)
    if found == _FAILED:
        raise failure or CheckpointError(f"the first process found no checkpoint in {output_dir} to go on from")
    if found == _NOTHING:
        return None
    return folder or folders.checkpoint_folder(output_dir, found)


def has_run(output_dir: Path) -> bool:
    """Whether a folder holds what would be a loss: a checkpoint, or what a run makes."""
    saved = folders.committed(output_dir) + folders.damaged(output_dir)
    return bool(saved) or any((output_dir / name).exists() for name in _RESULTS)


def prepare(output_dir: Path, config: TrainConfig, resume_from: Path | None, backend: Backend) -> None:
    """Makes room for a run that is about to begin, when all that it starts from is open and checked.

    An earlier run that is to be overwritten moves to REPLACED; checkpoints that are newer than the one that the run
    goes on from are set aside; what a killed save left is deleted.
    """
    if backend.process_index == 0:
        if config.overwrite_output_dir and config.resume_from_checkpoint is None and has_run(output_dir):
            _replace(output_dir, config)
        if resume_from is not None:
            for folder in folders.newer_than(output_dir, resume_from):
                log.warning(
                    "going back to %s: %s is set aside as %s", resume_from.name, folder.name,
                    folders.abandon(folder).name,
                )  # fmt: skip
        folders.clear_leftovers(output_dir)
    backend.everywhere(True)


def _replace(output_dir: Path, config: TrainConfig) -> None:
    aside = output_dir / REPLACED  # it may hold part of this run, whose move was cut off, or a run that came before
    saved = (folders.committed, folders.damaged, folders.abandoned)
    left = [folder for of_kind in saved for folder in of_kind(output_dir)]
    left += [output_dir / name for name in (CONFIG_FILE, *_RESULTS, "samples", *sorted(subfolders()))]
    for path in left:
        if path.exists():
            move(path, unused(aside / path.name))
    for path in (output_dir / config.logging_dir).glob(EVENT_FILES):
        move(path, unused(aside / "logs" / path.name))
    log.info("the run that was in %s is in %s until the first checkpoint is saved", output_dir, aside)


def discard_replaced(output_dir: Path) -> None:
    """Deletes the run that another one has taken the place of."""
    remove_tree(output_dir / REPLACED)
