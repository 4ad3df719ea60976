"""A run as it is on disk: its curves, values, samples, options, and what a page needs beside."""

from __future__ import annotations

import csv
import json
import logging
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from flax_diffusion.core.config.options import CONFIG_FILE
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import absolute, names_in
from flax_diffusion.core.io.metrics_file import METRICS_FILE, read_metrics
from flax_diffusion.core.io.untrusted import MAX_YAML_BYTES, parse_yaml, read_text
from flax_diffusion.core.report.curves import Curve
from flax_diffusion.core.report.files import DATA
from flax_diffusion.core.report.pictures import BUDGET, Grid, Grids
from flax_diffusion.core.tracking.csv_file import FILE as STEPS
from flax_diffusion.core.tracking.tensorboard import EVENT_FILES

log = logging.getLogger(__name__)

SAMPLES = "samples"
"""Folder of the grids, in that of the run."""

_FORMAT = 1  # of the data file
_HEAD, _FOOT = 12, 4  # bytes around a record: its length and a checksum of that, and a checksum of the record


@dataclass
class Kept:
    """What the data file of a page holds.

    Attributes:
        facts: What `facts_of` returns, and how far the run is.
        curves: Curves by name.
        seen: What the model saw in its first step, a `Seen` each.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)

    def as_json(self) -> str:
        """Return the content of the file."""
        curves = {name: curve.as_json() for name, curve in self.curves.items()}
        return json.dumps({"format": _FORMAT, "facts": self.facts, "curves": curves, "seen": self.seen}) + "\n"


@dataclass
class Run:
    """A run, for a page.

    Attributes:
        name: Its name on the page.
        kept: What the data file holds, or what there is in its place.
        options: Values by option; None where there is no config.yaml.
        grids: Grids of samples, in ascending order of their steps.
        grid_count: Number of grids that there are in all.
    """

    name: str
    kept: Kept
    options: dict[str, Any] | None
    grids: list[Grid]
    grid_count: int


def read_kept(file: Path) -> Kept | None:
    """Return what a data file holds; None where there is none, or it is damaged, which is logged."""
    if not file.exists():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']}, and this version reads {_FORMAT}")
        curves = {str(name): Curve.from_json(curve) for name, curve in data["curves"].items()}
        return Kept(dict(data["facts"]), curves, list(data["seen"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: the curves in it cannot be read (%s: %s)", file, type(error).__name__, error)
        return None


def read_run(folder: Path, name: str, budget: int = BUDGET) -> Run:
    """Read a run of this or of an older version, also one that is under way.

    Args:
        folder: Its folder.
        name: Its name on the page.
        budget: Bytes for its grids.

    Raises:
        ConfigError: If the folder holds no run, or a file is none of a run's.
    """
    options = _read_options(folder / CONFIG_FILE)
    boards = folder / str((options or {}).get("logging_dir", "logs"))
    kept = read_kept(boards / DATA) or Kept(curves=_read_boards(boards))
    kept.curves |= judged(folder)
    grids = Grids(folder / SAMPLES, budget)
    shown = grids.all()
    if options is None and not kept.curves and not shown:
        raise ConfigError(
            f"{folder}: holds no run: there is neither {CONFIG_FILE} nor {METRICS_FILE}, and neither "
            f"{boards.name}/ nor {SAMPLES}/ holds anything of one: name the output folder of a run"
        )
    kept.facts = {"task": (options or {}).get("task", "")} | kept.facts
    return Run(name, kept, None if options is None else without_task(options), shown, grids.count)


def without_task(options: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config.yaml without the name of the task."""
    return {name: value for name, value in options.items() if name != "task"}


def _read_options(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        values = parse_yaml(read_text(file, MAX_YAML_BYTES))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}): mend it, or move it away") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: is no mapping of option: value: mend it, or move it away")
    return {str(name): value for name, value in values.items()}


def judged(folder: Path) -> dict[str, Curve]:
    """Return the values that a run was judged by, as curves by name.

    Args:
        folder: Folder of the run.

    Raises:
        ConfigError: If its file holds something else.
    """
    curves: dict[str, Curve] = {}
    for row in sorted(read_metrics(folder / METRICS_FILE), key=lambda row: int(row["step"])):
        for name, value in row.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                curves.setdefault(name, Curve()).add(int(row["step"]), float("nan") if value is None else value)
    return curves


def _read_boards(folder: Path) -> dict[str, Curve]:
    """Return the curves that the boards of a run kept: those of the table of steps, else of TensorBoard's files."""
    names = names_in(folder)
    if STEPS in names:
        with (folder / STEPS).open(encoding="utf-8", newline="") as file:
            return _read_table(csv.reader(file), folder / STEPS)
    return _read_events([folder / name for name in names if fnmatch(name, EVENT_FILES)])


def _read_events(files: list[Path]) -> dict[str, Curve]:
    """Return the curves of event files by name.

    What a start of the run wrote from the step on at which a later one began is left out, as TensorBoard does.

    Args:
        files: The files, in the order in which they were begun.
    """
    from tensorboard.compat.proto import event_pb2

    start: int = event_pb2.SessionLog.START  # pyright: ignore[reportAttributeAccessIssue]  (made at run time)
    curves: dict[str, Curve] = {}
    for file in files:
        for event in _events(file):
            if event.HasField("session_log") and event.session_log.status == start:
                curves = {name: curve.before(event.step) for name, curve in curves.items()}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    curve = curves.setdefault(value.tag, Curve())
                    if event.step > curve.last_step:
                        curve.add(event.step, value.simple_value)
    return curves


def _events(file: Path) -> Iterator[Any]:
    """Yield the events of a file up to its end, or up to where it is damaged or cut off."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto import event_pb2

    with file.open("rb") as stream:
        while len(head := stream.read(_HEAD)) == _HEAD:
            (length,) = struct.unpack("<Q", head[:8])
            record = stream.read(length) if length < 2**31 else b""
            try:
                if len(record) < length:
                    raise DecodeError("it is cut off")
                yield event_pb2.Event.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
            except DecodeError as error:
                log.warning("%s: the end is left out (%s)", file, error)
                return
            stream.read(_FOOT)


def _read_table(rows: Iterable[list[str]], file: Path) -> dict[str, Curve]:
    head, *rest = [*rows] or [[]]
    if head[:1] != ["step"]:
        if head:
            log.warning("%s is left out: it is no table of steps", file)
        return {}
    curves = {name: Curve() for name in head[1:]}
    for number, row in enumerate(rest, 2):
        if len(row) < len(head) and number > len(rest):  # cut off where the run was killed
            break
        try:
            for name, word in zip(head[1:], row[1:], strict=True):
                if word:
                    curves[name].add(int(row[0]), float(word))
        except ValueError as error:
            raise ConfigError(f"{file} line {number}: is no row of numbers ({error}): mend it, or move it") from error
    return {f"train/{name}": curve for name, curve in curves.items() if curve.last_step}


def distinct_names(folders: list[Path]) -> list[str]:
    """Return a short name for each of several different folders: the end of its path that no other one has."""
    parts = [[part for part in os.fspath(absolute(folder)).split("/") if part] for folder in folders]
    names = []
    for own in parts:
        others = [other for other in parts if other is not own]
        length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        names.append("/".join(own[-length:]))
    return names
