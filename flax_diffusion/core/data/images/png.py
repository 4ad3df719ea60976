"""Corrections to what Pillow makes of PNG files: texts that are not needed, and a single transparent colour."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UNUSED_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Starts of the texts in which Pillow looks for the orientation."""


def without_text(data: bytes) -> bytes:
    """Remove texts and colour profile from a PNG file; neither is used.

    Pillow unpacks them all, refuses a whole picture if they are large, and takes a text's keyword for one of its own.
    A damaged chunk stays, so that Pillow still reports it.

    Args:
        data: Content of a file of any format.

    Returns:
        The content without them; other formats are returned as they are.
    """
    if not data.startswith(SIGNATURE):
        return data
    parts: list[memoryview] = []
    view, kept, place = memoryview(data), 0, len(SIGNATURE)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            break
        if kind in _UNUSED_CHUNKS and not data.startswith(_ORIENTATION_TEXTS, place + 8):
            (checksum,) = struct.unpack_from(">I", data, end - 4)
            if zlib.crc32(view[place + 4 : end - 4]) == checksum:
                parts.append(view[kept:place])
                kept = end
        place = end
    return b"".join([*parts, view[kept:]]) if parts else data


def correct_transparency(image: Image.Image, data: bytes) -> None:
    """Convert the transparent colour of a picture to the scale of Pillow's pixels, in place.

    A file stores it with its own depth, 1 to 16 bits. Pillow scales grey of 2 and 4 bits to 8 bits, but compares the
    pixels with the colour as it is stored.

    Args:
        image: Opened picture of format PNG.
        data: Content of its file.

    Reference:
        PNG (Third Edition), section 11.3.1.1 tRNS.
    """
    key, depth = image.info.get("transparency"), data[24]
    most = 2**depth - 1
    if image.mode == "L" and isinstance(key, int):
        image.info["transparency"] = (key & most) * (255 // most)
    elif image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value & most for value in key)


def sixteen_bit_alpha(image: Image.Image, data: bytes) -> Image.Image | None:
    """Return the opacity of a picture with 16-bit colours, one of which is transparent.

    Pillow keeps the upper byte of each value, but compares it with all 16 bits of the transparent colour.

    Args:
        image: Loaded picture of format PNG.
        data: Content of its file.

    Returns:
        An image of mode L: 0 where the picture has exactly that colour and 255 elsewhere. None for other pictures.
    """
    key = image.info.get("transparency")
    if image.mode != "RGB" or data[24] != 16 or not isinstance(key, tuple):
        return None
    lower = Image.open(BytesIO(data), formats=["PNG"])
    lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # type: ignore[attr-defined]  # swapped byte order gives the lower byte
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
    return Image.fromarray(np.where((values == key).all(-1), 0, 255).astype(np.uint8))
