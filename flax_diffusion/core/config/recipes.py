"""The recipes that are installed with the package, which `--config` takes by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from flax_diffusion.core.errors import ConfigError, nearest
from flax_diffusion.core.io.files import as_path

_FOLDER = "recipes"


def recipes() -> dict[str, Path]:
    """Return the files of the installed recipes by name."""
    folder = Path(str(resources.files("flax_diffusion") / _FOLDER))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def recipe_file(given: str | Path) -> Any:
    """Return the file that `--config` names: a path, here or in an object store, or the name of a recipe.

    Args:
        given: The path or the name.

    Raises:
        ConfigError: If there is neither.
    """
    path, known = as_path(given), recipes()
    if path.exists():
        return path
    name = str(given)
    if name in known:
        return known[name]
    stem = name.rpartition("/")[2].removesuffix(".yaml")
    if stem in known:
        raise ConfigError(f"--config {name}: No such file; the installed recipe of that name is --config {stem}")
    if stem != name:
        raise ConfigError(f"--config {name}: No such file or directory")
    raise ConfigError(
        f"--config {name}: No such file, and no recipe of that name{nearest(name, known)}; the recipes are "
        f"{', '.join(known)}"
    )
