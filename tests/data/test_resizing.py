"""The square that is cut out of a resized picture: Pillow's values, at the cost of the square."""

import numpy as np
import pytest
from PIL import Image

from flax_diffusion.core.data.images import resizing
from flax_diffusion.core.data.images.transforms import FILTERS, ImageTransform


@pytest.fixture
def only_the_square(monkeypatch):
    """Every picture that grows takes the way of strips."""
    monkeypatch.setattr(resizing, "_ALWAYS_SMALL", 1)
    monkeypatch.setattr(resizing, "_MAX_GROWTH", 0)


@pytest.mark.usefixtures("only_the_square")
@pytest.mark.parametrize("resample", list(FILTERS))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_equals_the_whole_resized_and_then_cropped(resample, mode):
    rng = np.random.default_rng(0)
    for number in range(150):
        short, side = int(rng.integers(1, 40)), int(rng.integers(40, 60))
        long = int(short * rng.uniform(1, 30)) + 1
        width, height = (short, long) if number % 2 else (long, short)
        pixels = rng.integers(0, 256, (height, width, 3) if mode == "RGB" else (height, width), dtype=np.uint8)
        pixels = pixels // 128 * 255 if number % 3 else pixels  # black and white reach beyond both ends
        image = Image.fromarray(pixels)
        size = (side, int(side * height / width)) if number % 2 else (int(side * width / height), side)
        left, top = (int(rng.integers(0, one - side + 1)) for one in size)
        expected = image.resize(size, FILTERS[resample]).crop((left, top, left + side, top + side))
        part = resizing.resize_part(image, size, (left, top), (side, side), FILTERS[resample])
        assert part.mode == mode
        np.testing.assert_array_equal(np.asarray(part), np.asarray(expected), str((image.size, size, left, top)))


@pytest.mark.parametrize("interpolation", list(FILTERS))
@pytest.mark.parametrize("resize_mode", ["crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 2**20), (2**20, 1), (7, 20_000), (3, 400)])
def test_memory_is_bounded_by_result_and_picture(size, resize_mode, interpolation, monkeypatch):
    image = Image.new("RGB", size, (10, 20, 30))
    pixels = []
    resize = Image.Image.resize

    def counted(self, size, *arguments):
        pixels.append(size[0] * size[1])
        return resize(self, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", counted)
    transform = ImageTransform(resolution=256, resize_mode=resize_mode, center_crop=True, interpolation=interpolation)
    done = transform(image, lambda stream: np.random.default_rng(0))
    assert max(pixels) <= 4 * max(256**2, size[0] * size[1], 2**22)
    expected = np.array([10, 20, 30], np.float32) / 127.5 - 1
    np.testing.assert_allclose(done.pixel_values, np.broadcast_to(expected[:, None, None], (3, 256, 256)), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_a_strip_at_the_size_of_stable_diffusion(size):
    """Each of 3,000 pixels becomes a square of 512; the one in the middle is what is kept, with parts of others."""
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    transform = ImageTransform(resolution=512, center_crop=True, interpolation="nearest")
    done = transform(Image.fromarray(values), lambda stream: np.random.default_rng(0))
    line = values.reshape(3000, 3)
    top = (3000 * 512 - 512) // 2
    rows = line[(top + np.arange(512)) // 512]
    expected = rows[:, None] if size[0] == 1 else rows[None]
    shown = np.round((done.pixel_values.transpose(1, 2, 0) + 1) * 127.5)
    np.testing.assert_array_equal(shown, np.broadcast_to(expected, (512, 512, 3)))
    assert done.place.crop_top_left == ((top, 0) if size[0] == 1 else (0, top))
