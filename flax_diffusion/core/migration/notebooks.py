"""Jupyter notebooks: the code of all cells as one text, and edits of it in the file, whose formatting stays."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from flax_diffusion.core.io.untrusted import parse_json
from flax_diffusion.core.migration import code
from flax_diffusion.core.migration.edits import Edit, Lines, apply

_TOKEN = re.compile(r'[\[\]{},:]|"[^"\\]*(?:\\.[^"\\]*)*"|[^\s\[\]{},:"]+')
_MAGIC = re.compile(r"(?P<indent>[^\S\r\n]*)(?:%{1,2}[A-Za-z_]|!|\?|[\w.]+\?{1,2}\s*$)")
_ASSIGNED = re.compile(r"(?P<target>[^\S\r\n]*[\w\s,.\[\]]+=\s*)(?:%[A-Za-z_]|!)")
_OF_PYTHON = re.compile(r"%%(?:time|timeit|capture|prun)\b")
"""Magics of a whole cell whose other lines are Python."""


@dataclass(frozen=True)
class Cell:
    """A code cell.

    Attributes:
        number: Its number among all cells, from 1.
        text: Its text.
        span: Where its source stands in the file.
        pieces: The spans of the texts that the source is a list of; None if it is one text.
    """

    number: int
    text: str
    span: tuple[int, int]
    pieces: tuple[tuple[int, int], ...] | None


def cells_of(text: str) -> list[Cell]:
    """Return the code cells of a notebook in Python.

    Args:
        text: The file's text.

    Raises:
        ValueError: If it is no notebook.
    """
    try:
        book = parse_json(text)
    except ValueError as error:
        raise ValueError(f"is no notebook: {error}") from error
    if not isinstance(book, dict) or not isinstance(book.get("cells"), list):
        raise ValueError("is no notebook of format 4, which has a list of cells: open it in Jupyter and save it")
    if _language(book) != "python":
        return []
    spans, found = _spans(text), []
    for index, cell in enumerate(book["cells"]):
        source = cell.get("source") if isinstance(cell, dict) and cell.get("cell_type") == "code" else None
        key = ("cells", index, "source")
        if isinstance(source, str):
            found.append(Cell(index + 1, source, spans[key], None))
        elif isinstance(source, list) and source and all(isinstance(piece, str) for piece in source):
            pieces = tuple(spans[(*key, number)] for number in range(len(source)))
            found.append(Cell(index + 1, "".join(source), spans[key], pieces))
    return found


def _language(book: dict[str, Any]) -> str:
    metadata = book.get("metadata")
    for part, key in (("kernelspec", "language"), ("language_info", "name")):
        about = metadata.get(part) if isinstance(metadata, dict) else None
        if isinstance(about, dict) and key in about:
            return str(about[key]).lower()
    return "python"


def _spans(text: str) -> dict[tuple[str | int, ...], tuple[int, int]]:
    """Return where each value of a JSON text stands that lies at most four levels deep, by the keys that lead to it."""
    spans: dict[tuple[str | int, ...], tuple[int, int]] = {}
    path: list[Any] = []  # the key or the position at each level; None where a key is to come
    opened: list[int] = []
    for token in _TOKEN.finditer(text):
        sign = token[0]
        if sign in "[{":
            opened.append(token.start())
            path.append(0 if sign == "[" else None)
        elif sign in "]}":
            path.pop()
            if len(path) <= 4:
                spans[tuple(path)] = (opened[-1], token.end())
            opened.pop()
        elif sign == ",":
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
        elif sign == ":":
            continue
        elif path and path[-1] is None:
            path[-1] = json.loads(sign)
        elif len(path) <= 4:
            spans[tuple(path)] = token.span()
    return spans


def as_python(cell: str) -> str:
    """Return a cell with IPython's own lines replaced by `pass`, each line in its place.

    Args:
        cell: The cell's text.

    Raises:
        ValueError: If the rest does not parse as Python 3.
    """
    lines = Lines(cell).split()
    if lines[0].startswith("%%") and not _OF_PYTHON.match(lines[0]):
        return "".join(_ending(line) for line in lines)
    try:
        code.parse(cell)
    except ValueError:
        masked, continued = [], False
        for line in lines:
            magic, assigned = _MAGIC.match(line), _ASSIGNED.match(line)
            if continued:
                kept = ""
            elif magic:
                kept = "" if line.startswith("%%") else f"{magic['indent']}pass"
            elif assigned:
                kept = f"{assigned['target']}None"
            else:
                masked.append(line)
                continue
            continued = line.rstrip().endswith("\\")
            masked.append(kept + _ending(line))
        cell = "".join(masked)
        code.parse(cell)
    return cell


def commands_in(cell: str) -> str:
    """Return the lines of a cell that a shell runs or a magic takes; the other lines are empty, in their place."""
    lines = Lines(cell).split()
    if lines[0].startswith("%%") and not _OF_PYTHON.match(lines[0]):
        return cell
    kept, continued = [], False
    for line in lines:
        runs = continued or bool(_MAGIC.match(line)) or bool(_ASSIGNED.match(line))
        continued = runs and line.rstrip().endswith("\\")
        kept.append(line if runs else _ending(line))
    return "".join(kept)


def _ending(line: str) -> str:
    return line[len(line.rstrip("\r\n")) :]


def edited(text: str, cells: list[tuple[Cell, str]]) -> str:
    """Return a notebook with new text in some cells.

    Args:
        text: The file's text.
        cells: The cells with their new texts.
    """
    ascii_only = text.isascii()
    edits = []
    for cell, new in cells:
        if cell.pieces is None:
            edits.append(Edit(*cell.span, json.dumps(new, ensure_ascii=ascii_only)))
            continue
        written = {json.loads(text[start:end]): text[start:end] for start, end in cell.pieces}
        before = text[cell.span[0] : cell.pieces[0][0]]
        after = text[cell.pieces[-1][1] : cell.span[1]]
        comma = text[cell.pieces[0][1] : cell.pieces[1][0]] if len(cell.pieces) > 1 else f",{before[1:] or ' '}"
        lines = [line for line in Lines(new).split() if line]
        literals = [written.get(line) or json.dumps(line, ensure_ascii=ascii_only) for line in lines]
        edits.append(Edit(*cell.span, before + comma.join(literals) + after))
    return apply(text, edits)
