"""Hub datasets, with the download replaced by a table made here."""

import datasets
import numpy as np
import pytest
from PIL import Image

from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.errors import DataError


def serve(monkeypatch, columns, image_column="image"):
    dataset = datasets.Dataset.from_dict(columns)
    if image_column is not None:
        dataset = dataset.cast_column(image_column, datasets.Image())
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def pictures(count):
    return [Image.fromarray(np.full((2, 2, 3), value, np.uint8)) for value in range(count)]


def test_rows_stay_encoded(monkeypatch, tmp_path):
    asked = serve(monkeypatch, {"image": pictures(3), "text": ["a", "b", "c"], "extra": [1, 2, 3]})
    source = open_source(
        dataset_name="someone/pets", dataset_config_name="cats", split="test", cache_dir=tmp_path, max_train_samples=2
    )
    assert asked == [(("someone/pets", "cats"), {"split": "test", "cache_dir": str(tmp_path)})]
    assert len(source) == 2
    record = source[1]
    assert isinstance(record.image, bytes)
    assert (record.caption, record.name) == ("b", "someone/pets[1]")
    assert decode(record).getpixel((0, 0)) == (1, 1, 1)


def test_unconditional_and_lists(monkeypatch):
    serve(monkeypatch, {"image": pictures(1), "text": [["a", "b"]]})
    assert open_source(dataset_name="x/y", caption_column=None)[0].caption is None
    assert open_source(dataset_name="x/y")[0].caption == ["a", "b"]


def test_rows_that_name_files(monkeypatch, tmp_path):
    """Those that were downloaded with the dataset, and no others."""
    path = tmp_path / "cache" / "a.png"
    path.parent.mkdir()
    pictures(1)[0].save(path)
    serve(monkeypatch, {"image": [str(path)], "text": ["a"]})
    assert open_source(dataset_name="x/y", cache_dir=tmp_path / "cache")[0].image == path
    for elsewhere in (tmp_path / "other", tmp_path / "cache/../cachet"):
        with pytest.raises(DataError, match=r"x/y\[0\] is the file .*a\.png, which was not downloaded with"):
            open_source(dataset_name="x/y", cache_dir=elsewhere)[0]


@pytest.mark.parametrize(
    ("columns", "image_column", "message"),
    [
        ({"image": 1, "caption": ["a"]}, "image", r"caption_column is text, but dataset x/y has the columns"),
        ({"picture": 1, "text": ["a"]}, "picture", r"image_column is image, but dataset x/y has"),
        ({"image": 1, "text": [5]}, "image", r"caption_column text of dataset x/y is .*; it must be text"),
        ({"image": [5], "text": ["a"]}, None, r"image_column image of dataset x/y is .*; it must hold images"),
        ({"image": 2, "text": ["a", None]}, "image", r"1 rows of dataset x/y have no text"),
        ({"image": 0, "text": []}, "image", r"dataset x/y, split train holds no rows"),
    ],
)
def test_mistakes(monkeypatch, columns, image_column, message):
    made = {key: pictures(value) if isinstance(value, int) else value for key, value in columns.items()}
    serve(monkeypatch, made, image_column)
    with pytest.raises(DataError, match=message):
        open_source(dataset_name="x/y")


def test_not_to_be_had_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"dataset nobody/nothing \(split train\) cannot be loaded") as caught:
        open_source(dataset_name="nobody/nothing", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_picture_or_no_table(monkeypatch):
    serve(monkeypatch, {"image": [*pictures(1), None], "text": ["a", "b"]})
    with pytest.raises(DataError, match=r"^x/y\[1\] holds no image; use another dataset, or skip bad images$"):
        open_source(dataset_name="x/y")[1]
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: splits)
    with pytest.raises(DataError, match=r"^dataset x/y, split train is not a table of rows; name one split$"):
        open_source(dataset_name="x/y")
