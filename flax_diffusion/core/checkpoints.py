"""Which checkpoint folders a run has, which to resume from, and which to let go."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from flax_diffusion.core.errors import CheckpointError
from flax_diffusion.core.files import as_path, is_local, remove_tree

log = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"checkpoint-\d+\.(orbax-checkpoint-tmp.*|\d+\.partial)")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """The folder of a step's checkpoint: `checkpoint-1500`."""
    return output_dir / f"checkpoint-{step}"


def committed(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. A save in flight bears another name."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(filter(_is_complete, found), key=step_of)


def _is_complete(folder: Path) -> bool:
    """Object stores cannot rename: there Orbax writes a file last that says so."""
    return is_local(folder) or (folder / "commit_success.txt").exists()


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint folder's name."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not a checkpoint's name, must be like checkpoint-1500")
    return int(match[1])


def to_resume(output_dir: Path, request: str | None) -> Path | None:
    """Finds what `--resume_from_checkpoint` asks for.

    Args:
        output_dir: Folder of the run.
        request: `latest`, the name of a checkpoint in `output_dir`, a path to one, or None.

    Returns:
        The folder, or None to start from the beginning: no request, or `latest` of a run that has none yet.

    Raises:
        CheckpointError: If a checkpoint is named that is not there.
    """
    if request is None:
        return None
    have = committed(output_dir)
    if request == "latest":
        if not have:
            log.warning("no checkpoint in %s yet: starting from the beginning", output_dir)
            return None
        return have[-1]
    for folder in (output_dir / request, as_path(request)):
        if folder.is_dir():
            step_of(folder)
            return folder
    names = ", ".join(path.name for path in have) or "none"
    raise CheckpointError(f"--resume_from_checkpoint {request}: not in {output_dir}, which has: {names}")


def rotate(output_dir: Path, limit: int | None) -> None:
    """Deletes the oldest committed checkpoints beyond `limit`. Call it after a new one is committed."""
    if limit is None:
        return
    for folder in committed(output_dir)[:-limit]:
        remove_tree(folder)


def clear_leftovers(output_dir: Path) -> None:
    """Deletes what a killed run left of a save in flight."""
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            cut_off = _NAME.fullmatch(path.name) and path.is_dir() and not _is_complete(path)
            if _LEFTOVER.fullmatch(path.name) or cut_off:
                remove_tree(path)


def check_same_shapes(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Compares names and shapes of a checkpoint's arrays with those of this run.

    Raises:
        CheckpointError: Naming the first differences.
    """
    differences = [
        f"{name} is {have[name]} there and {want[name]} here"
        for name in want
        if name in have and have[name] != want[name]
    ]
    differences += [f"{name} is missing there" for name in want if name not in have]
    differences += [f"{name} is not in this run" for name in have if name not in want]
    differences.sort(key=lambda text: not text.startswith("params/"))  # moments only repeat what the weights say
    if differences:
        more = f", and {len(differences) - 3} more differences" if len(differences) > 3 else ""
        raise CheckpointError(
            f"{folder.name} is of another model or optimizer: {'; '.join(differences[:3])}{more}; resume with the "
            "config it was made with"
        )
