"""What Pillow does not see to in PNG files: text that is not wanted, and one transparent colour."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BESIDE_THE_PIXELS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTING = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Texts in which Pillow looks for the orientation."""


def without_text(data: bytes) -> bytes:
    """Leave out texts and colour profile, none of which is used.

    Pillow unpacks them all, refuses a whole picture if they are large, and takes a text's keyword for one of its own.
    A chunk that is damaged stays, so that it is still found out.

    Args:
        data: A file, of any format.

    Returns:
        The same picture, without them.
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
        if kind in _BESIDE_THE_PIXELS and not data.startswith(_ORIENTING, place + 8):
            (checksum,) = struct.unpack_from(">I", data, end - 4)
            if zlib.crc32(view[place + 4 : end - 4]) == checksum:
                parts.append(view[kept:place])
                kept = end
        place = end
    return b"".join([*parts, view[kept:]]) if parts else data


def correct_transparency(image: Image.Image, data: bytes) -> None:
    """Give the transparent colour in the values that Pillow's pixels have.

    A file names it by its own values, of 1 to 16 bits. Pillow spreads grey of 2 and 4 bits over 8 and compares with
    the colour as it is written.

    Args:
        image: Opened, of format PNG.
        data: Its file.

    Reference: PNG (Third Edition), section 11.3.1.1 tRNS.
    """
    key, depth = image.info.get("transparency"), data[24]
    most = 2**depth - 1
    if image.mode == "L" and isinstance(key, int):
        image.info["transparency"] = (key & most) * (255 // most)
    elif image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value & most for value in key)


def sixteen_bit_alpha(image: Image.Image, data: bytes) -> Image.Image | None:
    """The opacity of a picture of 16-bit colours, one of which is transparent.

    Pillow keeps the upper byte of each value, and compares it with all 16 bits of the transparent colour.

    Args:
        image: Loaded, of format PNG.
        data: Its file.

    Returns:
        Mode L, 0 where the picture has that very colour and else 255; None for a picture of another kind.
    """
    key = image.info.get("transparency")
    if image.mode != "RGB" or data[24] != 16 or not isinstance(key, tuple):
        return None
    lower = Image.open(BytesIO(data), formats=["PNG"])
    lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # type: ignore[attr-defined]  # read in the other order
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
    return Image.fromarray(np.where((values == key).all(-1), 0, 255).astype(np.uint8))
