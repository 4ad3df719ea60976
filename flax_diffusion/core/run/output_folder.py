"""A run's output folder: whether it is free, and what an earlier run left there."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.checkpoints import folders, snapshots
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.config.options import CONFIG_FILE, Reads, TrainConfig, named_inputs
from flax_diffusion.core.data.combined import folders_of
from flax_diffusion.core.errors import CheckpointError, ConfigError, naming
from flax_diffusion.core.families.family import subfolders
from flax_diffusion.core.io.files import as_path, is_local, lies_in, move, remove_tree, unused, write_text
from flax_diffusion.core.io.metrics_file import METRICS_FILE
from flax_diffusion.core.report.files import PAGE
from flax_diffusion.core.run import lineage
from flax_diffusion.core.tasks.task import Task
from flax_diffusion.core.tracking import profile
from flax_diffusion.core.tracking.boards import FILES

log = logging.getLogger(__name__)

LATEST = "latest"
AVERAGES = "ema"
"""Folder for the results with the moving averages that are not the main one."""
REPLACED = "replaced-run"
"""Folder for an earlier run that is to be overwritten, until the new one has saved a checkpoint."""

_NOTHING, _FAILED = -1, -2  # instead of a step

_RESULTS = ("model_index.json", snapshots.FOLDER)
_ADAPTERS = "*.safetensors"


def check(output_dir: Path, config: TrainConfig) -> None:
    """Make sure that the folder can be written, is free, and holds the checkpoint to resume from.

    Args:
        output_dir: Folder of the run.
        config: Options of the run.

    Raises:
        ConfigError: If another run is in the folder, if the folder contains what the run reads or lies in its data, or
            if it cannot be written.
        CheckpointError: If the named checkpoint does not exist.
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


def _inputs(config: TrainConfig) -> Iterator[tuple[str, Reads, str]]:
    """Yield as `named_inputs`, but each of several folders by itself."""
    for option, kind, text in named_inputs(config):
        if kind is Reads.DATA_FOLDERS:
            with naming(f"--{option}"):
                yield from ((option, kind, one.name) for one in folders_of(text))
        else:
            yield option, kind, text


def check_apart(output_dir: Path, config: TrainConfig) -> None:
    """Make sure that a run does not write where it reads.

    Args:
        output_dir: Folder of the run.
        config: Options of the run.

    Raises:
        ConfigError: If one of the folders lies in the other; the message names both.
    """
    for option, kind, name in _inputs(config):
        if kind in (Reads.MODEL, Reads.DATA) and not as_path(name).exists():  # an id of the Hub
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
    """Return the checkpoint to resume from, all of whose files the first process has read.

    Args:
        output_dir: Folder of the run.
        request: `latest`, the name of a checkpoint in `output_dir`, a path to one, or None.
        backend: The backend of this process.

    Returns:
        The checkpoint's folder; None to start from the beginning, for no request or for `latest` in a run that has no
        checkpoint yet.

    Raises:
        CheckpointError: If the named checkpoint, or every one, is unusable. Every process raises it.
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
    found = backend.broadcast_from_first(found)
    if found == _FAILED:
        raise failure or CheckpointError(f"the first process found no checkpoint in {output_dir} to go on from")
    if found == _NOTHING:
        return None
    return folder or folders.checkpoint_folder(output_dir, found)


def has_run(output_dir: Path) -> bool:
    """Return whether a folder holds something that must not be lost: a checkpoint, or the result of a run."""
    saved = folders.committed(output_dir) + folders.damaged(output_dir)
    results = [output_dir / name for name in _RESULTS] + [*output_dir.glob(_ADAPTERS)]
    return bool(saved) or any(path.exists() for path in results)


def prepare(output_dir: Path, config: TrainConfig, resume_from: Path | None, backend: Backend) -> None:
    """Make room for a run that is about to begin, once its inputs are open and checked.

    An earlier run that is to be overwritten moves to `REPLACED`. Checkpoints that are newer than the one to resume from
    are set aside. Later snapshots of averages, and the files of a killed save, are deleted.

    Args:
        output_dir: Folder of the run.
        config: Options of the run.
        resume_from: Folder of the checkpoint to resume from; None to start from the beginning.
        backend: The backend of this process.
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
        snapshots.forget_after(output_dir, folders.step_of(resume_from) if resume_from else 0)
    backend.all_processes(True)


def write_config(task: Task[TrainConfig], output_dir: Path, *, resumes: bool) -> None:
    """Write the options that reproduce a run, and log which of them differ from those it started with.

    Args:
        task: The task, with the run's options.
        output_dir: Folder of the run.
        resumes: Whether the run goes on from a checkpoint.
    """
    file = output_dir / CONFIG_FILE
    if resumes and file.exists():
        changed = lineage.changes(command_line.read_yaml(file), task.config)
        if changed:
            log.info("goes on with other options than %s says: %s", file, "; ".join(changed))
    values = {"task": task.name} | lineage.recipe_values(task.config)
    write_text(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _replace(output_dir: Path, config: TrainConfig) -> None:
    aside = output_dir / REPLACED  # it may hold part of this run, whose move was cut off, or an earlier run
    saved = (folders.committed, folders.damaged, folders.abandoned)
    left = [folder for of_kind in saved for folder in of_kind(output_dir)]
    names = (CONFIG_FILE, METRICS_FILE, PAGE, *_RESULTS, "samples", profile.FOLDER, AVERAGES, *sorted(subfolders()))
    left += [*(output_dir / name for name in names), *output_dir.glob(_ADAPTERS)]
    for path in left:
        if path.exists():
            move(path, unused(aside / path.name))
    for path in [path for pattern in FILES for path in (output_dir / config.logging_dir).glob(pattern)]:
        move(path, unused(aside / "logs" / path.name))
    log.info("the run that was in %s is in %s until the first checkpoint is saved", output_dir, aside)


def discard_replaced(output_dir: Path) -> None:
    """Delete the earlier run that the one in a folder has replaced."""
    remove_tree(output_dir / REPLACED)
