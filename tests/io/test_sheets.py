"""Sheets of pictures: places, enlargement, captions."""

import numpy as np
import pytest
from PIL import Image

from flax_diffusion.core.io.sheets import contact_sheet, save_picture


def test_small_pictures_are_enlarged_by_a_whole_factor():
    images = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8, 1)
    sheet = np.asarray(contact_sheet(images))
    factor = 18  # the least by which 30 pixels, three pictures with their borders, reach 512
    assert sheet.shape == (2 * 10 * factor, 3 * 10 * factor)
    assert np.all(sheet[10 * factor :, 2 * 10 * factor :] == 255)  # the place of no picture
    second = sheet[factor : 9 * factor, 11 * factor : 19 * factor]
    np.testing.assert_array_equal(second[::factor, ::factor], images[1, ..., 0])
    np.testing.assert_array_equal(np.asarray(contact_sheet(images, 2)).shape, (3 * 10 * factor, 2 * 10 * factor))


def test_pictures_of_several_sizes_lie_in_the_middle():
    images = [np.zeros((512, 256, 3), np.uint8), np.zeros((256, 512, 3), np.uint8)]
    sheet = np.asarray(contact_sheet(images))
    assert sheet.shape == (544, 2 * 544, 3)
    rows, columns = np.where(sheet[:, :544, 0] == 0)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 527, 144, 399)


@pytest.mark.parametrize("text", ["a dog", "a very long text " * 40, "größer 犬\nseed 3", ""])
def test_captions_are_under_the_pictures(text):
    images = np.zeros((4, 64, 64, 3), np.uint8)
    bare, sheet = np.asarray(contact_sheet(images)), np.asarray(contact_sheet(images, captions=[text] * 4))
    assert sheet.shape[1] == bare.shape[1]
    strip = (sheet.shape[0] - bare.shape[0]) // 2
    assert 0 < strip < 100
    place = bare.shape[0] // 2
    np.testing.assert_array_equal(sheet[:place], bare[:place])
    assert bool(np.any(sheet[place : place + strip] < 128)) == bool(text)
    edges = sheet[place : place + strip, [0, 1, bare.shape[1] // 2 - 1, bare.shape[1] // 2, -1]]
    assert np.all(edges == 255)  # no caption reaches into another's place


def test_texts_in_the_file(tmp_path):
    save_picture(Image.new("L", (2, 2)), tmp_path / "a.png", {"prompt": "größer 犬"})
    with Image.open(tmp_path / "a.png") as image:
        assert dict(image.info)["prompt"] == "größer 犬"
