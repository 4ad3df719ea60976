"""Every odd image file that turns up in a dataset."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.sources.source import Record
from flax_diffusion.core.errors import DataError


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data):
    image = decode(Record(data, None, "picture"))
    assert image.mode == "RGB"
    return np.asarray(image)


def grid(*rows):
    return np.array(rows, np.uint8)


COLOURS = grid([[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG2000"])
def test_lossless_formats(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(COLOURS), kind, **options)), COLOURS)


def test_path_array_and_picture(tmp_path):
    path = tmp_path / "really_a_png.jpg"  # the content counts
    path.write_bytes(encoded(Image.fromarray(COLOURS)))
    for given in (path, COLOURS, Image.fromarray(COLOURS)):
        np.testing.assert_array_equal(pixels(given), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = np.arange(6, dtype=np.uint8).reshape(2, 3) * 20
    shown = {
        1: raw, 2: raw[:, ::-1], 3: raw[::-1, ::-1], 4: raw[::-1], 5: raw.T, 6: raw.T[:, ::-1],
        7: raw[::-1, ::-1].T, 8: raw.T[::-1],
    }[orientation]  # fmt: skip
    data = encoded(Image.fromarray(raw), exif=exif)
    np.testing.assert_array_equal(pixels(data)[..., 0], shown)


def test_a_given_picture_is_not_changed():
    picture = Image.fromarray(COLOURS[:1])
    picture.getexif()[0x0112] = 6
    assert pixels(picture).shape == (2, 1, 3)
    assert picture.size == (2, 1)


def test_grey_and_one_bit():
    grey = grid([0, 100], [200, 255])
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2))
    bits = Image.fromarray(grid([0, 255])).convert("1")
    np.testing.assert_array_equal(pixels(encoded(bits))[0, :, 0], [0, 255])


def test_rgba_over_white():
    rgba = grid([[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]])
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(rgba))), [[[10, 20, 30], [255] * 3, [204] * 3]])


def test_premultiplied_alpha():
    image = Image.fromarray(grid([[100, 50, 0, 128]])).convert("RGBa")
    np.testing.assert_allclose(pixels(image)[0, 0], [177, 152, 127], atol=1)


def test_grey_with_alpha():
    image = Image.merge("LA", [Image.fromarray(grid([50, 50, 50])), Image.fromarray(grid([255, 0, 128]))])
    np.testing.assert_array_equal(pixels(encoded(image))[0, :, 0], [50, 255, 152])


def test_palette():
    image = Image.new("P", (3, 1))
    image.putpalette([1, 2, 3, 40, 50, 60, 70, 80, 90])
    image.putdata([2, 0, 1])
    np.testing.assert_array_equal(pixels(encoded(image)), [[[70, 80, 90], [1, 2, 3], [40, 50, 60]]])
    clear = encoded(image, transparency=0)
    np.testing.assert_array_equal(pixels(clear), [[[70, 80, 90], [255] * 3, [40, 50, 60]]])
    partly = encoded(image, transparency=bytes([0, 51, 255]))
    np.testing.assert_array_equal(pixels(partly), [[[70, 80, 90], [255] * 3, [212, 214, 216]]])


@pytest.mark.parametrize(("mode", "key"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_one_transparent_colour(mode, key):
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), (9, 9, 9) if mode == "RGB" else 9)
    np.testing.assert_array_equal(pixels(encoded(image, transparency=key)), [[[255] * 3, [9] * 3]])


def raw_png(values, colour, depth, key=None, interlace=0):
    """A PNG file of whole rows, by its definition: `values` (rows, columns, channels) packed to `depth` bits."""
    values = np.asarray(values)
    height, width = values.shape[:2]
    flat = values.reshape(height, -1)
    bits = (flat[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))]
    if key is not None:
        chunks.append((b"tRNS", struct.pack(f">{len(key)}H", *key)))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_one_transparent_grey_of_every_depth(depth):
    most = 2**depth - 1
    values = np.array([[0, most // 3, most]])
    for key in dict.fromkeys(values[0].tolist()):
        shown = pixels(raw_png(values[..., None], 0, depth, [key]))[0, :, 0]
        expected = [255 if value == key else round(value * 255 / most) for value in values[0].tolist()]
        np.testing.assert_array_equal(shown, expected, f"key {key}")


def test_one_transparent_colour_of_sixteen_bits():
    """That very colour, and none whose upper or lower bytes alone are the same."""
    key = (0x0A01, 0x1402, 0x1E03)
    others = [(0x0A02, 0x1402, 0x1E03), (0x0101, 0x0202, 0x0303), (0xFFFF, 0, 0x80FF)]
    shown = pixels(raw_png(np.array([[key, *others]]), 2, 16, key))
    np.testing.assert_array_equal(shown, [[[255] * 3, *([value >> 8 for value in other] for other in others)]])


def test_one_transparent_colour_of_eight_bits_with_other_bits_set():
    shown = pixels(raw_png(np.array([[[1, 2, 3], [9, 9, 9]]]), 2, 8, (0x101, 0x202, 0x303)))
    np.testing.assert_array_equal(shown, [[[255] * 3, [9] * 3]])


def test_cmyk():
    cmyk = grid([[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]])
    image = Image.frombytes("CMYK", (3, 1), cmyk.tobytes())
    np.testing.assert_array_equal(pixels(encoded(image, "TIFF")), [[[255] * 3, [0, 255, 255], [0] * 3]])
    flat = Image.new("CMYK", (16, 16), (0, 255, 0, 0))
    np.testing.assert_allclose(pixels(encoded(flat, "JPEG", quality=100))[8, 8], [255, 0, 255], atol=2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [round(int(value) / 257) for value in values[0]]
    assert expected == [0, 0, 1, 1, 128, 255]
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(values), kind))[0, :, 0], expected)


def test_big_endian_sixteen_bits():
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257 * 7, 65535))
    np.testing.assert_array_equal(pixels(image)[0, :, 1], [7, 255])


def test_thirty_two_bits():
    np.testing.assert_array_equal(
        pixels(encoded(Image.fromarray(np.array([[514, 65535]], np.int32)), "TIFF"))[0, :, 0], [2, 255]
    )
    for beyond in (70000, -1):
        with pytest.raises(DataError, match=rf"picture has grey values from .*{beyond}.* not 16 bits; convert"):
            pixels(encoded(Image.fromarray(np.array([[0, beyond]], np.int32)), "TIFF"))


def test_floats_are_refused():
    with pytest.raises(DataError, match=r"picture has floating-point pixels"):
        pixels(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(COLOURS), Image.new("RGB", (2, 2))]
    np.testing.assert_array_equal(pixels(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])), COLOURS)


NOISY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_truncated(kind, part):
    data = encoded(NOISY, kind)
    with pytest.raises(DataError, match=r"^picture (cannot be decoded|is not an image)") as caught:
        pixels(data[: int(len(data) * part)])
    assert "\n" not in str(caught.value)


def test_damaged_png():
    data = bytearray(encoded(NOISY))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DataError, match=r"picture cannot be decoded"):
        pixels(bytes(data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"picture is empty \(0 bytes\); replace or remove it"),
        (b"<html>not found</html>", r"picture is not an image in a supported format"),
    ],
)
def test_no_image(data, message):
    with pytest.raises(DataError, match=message):
        pixels(data)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"picture has disappeared since the dataset was opened"):
        pixels(tmp_path / "gone.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [3000, 1000])  # Pillow warns at the first, refuses at the second
def test_decompression_bomb(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"picture is too large"):
        pixels(encoded(NOISY))
