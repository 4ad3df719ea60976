"""What `open_source` accepts, and the digits."""

import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from flax_diffusion.core.data.sources.folders import FolderSource
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.errors import DataError


def test_digits():
    source = open_source(dataset_name="digits")
    assert len(source) == 1797
    record = source[13]
    assert record.image.dtype == np.uint8
    assert record.image.shape == (8, 8)
    assert record.caption == "a handwritten three"
    assert record.name == "digits[13]"
    scans, labels = load_digits(return_X_y=True)
    levels = [round(value * 255 / 16) for value in range(17)]
    for index in (0, 5, 1796):
        expected = np.array([levels[int(value)] for value in scans[index]]).reshape(8, 8)
        np.testing.assert_array_equal(source[index].image, expected)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert [source[n].caption.split()[-1] for n in range(1797)] == [words[label] for label in labels]


def test_digits_options():
    source = open_source(dataset_name="digits", caption_column=None, max_train_samples=5)
    assert len(source) == 5
    assert source[4].caption is None
    assert len(pickle.loads(pickle.dumps(source))) == 5  # noqa: S301


@pytest.mark.parametrize("by", ["imagefolder", "train_data_dir", "dataset_name"])
def test_three_ways_to_name_a_folder(tmp_path, by):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    place = {
        "imagefolder": {"dataset_name": "imagefolder", "train_data_dir": tmp_path},
        "train_data_dir": {"train_data_dir": str(tmp_path)},
        "dataset_name": {"dataset_name": str(tmp_path)},
    }[by]
    source = open_source(**place, caption_column=None)
    assert isinstance(source, FolderSource)
    assert source.files == ["a.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no training data named; give --dataset_name or --train_data_dir"),
        ({"dataset_name": "digits", "train_data_dir": "x"}, "--dataset_name digits and --train_data_dir x exclude"),
        ({"dataset_name": "imagefolder"}, "needs --train_data_dir"),
        ({"dataset_name": "digits", "max_train_samples": 0}, "--max_train_samples 0: must be 1 or more"),
        ({"train_data_dir": "does/not/exist"}, "does/not/exist does not exist"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(DataError, match=message) as caught:
        open_source(**options)
    assert "\n" not in str(caught.value)
