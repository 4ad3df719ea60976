"""Files on this machine and in object stores: paths, and writes of which a reader never sees one half done."""

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
"""Schemes of the object stores that paths may lie in, such as `gs` of `gs://bucket/folder`."""


def as_path(name: str | Path) -> Path:
    """Return the path for a name: on this machine, or in an object store if it starts with `gs://` or `s3://`.

    Args:
        name: The path as the user wrote it.

    Raises:
        ConfigError: If it has another scheme, or the package that reads this store is not installed.
    """
    scheme, has_scheme, _ = str(name).partition("://")
    if isinstance(name, Path) or not has_scheme:
        return Path(name)
    if scheme not in STORES:
        raise ConfigError(f"{name}: paths of object stores start with {' or '.join(f'{one}://' for one in STORES)}")
    import fsspec  # imported here because most runs need neither
    from etils import epath

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ConfigError(f"{name}: {error}") from error
    return cast(Path, epath.Path(name))


def is_local(path: Path) -> bool:
    """Return whether a path is on this machine, not in an object store."""
    return isinstance(path, Path)


def user_cache() -> Path:
    """Return this user's cache folder for this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flax_diffusion"


def absolute(path: Path) -> Path:
    """Return the absolute path; one in an object store already is."""
    return path.resolve() if is_local(path) else path


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    # Python deletes the folder when the process ends.
    return tempfile.TemporaryDirectory(prefix="flax_diffusion-")


def temporary_folder() -> Path:
    """Make a new folder on this machine, which is deleted when the process ends."""
    return Path(tempfile.mkdtemp(dir=_temporary().name))


def version_of(file: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its time of change, which together tell two versions of it apart."""
    stat: Any = file.stat()
    return (stat.st_size, stat.st_mtime_ns) if is_local(file) else (stat.length, stat.mtime)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content; either path may be in an object store."""
    with source.open("rb") as readable, target.open("wb") as writable:
        shutil.copyfileobj(readable, writable)


def read_range(file: Path, start: int, length: int) -> bytes:
    """Return some bytes of a file, fewer at its end.

    Args:
        file: The file, on this machine or in an object store, of which no more is then read.
        start: Number of the first byte.
        length: Number of bytes.
    """
    if not is_local(file):
        from etils.epath import backend

        store: Any = backend.fsspec_backend.fs(os.fspath(file))
        return store.cat_file(os.fspath(file), start=start, end=start + length)
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        return stream.read(length)


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a folder, but not its subfolders, to another folder, which must exist."""
    for file in source.iterdir():
        if not file.is_dir():
            copy_file(file, target / file.name)


@functools.cache
def _copied(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder for a local copy, and the versions of the files copied to it so far."""
    return temporary_folder(), {}


def local_copy(folder: Path, patterns: tuple[str, ...] = ("*",)) -> Path:
    """Return a folder on this machine with the matching files of a folder, without its subfolders.

    Args:
        folder: A folder on this machine, which is returned as it is, or in an object store.
        patterns: Globs for the names of the files to copy.
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


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, in order, with what other processes have just written; none where it is not."""
    if not is_local(folder):
        from etils.epath import backend

        cast(Any, backend.fsspec_backend.fs(os.fspath(folder))).invalidate_cache()
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def lies_in(inner: str, outer: str) -> bool:
    """Return whether `inner` is `outer` or lies below it, with links resolved; neither has to exist."""
    if is_local(as_path(inner)) != is_local(as_path(outer)):
        return False
    if not is_local(as_path(inner)):
        return PurePosixPath(inner).is_relative_to(outer)
    return Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer))


def walk(root: Path, links: list[str] | None = None) -> Iterator[str]:
    """Yield the files below a folder in an order that is the same on every file system; hidden ones are left out.

    Args:
        root: The folder.
        links: A list to which links to folders are appended; they are not followed.

    Yields:
        The path of each file relative to `root`.

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
    """Return a path in the form in which object stores list their contents."""
    return PurePosixPath(os.fspath(path).rpartition("://")[2])


def remove_tree(folder: Path) -> None:
    """Delete a folder with everything in it, if it exists."""
    if not folder.exists():
        return
    if is_local(folder):
        shutil.rmtree(folder)
    else:
        cast(Any, folder).rmtree()


def move(source: Path, target: Path) -> None:
    """Move a file or a folder.

    Object stores cannot rename a folder. There, all files are copied within the store before any is deleted.

    Args:
        source: The file or folder.
        target: The new path, at which nothing may exist yet.
    """
    if is_local(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target)  # works across file systems, too
        return
    from etils.epath import backend

    store: Any = backend.fsspec_backend.fs(
        os.fspath(source)
    )  # the instance whose cached listings `source` itself reads
    if source.is_dir():
        names = [*walk(source)]
        store.copy([os.fspath(source / name) for name in names], [os.fspath(target / name) for name in names])
    else:
        store.copy(os.fspath(source), os.fspath(target))
    store.rm(os.fspath(source), recursive=True)
    store.invalidate_cache()  # else folders that were listed before would not show their new files


def unused(path: Path) -> Path:
    """Return the path if nothing exists there, else the first of `path.2`, `path.3`, … at which nothing exists."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: yield a temporary path to write to, then move that file to `path`.

    The file is flushed to disk before it is moved. If writing fails, the temporary file is deleted and the old file at
    `path` stays.

    Args:
        path: The file to write, on this machine or in an object store; its folder is made.

    Yields:
        The temporary path, on this machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.name}.{os.getpid()}.partial"
    partial = path.with_name(name) if is_local(path) else temporary_folder() / path.name
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if is_local(path):
            os.replace(partial, path)
        else:
            copy_file(partial, path)  # an object becomes visible only when all of it is stored
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder on this machine to write files to, which are in `folder` afterwards.

    Args:
        folder: The final folder. If it is on this machine, it is yielded itself.
    """
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        yield Path(local)
        copy_files(Path(local), folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON as Hugging Face's libraries do: indented by two spaces, with sorted keys and a final newline."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
