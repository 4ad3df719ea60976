"""Lines of requirements, shell files and notebooks: what they install, and which scripts of Diffusers they start."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from flax_diffusion.core.migration.edits import Lines, Remark

LIMITS = {"diffusers": (0, 40), "transformers": (5,)}
"""First releases without Flax, by package."""

_PACKAGE = re.compile(
    r"""(?<![\w./-])(diffusers|transformers)(?![\w./-])["']?\s*"""
    r"""(?:\[(?P<extras>[\w\s,-]*)\])?\s*"""
    r"""(?:=\s*(?P<table>\{[^}]*)|=\s*["'](?P<poetry>[^"']*)|\(?(?P<pip>(?:[=~<>!^]{1,3}\s*[\w.*]+[\s,]*)*))"""
)
_VERSION = re.compile(r"(===?|~=|<=?|\^|(?<![=<>~!^])=|^)\s*(\d+(?:\.\d+)*)")
_SCRIPT = re.compile(r"\b(?:train_)?(\w+?)_flax\.py\b")
_INSTALLS = re.compile(r"\b(?:pip3?|conda|mamba|poetry|pdm|uv)\b.*\b(?:install|add)\b")


def requirements(lines: Lines) -> Iterator[Remark]:
    """Yield remarks on the lines of a file of requirements.

    Args:
        lines: The file.
    """
    for number, line in enumerate(lines.split(), 1):
        if not line.lstrip().startswith("#"):
            yield from (Remark(number, text) for text in _installed(line))


def shell(lines: Lines, tasks: Collection[str]) -> Iterator[Remark]:
    """Yield remarks on commands of a shell that install packages or start the scripts of Diffusers.

    Args:
        lines: The commands.
        tasks: Tasks that `flax_diffusion.train` has.
    """
    continued = False
    for number, line in enumerate(lines.split(), 1):
        if line.lstrip().startswith("#"):
            continue
        installs = bool(_INSTALLS.search(line)) or continued
        continued = installs and line.rstrip().endswith("\\")
        if installs:
            yield from (Remark(number, text) for text in _installed(line))
        for found in _SCRIPT.finditer(line):
            if found[1] in tasks:
                yield Remark(number, f"{found[0]}: `python -m flax_diffusion.train {found[1]}` takes its flags")
            elif found[0].startswith("train_"):
                yield Remark(number, f"{found[0]}: flax_diffusion.train has no such task; it has {', '.join(tasks)}")


def _installed(line: str) -> Iterator[str]:
    """Yield what to say of the packages that a line names."""
    for found in _PACKAGE.finditer(line):
        package, limit = found[1], LIMITS[found[1]]
        in_table = re.search(r"""\bversion\s*=\s*["']([^"']*)""", found["table"] or "")
        versions = in_table[1] if in_table else found["poetry"] or found["pip"] or ""
        extras = found["extras"] or "".join(re.findall(r"\bextras\s*=\s*\[(.*?)\]", found["table"] or ""))
        if "flax" in re.findall(r"[\w-]+", extras):
            yield f"{package}[flax]: {package} has no such extra any more: install flax-diffusion"
        for operator, version in _VERSION.findall(versions):
            parts = tuple(map(int, version.split(".")))
            below = operator == "<" and parts[: len(limit)] == limit and not any(parts[len(limit) :])
            if parts < limit or below:
                newer = ".".join(map(str, limit))
                yield f"{package}{operator or '=='}{version}: flax-diffusion goes with {package} {newer} and newer"
                break
