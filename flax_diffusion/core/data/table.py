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


def write_tables(
    folder: Path, end: str, count: int, batches: Iterable[tuple[list[str], Mapping[str, np.ndarray]]]
) -> dict[str, Table]:
    """Write tables whose rows have the same names, batch by batch.

    Args:
        folder: Folder of the files `<table>-<end>.npy`, which is made.
        end: End of the files' names.
        count: Largest number of rows.
        batches: Names of rows, and by table the rows (N, …); all rows of a table have one shape and dtype.

    Returns:
        The tables; none where there are no batches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, int] = {}
    files: dict[str, np.memmap] = {}
    for names, tables in batches:
        for table, rows in tables.items():
            if table not in files:
                files[table] = np.lib.format.open_memmap(
                    _file(folder, table, end), mode="w+", dtype=rows.dtype, shape=(count, *rows.shape[1:])
                )
            files[table][len(places) : len(places) + len(names)] = rows
        places |= {name: len(places) + place for place, name in enumerate(names)}
    for file in files.values():
        file.flush()
    return {table: Table(_file(folder, table, end), places) for table in files}


def _file(folder: Path, table: str, end: str) -> Path:
    return folder / f"{table}-{end}.npy"
