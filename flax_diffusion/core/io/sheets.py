"""Pictures as files: single ones, and sheets of many with what they show under each."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from flax_diffusion.core.io.files import replacing

LEAST_SIDE = 512
"""Length in pixels that the longer side of a sheet reaches, so that a person can see the pixels of small pictures."""
MAX_LINES = 2
"""Most lines on a sheet for each line of a caption."""


def contact_sheet(
    images: Sequence[np.ndarray] | np.ndarray, columns: int | None = None, captions: Sequence[str] = ()
) -> Image.Image:
    """Lay pictures out in rows on a white sheet; small ones are enlarged by a whole factor.

    Args:
        images: Pictures, each uint8 (H, W, 1 or 3); of several sizes, each is in the middle of its place.
        columns: Pictures per row; None for a sheet that is nearly square.
        captions: Text under each picture; empty for none.

    Returns:
        The sheet. Captions that are too long for their place end with an ellipsis.
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    border = max(1, height // 32)
    height, width = height + 2 * border, width + 2 * border
    factor = max(1, math.ceil(LEAST_SIDE / max(rows * height, columns * width)))
    height, width = factor * height, factor * width
    font = ImageFont.load_default(size=max(10, min(24, width // 12)))
    texts = [_wrapped(caption, font, width - 4) for caption in captions]
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    strip = max((math.ceil(measure.multiline_textbbox((0, 0), text, font)[3]) + 6 for text in texts), default=0)
    mode = "L" if all(image.shape[-1] == 1 for image in images) else "RGB"
    sheet = Image.new(mode, (columns * width, rows * (height + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, image in enumerate(images):
        left, top = place % columns * width, place // columns * (height + strip)
        picture = to_pillow(image)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        if texts:
            draw.multiline_text((left + width // 2, top + height), texts[place], "black", font, "ma", align="center")
    return sheet


def _wrapped(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return a caption in lines of a width in pixels; what is too long for its lines ends with an ellipsis."""
    letters = max(2, int(width / font.getlength("n")))
    lines = (textwrap.wrap(line, letters, max_lines=MAX_LINES, placeholder="…") for line in caption.splitlines())
    return "\n".join(line for several in lines for line in several)


def to_pillow(image: np.ndarray) -> Image.Image:
    """Return a uint8 (H, W, 1 or 3) array as a Pillow image, grey or RGB."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def enlarge(image: Image.Image, at_least: int) -> Image.Image:
    """Scale a small picture up by a whole factor, so that a person can see its pixels.

    Args:
        image: The picture.
        at_least: Length in pixels that the longer side must reach.
    """
    factor = max(1, math.ceil(at_least / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def save_picture(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG file, whole or not at all.

    Args:
        image: The picture.
        path: The file.
        texts: Texts in the file beside the picture, by keyword; None for none.
    """
    known = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        known.add_itxt(keyword, text)
    with replacing(path) as partial:
        image.save(partial, "PNG", pnginfo=known)
