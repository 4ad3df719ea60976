"""Dataset cards: the files of a configuration and a split, as the README.md of a dataset lists them.

Reference: the field `configs` of a dataset card on the Hugging Face Hub.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fsspec.utils import glob_translate

from flax_diffusion.core.data.sources.splits import of_split
from flax_diffusion.core.errors import DataError, nearest
from flax_diffusion.core.io.untrusted import parse_yaml, read_text

CARD = "README.md"
_HEADER = re.compile(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", re.DOTALL)


def files_of(root: Path, files: Sequence[str], config: str | None, split: str) -> list[str] | None:
    """Choose the files of a local dataset by its card.

    Args:
        root: The dataset's folder.
        files: All files in it, relative to it.
        config: Name of the configuration; None for the default one.
        split: Name of the split, such as `train`.

    Returns:
        The names of the files, in order; None if the card names no files or there is no card.

    Raises:
        DataError: If the card cannot be read, has no such configuration or split, or names files that do not exist.
    """
    configs = _configs(root) if CARD in files else {}
    if not configs:
        if config is None:
            return None
        raise DataError(
            f"--dataset_config_name {config}: {root} has no {CARD} that lists configurations; "
            f"give {root}/{config} if that is its folder, or leave the option out"
        )
    chosen = _chosen(root, configs, config)
    where = f"{root / CARD}, config_name {chosen['config_name']}"
    data_dir, data_files = chosen.get("data_dir"), chosen.get("data_files")
    if data_files is None:
        inside = [name for name in files if name.startswith(f"{data_dir}/")] if data_dir else files
        return of_split(root, [name for name in inside if name != CARD], split)
    patterns = _patterns(data_files, where)
    if split not in patterns:
        raise DataError(f"{where} has no split {split}; it has {', '.join(patterns)}")
    prefix = f"{data_dir}/" if data_dir else ""
    return _matching(files, [prefix + pattern for pattern in patterns[split]], where)


def _configs(root: Path) -> dict[str, dict[str, Any]]:
    """Return the configurations in the card by name."""
    where = root / CARD
    try:
        header = _HEADER.match(read_text(where))
        values = parse_yaml(header[1]) if header and "configs:" in header[1] else None
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: its header cannot be read ({error}); repair it or remove the file") from error
    listed = values.get("configs") if isinstance(values, dict) else None
    if listed is None:
        return {}
    if not isinstance(listed, list) or not all(isinstance(one, dict) and "config_name" in one for one in listed):
        raise DataError(f"{where}: `configs` must be a list of mappings, each with a config_name; repair it")
    return {str(one["config_name"]): one for one in listed}


def _chosen(root: Path, configs: dict[str, dict[str, Any]], config: str | None) -> dict[str, Any]:
    names = ", ".join(configs)
    if config is not None:
        if config not in configs:
            raise DataError(
                f"--dataset_config_name {config}: {root / CARD} has the configurations {names}"
                f"{nearest(config, configs)}"
            )
        return configs[config]
    defaults = [name for name, one in configs.items() if name == "default" or one.get("default") is True]
    candidates = defaults or list(configs)
    if len(candidates) > 1:
        raise DataError(f"{root / CARD} has the configurations {names}; choose one with --dataset_config_name")
    return configs[candidates[0]]


def _patterns(data_files: Any, where: str) -> dict[str, list[str]]:
    """Return the glob patterns by split."""
    listed = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, list[str]] = {}
    for one in listed:
        split, paths = (str(one.get("split", "train")), one.get("path")) if isinstance(one, dict) else ("train", one)
        for path in paths if isinstance(paths, list) else [paths]:
            if not isinstance(path, str):
                raise DataError(
                    f"{where}: data_files must be paths, or a list of mappings with split and path; repair it"
                )
            patterns.setdefault(split, []).append(path)
    return patterns


def _matching(files: Iterable[str], patterns: Sequence[str], where: str) -> list[str]:
    try:
        matches = [re.compile(glob_translate(pattern.removeprefix("./"))).match for pattern in patterns]
    except ValueError as error:
        raise DataError(
            f"{where} names {', '.join(patterns)}, which is not a valid glob pattern ({error}); repair it"
        ) from error
    found = [name for name in files if any(match(name) for match in matches)]
    if not found:
        raise DataError(f"{where} names {', '.join(patterns)}, but no file in the folder matches; restore the files")
    return found
