"""The values that a run is judged by, one line of JSON for each step at which there are some."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import write_text

METRICS_FILE = "metrics.jsonl"
"""Name of the file in a run's folder."""


class MetricsFile:
    """The file, which has each step once, however often the run was interrupted.

    Args:
        path: Its path.
        first_step: Steps taken before this start of the run. What the file says of later ones is forgotten.
        writes: Whether this process writes it.

    Raises:
        ConfigError: If it holds something else.
    """

    def __init__(self, path: Path, first_step: int, *, writes: bool):
        self._path, self._writes = path, writes
        there = read_metrics(path) if first_step else []
        self._rows = [row for row in there if row["step"] <= first_step]
        if len(self._rows) < len(there):
            self._write()

    def has(self, step: int, names: Iterable[str]) -> bool:
        """Return whether values of a step are there."""
        return any(row["step"] == step and set(names) <= row.keys() for row in self._rows)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of a step, in place of those of the same name. One that is not finite becomes null.

        Args:
            step: The optimizer step.
            values: Values by name.
        """
        row = next((row for row in self._rows if row["step"] == step), None)
        if row is None:
            row = {"step": step}
            self._rows.append(row)
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._write()

    def _write(self) -> None:
        if self._writes:
            write_text(self._path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in self._rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's file, each with its step; none where there is no file.

    Args:
        path: Its path.

    Raises:
        ConfigError: If it holds something else.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} line {number}: is no JSON object with a step: correct it, or delete the file"
            ) from error
        rows.append(row)
    return rows
