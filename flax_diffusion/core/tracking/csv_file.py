"""The values of each step as a CSV file, for spreadsheets and pandas."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import copy_file, is_local, replacing, temporary_folder

FILE = "steps.csv"
"""Name of the file in the folder of the boards."""
_PREFIX = "train/"


class CsvFile:
    """A row for each step, with the names of the first one as columns. Pictures are not in it.

    Args:
        folder: Folder of the file.
        first_step: First step that is written. Rows of an earlier start of the run from it on are dropped.

    Raises:
        ConfigError: If there is another file of that name.
    """

    def __init__(self, folder: Path, first_step: int):
        self._target = folder / FILE
        self._local = self._target if is_local(folder) else temporary_folder() / FILE
        folder.mkdir(parents=True, exist_ok=True)
        rows = _read(self._target) if first_step > 1 and self._target.exists() else []
        self._columns = rows[0] if rows else []
        # The last row is cut off where an earlier start was killed while it wrote.
        kept = [row for row in rows[1:] if len(row) == len(self._columns) and int(row[0]) < first_step]
        with replacing(self._local) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self._columns, *kept] if rows else [])
        self._file = self._local.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self.flush()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a row with the values of training; other values are in metrics.jsonl.

        Args:
            values: Value by name.
            step: The optimizer step.
        """
        row = {name.removeprefix(_PREFIX): value for name, value in values.items() if name.startswith(_PREFIX)}
        if not row:
            return
        if not self._columns:
            self._columns = ["step", *row]
            self._writer.writerow(self._columns)
        self._writer.writerow([step, *(row.get(name, "") for name in self._columns[1:])])

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Leave a picture out."""

    def flush(self) -> None:
        """Write everything added so far to disk."""
        self._file.flush()
        if self._local != self._target:  # objects in a store cannot grow
            copy_file(self._local, self._target)

    def close(self) -> None:
        """Write what is left to disk, and close the file."""
        self.flush()
        self._file.close()


def _read(path: Path) -> list[list[str]]:
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    if rows and (rows[0][0] != "step" or not all(row and row[0].isdecimal() for row in rows[1:])):
        raise ConfigError(f"{path}: is no table of steps of a run: move it, or name another --logging_dir")
    return rows
