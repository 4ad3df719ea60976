"""Pixel for pixel what torchvision's transforms compute on PIL images, by their documented formulas."""

import numpy as np
import pytest
import torch
from PIL import Image

from flax_diffusion.core.data.images.transforms import FILTERS, ImageTransform, scale
from flax_diffusion.core.randomness.streams import Stream, example_rng


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rng(index=0):
    return lambda stream: example_rng(0, stream, 0, index)


def no_rng(stream):
    raise AssertionError(f"drew from {stream.name}")


def to_tensor_and_normalize(image):
    """ToTensor, then Normalize([0.5], [0.5]), as torch computes them."""
    tensor = torch.from_numpy(np.array(image)).float().div(255)
    tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
    return tensor.sub(0.5).div(0.5).numpy()


SIZES = [(40, 30), (30, 40), (33, 33), (101, 17), (16, 16), (16, 23), (5, 7), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", list(FILTERS))
def test_center_crop(size, interpolation):
    image = picture(*size)
    width, height = size
    short, long = min(size), max(size)
    scaled = int(16 * long / short)
    resized = image.resize((16, scaled) if width <= height else (scaled, 16), getattr(Image, interpolation.upper()))
    top, left = int(round((resized.height - 16) / 2.0)), int(round((resized.width - 16) / 2.0))  # noqa: RUF046
    expected = to_tensor_and_normalize(resized.crop((left, top, left + 16, top + 16)))
    done = ImageTransform(resolution=16, interpolation=interpolation, center_crop=True)(image, no_rng)
    assert done.pixel_values.dtype == np.float32
    np.testing.assert_array_equal(done.pixel_values, expected)
    assert done.place.original == (width, height)
    assert done.place.crop_top_left == (top, left)


@pytest.mark.parametrize("size", SIZES)
def test_stretch(size):
    image = picture(*size)
    expected = to_tensor_and_normalize(image.resize((16, 16), Image.Resampling.BILINEAR))
    done = ImageTransform(resolution=16, resize_mode="stretch")(image, no_rng)
    np.testing.assert_array_equal(done.pixel_values, expected)
    assert done.place.crop_top_left == (0, 0)


def test_random_crop_reaches_every_offset():
    image = picture(16, 20)
    transform = ImageTransform(resolution=16)
    seen = set()
    for index in range(60):
        done = transform(image, rng(index))
        top, left = done.place.crop_top_left
        seen.add(top)
        assert left == 0
        np.testing.assert_array_equal(done.pixel_values, to_tensor_and_normalize(image.crop((0, top, 16, top + 16))))
    assert seen == {0, 1, 2, 3, 4}


def test_flip():
    image = picture(20, 16)
    transform = ImageTransform(resolution=16, center_crop=True, random_flip=True)
    plain = to_tensor_and_normalize(image.crop((2, 0, 18, 16)))
    flips = []
    for index in range(400):
        done = transform(image, rng(index))
        flipped = rng(index)(Stream.FLIP).random() < 0.5
        np.testing.assert_array_equal(done.pixel_values, plain[:, :, ::-1] if flipped else plain)
        flips.append(flipped)
    assert 160 < sum(flips) < 240  # 4 standard errors


def test_place_of_the_crop_in_the_flipped_picture():
    image = picture(21, 16)
    transform = ImageTransform(resolution=16, random_flip=True)
    whole = scale(np.asarray(image))
    for index in range(20):
        done = transform(image, rng(index))
        seen = whole[:, :, ::-1] if rng(index)(Stream.FLIP).random() < 0.5 else whole
        left = done.place.crop_top_left[1]
        np.testing.assert_array_equal(done.pixel_values, seen[:, :, left : left + 16])


def test_one_channel():
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    done = ImageTransform(resolution=8, channels=1)(Image.fromarray(grey).convert("RGB"), no_rng)
    np.testing.assert_array_equal(done.pixel_values, to_tensor_and_normalize(grey))  # back to the same grey


def test_scale_covers_every_value():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(scale(values), to_tensor_and_normalize(values))
    assert (scale(values).min(), scale(values).max()) == (-1, 1)
