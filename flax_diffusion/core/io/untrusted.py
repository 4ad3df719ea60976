"""Reading what strangers wrote: bounded in size and in depth, and free of code.

What is wrong is a ValueError, or an OSError of the file's, which the caller turns into the message that fits.
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
MAX_YAML_BYTES = 2**17  # PyYAML takes seconds for it
MAX_DEPTH = 64
LFS_POINTER = b"version https://git-lfs"
"""How the file begins that stands for another in a clone without Git LFS."""
MAX_YAML_WRITTEN_OUT = 2**20  # values and characters, where every alias is put in full, as whoever uses them does


def read_bytes(path: Path, most: int, first: int | None = None) -> bytes:
    """The bytes of a file, which is no device, no pipe and no larger than `most`; of it the `first`, or all."""
    _check_file(path, most)
    if first is None:
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(first)


def read_text(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """The text of such a file in UTF-8, with or without a byte-order mark."""
    return read_bytes(path, most).decode("utf-8-sig")


def open_text(path: Path, most: int, newline: str | None = None) -> TextIO:
    """Such a file, opened to read line by line."""
    _check_file(path, most)
    return io.TextIOWrapper(path.open("rb"), encoding="utf-8-sig", newline=newline)


def _check_file(path: Path, most: int) -> None:
    if not is_local(path):  # in an object store there are only files, and asking takes as long as reading one
        return
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if status.st_size > most:
        raise ValueError(f"it is larger than {most} bytes")


def path_inside(name: str) -> str:
    """A path relative to a folder, without detours."""
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        raise ValueError("it leaves the folder")
    return path


def path_below(root: Path, name: str) -> Path:
    """The path of a file below a folder. No link to a folder may lead to it: such a one may lead anywhere."""
    inside = path_inside(name)
    if is_local(root) and (root / inside).parent.resolve() != root.resolve() / os.path.dirname(inside):
        raise ValueError("a link to a folder leads to it")
    return root / inside


def parse_json(text: str, *, unique: bool = False) -> Any:
    """The value of a JSON text; if `unique`, no object may give one name two values."""
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
    """Plain data, where 1e-4 is a number, which in YAML 1.1 it is not, and a name stands once in a mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Reads a mapping's nodes.

        Raises:
            ConstructorError: If it gives one name two values.
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
    """The same, with scalars as they are written: only null is not a text."""


_NULL, _MERGE, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "merge", "float"))
_WordLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _MERGE)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def parse_yaml(text: str, *, words: bool = False) -> Any:
    """The value of a YAML text: plain data, no objects; with `words`, scalars as they are written, and null."""
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
    except (AttributeError, KeyError, TypeError) as error:  # so PyYAML itself fails at such a scalar
        raise ValueError("a value is not of the type that its tag says") from error


def _check_events(text: str) -> None:
    """Bounds a document before anything is made of it; aliases of a few lines may stand for billions of values."""
    sizes: dict[str, int] = {}  # of what has an anchor
    open_nodes: list[tuple[str | None, int]] = []  # anchor and size so far of what the parser is in
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
                raise ValueError(f"the alias *{event.anchor} stands for nothing, or for what it is in")
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
