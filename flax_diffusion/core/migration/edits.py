"""Edits of a text by position, and remarks on its lines."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """Replacement of a part of a text.

    Attributes:
        start: Position of the part's first character.
        end: Position behind the part's last character.
        text: What takes its place.
    """

    start: int
    end: int
    text: str


@dataclass(frozen=True, order=True)
class Remark:
    """Something that needs a look.

    Attributes:
        line: Number of the line, from 1.
        text: What it is, and what to do.
    """

    line: int
    text: str


class Lines:
    """A text with the positions that Python's parser gives: a line from 1, and a column in bytes of UTF-8.

    Args:
        text: The text, with line endings as they are in the file.
    """

    def __init__(self, text: str):
        self.text = text
        ends = [found.end() for found in re.finditer(r"\r\n|\r|\n", text)]
        self.starts = [0, *ends]
        self.ending = text[ends[0] - 1 - text.startswith("\r\n", ends[0] - 2) : ends[0]] if ends else "\n"

    def offset(self, line: int, column: int) -> int:
        """Return the position of a character.

        Args:
            line: Its line, from 1.
            column: Its column, in bytes of UTF-8 from 0.
        """
        start = self.starts[line - 1]
        return start + len(self.text[start : start + column].encode()[:column].decode(errors="ignore"))

    def line_of(self, offset: int) -> int:
        """Return the number, from 1, of the line at a position."""
        return bisect.bisect_right(self.starts, offset)

    def split(self) -> list[str]:
        """Return the lines with their endings."""
        return [
            self.text[start:end] for start, end in zip(self.starts, [*self.starts[1:], len(self.text)], strict=True)
        ]


def apply(text: str, edits: Iterable[Edit]) -> str:
    """Return a text with edits made; no two may overlap.

    Args:
        text: The text.
        edits: Edits at positions in it.
    """
    for edit in sorted(edits, key=lambda one: one.start, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text
