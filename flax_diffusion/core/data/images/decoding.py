"""From an image file of any kind to 8-bit RGB, or an error that names the file."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from flax_diffusion.core.data.images import png
from flax_diffusion.core.data.sources.source import Record
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.io.files import is_local
from flax_diffusion.core.io.untrusted import LFS_POINTER, read_bytes

# Pillow's other formats run programs (EPS), draw (WMF) or are no pictures.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_FILE_BYTES = 2**30
MAX_SIDE = 2**20
"""Largest side in pixels. Memory for resizing grows with the long side, and no real picture is longer."""
HEADER_BYTES = 2**16
"""Bytes at the start of a file that most often hold its header."""
_CHECKSUM_DIGITS = 32
_WHITE = (255, 255, 255, 255)
# Starts of files that are often mistaken for pictures that can be read here: offset, bytes, description.
_OTHER_KINDS = (
    (0, LFS_POINTER, "it is a Git LFS pointer; `git lfs pull` downloads the picture"),
    (4, b"ftyphe", "it is HEIC"),
    (4, b"ftypmif1", "it is HEIF"),
    (4, b"ftyp", "it is a video, or a camera's own format"),
    (0, b"\xff\x0a", "it is JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "it is JPEG XL"),
    (0, b"8BPS", "it is a Photoshop document"),
    (0, b"gimp xcf", "it is a GIMP document"),
    (0, b"%PDF", "it is PDF"),
    (0, b"%!PS", "it is PostScript"),
    (0, b"<svg", "it is SVG"),
    (0, b"<?xml", "it is XML, as SVG is"),
    (0, b"<!DOCTYPE", "it is a web page"),
    (0, b"<html", "it is a web page"),
    (0, b"\x00\x00\x01\x00", "it is an icon (ICO)"),
    (0, b"DDS ", "it is DDS"),
    (0, b"qoif", "it is QOI"),
    (0, b"v/1\x01", "it is OpenEXR"),
    (0, b"#?RADIANCE", "it is Radiance HDR"),
    (0, b"PK\x03\x04", "it is a zip archive"),
)


def decode(record: Record) -> Image.Image:
    """Decode a record's picture.

    The content decides the format, not the file's extension. EXIF orientation is applied, transparency is put
    on white, 16-bit grey is scaled to 8 bits, and of an animation the first frame is taken.

    Args:
        record: A record of a source.

    Returns:
        The picture in mode RGB.

    Raises:
        DataError: If the file is missing, empty, truncated, no image, implausibly large (found before its pixels are
            decoded), or has floating-point pixels.
    """
    source = record.image
    with _named(record):
        if isinstance(source, np.ndarray):
            return _to_rgb(Image.fromarray(source))
        if isinstance(source, Image.Image):
            return _to_rgb(ImageOps.exif_transpose(source))
        data = png.without_text(_content(source))
        image = _open(data)
        # Pillow reads the pixels only now; a broken file may raise almost anything from its format's plug-in.
        image.load()
        if image.format == "PNG" and (alpha := png.sixteen_bit_alpha(image, data)) is not None:
            del image.info["transparency"]
            image.putalpha(alpha)
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def size_of(record: Record) -> tuple[int, int]:
    """Return width and height of a record's picture once it is turned upright, in pixels, without decoding it.

    Args:
        record: A record of a source.

    Raises:
        DataError: As `decode`, except for errors that only the pixels show.
    """
    source = record.image
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    with _named(record):
        image = source if isinstance(source, Image.Image) else _open(png.without_text(_content(source)))
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.height, image.width) if turned else image.size


def checksum(record: Record) -> str:
    """Return a checksum of a record's picture file, or of the pixels of one that is in memory, as 32 digits.

    Args:
        record: A record of a source.

    Raises:
        DataError: As `decode`, for a picture in memory.
        OSError: If the file cannot be read.
    """
    image = record.image
    if isinstance(image, bytes):
        whole = hashlib.sha256(image)
    elif isinstance(image, (np.ndarray, Image.Image)):
        picture = decode(record)
        whole = hashlib.sha256(repr(picture.size).encode() + picture.tobytes())
    else:
        with image.open("rb") as stream:
            whole = hashlib.file_digest(stream, "sha256")
    return whole.hexdigest()[:_CHECKSUM_DIGITS]


def check_header(record: Record) -> None:
    """Check a record's picture as far as possible without decoding it.

    Args:
        record: A record of a source.

    Raises:
        DataError: As `decode`, except for errors that only the pixels show.
    """
    source = record.image
    if isinstance(source, (Image.Image, np.ndarray)):
        return
    with _named(record):
        if isinstance(source, bytes) or not is_local(source) or not _has_good_start(source):
            _open(png.without_text(_content(source)))


def _content(source: bytes | Path) -> bytes:
    return source if isinstance(source, bytes) else read_bytes(source, MAX_FILE_BYTES)


def _has_good_start(path: Path) -> bool:
    """Return whether the start of a file holds a good header. If not, the caller reads all of it to find the error."""
    start = read_bytes(path, MAX_FILE_BYTES, first_bytes=HEADER_BYTES)
    try:
        _open(png.without_text(start))
    except Exception:
        return False
    return True


@contextmanager
def _named(record: Record) -> Iterator[None]:
    """Turn every error from reading a picture into one that names it."""
    name = record.name
    try:
        yield
    except _PictureError as error:
        raise DataError(f"{name} {error}") from error
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not an image in a supported format{_kind(record)}; remove or convert it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large ({error}); scale it down") from error
    except FileNotFoundError as error:
        if isinstance(record.image, Path) and record.image.is_symlink():
            raise DataError(f"{name} is a link to a file that does not exist; restore or remove it") from error
        raise DataError(f"{name} has disappeared since the dataset was opened; restore it") from error
    except Exception as error:
        raise DataError(f"{name} cannot be decoded ({error}); replace or remove it") from error


class _PictureError(Exception):
    """An error in a picture and its fix, without the picture's name."""


def _kind(record: Record) -> str:
    """Return a phrase for what a file seems to be, or ""."""
    source = record.image
    assert not isinstance(source, (Image.Image, np.ndarray))
    start = source[:64] if isinstance(source, bytes) else read_bytes(source, MAX_FILE_BYTES, first_bytes=64)
    kinds = (kind for offset, begin, kind in _OTHER_KINDS if start[offset:].lstrip().startswith(begin))
    kind = next(kinds, None)
    return f": {kind}" if kind else ""


def _open(data: bytes) -> Image.Image:
    """Open a picture without reading its pixels."""
    if not data:
        raise _PictureError("is empty (0 bytes); replace or remove it")
    image = Image.open(BytesIO(data), formats=FORMATS)
    # Pillow itself only warns above this size, and refuses above twice of it.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise _PictureError(f"is too large ({image.width}x{image.height}, over {limit} pixels); scale it down")
    if max(image.size) > MAX_SIDE:
        raise _PictureError(f"is too large ({image.width}x{image.height}, over {MAX_SIDE} pixels long); scale it down")
    if image.mode == "F":
        raise _PictureError("has floating-point pixels, with no defined white; convert it to 8 or 16 bits")
    if image.format == "PNG":
        png.correct_transparency(image, data)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I"):
        image = _sixteen_to_eight_bit(image)
    elif mode == "F":
        raise _PictureError("has floating-point pixels, with no defined white; convert it to 8 or 16 bits")
    elif image.has_transparency_data:
        if mode in ("RGBa", "La"):  # colours are already multiplied by alpha
            image = image.convert(mode.replace("a", "A"))
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture)
    return image if image.mode == "RGB" else image.convert("RGB")


def _sixteen_to_eight_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255. Mode I has 32 bits, but files that give it hold 16.
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _PictureError(f"has grey values from {low} to {high}, not 16 bits; convert it to 8 or 16 bits")
    scaled = (values * 255 + 32767) // 65535
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[values == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))
