"""Imports of code for Diffusers' and Transformers' Flax classes: `python -m flax_diffusion.migrate PATH … [--write]`.

It prints, as a unified diff, what changes in Python files and notebooks that were written for diffusers 0.39 and
transformers 4.57, so that they take their Flax classes from here. It lists on stderr what needs a look: names that are
not here, keywords that nothing reads any more, requirements, and the scripts that `flax_diffusion.train` replaces.
Nothing is changed without --write.

Exit status: 0 if there is nothing to do, or after --write; 1 if there is; 2 if a file cannot be used.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import shutil
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import flax_diffusion
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import replacing
from flax_diffusion.core.io.untrusted import MAX_TEXT_BYTES, read_bytes
from flax_diffusion.core.migration import code, commands, notebooks
from flax_diffusion.core.migration.edits import Lines, apply
from flax_diffusion.core.tasks.task import TASKS

_REQUIREMENTS = re.compile(
    r".*requirements.*\.(txt|in)|constraints.*\.txt|pyproject\.toml|setup\.cfg|environment.*\.ya?ml|Pipfile"
)
_SHELL = re.compile(r".*\.(sh|bash|zsh)|Dockerfile.*|Makefile")
_SKIPPED = ("__pycache__", "node_modules", "site-packages")


@dataclass(frozen=True)
class Change:
    """What is to do in one file.

    Attributes:
        path: The file.
        before: Its text.
        after: Its new text.
        encoding: Name of its encoding.
        remarks: What needs a look, each with its place in the file: a line, or a cell and a line.
    """

    path: Path
    before: str
    after: str
    encoding: str
    remarks: tuple[tuple[str, str], ...]

    @property
    def diff(self) -> str:
        """The change of the text, as a unified diff."""
        name = self.path.as_posix()
        outside = self.path.is_absolute() or ".." in self.path.parts
        names = (name, name) if outside else (f"a/{name}", f"b/{name}")
        before, after = Lines(self.before).split(), Lines(self.after).split()
        rows = difflib.unified_diff([line for line in before if line], [line for line in after if line], *names)
        return "".join(row if row.endswith(("\n", "\r")) else f"{row}\n\\ No newline at end of file\n" for row in rows)


@cache
def homes() -> dict[str, str]:
    """Return our module for each public name, without importing JAX: `flax_diffusion` itself or a package in it."""
    found = {}
    for file in sorted(Path(flax_diffusion.__file__).parent.glob("*/__init__.py")):
        for name in code.names_in(code.parse(file.read_text(encoding="utf-8"))):
            found[name] = f"flax_diffusion.{file.parent.name}"
    return found | dict.fromkeys(flax_diffusion.__all__, "flax_diffusion")


def examine(path: Path) -> Change:
    """Return what is to do in a file.

    Args:
        path: The file: Python, a notebook, requirements or a shell file.

    Raises:
        ConfigError: If it is none of these, or cannot be read.
    """
    kind = _kind(path)
    if kind is None:
        raise ConfigError(f"{path}: is no Python file, notebook, shell file or list of requirements: leave it out")
    try:
        data = read_bytes(path, MAX_TEXT_BYTES)
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0] if kind is _python else "utf-8"
        encoding = "utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else encoding
        text = data.decode(encoding)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not {error.encoding.upper()}: save it as UTF-8") from error
    except SyntaxError as error:  # of the line that names the encoding
        what = error.msg if str(error.msg).startswith("unknown encoding") else "is not UTF-8"
        raise ConfigError(f"{path}: {what}: save it as UTF-8") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        after, remarks = kind(path, text)
        if kind is _python:
            code.parse(after)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return Change(path, text, after, encoding, tuple(remarks))


Kind = Callable[[Path, str], tuple[str, list[tuple[str, str]]]]
"""Function of a file and its text, which returns the new text and the remarks with their places."""


def _kind(path: Path) -> Kind | None:
    if path.suffix in (".py", ".pyi"):
        return _python
    if path.suffix == ".ipynb":
        return _notebook
    if _REQUIREMENTS.fullmatch(path.name) or (path.parent.name == "requirements" and path.suffix in (".txt", ".in")):
        return _requirements
    return _shell if _SHELL.fullmatch(path.name) else None


def _python(path: Path, text: str) -> tuple[str, list[tuple[str, str]]]:
    tree = code.parse(text)
    if not any(package in text for package in code.PACKAGES):
        return text, []
    lines = Lines(text)
    found = code.Finder(lines, tree, homes())
    remarks = found.remarks | set(commands.requirements(lines) if path.name == "setup.py" else ())
    return apply(text, found.edits), [(str(one.line), one.text) for one in sorted(remarks)]


def _notebook(path: Path, text: str) -> tuple[str, list[tuple[str, str]]]:
    cells = notebooks.cells_of(text)
    whole, python, shell, starts, remarks = "", "", "", [], set()
    for cell in cells:
        end = "" if cell.text.endswith("\n") else "\n"
        starts.append(len(whole))
        whole += cell.text + end
        shell += notebooks.commands_in(cell.text) + end
        try:
            python += notebooks.as_python(cell.text) + end
        except ValueError as error:
            python += "".join("\n" for line in Lines(cell.text + end).split() if line)
            if any(package in cell.text for package in code.PACKAGES):
                remarks.add((cell.number, 1, f"the cell {error}: change it by hand"))
    lines = Lines(whole)
    found = code.Finder(lines, code.parse(python), homes())
    numbers = [lines.line_of(start) for start in starts]
    for one in {*found.remarks, *commands.shell(Lines(shell), TASKS)}:
        index = max(index for index, first in enumerate(numbers) if first <= one.line)
        remarks.add((cells[index].number, one.line - numbers[index] + 1, one.text))
    changed = []
    for cell, start in zip(cells, starts, strict=True):
        inside = [edit for edit in found.edits if start <= edit.start < start + len(cell.text)]
        if inside:
            shifted = [type(edit)(edit.start - start, edit.end - start, edit.text) for edit in inside]
            changed.append((cell, apply(cell.text, shifted)))
    places = [(f"cell {number}:{line}", remark) for number, line, remark in sorted(remarks)]
    return notebooks.edited(text, changed) if changed else text, places


def _requirements(path: Path, text: str) -> tuple[str, list[tuple[str, str]]]:
    return text, [(str(one.line), one.text) for one in sorted(commands.requirements(Lines(text)))]


def _shell(path: Path, text: str) -> tuple[str, list[tuple[str, str]]]:
    return text, [(str(one.line), one.text) for one in sorted(commands.shell(Lines(text), TASKS))]


def files(path: Path, errors: list[ConfigError]) -> Iterator[Path]:
    """Yield a file, or the files to look at in a folder and below it, each once.

    Hidden folders and virtual environments are left out, and links are not followed.

    Args:
        path: A file or a folder.
        errors: A list to which folders that cannot be read are added.

    Raises:
        ConfigError: If there is no such path, or the folder holds no Python.
    """
    if not path.is_dir():
        if not path.exists():
            raise ConfigError(f"{path}: there is no such file or folder: check the path")
        yield path
        return
    any_python = False

    def report(error: OSError) -> None:
        errors.append(ConfigError(f"{error.filename}: {error.strerror}: the folder is left out"))

    for folder, subfolders, names in os.walk(path, onerror=report):
        subfolders[:] = sorted(name for name in subfolders if not _is_skipped(Path(folder), name))
        for file in (Path(folder) / name for name in sorted(names)):
            kind = None if file.is_symlink() else _kind(file)
            if kind is not None:
                any_python = any_python or kind in (_python, _notebook)
                yield file
    if not any_python:
        raise ConfigError(f"{path}: the folder holds no .py and no .ipynb file: name another")


def _is_skipped(folder: Path, name: str) -> bool:
    environment = (folder / name / "pyvenv.cfg").exists() or (folder / name / "conda-meta").exists()
    return name.startswith(".") or name in _SKIPPED or environment


def write(change: Change) -> None:
    """Write a file's new text in the file's encoding, whole or not at all.

    Args:
        change: The change.

    Raises:
        ConfigError: If it cannot be written.
    """
    path = Path(os.path.realpath(change.path))  # a link stays one
    try:
        with replacing(path) as partial:
            partial.write_bytes(change.after.encode(change.encoding))
            shutil.copymode(path, partial)
    except OSError as error:
        raise ConfigError(f"{change.path}: could not be written: {error.strerror or error}") from error


def migrate(paths: Sequence[str | Path], *, write_files: bool = False) -> tuple[list[Change], list[ConfigError]]:
    """Find what changes in files and folders, and write it if asked to.

    Args:
        paths: Files and folders.
        write_files: Whether to write the changed files.

    Returns:
        What is to do, of the files in which there is anything; after writing, the remarks are those on the new text.
        And an error for each path that cannot be used.
    """
    changes, errors, seen = [], [], set()
    for path in map(Path, paths):
        try:
            for file in files(path, errors):
                if (real := os.path.realpath(file)) in seen:
                    continue
                seen.add(real)
                try:
                    change = examine(file)
                    if write_files and change.after != change.before:
                        write(change)
                        change = Change(file, change.before, change.after, change.encoding, examine(file).remarks)
                except ConfigError as error:
                    errors.append(error)
                    continue
                if change.after != change.before or change.remarks:
                    changes.append(change)
        except ConfigError as error:
            errors.append(error)
    return changes, errors


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None.

    Raises:
        SystemExit: With status 1 if there is something to do, 2 if a path cannot be used.
    """
    parser = command_line.Parser(prog="python -m flax_diffusion.migrate", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="FILE_OR_FOLDER", help="Files, and folders with all below them.")
    parser.add_argument("--write", action="store_true", help="Change the files.")
    words = sorted(sys.argv[1:] if argv is None else argv, key=lambda word: not word.startswith("-"))
    options = parser.parse(words)  # the switch comes first, as argparse wants all paths together
    changes, errors = migrate(options["paths"], write_files=options["write"])
    changed = [change for change in changes if change.after != change.before]
    if not options["write"]:
        try:
            sys.stdout.write("".join(change.diff for change in changed))
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, such as `head`, has seen enough; Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    remarks = [f"{change.path}:{place}: {text}\n" for change in changes for place, text in change.remarks]
    if remarks:
        sys.stderr.write(f"needs a look:\n{''.join(remarks)}")
    sys.stderr.write("".join(f"error: {error}\n" for error in errors))
    verb = "changed" if options["write"] else "to change"
    sys.stderr.write(f"files {verb}: {len(changed)}; places to look at: {len(remarks)}\n")
    if errors or (changes and not options["write"]):
        raise SystemExit(2 if errors else 1)


if __name__ == "__main__":
    command_line.main_guard(main)
