"""Checkpoint folders: how one is sealed, which one to resume from, and which ones to delete.

A checkpoint is written under a temporary name. When all of it is on disk it is sealed: a manifest records the checksum
of every file and the checkpoint that the run had before it, and the folder gets its final name. Object stores cannot
rename folders. There, the manifest alone marks the checkpoint as whole.

Checkpoints from which the run no longer resumes are not deleted but set aside under another name: those that are
damaged, and those that are newer than the one that the user goes back to.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flax_diffusion.core.errors import CheckpointError
from flax_diffusion.core.io.files import absolute, as_path, is_local, move, remove_tree, unused, walk, write_json
from flax_diffusion.core.io.untrusted import parse_json, read_text

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"

_NAME = re.compile(r"checkpoint-(\d+)")
_UNSEALED = re.compile(r"checkpoint-\d+\.partial")
_LEFTOVER = re.compile(r"checkpoint-\d+\.partial(\..*)?")
_DAMAGED = re.compile(r"checkpoint-\d+\.damaged(\.\d+)?")
_ABANDONED = re.compile(r"checkpoint-\d+\.abandoned(\.\d+)?")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, such as `checkpoint-1500`."""
    return output_dir / f"checkpoint-{step}"


def unsealed(folder: Path) -> Path:
    """Return the folder that a checkpoint is written to until it is sealed."""
    return folder.with_name(f"{folder.name}.partial") if is_local(folder) else folder


def make_room(folder: Path) -> None:
    """Clear the place where a checkpoint is about to be written; a whole one there is set aside."""
    written = unsealed(folder)
    if written == folder and (folder / MANIFEST).exists():
        abandon(folder)
    remove_tree(written)


def seal(folder: Path, parent: str | None = None) -> None:
    """Seal the checkpoint that was written to `unsealed(folder)`. An older one of the same name is set aside.

    Args:
        folder: Final folder of the checkpoint.
        parent: `identity_of` the checkpoint that the run had before it; None for the first one.
    """
    written = unsealed(folder)
    names = [*walk(written)]
    with ThreadPoolExecutor() as pool:
        sums = [*pool.map(lambda name: _checksum(written / name), names)]
    write_json(written / MANIFEST, {"parent": parent, "sha256": dict(zip(names, sums, strict=True))})
    if written != folder:
        if folder.exists():
            abandon(folder)
        written.rename(folder)


def finish_seals(output_dir: Path) -> None:
    """Give their final names to checkpoints that were whole but not yet renamed when the process was killed."""
    for written in _named(output_dir, _UNSEALED):
        folder = written.with_name(written.name.removesuffix(".partial"))
        if (written / MANIFEST).exists() and not folder.exists():
            written.rename(folder)


def identity_of(folder: Path) -> str:
    """Return the name of a sealed checkpoint and the checksum of its manifest, which no other checkpoint has."""
    return f"{folder.name}@{_checksum(folder / MANIFEST)[:16]}"


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def find_damage(folder: Path) -> str | None:
    """Read all files of a sealed checkpoint and return what is wrong with them, or None if nothing is."""
    try:
        items: list[tuple[str, Any]] = list(parse_json(read_text(folder / MANIFEST))["sha256"].items())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"

    def check(item: tuple[str, Any]) -> str | None:
        name, expected = item
        try:
            return None if _checksum(folder / name) == expected else f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(check, items)), None)


def committed(output_dir: Path) -> list[Path]:
    """Return the sealed checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(filter(_is_sealed, found), key=step_of)


def describe_newest(output_dir: Path) -> str:
    """Return a phrase that names the newest checkpoint of a run, for messages of a run that fails."""
    have = committed(output_dir)
    return f"the newest checkpoint is {have[-1].name}" if have else "no checkpoint was saved yet"


def _is_sealed(folder: Path) -> bool:
    # On this machine the name says so: a checkpoint that has its name and no manifest is damaged.
    return is_local(folder) or (folder / MANIFEST).exists()


def step_of(folder: Path) -> int:
    """Return the optimizer step in a checkpoint folder's name.

    Raises:
        CheckpointError: If the folder has no checkpoint's name.
    """
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} has no checkpoint's name, which must be like checkpoint-1500")
    return int(match[1])


def find(output_dir: Path, request: str) -> Path:
    """Find a checkpoint by its name in the folder of a run, or by its path.

    Args:
        output_dir: Folder of the run.
        request: The name or the path.

    Raises:
        CheckpointError: If there is none.
    """
    for folder in (output_dir / request, as_path(request)):
        if folder.is_dir():
            step_of(folder)
            return folder
    names = ", ".join(path.name for path in committed(output_dir)) or "none"
    raise CheckpointError(f"--resume_from_checkpoint {request}: not in {output_dir}, which has: {names}")


def require_whole(folder: Path) -> None:
    """Read all files of a checkpoint and refuse it if it is damaged.

    Raises:
        CheckpointError: If it is damaged; the message says how.
    """
    wrong = find_damage(folder)
    if wrong is not None:
        raise CheckpointError(f"{folder}: {wrong}; use another checkpoint")


def newest_whole(output_dir: Path) -> Path | None:
    """Find the newest checkpoint that is not damaged. Newer, damaged ones are set aside with a warning.

    Returns:
        The folder, or None if the run has saved none yet.

    Raises:
        CheckpointError: If the run has checkpoints and all are damaged.
    """
    wrong: dict[Path, str] = {}
    for folder in reversed(committed(output_dir)):
        why = find_damage(folder)
        if why is None:
            for one, reason in wrong.items():
                log.warning("%s: %s; set aside as %s", one.name, reason, _set_aside(one, "damaged").name)
            return folder
        wrong[folder] = why
    reasons = [f"{folder.name}: {why}" for folder, why in wrong.items()]
    reasons += [f"{path.name} was set aside" for path in damaged(output_dir)]
    if reasons:
        raise CheckpointError(
            f"{output_dir}: no checkpoint is whole ({'; '.join(reasons)}); bring one back from a copy, or start "
            "anew by --overwrite_output_dir"
        )
    log.warning("no checkpoint in %s yet: starting from the beginning", output_dir)
    return None


def _set_aside(folder: Path, why: str) -> Path:
    aside = unused(folder.with_name(f"{folder.name}.{why}"))
    move(folder, aside)
    return aside


def abandon(folder: Path) -> Path:
    """Set aside a checkpoint from which the run does not resume, and return its new path."""
    return _set_aside(folder, "abandoned")


def newer_than(output_dir: Path, start: Path) -> list[Path]:
    """Return the checkpoints of a run at or after the step of the one that it resumes from, oldest first.

    Args:
        output_dir: Folder of the run.
        start: The checkpoint that the run resumes from, in that folder or elsewhere. It is left out.
    """
    at = step_of(start)
    return [one for one in committed(output_dir) if step_of(one) >= at and absolute(one) != absolute(start)]


def damaged(output_dir: Path) -> list[Path]:
    """Return the checkpoints that were set aside because they are damaged."""
    return _named(output_dir, _DAMAGED)


def abandoned(output_dir: Path) -> list[Path]:
    """Return the checkpoints that were set aside because the run went back to an older one."""
    return _named(output_dir, _ABANDONED)


def _named(output_dir: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in output_dir.iterdir() if pattern.fullmatch(path.name)) if output_dir.is_dir() else []


def rotate(output_dir: Path, limit: int | None, newest: Path) -> None:
    """Delete the oldest checkpoints beyond a limit.

    Args:
        output_dir: Folder of the run.
        limit: Checkpoints to keep; None for all.
        newest: The checkpoint that was sealed last, which is kept whatever its step.
    """
    if limit is None:
        return
    others = [folder for folder in committed(output_dir) if folder.name != newest.name]
    for folder in others[: max(0, len(others) + 1 - limit)]:
        remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint, if it exists. If the process is killed meanwhile, what is left does not count as one."""
    if is_local(folder):
        if folder.exists():
            remove_tree(unsealed(folder))
            remove_tree(folder.rename(unsealed(folder)))
    else:
        (folder / MANIFEST).unlink(missing_ok=True)
        remove_tree(folder)


def clear_leftovers(output_dir: Path) -> None:
    """Delete what a killed run left of an unfinished save."""
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            cut_off = _NAME.fullmatch(path.name) and path.is_dir() and not _is_sealed(path)
            if _LEFTOVER.fullmatch(path.name) or cut_off:
                remove_tree(path)


def check_same_shapes(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Compare names and shapes of a checkpoint's arrays with those of this run.

    Args:
        have: Shapes by name in the checkpoint.
        want: Shapes by name in this run.
        folder: The checkpoint, for messages.

    Raises:
        CheckpointError: If they differ; the message names the first differences.
    """
    differences = [
        f"{name} is {have[name]} there and {want[name]} here"
        for name in want
        if name in have and have[name] != want[name]
    ]
    differences += [f"{name} is missing there" for name in want if name not in have]
    differences += [f"{name} is not in this run" for name in have if name not in want]
    differences.sort(
        key=lambda text: not text.startswith("params/")
    )  # weights first: the optimizer's moments have the same differences
    if differences:
        more = f", and {len(differences) - 3} more differences" if len(differences) > 3 else ""
        raise CheckpointError(
            f"{folder.name} is of another model or optimizer: {'; '.join(differences[:3])}{more}; resume with the "
            "config it was made with"
        )
