"""Which files of a local dataset belong to the split that is trained on.

Copies of datasets of the Hub hold their splits side by side: in folders (`train/`, `val2017/`), or by the names of
Parquet files (`train-00000-of-00002.parquet`). Trained on together, they would be a result that no test set measures.

Reference: the words are those by which Hugging Face's `datasets` finds the splits of files.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from flax_diffusion.core.data.sources.source import first_few
from flax_diffusion.core.errors import DataError

log = logging.getLogger(__name__)

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_BESIDE = {"", "partial", "image", "images", "img", "imgs", "picture", "pictures", "data", "set", "dataset", "split"}
"""Words that may stand beside a split's in the name of a folder; among others it is a name like any."""


def of_split(root: Path, names: Sequence[str], split: str | None) -> list[str]:
    """Choose the files of one split, if splits are what the names tell apart.

    Args:
        root: The dataset's folder, for messages.
        names: Of pictures, or of Parquet files, relative to it.
        split: To choose, such as `train`; None for all, whatever their names are.

    Returns:
        All names, where there is one split or none; else those of the split.

    Raises:
        DataError: There are others and not this one, or files of splits lie beside files of none.
    """
    if split is None:
        return list(names)
    of = [_by_folder(name, split) or (_by_name(name) if name.lower().endswith(".parquet") else None) for name in names]
    if not any(of):
        # A picture of a train, or of a test: only where every picture's name tells a split, they are meant so.
        of = [_by_name(name) for name in names]
        if None in of or split not in of:
            return list(names)
    found = sorted({one for one in of if one is not None})
    if None in of:
        inside = next(name for name, one in zip(names, of, strict=True) if one is not None)
        outside = [name for name, one in zip(names, of, strict=True) if one is None]
        raise DataError(
            f"{root} holds files of the split {found[0]} ({inside}) beside files of none ({first_few(outside)}); give "
            "the folder to train on, move the others away, or rename what is no split"
        )
    if len(found) == 1:
        return list(names)
    if split not in found:
        raise DataError(f"{root} holds the splits {', '.join(found)} and no {split}; give the folder to train on")
    chosen = [name for name, one in zip(names, of, strict=True) if one == split]
    left = ", ".join(one for one in found if one != split)
    log.info("%s: %d of %d files are of the split %s; left out: %s", root, len(chosen), len(names), split, left)
    return chosen


def is_beside_splits(name: str, split: str | None) -> bool:
    """Whether a file lies in no split's folder."""
    return _by_folder(name, split) is None


def _by_folder(name: str, split: str | None) -> str | None:
    """The split that a folder in a path is of."""
    for folder in PurePosixPath(name).parts[:-1]:
        words = [word for word in _parts(folder) if word not in _BESIDE]
        if len(words) == 1 and (words[0] in _SPLIT_OF or folder == split):
            return _SPLIT_OF.get(words[0], folder)
    return None


def _by_name(name: str) -> str | None:
    return next((_SPLIT_OF[word] for word in _parts(PurePosixPath(name).name) if word in _SPLIT_OF), None)


def _parts(name: str) -> list[str]:
    return re.split("[-._ 0-9]+", name.casefold())
