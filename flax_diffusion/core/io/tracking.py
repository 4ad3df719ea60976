"""Where a run shows itself: progress bar, TensorBoard and picture grids."""

from __future__ import annotations

import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from flax_diffusion.core.io.files import copy_files, is_local, replacing, temporary_folder

EVENT_FILES = "events.out.tfevents.*"
"""What TensorBoard's files are called."""


def image_grid(images: np.ndarray, columns: int | None = None, border: int = 0) -> Image.Image:
    """Lays pictures out in rows.

    Args:
        images: uint8, (n, height, width, 1 or 3).
        columns: Pictures a row; by default the grid is as square as it can be.
        border: Pixels of white around each picture.

    Returns:
        One picture; cells left over are white.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cell_h, cell_w = height + 2 * border, width + 2 * border
    sheet = np.full((rows * cell_h, columns * cell_w, channels), 255, np.uint8)
    for position, picture in enumerate(images):
        top, left = (position // columns) * cell_h + border, (position % columns) * cell_w + border
        sheet[top : top + height, left : left + width] = picture
    return to_pillow(sheet)


def to_pillow(image: np.ndarray) -> Image.Image:
    """A uint8 (height, width, 1 or 3) array as a Pillow image, grey or RGB."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_picture(image: Image.Image, path: Path) -> None:
    """Writes a PNG file, whole or not at all."""
    with replacing(path) as partial:
        image.save(partial, "PNG")


def enlarge(image: Image.Image, at_least: int) -> Image.Image:
    """Scales a small picture up by a whole factor, so that a person can see its pixels."""
    factor = max(1, math.ceil(at_least / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


class TensorBoard:
    """Writes scalars and images as TensorBoard event files, with nothing but the tensorboard package.

    Args:
        folder: For the files; those of earlier runs stay.
        first_step: Before which nothing is written; what an earlier run wrote from it on, readers pass over.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]  (made at run time)
        self._summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
        self._folder = folder
        self._local = folder if is_local(folder) else temporary_folder()
        self._writer = EventFileWriter(str(self._local))
        start = event_pb2.SessionLog(status="START")  # pyright: ignore[reportAttributeAccessIssue]
        self._writer.add_event(self._event(wall_time=time.time(), step=first_step, session_log=start))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Adds one point to each curve."""
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Adds a picture."""
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        image = self._summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=len(picture.getbands()),
            encoded_image_string=buffer.getvalue(),
        )
        summary = self._summary(value=[self._summary.Value(tag=tag, image=image)])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self.flush()

    def flush(self) -> None:
        """Writes what there is to disk."""
        self._writer.flush()
        self._upload()

    def close(self) -> None:
        """Writes what is left to disk."""
        self._writer.close()
        self._upload()

    def _upload(self) -> None:
        """Event files grow and objects cannot, so that those of an object store are written again."""
        if self._local != self._folder:
            copy_files(self._local, self._folder)


class Tracker:
    """One object for all that a run reports; on processes other than the first it reports nothing."""

    def __init__(self, output_dir: Path, logging_dir: str | None, *, first_step: int, total_steps: int, main: bool):
        self._samples = output_dir / "samples"
        self._main = main
        self._board = TensorBoard(output_dir / logging_dir, first_step + 1) if main and logging_dir else None
        self._bar = tqdm(
            total=total_steps, initial=first_step, disable=not main, unit="step", dynamic_ncols=True, file=sys.stderr
        )
        self._last = time.perf_counter()

    def step(self, step: int, metrics: dict[str, float], images: int) -> None:
        """Reports a finished optimizer step.

        Args:
            step: Its number, from 1.
            metrics: At least `loss` and `learning_rate`.
            images: Images in it, over all devices.
        """
        now = time.perf_counter()
        metrics = metrics | {"images_per_second": images / max(now - self._last, 1e-9)}
        self._last = now
        if self._board:
            self._board.scalars({f"train/{name}": value for name, value in metrics.items()}, step)
        self._bar.set_postfix(
            loss=f"{metrics['loss']:.4f}",
            lr=f"{metrics['learning_rate']:.2e}",
            img_s=f"{images * (self._bar.format_dict['rate'] or 0):.1f}",
            refresh=False,
        )
        self._bar.update()

    def advance(self) -> None:
        """Counts a step of which there is nothing to report."""
        self._bar.update()

    def grid(self, step: int, images: np.ndarray, columns: int | None) -> None:
        """Writes sampled images (uint8, NHWC) to `samples/` and TensorBoard."""
        if not self._main:
            return
        picture = enlarge(image_grid(images, columns, border=max(1, images.shape[1] // 32)), 512)
        save_picture(picture, self._grid_file(step))
        if self._board:
            self._board.image("samples", picture, step)
        self._last = time.perf_counter()

    def has_grid(self, step: int) -> bool:
        """Whether the pictures of a step are there."""
        return self._grid_file(step).exists()

    def _grid_file(self, step: int) -> Path:
        return self._samples / f"{step:08d}.png"

    def flush(self) -> None:
        """Writes what was reported to disk."""
        if self._board:
            self._board.flush()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._main:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the bar and flushes the event file."""
        self._bar.close()
        if self._board:
            self._board.close()
