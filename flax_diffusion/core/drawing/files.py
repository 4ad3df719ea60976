"""The files that `generate` writes: pictures as they are drawn, and a sheet of all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flax_diffusion.core.display import console
from flax_diffusion.core.drawing.options import ALL, GenerateConfig, command_of
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import as_path, replacing
from flax_diffusion.core.io.sheets import contact_sheet, save_picture, to_pillow

GRID = "grid.png"
_WRITTEN = re.compile(r"\d{5,}\.png")
_ROOM_BYTES = 2**20  # about the size of a picture


class Drawn(NamedTuple):
    """A picture, and how it came to be.

    Attributes:
        image: The picture, uint8 (H, W, C).
        call: The options that it was drawn with.
        place: Its number among the pictures of these, from 0.
    """

    image: np.ndarray
    call: GenerateConfig
    place: int

    @property
    def what(self) -> str:
        """The prompt or the class; empty for a model that is told neither."""
        told = self.call.prompt or self.call.class_label
        number = self.place // self.call.num_images
        return str(number) if told == [ALL] else told[number] if told else ""

    @property
    def caption(self) -> str:
        """What stands under it on the sheet."""
        return f"{self.what}\nseed {self.call.seed}, image {self.place}".strip()

    def texts(self, prog: str) -> dict[str, str]:
        """Return what its file holds beside it: prompt, seed, and the command whose image of that number it is.

        Args:
            prog: Name of the command.
        """
        own = {"prompt": self.what, "negative_prompt": self.call.negative_prompt, "seed": str(self.call.seed)}
        own |= {"command": command_of(self.call, prog), "image": str(self.place)}
        return {keyword: text for keyword, text in own.items() if text}


def _count(calls: Sequence[GenerateConfig]) -> int | None:
    """Return the number of pictures to draw; None for all classes, whose number the model knows."""
    if calls[0].class_label == [ALL]:
        return None
    return sum(call.num_images * max(1, len(call.prompt or call.class_label)) for call in calls)


def _numbered(images: Iterator[np.ndarray], calls: Sequence[GenerateConfig]) -> Iterator[Drawn]:
    """Yield pictures with the call that each is of; every call but the last is of one prompt."""
    for call in calls[:-1]:
        for place in range(call.num_images):
            yield Drawn(next(images), call, place)
    for place, image in enumerate(images):
        yield Drawn(image, calls[-1], place)


def earlier_pictures(folder: Path) -> list[Path]:
    """Return the pictures that an earlier call has written to a folder."""
    if not folder.is_dir():  # in an object store a folder exists only when something is in it
        return []
    return sorted(path for path in folder.iterdir() if _WRITTEN.fullmatch(path.name) or path.name == GRID)


def free_folder(config: GenerateConfig) -> Path:
    """Return the output folder, once it can be written and holds no pictures that would mix with the new ones.

    Args:
        config: The options.

    Raises:
        ConfigError: If it cannot be written, or holds pictures of an earlier call.
    """
    folder = as_path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be made: {error.strerror}; name another folder") from error
    before = earlier_pictures(folder)
    if before and not config.overwrite_output_dir:
        raise ConfigError(
            f"--output_dir {folder}: holds {before[0].name} of an earlier call, and {len(before) - 1} more: name "
            "another folder, or delete them by --overwrite_output_dir"
        )
    probe = folder / ".room"
    try:
        with replacing(probe) as partial:
            partial.write_bytes(bytes(_ROOM_BYTES))
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--output_dir {folder}: cannot be written: {error.strerror or error}; make room, or name another folder"
        ) from error
    return folder


def write(batches: Iterator[np.ndarray], folder: Path, calls: Sequence[GenerateConfig], prog: str) -> int:
    """Write pictures as they are drawn, then the sheet of all, and return the number of pictures.

    Args:
        batches: The pictures, a batch at a time, each uint8 (N, H, W, C).
        folder: The folder.
        calls: The calls that they are of, in order; see `calls_of`.
        prog: Name of the command.

    Raises:
        ConfigError: If one cannot be written; those before it stay.
    """
    drawn = (image for batch in batches for image in batch)
    pictures: list[Drawn] = []
    name = ""
    try:
        with console.current().counting("drawing", _count(calls), "pictures") as add:
            for picture in _numbered(drawn, calls):
                name = f"{len(pictures):05d}.png"
                save_picture(to_pillow(picture.image), folder / name, picture.texts(prog))
                pictures.append(picture)
                add(1)
        name = GRID
        columns = calls[0].num_images if len({one.what for one in pictures}) > 1 < calls[0].num_images else None
        captions = [one.caption for one in pictures]
        sheet = contact_sheet([one.image for one in pictures], columns, captions)
        save_picture(sheet, folder / GRID, {"captions": json.dumps(captions, ensure_ascii=False)})
    except OSError as error:
        raise ConfigError(
            f"--output_dir {folder}: {name} could not be written: {error.strerror or error}; the {len(pictures)} "
            "pictures before it are there"
        ) from error
    return len(pictures)
