"""Files of this machine and of object stores: paths, and writing so that a reader never sees half of one."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, cast

from flax_diffusion.core.errors import ConfigError


def as_path(name: str | Path) -> Path:
    """The path that a user names: of this machine, or, where it starts like `gs://`, of an object store.

    Raises:
        ConfigError: If what reads that store is not installed.
    """
    if isinstance(name, Path) or "://" not in str(name):
        return Path(name)
    from etils import epath

    path = cast(Path, epath.Path(name))
    try:
        path.exists()
    except ImportError as error:
        raise ConfigError(f"{name}: needs a package that is not installed ({error}); for gs:// it is gcsfs") from error
    return path


def is_local(path: Path) -> bool:
    """Whether a path is one of this machine."""
    return isinstance(path, Path)


def user_cache() -> Path:
    """Where this user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flax_diffusion"


def absolute(path: Path) -> Path:
    """The path, wherever the process is."""
    return path.resolve() if is_local(path) else path


@functools.cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    """Deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="flax_diffusion-")


def local_copy(folder: Path, patterns: tuple[str, ...] = ("*",)) -> Path:
    """A folder of this machine with the files of another that match, not those in its subfolders.

    Args:
        folder: Anywhere; of this machine, it is returned as it is.
        patterns: Globs.
    """
    if is_local(folder):
        return folder
    target = Path(_copies().name, str(folder).replace("://", "/"))
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        wanted = any(fnmatch(file.name, pattern) for pattern in patterns)
        if wanted and not (target / file.name).exists() and not file.is_dir():
            with replacing(target / file.name) as partial, file.open("rb") as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    return target


def walk(root: Path) -> Iterator[str]:
    """The files below a folder, relative to it, in an order that every file system agrees on; no hidden ones.

    Links to folders are not followed.
    """
    for folder, subfolders, names in os.walk(root) if is_local(root) else cast(Any, root).walk():
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = _without_scheme(folder).relative_to(_without_scheme(root))
        yield from (str(inside / name) for name in sorted(names) if not name.startswith("."))


def _without_scheme(path: Any) -> PurePosixPath:
    """As object stores list what they have."""
    return PurePosixPath(os.fspath(path).rpartition("://")[2])


def remove_tree(folder: Path) -> None:
    """Deletes a folder with all in it; one that is not there is no error."""
    if not folder.exists():
        return
    if is_local(folder):
        shutil.rmtree(folder)
    else:
        cast(Any, folder).rmtree()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name on this machine to write to; afterwards flushes it to disk and moves it to `path`.

    If writing fails, the temporary file goes and what stood at `path` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    if not is_local(path):
        partial = Path(_copies().name, partial.name)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
            if not is_local(path):  # an object is there when all of it is
                with path.open("wb") as sink:
                    shutil.copyfileobj(file, sink)
                return
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder of this machine to write files to, which afterwards are in `folder`.

    Of this machine, it is that folder itself.
    """
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        yield Path(local)
        for file in Path(local).iterdir():
            with file.open("rb") as source, (folder / file.name).open("wb") as sink:
                shutil.copyfileobj(source, sink)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as Hugging Face's libraries do: two spaces, sorted keys, a final newline."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
