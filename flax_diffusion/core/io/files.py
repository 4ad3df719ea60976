"""Files of this machine and of object stores: paths, and writing so that a reader never sees half of one."""

from __future__ import annotations

import functools
import itertools
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

STORES = ("gs", "s3")
"""Object stores, as paths in them start."""


def as_path(name: str | Path) -> Path:
    """The path that a user names: of this machine, or, where it starts with `gs://` or `s3://`, of an object store.

    Raises:
        ConfigError: If it starts in another such way, or what reads that store is not installed.
    """
    scheme, has_scheme, _ = str(name).partition("://")
    if isinstance(name, Path) or not has_scheme:
        return Path(name)
    if scheme not in STORES:
        raise ConfigError(f"{name}: paths of object stores start with {' or '.join(f'{one}://' for one in STORES)}")
    import fsspec  # only now: most runs need neither
    from etils import epath

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ConfigError(f"{name}: {error}") from error
    return cast(Path, epath.Path(name))


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
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="flax_diffusion-")


def temporary_folder() -> Path:
    """A new folder of this machine, there as long as the process is."""
    return Path(tempfile.mkdtemp(dir=_temporary().name))


def version_of(file: Path) -> tuple[int, int]:
    """Bytes and time of change, by which two states of a file differ."""
    stat: Any = file.stat()
    return (stat.st_size, stat.st_mtime_ns) if is_local(file) else (stat.length, stat.mtime)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's content, from and to anywhere."""
    with source.open("rb") as readable, target.open("wb") as writable:
        shutil.copyfileobj(readable, writable)


def copy_files(source: Path, target: Path) -> None:
    """Copies the files of a folder to another that is there, not those in its subfolders."""
    for file in source.iterdir():
        if not file.is_dir():
            copy_file(file, target / file.name)


@functools.cache
def _copied(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where a folder's copy is, and the versions of the files in it."""
    return temporary_folder(), {}


def local_copy(folder: Path, patterns: tuple[str, ...] = ("*",)) -> Path:
    """A folder of this machine with the files of another that match, not those in its subfolders.

    Args:
        folder: Anywhere; of this machine, it is returned as it is.
        patterns: Globs.
    """
    if is_local(folder):
        return folder
    target, versions = _copied(folder)
    for file in folder.iterdir():
        if file.is_dir() or not any(fnmatch(file.name, pattern) for pattern in patterns):
            continue
        version = version_of(file)
        if versions.get(file.name) != version:
            with replacing(target / file.name) as partial:
                copy_file(file, partial)
            versions[file.name] = version
    return target


def lies_in(inner: str, outer: str) -> bool:
    """Whether a path is another one or below it, through whatever links; neither has to exist."""
    if is_local(as_path(inner)) != is_local(as_path(outer)):
        return False
    if not is_local(as_path(inner)):
        return PurePosixPath(inner).is_relative_to(outer)
    return Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer))


def walk(root: Path, links: list[str] | None = None) -> Iterator[str]:
    """The files below a folder, relative to it, in an order that every file system agrees on; no hidden ones.

    Args:
        root: The folder.
        links: Gets the links to folders, which are not followed.

    Raises:
        OSError: If a subfolder cannot be read.
    """
    local = is_local(root)
    for folder, subfolders, names in os.walk(root, onerror=_raise) if local else cast(Any, root).walk():
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = _without_scheme(folder).relative_to(_without_scheme(root))
        if local and links is not None:
            links += [str(inside / name) for name in subfolders if os.path.islink(os.path.join(folder, name))]
        yield from (str(inside / name) for name in sorted(names) if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


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


def move(source: Path, target: Path) -> None:
    """Gives a file or a folder another name, under which nothing is yet.

    Object stores cannot rename a folder: there its files are copied, within the store, before any is deleted.
    """
    if is_local(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target)  # also to another file system
        return
    from etils.epath import backend

    store: Any = backend.fsspec_backend.fs(os.fspath(source))  # the one whose listings `source` itself would see
    if source.is_dir():
        names = [*walk(source)]
        store.copy([os.fspath(source / name) for name in names], [os.fspath(target / name) for name in names])
    else:
        store.copy(os.fspath(source), os.fspath(target))
    store.rm(os.fspath(source), recursive=True)
    store.invalidate_cache()  # or folders that were listed before would go without what is new in them


def unused(path: Path) -> Path:
    """The path, or where something bears that name, the first of `path.2`, `path.3`, … that nothing bears."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name on this machine to write to; afterwards flushes it to disk and moves it to `path`.

    If writing fails, the temporary file goes and what stood at `path` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = f".{path.name}.{os.getpid()}.partial"
    partial = path.with_name(beside) if is_local(path) else temporary_folder() / path.name
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if is_local(path):
            os.replace(partial, path)
        else:
            copy_file(partial, path)  # an object is there when all of it is
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
        copy_files(Path(local), folder)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as Hugging Face's libraries do: two spaces, sorted keys, a final newline."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
