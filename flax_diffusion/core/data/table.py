"""Tables of arrays of one shape by name, in a file: written once before training, read by every worker."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Table(Mapping[str, np.ndarray]):
    """Rows of an .npy file by name. Picklable: each process maps the file into its memory on its first read."""

    path: Path
    places: Mapping[str, int]

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array(self._rows[self.places[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "places": self.places}


def write_table(path: Path, count: int, batches: Iterable[tuple[list[str], np.ndarray]]) -> Table:
    """Write a table, batch by batch.

    Args:
        path: Path of the .npy file; its folder is made.
        count: Largest number of rows.
        batches: Names and their rows (N, …); all rows have one shape and dtype.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    places: dict[str, int] = {}
    file: np.ndarray | None = None
    for names, rows in batches:
        if file is None:
            file = np.lib.format.open_memmap(path, mode="w+", dtype=rows.dtype, shape=(count, *rows.shape[1:]))
        file[len(places) : len(places) + len(names)] = rows
        places |= {name: len(places) + place for place, name in enumerate(names)}
    if isinstance(file, np.memmap):
        file.flush()
    return Table(path, places)
