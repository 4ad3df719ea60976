"""Checkpoint folders: what makes one whole, which to resume from, and which to let go.

A checkpoint is written under another name. When all of it is on disk it is sealed: a manifest notes the checksum of
every file and which checkpoint the run had before it, and the folder gets its name. Object stores cannot rename: there
the manifest alone says that it is whole.

What a run no longer goes on from, but did not make in vain, is set aside under another name: a damaged checkpoint, and
those that are newer than the one that the user goes back to.
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
    """The folder of a step's checkpoint: `checkpoint-1500`."""
    return output_dir / f"checkpoint-{step}"


def unsealed(folder: Path) -> Path:
    """Where a checkpoint is written until it is sealed."""
    return folder.with_name(f"{folder.name}.partial") if is_local(folder) else folder


def make_room(folder: Path) -> None:
    """Clears the place where a checkpoint is about to be written; a whole one that stands there is set aside."""
    written = unsealed(folder)
    if written == folder and (folder / MANIFEST).exists():
        abandon(folder)
    remove_tree(written)


def seal(folder: Path, parent: str | None = None) -> None:
    """Makes a checkpoint of what stands in `unsealed(folder)`. One that bears its name by then is set aside.

    Args:
        folder: Of the checkpoint.
        parent: `identity_of` the checkpoint that the run had before it; None for its first one.
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
    """Gives their names to checkpoints that were whole but not named yet when the process was killed."""
    for written in _named(output_dir, _UNSEALED):
        folder = written.with_name(written.name.removesuffix(".partial"))
        if (written / MANIFEST).exists() and not folder.exists():
            written.rename(folder)


def identity_of(folder: Path) -> str:
    """Name of a sealed checkpoint and the checksum of its manifest, by which no other one is the same."""
    return f"{folder.name}@{_checksum(folder / MANIFEST)[:16]}"


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a sealed checkpoint: reads all of them. None: nothing."""
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
    """The checkpoints of a run, oldest first. A save in flight is none."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(filter(_is_sealed, found), key=step_of)


def newest_named(output_dir: Path) -> str:
    """Tells which checkpoint a run that fails leaves to go on from."""
    have = committed(output_dir)
    return f"the newest checkpoint is {have[-1].name}" if have else "no checkpoint was saved yet"


def _is_sealed(folder: Path) -> bool:
    """On this machine the name says so, and a manifest that is not there is a damage."""
    return is_local(folder) or (folder / MANIFEST).exists()


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint folder's name."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not a checkpoint's name, must be like checkpoint-1500")
    return int(match[1])


def find(output_dir: Path, request: str) -> Path:
    """Finds a checkpoint by its name in the folder of a run, or by its path.

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
    """Reads all files of a checkpoint.

    Raises:
        CheckpointError: Naming what is wrong with it.
    """
    wrong = damage(folder)
    if wrong is not None:
        raise CheckpointError(f"{folder}: {wrong}; use another checkpoint")


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint with nothing wrong; newer ones get another name, with a warning.

    Returns:
        The folder, or None if the run has saved none yet.

    Raises:
        CheckpointError: If something is wrong with each of them.
    """
    wrong: dict[Path, str] = {}
    for folder in reversed(committed(output_dir)):
        why = damage(folder)
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
    """Sets a checkpoint aside that the run does not go on from; returns where it is now."""
    return _set_aside(folder, "abandoned")


def newer_than(output_dir: Path, start: Path) -> list[Path]:
    """The checkpoints in the folder of a run that lie ahead of one that the run goes on from, oldest first.

    Args:
        output_dir: Of the run.
        start: The checkpoint, in that folder or elsewhere.
    """
    at = step_of(start)
    return [one for one in committed(output_dir) if step_of(one) >= at and absolute(one) != absolute(start)]


def damaged(output_dir: Path) -> list[Path]:
    """Checkpoints that were found damaged and set aside."""
    return _named(output_dir, _DAMAGED)


def abandoned(output_dir: Path) -> list[Path]:
    """Checkpoints that were set aside because the run went back to an older one."""
    return _named(output_dir, _ABANDONED)


def _named(output_dir: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in output_dir.iterdir() if pattern.fullmatch(path.name)) if output_dir.is_dir() else []


def rotate(output_dir: Path, limit: int | None, newest: Path) -> None:
    """Deletes the oldest checkpoints beyond a limit.

    Args:
        output_dir: Of the run.
        limit: Checkpoints to keep; None for all.
        newest: That was sealed last: it stays, whatever its step.
    """
    if limit is None:
        return
    others = [folder for folder in committed(output_dir) if folder.name != newest.name]
    for folder in others[: max(0, len(others) + 1 - limit)]:
        remove(folder)


def remove(folder: Path) -> None:
    """Deletes a checkpoint; one that is not there is no error. Cut off midway, it leaves no half of one."""
    if is_local(folder):
        if folder.exists():
            remove_tree(unsealed(folder))
            remove_tree(folder.rename(unsealed(folder)))
    else:
        (folder / MANIFEST).unlink(missing_ok=True)
        remove_tree(folder)


def clear_leftovers(output_dir: Path) -> None:
    """Deletes what a killed run left of a save in flight."""
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            cut_off = _NAME.fullmatch(path.name) and path.is_dir() and not _is_sealed(path)
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
