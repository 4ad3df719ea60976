"""Curves out of TensorBoard's event files, for runs that kept nothing else."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_diffusion.core.report.curves import Curve

log = logging.getLogger(__name__)

_HEAD, _FOOT = 12, 4  # bytes around a record: its length and a checksum of that, and a checksum of the record


def read_events(files: list[Path]) -> dict[str, Curve]:
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
