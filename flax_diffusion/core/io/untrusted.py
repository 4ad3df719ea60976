"""Readers of untrusted files, which bound size and depth and run no code.

Errors are ValueError, or OSError from reading a file. The caller turns them into a message with its own context.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import yaml

from flax_diffusion.core.io.files import is_local

MAX_TEXT_BYTES = 2**26
MAX_YAML_BYTES = 2**17  # PyYAML takes seconds for a file of this size
MAX_DEPTH = 64
LFS_POINTER = b"version https://git-lfs"
"""Start of the file that stands in for the real one in a clone made without Git LFS."""
MAX_YAML_WRITTEN_OUT = 2**20  # values and characters with every alias expanded, as readers of the document do


def read_bytes(path: Path, max_bytes: int, first_bytes: int | None = None) -> bytes:
    """Read a file.

    Args:
        path: The file.
        max_bytes: Largest size of the whole file, bytes.
        first_bytes: Number of bytes to read from its start; None for all.

    Raises:
        ValueError: If it is not a regular file (a device or a pipe, for example), or is too large.
    """
    _check_file(path, max_bytes)
    if first_bytes is None:
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(first_bytes)


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a UTF-8 text file, with or without a byte-order mark.

    Args:
        path: The file.
        max_bytes: Largest size of the file, bytes.

    Raises:
        ValueError: As `read_bytes`, or if the file is not UTF-8.
    """
    return read_bytes(path, max_bytes).decode("utf-8-sig")


def open_text(path: Path, max_bytes: int, newline: str | None = None) -> TextIO:
    """Open a UTF-8 text file to read it line by line.

    Args:
        path: The file.
        max_bytes: Largest size of the file, bytes.
        newline: As of Python's `open`.

    Raises:
        ValueError: As `read_bytes`.
    """
    _check_file(path, max_bytes)
    return io.TextIOWrapper(path.open("rb"), encoding="utf-8-sig", newline=newline)


def _check_file(path: Path, max_bytes: int) -> None:
    if not is_local(path):  # an object store holds only files, and asking for the size takes as long as reading one
        return
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes")


def path_inside(name: str) -> str:
    """Return a relative path in normal form.

    Args:
        name: The path, relative to a folder.

    Raises:
        ValueError: If it is absolute or leads out of the folder.
    """
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        raise ValueError("it leaves the folder")
    return path


def path_below(root: Path, name: str) -> Path:
    """Return the path of a file below a folder.

    Args:
        root: The folder.
        name: Path of the file relative to `root`.

    Raises:
        ValueError: If the path leaves the folder, or goes through a link to a folder, which may lead anywhere.
    """
    inside = path_inside(name)
    if is_local(root) and (root / inside).parent.resolve() != root.resolve() / os.path.dirname(inside):
        raise ValueError("a link to a folder leads to it")
    return root / inside


def parse_json(text: str, *, unique: bool = False) -> Any:
    """Parse a JSON text.

    Args:
        text: The text.
        unique: Whether to refuse an object that gives one name two values.

    Raises:
        ValueError: If it is not JSON, is nested too deep, or gives a name twice where that is refused.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it gives {next(name for name in names if names.count(name) > 1)!r} twice")
    return values


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class _Loader(yaml.SafeLoader):
    """Loader of plain data that reads 1e-4 as a number, unlike YAML 1.1, and refuses a name twice in one mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping's nodes.

        Raises:
            ConstructorError: If the mapping gives one name two values.
        """
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(problem=f"it gives {key.value!r} twice")
                seen.add(key.value)
        return node


class _WordLoader(_Loader):
    """The same loader, which keeps every scalar except null as the text that is written."""


_NULL, _MERGE, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "merge", "float"))
_WordLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _MERGE)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def parse_yaml(text: str, *, words: bool = False) -> Any:
    """Parse a YAML text into plain data.

    Args:
        text: The text.
        words: Whether to keep every scalar except null as the text that is written.

    Raises:
        ValueError: If it is not YAML, holds objects, is too deep, or its aliases stand for too much.
    """
    try:
        _check_events(text)
        loader = (_WordLoader if words else _Loader)(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem}{place}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except (
        AttributeError,
        KeyError,
        TypeError,
    ) as error:  # PyYAML itself fails like this at a scalar that does not fit its tag
        raise ValueError("a value is not of the type that its tag says") from error


def _check_events(text: str) -> None:
    """Check the size of a document before it is loaded: aliases of a few lines may stand for billions of values."""
    sizes: dict[str, int] = {}  # of the nodes that have an anchor
    open_nodes: list[tuple[str | None, int]] = []  # anchor and size so far of each node that is still open
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} stands for nothing, or for a node that it lies in")
            anchor, size = None, sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1 + len(event.value)
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if open_nodes:
            outer, so_far = open_nodes.pop()
            open_nodes.append((outer, so_far + size))
            if so_far + size > MAX_YAML_WRITTEN_OUT:
                raise ValueError("its aliases stand for more than any recipe holds")
