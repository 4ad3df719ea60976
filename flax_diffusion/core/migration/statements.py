"""Import statements, taken apart to names with their comments and put together again."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from flax_diffusion.core.migration.edits import Edit, Lines

MAX_COLUMNS = 88
"""Width up to which names are written in one line, as Black does by default."""

_COMMENT = re.compile(r"#[^\r\n]*")
_REST_OF_LINE = re.compile(r"(?:[^\S\r\n]*,)?(?P<comment>[^\S\r\n]*#[^\r\n]*)?")


def span(node: ast.stmt | ast.expr | ast.alias, lines: Lines) -> tuple[int, int]:
    """Return the first position of a node, and the one behind its last."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return lines.offset(node.lineno, node.col_offset), lines.offset(node.end_lineno, node.end_col_offset)


@dataclass(frozen=True)
class Name:
    """A name in an import statement.

    Attributes:
        text: The name as written, with `as` and what follows.
        above: Comments and empty lines above it.
        comment: Comment behind it in its line, with the spaces before it.
    """

    text: str
    above: tuple[str, ...] = ()
    comment: str = ""


class FromImport:
    """A `from … import …` statement as it is written.

    Args:
        node: The statement.
        lines: The text that it stands in.
    """

    def __init__(self, node: ast.ImportFrom, lines: Lines):
        self.node, self.lines = node, lines
        self.start, self.end = span(node, lines)
        spans = [span(alias, lines) for alias in node.names]
        text = lines.text
        self.head = text[self.start : spans[0][0]]
        gaps = [text[end:start] for (_, end), (start, _) in itertools.pairwise(spans)]
        tail = text[spans[-1][1] : self.end]
        self.several_lines = bool(re.search(r"[\r\n]", text[self.start : self.end]))
        self.in_lines = "(" in self.head and self.several_lines
        self.one_a_line = self.in_lines and all(re.search(r"[\r\n]", gap) for gap in [self.head, *gaps, tail])
        self.last_comma = "," in _COMMENT.sub("", tail)
        opened = _REST_OF_LINE.match(self.head.partition("(")[2]) if self.in_lines else None
        self.head_comment = (opened and opened["comment"]) or ""
        above = _whole_lines(self.head.partition("(")[2]) if self.in_lines else ()
        names = []
        for (start, end), gap in zip(spans, [*gaps, tail], strict=True):
            rest = _REST_OF_LINE.match(gap)
            names.append(Name(text[start:end], above, (rest and rest["comment"]) or ""))
            above = _whole_lines(gap)
        self.names, self.below = names, above
        first_line = text[lines.starts[lines.line_of(self.start) - 1] : self.start]
        self.indent = first_line[: len(first_line) - len(first_line.lstrip())]
        own = re.search(r"[\r\n]([^\S\r\n]*)$", self.head)
        self.inner_indent = own[1] if own else self.indent + "    "

    def renamed(self, module: str) -> Edit | None:
        """Return the edit that changes nothing but the module, or None if the statement has an unusual form."""
        found = re.match(r"from(?:\s|\\)+([\w.]+)(?=\s|\\)", self.head)
        if found is None or found[1] != self.node.module:
            return None
        return Edit(self.start + found.start(1), self.start + found.end(1), module)

    def written(self, module: str, names: Sequence[Name], *, stays: bool) -> str:
        """Return a statement that imports some of the names.

        Args:
            module: The module to import from.
            names: The names.
            stays: Whether it takes the place of this one, so that it keeps its form.
        """
        comments = any(name.comment or any(name.above) for name in names)
        comments = comments or (stays and bool(self.head_comment or any(self.below)))
        joined = ", ".join(name.text for name in names)
        one_line = f"from {module} import {joined}"
        fits = len(self.indent + one_line) <= MAX_COLUMNS
        if not comments and not (stays and self.one_a_line) and (fits or not self.several_lines):
            in_parens = stays and not self.several_lines and "(" in self.head
            return f"from {module} import ({joined})" if in_parens else one_line
        rows = [f"from {module} import ({self.head_comment if stays else ''}"]
        for position, name in enumerate(names):
            comma = "," if position + 1 < len(names) or self.last_comma or not self.one_a_line else ""
            rows += [self.inner_indent + line if line else "" for line in name.above]
            rows.append(f"{self.inner_indent}{name.text}{comma}{name.comment}")
        rows += [self.inner_indent + line if line else "" for line in (self.below if stays else ())]
        return self.lines.ending.join([*rows, f"{self.indent})"])


def _whole_lines(gap: str) -> tuple[str, ...]:
    """Return the comments and empty lines between two names; what stands in a line with a name is left out."""
    return tuple(line.strip() for line in re.split(r"\r\n|\r|\n", gap)[1:-1])


def joined(statements: Sequence[str], start: int, end: int, lines: Lines) -> Edit:
    """Return the edit that puts statements in the place of one, each in a line of its own where that one has its own.

    Args:
        statements: The new statements.
        start: First position of the old one.
        end: Position behind the old one.
        lines: The text.
    """
    before = lines.text[lines.starts[lines.line_of(start) - 1] : start]
    after = re.split(r"[\r\n]", lines.text[end:], maxsplit=1)[0].strip()
    alone = not before.strip() and (not after or after.startswith("#"))
    return Edit(start, end, (lines.ending + before if alone else "; ").join(statements))
