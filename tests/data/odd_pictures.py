"""Pictures of odd kinds, made here: what each must be read as, or how it must be refused."""

import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (7, 10, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (7, 10, 4), dtype=np.uint8)
GREY = RNG.integers(0, 256, (7, 10), dtype=np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(16), np.arange(24), [5]), -1)[:, :, 0].astype(np.uint8) * 8

Odd = tuple[str, bytes, Any]
"""Its name; its file; the pixels that it must be read as, uint8 (H, W, 3), or a pattern of the error."""


def saved(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """A picture's file."""
    buffer = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def three(grey: np.ndarray) -> np.ndarray:
    """Grey as RGB."""
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, 2)


def over_white(rgba: np.ndarray) -> np.ndarray:
    """By the formula, rounded: c·α + 255·(1 − α)."""
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:].astype(float) / 255
    return np.floor(colour * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What is shown of stored pixels. Reference: EXIF 2.32, tag 0x0112."""
    across = pixels.swapaxes(0, 1)
    return [
        pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1],
        across, across[:, ::-1], across[::-1, ::-1], across[::-1],
    ][orientation - 1]  # fmt: skip


def oriented(orientation: int) -> Image.Exif:
    """EXIF with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
"""First row and column, and steps between rows and columns, of each pass of an interlaced PNG."""


def png(
    values: np.ndarray, colour: int, depth: int, *, before: bytes = b"", after: bytes = b"", lace: bool = False
) -> bytes:
    """A PNG file of samples (H, W, channels), written by its definition."""

    def rows(part: np.ndarray) -> bytes:
        if 0 in part.shape:
            return b""
        bits = (part.reshape(len(part), -1)[..., None].astype(np.int64) >> np.arange(depth - 1, -1, -1)) & 1
        packed = np.packbits(bits.reshape(len(part), -1).astype(np.uint8), axis=1)
        return b"".join(b"\0" + row.tobytes() for row in packed)

    passes = [values[top::down, left::right] for top, left, down, right in ADAM7] if lace else [values]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colour, 0, 0, lace)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(map(rows, passes))))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")


def pngs() -> Iterator[Odd]:
    """All colour types and depths, plain and interlaced, with and without transparency."""
    for lace in (False, True):
        way = ", interlaced" if lace else ""
        for depth in (1, 2, 4, 8, 16):
            most = 2**depth - 1
            values = RNG.integers(0, most + 1, (9, 11, 1))
            shown = three(np.floor(values[..., 0] * 255 / most + 0.5))
            yield f"png grey {depth}{way}", png(values, 0, depth, lace=lace), shown
            key = int(values[4, 4, 0])
            clear = np.where(values == key, 255, shown)
            key_chunk = chunk(b"tRNS", struct.pack(">H", key))
            yield f"png grey {depth}{way}, one clear", png(values, 0, depth, before=key_chunk, lace=lace), clear
        for depth in (8, 16):
            values = RNG.integers(0, 2**depth, (9, 11, 3))
            values[0, 0] = values[4, 4] ^ 1  # nearly the clear one
            shown = (values >> (depth - 8)).astype(np.uint8)
            yield f"png colour {depth}{way}", png(values, 2, depth, lace=lace), shown
            clear = np.where((values == values[4, 4]).all(-1, keepdims=True), 255, shown)
            key_chunk = chunk(b"tRNS", struct.pack(">3H", *values[4, 4].tolist()))
            yield f"png colour {depth}{way}, one clear", png(values, 2, depth, before=key_chunk, lace=lace), clear
            for colour, channels, name in ((4, 2, "grey"), (6, 4, "colour")):
                values = RNG.integers(0, 2**depth, (9, 11, channels))
                eight = (values >> (depth - 8)).astype(np.uint8)
                rgba = eight if channels == 4 else eight[..., [0, 0, 0, 1]]
                yield f"png {name} and alpha {depth}{way}", png(values, colour, depth, lace=lace), over_white(rgba)
        for depth in (1, 2, 4, 8):
            palette = RNG.integers(0, 256, (2**depth, 4), dtype=np.uint8)
            values = RNG.integers(0, 2**depth, (9, 11, 1))
            colours = chunk(b"PLTE", palette[:, :3].tobytes())
            shown = palette[values[..., 0]]
            yield f"png palette {depth}{way}", png(values, 3, depth, before=colours, lace=lace), shown[..., :3]
            one = colours + chunk(b"tRNS", b"\0")
            first = np.where(values == 0, 255, shown[..., :3])
            yield f"png palette {depth}{way}, one clear", png(values, 3, depth, before=one, lace=lace), first
            several = colours + chunk(b"tRNS", palette[:, 3].tobytes())
            yield (
                f"png palette {depth}{way}, alpha",
                png(values, 3, depth, before=several, lace=lace),
                over_white(shown),
            )


def texts() -> Iterator[Odd]:
    """PNG files with much beside the pixels, and with the orientation in it."""
    large = zlib.compress(bytes(2_000_000))
    beside = {
        "text": chunk(b"tEXt", b"Comment\0" + b"x" * 2_000_000),
        "packed text": chunk(b"zTXt", b"Comment\0\0" + large),
        "packed international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + large),
        "a large colour profile": chunk(b"iCCP", b"profile\0\0" + large),
        "a colour profile that is none": chunk(b"iCCP", b"profile\0\0" + b"none"),
        "a text called exif": chunk(b"tEXt", b"exif\0none"),
        "a text called transparency": chunk(b"tEXt", b"transparency\0none"),
        "a thousand texts": chunk(b"tEXt", b"Comment\0text") * 1000,
        "a chunk of its own": chunk(b"prVt", b"x" * 100_000),
        "gamma and resolution": chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"pHYs", struct.pack(">IIB", 1, 2, 1)),
    }
    for name, chunks in beside.items():
        yield f"png with {name}", png(RGB, 2, 8, before=chunks), RGB
        yield f"png with {name} at its end", png(RGB, 2, 8, after=chunks), RGB
    exif = oriented(6).tobytes()
    lines = exif.hex()
    raw = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(exif)}\n{lines}".encode()))
    yield "png with EXIF in a text", png(RGB, 2, 8, before=raw), turned(RGB, 6)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    packet = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    yield "png with XMP", png(RGB, 2, 8, before=packet), turned(RGB, 8)


def orientations() -> Iterator[Odd]:
    """All eight, where EXIF may stand."""
    for number in range(1, 9):
        exif = oriented(number)
        yield f"png turned {number}", saved(RGB, "PNG", exif=exif), turned(RGB, number)
        yield f"tiff turned {number}", saved(RGB, "TIFF", exif=exif), turned(RGB, number)
        yield f"webp turned {number}", saved(RGB, "WEBP", exif=exif, lossless=True), turned(RGB, number)
        for name, image in (("grey", Image.fromarray(GREY)), ("colour", Image.fromarray(SMOOTH))):
            data = saved(image, "JPEG", exif=exif)
            stored = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
            yield f"jpeg {name} turned {number}", data, turned(stored, number)
    for number in (0, 9, 65535):
        yield f"png turned {number}, which is no way", saved(RGB, "PNG", exif=oriented(number)), RGB


def jpegs() -> Iterator[Odd]:
    """Read to what Pillow makes of them."""
    cmyk = Image.fromarray(np.dstack([SMOOTH, SMOOTH[..., :1]]), "CMYK")
    options: dict[str, tuple[Any, dict[str, Any]]] = {
        "progressive": (SMOOTH, {"progressive": True}),
        "of quality 1": (SMOOTH, {"quality": 1}),
        "of quality 100": (SMOOTH, {"quality": 100}),
        "4:4:4": (SMOOTH, {"subsampling": 0}),
        "4:2:2": (SMOOTH, {"subsampling": 1}),
        "4:2:0": (SMOOTH, {"subsampling": 2}),
        "optimized": (SMOOTH, {"optimize": True}),
        "with restarts": (SMOOTH, {"restart_marker_rows": 1}),
        "with a comment": (SMOOTH, {"comment": b"x" * 60_000}),
        "with a large colour profile": (SMOOTH, {"icc_profile": bytes(3_000_000)}),
        "CMYK": (cmyk, {}),
        "kept RGB": (SMOOTH, {"keep_rgb": True}),
        "1 x 1": (SMOOTH[:1, :1], {}),
        "1 x 24": (SMOOTH[:, :1], {}),
        "one bit": (Image.fromarray(GREY).convert("1"), {}),
    }
    for name, (image, given) in options.items():
        data = saved(image, "JPEG", **given)
        yield f"jpeg {name}", data, np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    data = saved(SMOOTH, "JPEG")
    yield "jpeg with bytes after its end", data + b"\0" * 100, np.asarray(Image.open(BytesIO(data)))
    several = saved(SMOOTH, "MPO", save_all=True, append_images=[Image.fromarray(SMOOTH[::-1].copy())])
    yield "jpeg of two pictures", several, np.asarray(Image.open(BytesIO(several)).convert("RGB"))


def tiffs() -> Iterator[Odd]:
    """Modes, ways of packing, orders of bytes."""
    sixteen = RNG.integers(0, 65536, (7, 10), dtype=np.uint16)
    eight = three(np.floor(sixteen.astype(float) * 255 / 65535 + 0.5))
    bits = Image.fromarray(GREY).convert("1")
    palette = Image.fromarray(RGB).quantize(8)
    cmyk = Image.fromarray(RGBA, "CMYK")
    modes: dict[str, tuple[Any, np.ndarray]] = {
        "one bit": (bits, np.asarray(bits.convert("RGB"))),
        "grey": (GREY, three(GREY)),
        "palette": (palette, np.asarray(palette.convert("RGB"))),
        "colour": (RGB, RGB),
        "colour and alpha": (RGBA, over_white(RGBA)),
        "grey and alpha": (Image.fromarray(RGBA[..., [0, 3]], "LA"), over_white(RGBA[..., [0, 0, 0, 3]])),
        "CMYK": (cmyk, np.asarray(cmyk.convert("RGB"))),
        "YCbCr": (
            Image.fromarray(RGB).convert("YCbCr"),
            np.asarray(Image.fromarray(RGB).convert("YCbCr").convert("RGB")),
        ),
        "16 bits": (sixteen, eight),
        "16 bits of the other order": (Image.fromarray(sixteen.astype(">u2")), eight),
        "32 bits that hold 16": (sixteen.astype(np.int32), eight),
    }
    for name, (image, shown) in modes.items():
        yield f"tiff {name}", saved(image, "TIFF"), shown
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "tiff_deflate"):
        yield f"tiff {packing}", saved(RGB, "TIFF", compression=packing), RGB
    yield "tiff group4", saved(bits, "TIFF", compression="group4"), np.asarray(bits.convert("RGB"))
    yield "tiff of two pages", saved(RGB, "TIFF", save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())]), RGB
    yield "tiff, big", saved(RGB, "TIFF", big_tiff=True), RGB
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270] = "x" * 100_000
    yield "tiff with a long description", saved(RGB, "TIFF", tiffinfo=tags), RGB
    yield "tiff of floats", saved(GREY.astype(np.float32), "TIFF"), r"has floating-point pixels, .*; convert it to 8 or"
    yield (
        "tiff of 32 bits",
        saved(sixteen.astype(np.int32) * 9, "TIFF"),
        r"has grey values from .*, not 16 bits; convert",
    )
    lab = Image.frombytes("LAB", (10, 7), RGB.tobytes())
    data = saved(lab, "TIFF")
    yield "tiff LAB", data, np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def others() -> Iterator[Odd]:
    """The remaining formats."""
    bits = Image.fromarray(GREY).convert("1")
    palette = Image.fromarray(RGB).quantize(8)
    of_palette = np.asarray(palette.convert("RGB"))
    second = Image.fromarray(RGB[::-1].copy())
    for kind in ("BMP", "DIB"):
        for name, image, shown in (
            ("one bit", bits, np.asarray(bits.convert("RGB"))), ("grey", GREY, three(GREY)),
            ("palette", palette, of_palette), ("colour", RGB, RGB),
        ):  # fmt: skip
            yield f"{kind.lower()} {name}", saved(image, kind), shown
    yield "gif", saved(palette, "GIF"), of_palette
    yield "gif, not interlaced", saved(palette, "GIF", interlace=0), of_palette
    yield "gif with a comment", saved(palette, "GIF", comment=b"x" * 100_000), of_palette
    indices = np.asarray(palette)
    clear = np.where(indices[..., None] == indices[3, 3], 255, of_palette)
    yield "gif, one clear", saved(palette, "GIF", transparency=int(indices[3, 3])), clear
    yield "gif, animated", saved(palette, "GIF", save_all=True, append_images=[second]), of_palette
    yield "png, animated", saved(RGB, "PNG", save_all=True, append_images=[second]), RGB
    yield "webp, animated", saved(RGB, "WEBP", save_all=True, append_images=[second], lossless=True), RGB
    yield "webp", saved(RGB, "WEBP", lossless=True), RGB
    yield "webp and alpha", saved(RGBA, "WEBP", lossless=True, exact=True), over_white(RGBA)
    yield "webp with a large colour profile", saved(RGB, "WEBP", lossless=True, icc_profile=bytes(2_000_000)), RGB
    for kind, given in (("WEBP", {}), ("AVIF", {}), ("AVIF", {"quality": 100, "subsampling": "4:4:4"})):
        data = saved(SMOOTH, kind, **given)
        yield f"{kind.lower()} lossy {given}", data, np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    data = saved(np.dstack([SMOOTH, SMOOTH[..., 0]]), "AVIF")
    yield "avif and alpha", data, over_white(np.asarray(Image.open(BytesIO(data))))
    data = saved(SMOOTH, "AVIF", save_all=True, append_images=[Image.fromarray(SMOOTH[::-1].copy())])
    yield "avif, animated", data, np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    yield "jpeg2000 colour", saved(RGB, "JPEG2000"), RGB
    yield "jpeg2000 grey", saved(GREY, "JPEG2000"), three(GREY)
    yield "jpeg2000 and alpha", saved(RGBA, "JPEG2000"), over_white(RGBA)
    yield "jpeg2000 codestream", saved(RGB, "JPEG2000", no_jp2=True), RGB
    sixteen = RNG.integers(0, 65536, (7, 10), dtype=np.uint16)
    eight = three(np.floor(sixteen.astype(float) * 255 / 65535 + 0.5))
    yield "pgm 16 bits", saved(sixteen, "PPM"), eight
    yield "pgm", saved(GREY, "PPM"), three(GREY)
    yield "ppm", saved(RGB, "PPM"), RGB
    yield "pbm", saved(bits, "PPM"), np.asarray(bits.convert("RGB"))
    words = " ".join(map(str, GREY.ravel().tolist())).encode()
    yield "pgm in words, with comments", b"P2 # one\n# two\n10 7\n255\n" + words, three(GREY)
    words = " ".join(map(str, RGB.ravel().tolist())).encode()
    yield "ppm in words", b"P3\n10 7\n255\n" + words, RGB
    yield "pbm in words", b"P1\n2 2\n0 1\n1 0\n", three(np.array([[255, 0], [0, 255]]))
    few = RNG.integers(0, 4, (7, 10))
    yield "pgm of 4 values", b"P5\n10 7\n3\n" + few.astype(np.uint8).tobytes(), three(few * 85)
    yield "pfm", b"Pf\n2 1\n-1.0\n" + np.array([0.5, 1.0], "<f4").tobytes(), r"has floating-point pixels"
    for kind in ("PNG", "BMP", "TIFF", "PPM", "JPEG2000"):
        yield f"{kind.lower()} 1 x 1", saved(RGB[:1, :1], kind), RGB[:1, :1]
        yield f"{kind.lower()} 1 x 7", saved(np.ascontiguousarray(RGB[:, :1]), kind), RGB[:, :1]


NOT_READ = {
    "nothing": (b"", r"is empty \(0 bytes\); replace or remove it"),
    "zeros": (bytes(1000), r"is not an image in a supported format; remove"),
    "text": (b"a picture of a dog\n" * 9, r"is not an image in a supported format; remove"),
    "web page": (b"<!DOCTYPE html><html></html>", r"supported format: it is a web page; remove or convert it"),
    "web page after a blank line": (b"\n <html></html>", r"it is a web page"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', r"it is SVG"),
    "svg with a head": (b'<?xml version="1.0"?><svg/>', r"it is XML, as SVG is"),
    "pdf": (b"%PDF-1.7\n%", r"it is PDF"),
    "post script": (b"%!PS-Adobe-3.0 EPSF-3.0\n", r"it is PostScript"),
    "photoshop": (b"8BPS\0\1" + bytes(30), r"it is a Photoshop document"),
    "gimp": (b"gimp xcf v011\0", r"it is a GIMP document"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), r"it is HEIC"),
    "heif": (b"\0\0\0\x18ftypmif1" + bytes(40), r"it is HEIF"),
    "video": (b"\0\0\0\x18ftypmp42" + bytes(40), r"it is a video"),
    "jpeg xl": (b"\xff\x0a" + bytes(40), r"it is JPEG XL"),
    "jpeg xl in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), r"it is JPEG XL"),
    "icon": (saved(SMOOTH, "ICO", sizes=[(16, 16)]), r"it is an icon"),
    "dds": (saved(RGB, "DDS"), r"it is DDS"),
    "qoi": (b"qoif" + bytes(40), r"it is QOI"),
    "open exr": (b"v/1\x01\2\0\0\0", r"it is OpenEXR"),
    "radiance": (b"#?RADIANCE\n", r"it is Radiance HDR"),
    "zip": (b"PK\3\4" + bytes(40), r"it is a zip archive"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid", r"it is a Git LFS pointer; `git lfs pull`"),
    "targa": (saved(RGB, "TGA"), r"is not an image in a supported format"),
    "pcx": (saved(RGB, "PCX"), r"is not an image in a supported format"),
}


def sized(width: int, height: int) -> bytes:
    """A PNG file that says a size, and has no pixels of it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refused() -> Iterator[Odd]:
    """What is no picture, is cut off, or says that it is huge."""
    for name, (data, message) in NOT_READ.items():
        yield f"not read: {name}", data, message
    for width, height in ((12_000, 12_000), (60_000, 60_000), (2**31 - 1, 1), (2**20 + 1, 1), (1, 2**20 + 1)):
        yield f"png of {width} x {height}", sized(width, height), r"is too large \(.*\); scale it down"
    bmp = bytearray(saved(RGB, "BMP"))
    struct.pack_into("<ii", bmp, 18, 40_000, 40_000)
    yield "bmp of 40000 x 40000", bytes(bmp), r"is too large \(.*\); scale it down"
    gif = bytearray(saved(Image.fromarray(GREY), "GIF"))
    struct.pack_into("<HH", gif, 6, 65_535, 65_535)
    yield "gif of 65535 x 65535", bytes(gif), r"is too large \(.*\); scale it down"
    yield "ppm of 50000 x 50000", b"P6\n50000 50000\n255\n", r"is too large \(.*\); scale it down"
    noisy = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000"):
        data = saved(noisy, kind)
        for part in (1, 30, 70):
            cut = data[: max(3, len(data) * part // 100)]
            yield f"{kind.lower()} of which {part}% are there", cut, r"(cannot be decoded|is not an image)"
    damaged = bytearray(png(noisy, 2, 8))
    damaged[len(damaged) // 2] ^= 1
    yield "png with a bit flipped", bytes(damaged), r"cannot be decoded"
    text = bytearray(png(RGB, 2, 8, before=chunk(b"tEXt", b"Comment\0text")))
    text[text.index(b"Comment")] ^= 1
    yield "png with a bit of a text flipped", bytes(text), r"(cannot be decoded|is not an image)"


FAMILIES: list[Callable[[], Iterator[Odd]]] = [pngs, texts, orientations, jpegs, tiffs, others, refused]
