"""Choice of the files of a local dataset that belong to one split, such as `train`.

Copies of Hub datasets hold their splits side by side: in folders (`train/`, `val2017/`), or by the names of Parquet
files (`train-00000-of-00002.parquet`). If a model were trained on all of them, no test set could measure it.

Reference: the words are those with which Hugging Face's `datasets` finds the splits of files.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from flax_diffusion.core.data.sources.source import first_few
from flax_diffusion.core.errors import DataError

log = logging.getLogger(__name__)

SHARDS = (".parquet", ".tar")
"""Extensions of files of many examples, whose names alone may tell splits apart."""
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_IGNORED_WORDS = {
    "",
    "partial",
    "image",
    "images",
    "img",
    "imgs",
    "picture",
    "pictures",
    "data",
    "set",
    "dataset",
    "split",
}
"""Words that may stand next to a split's name in the name of a folder; with any other word it names no split."""


def of_split(root: Path, names: Sequence[str], split: str | None) -> list[str]:
    """Choose the files of one split, if the names tell splits apart.

    Args:
        root: The dataset's folder, for messages.
        names: Names of pictures, Parquet files or tar shards, relative to it.
        split: Split to choose, such as `train`; None for all files, whatever their names are.

    Returns:
        All names if there is at most one split; otherwise those of `split`.

    Raises:
        DataError: If there are splits but not this one, or only some of the files belong to a split.
    """
    if split is None:
        return list(names)
    of = [_by_folder(name, split) or (_by_name(name) if name.lower().endswith(SHARDS) else None) for name in names]
    if not any(of):
        # A picture may show a train or a test: names mean splits only if every picture's name has one.
        of = [_by_name(name) for name in names]
        if None in of or split not in of:
            return list(names)
    found = sorted({one for one in of if one is not None})
    if None in of:
        inside = next(name for name, one in zip(names, of, strict=True) if one is not None)
        outside = [name for name, one in zip(names, of, strict=True) if one is None]
        raise DataError(
            f"{root} holds files of the split {found[0]} ({inside}) beside files of no split ({first_few(outside)}); "
            "give the folder to train on, move the others away, or rename what is not a split"
        )
    if len(found) == 1:
        return list(names)
    if split not in found:
        raise DataError(f"{root} holds the splits {', '.join(found)} and no {split}; give the folder to train on")
    chosen = [name for name, one in zip(names, of, strict=True) if one == split]
    left = ", ".join(one for one in found if one != split)
    log.info("%s: %d of %d files are of the split %s; left out: %s", root, len(chosen), len(names), split, left)
    return chosen


def is_split(folder: str) -> bool:
    """Return whether the name of a folder is that of a split, such as `train`."""
    return _by_folder(f"{folder}/_", None) is not None


def is_beside_splits(name: str, split: str | None) -> bool:
    """Return whether a file lies in no split's folder.

    Args:
        name: Path of the file, relative to the dataset's folder.
        split: Split that is trained on, whose name may be any word.
    """
    return _by_folder(name, split) is None


def _by_folder(name: str, split: str | None) -> str | None:
    """Return the split that a folder in a path names, or None."""
    for folder in PurePosixPath(name).parts[:-1]:
        words = [word for word in _parts(folder) if word not in _IGNORED_WORDS]
        if len(words) == 1 and (words[0] in _SPLIT_OF or folder == split):
            return _SPLIT_OF.get(words[0], folder)
    return None


def _by_name(name: str) -> str | None:
    return next((_SPLIT_OF[word] for word in _parts(PurePosixPath(name).name) if word in _SPLIT_OF), None)


def _parts(name: str) -> list[str]:
    return re.split("[-._ 0-9]+", name.casefold())
