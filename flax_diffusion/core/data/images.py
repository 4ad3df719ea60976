"""From an image file of any kind to 8-bit RGB, or an error that names the file."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flax_diffusion.core.data.sources import Record
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.untrusted import read_bytes

# Others that Pillow knows run programs (EPS), draw (WMF) or are no pictures.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_FILE_BYTES = 2**30
_WHITE = (255, 255, 255, 255)


def decode(record: Record) -> Image.Image:
    """Decode a record's picture.

    The content decides the format, not the file's extension. EXIF orientation is applied, transparency is laid
    over white, 16-bit grey is scaled to 8 bits, and of an animation the first frame is taken.

    Args:
        record: as a source gives it.

    Returns:
        The picture in mode RGB.

    Raises:
        DataError: the file is missing, empty, truncated, no image, implausibly large (told before its pixels are
            decoded), or of unbounded floats.
    """
    name = record.name
    try:
        image = _open(record)
        # Pillow reads files only now; a broken one may raise almost anything from its format's plug-in.
        image.load()
        if not isinstance(record.image, np.ndarray):
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, name)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not an image in a format that is read here; remove or convert it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large ({error}); scale it down") from error
    except FileNotFoundError as error:
        raise DataError(f"{name} is gone since the dataset was opened; restore it") from error
    except Exception as error:
        raise DataError(f"{name} cannot be decoded ({error}); replace or remove it") from error


def _open(record: Record) -> Image.Image:
    source = record.image
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    data = source if isinstance(source, bytes) else read_bytes(source, MAX_FILE_BYTES)
    if not data:
        raise DataError(f"{record.name} is empty (0 bytes); replace or remove it")
    image = Image.open(BytesIO(data), formats=FORMATS)
    # Pillow itself warns from this size on and refuses at twice it.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise DataError(
            f"{record.name} is too large ({image.width}x{image.height}, over {limit} pixels); scale it down"
        )
    return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode.startswith("I"):
        image = _sixteen_to_eight_bit(image, name)
    elif mode == "F":
        raise DataError(f"{name} has floating-point pixels, with no defined white; convert it to 8 or 16 bits")
    elif image.has_transparency_data:
        if mode in ("RGBa", "La"):  # colours already multiplied by alpha
            image = image.convert(mode.replace("a", "A"))
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture)
    return image if image.mode == "RGB" else image.convert("RGB")


def _sixteen_to_eight_bit(image: Image.Image, name: str) -> Image.Image:
    # Pillow's own conversion clips at 255. Mode I has 32 bits, but files that give it hold 16.
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(f"{name} has grey values from {low} to {high}, not 16 bits; convert it to 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
