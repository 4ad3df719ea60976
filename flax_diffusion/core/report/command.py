"""The command that makes the page of a run again, or one that compares several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import absolute, as_path, is_local, write_text
from flax_diffusion.core.report.files import COMPARISON, PAGE
from flax_diffusion.core.report.page import GENERATOR, as_page
from flax_diffusion.core.report.pictures import BUDGET
from flax_diffusion.core.report.reading import distinct_names, read_run


def report(runs: Sequence[str], output_file: str | None) -> Path:
    """Write a page, and return its path.

    Args:
        runs: Folders of the runs.
        output_file: The file to write; None for that of the run in its folder, or to compare several for
            `comparison.html` in the present folder.

    Raises:
        ConfigError: If a folder holds no run or is there twice, or the file cannot be written.
    """
    if not runs:
        raise ConfigError("report: names no run: give the output folder of one, or of several to compare them")
    folders = [as_path(run) for run in runs]
    for name, folder in zip(runs, folders, strict=True):
        if not folder.is_dir():
            there = "is a file" if folder.exists() else "does not exist"
            raise ConfigError(f"{name}: {there}; name the output folder of a run")
    places = [absolute(folder) for folder in folders]
    for name, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{name}: is there {places.count(place)} times; name each run once")
    target = _target(folders, output_file)
    names = distinct_names(folders)
    read = [read_run(folder, name, BUDGET // len(runs)) for folder, name in zip(folders, names, strict=True)]
    page = as_page(read)
    try:
        write_text(target, page)
    except OSError as error:
        raise ConfigError(
            f"{target}: cannot be written ({error.strerror or error}); name another --output_file"
        ) from error
    return target


def _target(folders: Sequence[Path], output_file: str | None) -> Path:
    """Return the file to write.

    Raises:
        ConfigError: If it has no folder, or is something else than a page of this program.
    """
    if output_file is None:
        target = folders[0] / PAGE if len(folders) == 1 else Path(COMPARISON)
    else:
        target = as_path(output_file)
    if is_local(target) and not target.parent.is_dir():
        raise ConfigError(f"--output_file {target}: its folder does not exist; make it, or name another file")
    if target.is_dir():
        raise ConfigError(f"--output_file {target}: is a folder; name a file in it, such as {target / PAGE}")
    if target.exists() and GENERATOR.encode() not in _start_of(target):
        raise ConfigError(f"{target}: is there already, and is no page of a run; name another --output_file")
    return target


def _start_of(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(2000)
