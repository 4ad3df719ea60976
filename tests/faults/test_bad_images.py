"""Pictures that are cut off, empty, no pictures or bombs: each is named, or skipped where that is asked for."""

import os
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin
from tiny import OBJECTIVE

from flax_diffusion.core.data.batches import ExampleFn
from flax_diffusion.core.data.images.decoding import FORMATS, check_header, decode
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.data.sources.source import Record
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.objectives.noising import NoiseSpec

MAKE = ExampleFn(transform=ImageTransform(resolution=8), noise=NoiseSpec(objective=OBJECTIVE, shape=(1, 2, 2)))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def encoded(kind, picture=PICTURE, **options):
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, *chunks, pixels=b""):
    """A PNG file of any size, of which the pixels need not be there."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def bad_files(offsets):
    """Name to content of what cannot be decoded."""
    files = {"empty.png": b"", "text.png": b"not a picture\n" * 20, "page.jpg": b"<html>not found</html>"}
    files["bomb.png"] = png(60_000, 60_000)
    files["half_a_bomb.png"] = png(12_000, 12_000)
    files["post_script.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(kind)
        # The last 20 bytes of a PNG are checksums and its end: without them all pixels are there.
        for place in np.linspace(1, len(data) - 21, offsets, dtype=int):
            files[f"{kind.lower()}_{place:05}.{kind.lower()}"] = data[:place]
    return files


@pytest.fixture(params=[3, pytest.param(20, marks=pytest.mark.acceptance)])
def folder(request, tmp_path):
    """A hundred good pictures for each bad one, by names that mix them, and the names of the bad ones."""
    bad = bad_files(request.param)
    good = encoded("PNG", PICTURE.resize((10, 8)))
    for number, (name, content) in enumerate(bad.items()):
        (tmp_path / f"{number:03}_050_{name}").write_bytes(content)
        for place in range(100):
            (tmp_path / f"{number:03}_{place:03}.jpg").write_bytes(good)  # the content counts, not the extension
    return tmp_path, sorted(f"{number:03}_050_{name}" for number, name in enumerate(bad))


def indices(source, **options):
    with Loader(source, MAKE, seed=3, batch_size=8, **options) as loader:
        seen = np.concatenate([batch["example_index"].ravel() for batch in loader])
        return seen, sorted(os.path.basename(name) for name in loader.skipped)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_named_or_skipped(folder, figure):
    root, bad = folder
    source = open_source(train_data_dir=root, caption_column=None)
    for name in bad:
        with pytest.raises(DataError, match=rf"{name}\b.* (decoded|image|empty|large)"):
            decode(Record(root / name, None, str(root / name)))
    whole = len(source) // 8
    with pytest.raises(DataError, match=r"_050_"):
        indices(source, num_steps=whole)
    seen, skipped = indices(source, num_steps=whole, skip_bad_images=True)
    for name in bad:
        (root / name).write_bytes(encoded("PNG"))
    expected, none = indices(source, num_steps=whole, skip_bad_images=True)
    assert none == []
    was_bad = np.isin(expected, [source.files.index(name) for name in bad])
    np.testing.assert_array_equal(seen[~was_bad], expected[~was_bad])
    assert skipped == sorted(source.files[index] for index in set(expected[was_bad]))
    assert was_bad.sum() >= len(bad) - 1
    figure(9, f"{len(bad)} bad pictures named, {len(skipped)} met and skipped; order of {len(seen)} others unchanged")


def test_a_file_of_another_extension():
    for kind in ("JPEG", "PNG", "WEBP"):
        assert decode(Record(encoded(kind), None, "picture.gif")).size == PICTURE.size


def test_all_formats_are_there():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height"), [(12_000, 12_000), (60_000, 60_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)]
)
def test_bombs_are_refused_before_they_are_decoded(width, height, monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(DataError, match=r"^bomb is too large \(.*(pixels|x).*\); scale it down"):
        decode(Record(png(width, height), None, "bomb"))


ZEROS = zlib.compress(bytes(100_000_000), 9)
BESIDE = [
    (b"zTXt", b"Comment\x00\x00" + ZEROS),
    (b"iTXt", b"Comment\x00\x01\x00\x00\x00" + ZEROS),
    (b"iCCP", b"profile\x00\x00" + ZEROS),
    (b"tEXt", b"Comment\x00" + b"x" * 70_000_000),
    (b"tEXt", b"transparency\x00none"),
]


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
@pytest.mark.parametrize("chunk", BESIDE, ids=["zTXt", "iTXt", "iCCP", "tEXt", "keyword"])
def test_what_is_written_beside_the_pixels_is_not_unpacked(chunk, place, monkeypatch):
    """A whole picture is read, however large its texts and its colour profile are."""

    def unpack(data):
        raise AssertionError("unpacked")

    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", unpack)
    data = png(1, 1, chunk, pixels=b"\x00\x01\x02\x03")
    if place == "after them":
        kind, text = chunk
        plain = png(1, 1, pixels=b"\x00\x01\x02\x03")
        after = struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text))
        data = plain[:-12] + after + plain[-12:]
    record = Record(data, None, "picture")
    check_header(record)
    assert decode(record).getpixel((0, 0)) == (1, 2, 3)


def test_bombs_in_what_tells_the_orientation():
    chunk = (b"zTXt", b"Raw profile type exif\x00\x00" + ZEROS)
    with pytest.raises(DataError, match=r"^bomb cannot be decoded .*too large"):
        decode(Record(png(1, 1, chunk, pixels=bytes(4)), None, "bomb"))


def test_a_damaged_text_is_found():
    data = bytearray(png(1, 1, (b"tEXt", b"Comment\x00text"), pixels=bytes(4)))
    data[data.index(b"text")] ^= 1
    with pytest.raises(DataError, match=r"^picture (cannot be decoded|is not an image)"):
        decode(Record(bytes(data), None, "picture"))


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00" + b"\xff" * 60_000, b"MM\x00*\x00\x00\x00\x08\xff\xff" + b"\x01\x12" * 30_000]
)
def test_strange_exif(exif):
    """It is read, or is an error of ours."""
    try:
        assert decode(Record(encoded("JPEG", exif=exif), None, "picture")).mode == "RGB"
    except DataError as error:
        assert str(error).startswith("picture cannot be decoded")  # noqa: PT017


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(DataError, match=rf"{name} cannot be decoded \(it is not a regular file\)"):
            decode(Record(tmp_path / name, None, name))
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(DataError, match=r"huge cannot be decoded \(it is larger than 1073741824 bytes\)"):
        decode(Record(tmp_path / "huge.png", None, "huge"))
