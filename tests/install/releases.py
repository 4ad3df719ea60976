"""Keeps `constraints.txt`, the versions that the gate was green with.

`python tests/install/releases.py COMMAND`, in an environment with `.[test]` installed:

    compare    name the versions that constraints.txt lacks or has otherwise
    check      the same, with exit status 1 if there are any
    newer      name the releases that are newer than those of the environment
    write      write constraints.txt by the environment
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = "flax-diffusion"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
HEAD = """\
# The versions that .ci/run was green with, on Python 3.11 and Linux: pip install -c constraints.txt .
# Written by tests/install/releases.py; CONTRIBUTING.md says when.
"""
CUDA = ("cuda-", "nvidia-", "triton")
"""First letters of what PyTorch's builds for CUDA bring, in versions that PyTorch itself asks for."""


def needed(root: str = f"{PROJECT}[test]") -> dict[str, list[Requirement]]:
    """Names all that a distribution needs in this environment, with what is asked of each.

    Args:
        root: Requirement to start from, whose own name is left out.

    Returns:
        Canonical name of each distribution to the requirements that name it.

    Raises:
        PackageNotFoundError: If one of them is not installed.
    """
    first = Requirement(root)
    found: dict[str, list[Requirement]] = {}
    visited, waiting = set(), [first]
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        found.setdefault(name, []).append(asked)
        for extra in ("", *asked.extras):
            if (name, extra) in visited:
                continue
            visited.add((name, extra))
            for line in metadata.requires(name) or ():
                requirement = Requirement(line)
                wanted = requirement.marker.evaluate({"extra": extra}) if requirement.marker else not extra
                if wanted and not canonicalize_name(requirement.name).startswith(CUDA):
                    waiting.append(requirement)
    del found[canonicalize_name(first.name)]
    return dict(sorted(found.items()))


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of distributions, without the name of the build (`2.13.0` of `2.13.0+cpu`)."""
    return {name: Version(metadata.version(name)).public for name in names}


def read(text: str) -> dict[str, str]:
    """The versions of a constraints file by canonical name.

    Raises:
        ValueError: For a row that does not give one version.
    """
    versions = {}
    for line in text.splitlines():
        row = line.partition("#")[0].strip()
        if row:
            name, equal, version = row.partition("==")
            if not equal:
                raise ValueError(f"constraints.txt: {row} does not give one version: write NAME==VERSION")
            versions[canonicalize_name(name)] = version
    return versions


def differences(here: Mapping[str, str], tested: Mapping[str, str]) -> list[str]:
    """A line for each distribution that `constraints.txt` lacks, or names in another version.

    Args:
        here: Versions of an environment.
        tested: Versions of the file.
    """
    return [
        f"{name}=={version} (there: {tested.get(name, 'none')})"
        for name, version in here.items()
        if tested.get(name) != version
    ]


def newer(outdated: Iterable[Mapping[str, str]], asked: Mapping[str, Sequence[Requirement]]) -> list[str]:
    """A line for each release that is newer than the installed one, and that nothing installed forbids.

    Args:
        outdated: What `pip list --outdated --format json` says.
        asked: What is needed, as `needed` says.
    """
    lines = []
    for row in outdated:
        requirements = asked.get(canonicalize_name(row["name"]), ())
        if requirements and all(requirement.specifier.contains(row["latest_version"]) for requirement in requirements):
            lines.append(f"{row['name']} {row['latest_version']} (tested: {Version(row['version']).public})")
    return lines


def say_newer(asked: Mapping[str, Sequence[Requirement]]) -> None:
    """Prints which newer releases are out, or why pip cannot tell."""
    # Where no index answers, pip's list is empty and its status 0; so one release is asked for first.
    for words in ("index versions jax", "list --outdated --format json"):
        ran = subprocess.run([sys.executable, "-m", "pip", *words.split()], capture_output=True, text=True)
        if ran.returncode != 0:
            last_line = ran.stderr.strip().rpartition("\n")[2]
            print(f"no word on newer releases; pip {words} says: {last_line}")
            return
    say("newer than in constraints.txt", newer(json.loads(ran.stdout), asked))


def say(title: str, lines: Sequence[str]) -> None:
    """Prints lines under a title."""
    print("\n    ".join([f"{title}:", *(lines or ["nothing"])]))


def main(words: Sequence[str]) -> int:
    """Runs one of the commands; returns the exit status."""
    asked = needed()
    match list(words):
        case [("compare" | "check") as command]:
            lines = differences(installed(asked), read(CONSTRAINTS.read_text()))
            say("other than in constraints.txt", lines)
            return 1 if lines and command == "check" else 0
        case ["newer"]:
            say_newer(asked)
        case ["write"]:
            rows = [f"{name}=={version}\n" for name, version in installed(asked).items()]
            CONSTRAINTS.write_text(HEAD + "".join(rows))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
