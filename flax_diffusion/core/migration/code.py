"""Python code: where it takes Flax classes from Diffusers or Transformers, and how it takes them from here."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flax_diffusion.core.migration import advice
from flax_diffusion.core.migration.edits import Edit, Lines, Remark
from flax_diffusion.core.migration.statements import FromImport, joined, span

PACKAGES = ("diffusers", "transformers")
OURS = "flax_diffusion"


def parse(text: str) -> ast.Module:
    """Parse Python code.

    Args:
        text: The code.

    Raises:
        ValueError: If it is no Python; the message is one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes, which are not our business
            return ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"does not parse as Python 3, line {error.lineno}: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"does not parse as Python 3: {error}") from error


def is_flax(path: str) -> bool:
    """Return whether a dotted name of Diffusers or Transformers is part of their Flax code."""
    return "flax" in path.lower()


@dataclass
class _Module:
    """A name that is bound to a module of Diffusers or Transformers.

    Attributes:
        path: Dotted name of the module.
        statements: The statements that bind it, each with the position of the name in it.
        homes: Our modules that its moved uses need.
        moved: Spans of the uses that move, and what each becomes.
        uses: Number of all uses of the name.
        lacking: Whether a use needs what is not here.
    """

    path: str
    statements: list[tuple[ast.Import | ast.ImportFrom, int]] = field(default_factory=list)
    homes: set[str] = field(default_factory=set)
    moved: list[tuple[int, int, str, str]] = field(default_factory=list)
    uses: int = 0
    lacking: bool = False

    @property
    def all_move(self) -> bool:
        """Whether nothing in the code needs the old module."""
        return bool(self.moved) and len(self.moved) == self.uses


class Finder:
    """What is to change in one piece of Python code, and what needs a look.

    Attributes:
        edits: The edits.
        remarks: The remarks.

    Args:
        lines: The code as it is in the file.
        tree: The code, parsed; lines may differ from `lines` where they are no Python.
        homes: Our module for each name that flax_diffusion has.
    """

    def __init__(self, lines: Lines, tree: ast.Module, homes: Mapping[str, str]):
        self.lines, self.homes = lines, homes
        self.edits: list[Edit] = []
        self.remarks: set[Remark] = set()
        self.nodes = [*ast.walk(tree)]
        self.modules: dict[str, _Module] = {}
        self.has_ours = any(
            alias.name == OURS and alias.asname is None
            for node in tree.body if isinstance(node, ast.Import) for alias in node.names
        )  # fmt: skip
        self._find_modules()
        self._find_uses()
        for node in self.nodes:
            if isinstance(node, ast.ImportFrom) and _package(node):
                self._from_import(node)
            elif isinstance(node, ast.Import):
                self._import(node)
            elif isinstance(node, ast.Call):
                self._call(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self._text(node, node.value)

    def _remark(self, node: ast.stmt | ast.expr | ast.alias, text: str) -> None:
        self.remarks.add(Remark(node.lineno, text))

    def _find_modules(self) -> None:
        """Find the names that are bound to modules of Diffusers and Transformers."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for position, alias in enumerate(node.names):
                    root = alias.name.split(".")[0]
                    if root in PACKAGES:
                        self._bind(alias.asname or root, alias.name if alias.asname else root, node, position)
            elif isinstance(node, ast.ImportFrom) and _package(node):
                for position, alias in enumerate(node.names):
                    if alias.name.islower() and alias.name not in self.homes:  # modules have lower-case names
                        self._bind(alias.asname or alias.name, f"{node.module}.{alias.name}", node, position)

    def _bind(self, name: str, path: str, node: ast.Import | ast.ImportFrom, position: int) -> None:
        self.modules.setdefault(name, _Module(path)).statements.append((node, position))

    def _find_uses(self) -> None:
        """Find the uses of those names, and which of them move."""
        for node in self.nodes:
            if isinstance(node, ast.Name) and node.id in self.modules:
                self.modules[node.id].uses += 1
            if not isinstance(node, ast.Attribute) or (parts := _dotted(node)) is None or parts[0] not in self.modules:
                continue
            module = self.modules[parts[0]]
            path = module.path
            for part in parts[1:-1]:
                path = f"{path}.{part}" if part.islower() and not _is_module(path.rpartition(".")[2]) else ""
            if not path.startswith(PACKAGES) or not self._candidate(path, node.attr):
                continue
            if node.attr in self.homes:
                home = self.homes[node.attr]
                start, end = span(node, self.lines)
                if "".join(self.lines.text[start:end].split()) == ".".join(parts):
                    module.homes.add(home)
                    module.moved.append((start, end, home, node.attr))
                else:  # before Python 3.12, the parser does not say where in a formatted text a name stands
                    module.lacking = True
                    self._remark(node, f"write {home}.{node.attr} for {'.'.join(parts)}, and import {home}")
            elif not _is_module(node.attr):
                module.lacking = True
                self._remark(node, advice.lacking(path, node.attr))
        for name, module in self.modules.items():
            keeps_alias = self._keeps_alias(name, module)
            for start, end, home, attribute in module.moved:
                self.edits.append(Edit(start, end, f"{name if keeps_alias else home}.{attribute}"))

    def _candidate(self, path: str, name: str) -> bool:
        """Return whether a name of a module of theirs is part of their Flax code."""
        return is_flax(f"{path}.{name}") or (name in self.homes and name.startswith("Flax"))

    def _keeps_alias(self, name: str, module: _Module) -> bool:
        """Return whether `import diffusers as d` becomes `import flax_diffusion as d`."""
        return module.all_move and module.homes == {OURS} and all(
            isinstance(node, ast.Import) and node.names[position].asname == name for node, position in module.statements
        )  # fmt: skip

    def _new_imports(self, modules: list[_Module], *, once: bool) -> list[str]:
        """Return the statements that import our modules for the moved uses.

        Args:
            modules: The names that the uses began with.
            once: Whether to leave out what the code imports already.
        """
        homes = {home for module in modules for home in module.homes}
        nested = sorted(homes - {OURS})  # these bind the package, too
        if nested:
            return [f"import {home}" for home in nested]
        return [f"import {OURS}"] if homes and not (once and self.has_ours) else []

    def _bound(self, node: ast.Import | ast.ImportFrom) -> dict[int, tuple[str, _Module]]:
        """Return the names that a statement binds to modules, by position."""
        return {
            position: (name, module) for name, module in self.modules.items()
            for statement, position in module.statements if statement is node
        }  # fmt: skip

    def _import(self, node: ast.Import) -> None:
        bound = self._bound(node)
        kept, new, changed = [], [], False
        for position, alias in enumerate(node.names):
            text = self.lines.text[slice(*span(alias, self.lines))]
            if position in bound:
                name, module = bound[position]
                if is_flax(alias.name) and (module.lacking or not module.moved):
                    self._remark(alias, advice.module_is_gone(*alias.name.rpartition(".")[::2]))
                elif self._keeps_alias(name, module):
                    text, changed = f"{OURS} as {name}", True
                elif module.moved:
                    new.append(module)
                    if module.all_move:
                        text = ""
                    elif is_flax(alias.name):  # the other uses need no more than the package
                        text = alias.name.split(".")[0]
            kept.append(text)
        kept = [text for text in kept if text]
        if changed or new:
            theirs = [f"import {', '.join(kept)}"] if kept else []
            statements = theirs + self._new_imports(new, once=bool(kept))
            self.edits.append(joined(statements, *span(node, self.lines), self.lines))

    def _from_import(self, node: ast.ImportFrom) -> None:
        bound = self._bound(node)
        module = str(node.module)
        keep, new, moved = [], [], {}
        for position, alias in enumerate(node.names):
            keeps = True
            if alias.name == "*":
                self._star(node)
            elif position in bound and bound[position][1].moved:
                new.append(bound[position][1])
                keeps = not bound[position][1].all_move
                if keeps and _is_module(alias.name):
                    self._remark(alias, advice.module_is_gone(module, alias.name))
            elif self._candidate(module, alias.name) and alias.name in self.homes:
                moved.setdefault(self.homes[alias.name], []).append(position)
                keeps = False
            elif self._candidate(module, alias.name):
                say = advice.module_is_gone if _is_module(alias.name) else advice.lacking
                self._remark(alias, say(module, alias.name))
            if keeps:
                keep.append(position)
        if not new and not moved:
            return
        statement = FromImport(node, self.lines)
        if not keep and not new and len(moved) == 1 and (edit := statement.renamed(next(iter(moved)))):
            self.edits.append(edit)
            return
        ours = [
            statement.written(home, [statement.names[position] for position in positions], stays=not keep)
            for home, positions in sorted(moved.items())
        ]
        kept = [statement.names[position] for position in keep]
        theirs = [statement.written(module, kept, stays=True)] if kept else []
        both = theirs + ours if module < OURS else ours + theirs  # in the order that isort gives
        statements = self._new_imports(new, once=bool(both)) + both
        self.edits.append(joined(statements, statement.start, statement.end, self.lines))

    def _star(self, node: ast.ImportFrom) -> None:
        """Remark on `import *`, which brought Flax classes that the code uses."""
        imports = [one for one in self.nodes if isinstance(one, ast.ImportFrom)]
        named = {alias.asname or alias.name for one in imports for alias in one.names}
        names = {one.id for one in self.nodes if isinstance(one, ast.Name)} - named
        used = sorted(name for name in names if name.startswith("Flax") and name in self.homes)
        if used:
            self._remark(node, f"import * brings no Flax class: add `from {OURS} import {', '.join(used)}`")
        elif is_flax(str(node.module)):
            self._remark(node, advice.module_is_gone(*str(node.module).rpartition(".")[::2]))

    def _call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "from_pretrained":
            owner = _dotted(function.value) or [""]
            for keyword in node.keywords:
                text = advice.keyword(owner[-1], str(keyword.arg), keyword.value)
                if text:
                    self._remark(keyword.value, text)
        if isinstance(function, ast.Name) and function.id == "getattr" and len(node.args) > 1:
            owner, name = _dotted(node.args[0]), node.args[1]
            text = name.value if isinstance(name, ast.Constant) else None
            if owner and owner[0] in self.modules and isinstance(text, str) and is_flax(text):
                self._remark(node, f"getattr finds no {text} there: take it from {OURS}")

    def _text(self, node: ast.Constant, text: str) -> None:
        found = re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", text)
        if found and is_flax(text):
            name = text.rpartition(".")[2]
            instead = f"write {self.homes[name]}.{name}" if name in self.homes else "it is not there any more"
            self._remark(node, f"the text {text!r} names Flax code: {instead}")


def _package(node: ast.ImportFrom) -> bool:
    return node.level == 0 and str(node.module).split(".")[0] in PACKAGES


def _is_module(name: str) -> bool:
    """Return whether a name is that of a module, such as `vae_flax`, as far as names tell."""
    return name.islower() and (name.endswith("_flax") or "_flax_" in name) and not name.startswith(("is_", "load_"))


def _dotted(node: ast.expr) -> list[str] | None:
    """Return the parts of a dotted name, or None for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None


def names_in(tree: ast.Module) -> Iterator[Any]:
    """Yield the names that are written out in a module's `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            yield from (item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant))
