"""Values and pictures as TensorBoard's event files."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from flax_diffusion.core.io.files import copy_files, is_local, names_in, temporary_folder

EVENT_FILES = "events.out.tfevents.*"
"""Glob of TensorBoard's file names."""


def next_file(folder: Path) -> str:
    """Name a new event file, so that it comes after all that are there.

    Readers take the files in the order of their names, each of which holds the second in which its run began. A run
    that begins in the same second as the one before it, or on a machine whose clock is behind, takes a later second.

    Args:
        folder: Folder of the event files; it may not be there yet.
    """
    fields = [name.split(".") for name in names_in(folder)]
    seconds = [int(field[3]) for field in fields if field[:3] == ["events", "out", "tfevents"] and field[3].isdigit()]
    begun = max(int(time.time()), *(second + 1 for second in seconds), 0)
    return f"events.out.tfevents.{begun:010d}.{socket.gethostname()}.{os.getpid()}"


class TensorBoard:
    """Writer of scalars and images as TensorBoard event files, which needs only the tensorboard package.

    Args:
        folder: Folder for the files; the files of earlier runs stay.
        first_step: First step that is written. Readers ignore what an earlier run wrote from this step on.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]  (the class is made at run time)
        self._summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
        self._folder = folder
        self._local = folder if is_local(folder) else temporary_folder()
        self._local.mkdir(parents=True, exist_ok=True)
        self._writer = RecordWriter((self._local / next_file(folder)).open("wb"))
        self._add(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status="START")  # pyright: ignore[reportAttributeAccessIssue]
        self._add(step=first_step, session_log=start)
        self._writer.flush()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve.

        Args:
            values: Value by name of the curve.
            step: The optimizer step.
        """
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])
        self._add(step=step, summary=summary)

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Add a picture.

        Args:
            tag: Name under which TensorBoard shows it.
            picture: The picture.
            step: The optimizer step.
        """
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        image = self._summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=len(picture.getbands()),
            encoded_image_string=buffer.getvalue(),
        )
        summary = self._summary(value=[self._summary.Value(tag=tag, image=image)])
        self._add(step=step, summary=summary)
        self.flush()

    def flush(self) -> None:
        """Write everything added so far to disk."""
        self._writer.flush()
        self._upload()

    def close(self) -> None:
        """Write what is left to disk and close the file."""
        self._writer.close()
        self._upload()

    def _add(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def _upload(self) -> None:
        # Event files grow, and objects in a store cannot: they are written again each time.
        if self._local != self._folder:
            copy_files(self._local, self._folder)
