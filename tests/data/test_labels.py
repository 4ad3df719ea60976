"""Classes of pictures: from folders, from columns, from several sources."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import OBJECTIVE

from flax_diffusion.core.data.batches import ExampleFn, LabelDropout
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.sources import hub
from flax_diffusion.core.data.sources.labels import with_labels
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.objectives.noising import NoiseSpec
from flax_diffusion.core.tasks.common.dataset import DatasetConfig, open_dataset


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def animals(tmp_path):
    """Two classes, the second with a folder inside."""
    for number, name in enumerate(("dog/a.png", "cat/b.png", "cat/inside/c.png", "dog/d.png")):
        picture(tmp_path / "animals" / name, number)
    return tmp_path / "animals"


def opened(column=None, **where):
    return with_labels(open_source(caption_column=None, **where), column)


def labels(source):
    return [(source[index].name.rpartition("/")[2], source[index].label) for index in range(len(source))]


def test_the_digits():
    source = opened(dataset_name="digits", max_train_samples=12)
    assert source.classes[:3] == ("zero", "one", "two")
    assert [source[index].label for index in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    with pytest.raises(DataError, match="--label_column is kind, but digits has the columns label; give --label_col"):
        opened("kind", dataset_name="digits")


def test_folders_are_classes_in_the_order_of_their_names(animals):
    source = opened(train_data_dir=animals)
    assert source.classes == ("cat", "dog")
    assert sorted(labels(source)) == [("a.png", 1), ("b.png", 0), ("c.png", 0), ("d.png", 1)]
    assert [bool(source[index].name.count("/cat/")) for index in range(4)] == [one == 0 for one in source.labels]


def test_the_split_is_no_class(animals, tmp_path):
    """Of `train` and `val` the former is taken; a `train` alone is no class either."""
    for split in ("train", "val"):
        shutil.copytree(animals, tmp_path / "both" / split)
    shutil.copytree(animals, tmp_path / "one" / "train")
    for folder in ("both", "one"):
        source = opened(train_data_dir=tmp_path / folder)
        assert (source.classes, len(source)) == (("cat", "dog"), 4)


def test_a_first_part_of_the_pictures_keeps_all_classes(animals):
    source = opened(train_data_dir=animals, max_train_samples=2)
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0]


def test_folders_that_are_no_classes(animals):
    (animals / "bird").mkdir()
    with pytest.raises(DataError, match=r"bird: is the folder of a class and holds no pictures; add some, or remove"):
        opened(train_data_dir=animals)
    (animals / "bird").rmdir()
    picture(animals / "e.png")
    with pytest.raises(DataError, match=r"1 of 5 pictures in .* lie in no folder of a class: e\.png; put the pictures"):
        opened(train_data_dir=animals)
    with pytest.raises(DataError, match=r"--label_column kind: .* has no metadata\.jsonl or metadata\.csv; leave it"):
        opened("kind", train_data_dir=animals)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_metadata_tell_classes(animals, form):
    rows = [("dog/a.png", 2), ("cat/b.png", 0), ("cat/inside/c.png", 0), ("dog/d.png", 1)]
    if form == "csv":
        text = "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows)
    else:
        text = "".join(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in rows)
    file = animals / f"metadata.{form}"
    file.write_text(text)
    source = opened(train_data_dir=animals)
    assert source.classes == ("0", "1", "2")
    assert sorted(labels(source)) == [("a.png", 2), ("b.png", 0), ("c.png", 0), ("d.png", 1)]
    with pytest.raises(DataError, match=r"--label_column is kind, but .* has the columns file_name, label"):
        opened("kind", train_data_dir=animals)
    file.write_text(text.replace("label", "other"))
    assert opened(train_data_dir=animals).classes == ("cat", "dog")
    assert opened("other", train_data_dir=animals).classes == ("0", "1", "2")
    file.write_text("".join(line for line in text.splitlines(keepends=True) if "b.png" not in line))
    with pytest.raises(DataError, match=r"1 of 4 pictures in .* have no label: cat/b\.png; add it to their rows"):
        opened(train_data_dir=animals)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["a", True], r"its class is True; it must be a name or a number from 0"),
        ([0, -1], r"its class is -1; it must be a name or a number"),
        ([0, 1.5], r"its class is 1\.5; it must be"),
        ([["a"], "b"], r"its class is \['a'\]; it must be"),
    ],
)
def test_what_is_no_class(animals, values, says):
    lines = [{"file_name": f"dog/{name}.png", "label": value} for name, value in zip("ad", values, strict=True)]
    (animals / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(animals / "cat")
    with pytest.raises(DataError, match=says):
        opened(train_data_dir=animals)


def test_two_rows_that_differ(animals):
    lines = [{"file_name": "dog/a.png", "label": 0}, {"file_name": "dog/a.png", "label": 1}]
    (animals / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"row 2 gives dog/a\.png the class 1, and a row before it 0; remove one"):
        opened(train_data_dir=animals)


def encoded(tmp_path, count):
    return [
        {"bytes": picture(tmp_path / f"{number}.png", number).read_bytes(), "path": None} for number in range(count)
    ]


def test_parquet_columns(tmp_path):
    table = {"image": encoded(tmp_path, 4), "label": [1, 0, 2, 1], "kind": ["b", "a", "c", "b"], "bad": [0, None, 1, 2]}
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        part = {name: column[2 * number : 2 * number + 2] for name, column in table.items()}
        pq.write_table(pa.table(part), data / f"{number}.parquet")
    cache = tmp_path / "cache"
    numbers = opened(train_data_dir=data, cache_dir=cache)
    assert (numbers.classes, numbers.labels.tolist()) == (("0", "1", "2"), [1, 0, 2, 1])
    names = opened("kind", train_data_dir=data, cache_dir=cache, max_train_samples=3)
    assert (names.classes, names.labels.tolist()) == (("a", "b", "c"), [1, 0, 2])
    with pytest.raises(DataError, match=r"row 1: its class is None; it must be a name or a number"):
        opened("bad", train_data_dir=data, cache_dir=cache)
    with pytest.raises(
        DataError, match=r"--label_column image in .*0\.parquet is of type .*; it must be numbers or tex"
    ):
        opened("image", train_data_dir=data, cache_dir=cache)


def test_names_that_datasets_wrote_into_parquet(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant"])})
    rows = {"image": encoded(tmp_path, 3), "label": [1, 0, 1]}
    made = datasets.Dataset.from_dict(rows, features)
    (tmp_path / "data").mkdir()
    made.to_parquet(tmp_path / "data/train.parquet")
    source = opened(train_data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    assert (source.classes, source.labels.tolist()) == (("zebra", "ant"), [1, 0, 1])


def test_names_of_a_dataset_of_the_hub(tmp_path, monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant"])})
    made = datasets.Dataset.from_dict({"image": encoded(tmp_path, 3), "label": [1, 0, 1]}, features)
    monkeypatch.setattr(hub.datasets, "load_dataset", lambda *_, **__: made)
    source = opened(dataset_name="me/animals", max_train_samples=2)
    assert (source.classes, source.labels.tolist()) == (("zebra", "ant"), [1, 0])
    with pytest.raises(DataError, match="--label_column is fine, but dataset me/animals has the columns image, label"):
        opened("fine", dataset_name="me/animals")


def test_several_folders_share_their_classes(animals, tmp_path):
    picture(tmp_path / "more/bird/e.png")
    picture(tmp_path / "more/dog/f.png")
    config = DatasetConfig(train_data_dir=f"{animals}:2,{tmp_path / 'more'}")
    source = with_labels(open_dataset(config), None)
    assert source.classes == ("bird", "cat", "dog")
    assert len(source) == 10
    by_name = dict(labels(source))
    assert by_name == {"a.png": 2, "b.png": 1, "c.png": 1, "d.png": 2, "e.png": 0, "f.png": 2}


def test_labels_are_dropped_by_seed_and_example():
    source = opened(dataset_name="digits")
    transform = ImageTransform(
        resolution=8, resize_mode="crop", center_crop=True, random_flip=False, interpolation="bilinear", channels=1
    )
    make = ExampleFn(
        transform=transform, noise=NoiseSpec(shape=(1, 8, 8), objective=OBJECTIVE), labels=LabelDropout(0.25, 10)
    )
    told = np.array([make(source, 3, 1, index)["class_labels"] for index in range(1000)])
    again = make(source, 3, 1, 77)["class_labels"]
    assert (again.dtype, again.shape, int(again)) == (np.int32, (), told[77])
    dropped = told == 10
    assert 0.2 < dropped.mean() < 0.3
    assert (told[~dropped] == source.labels[:1000][~dropped]).all()
    other = [int(make(source, 3, 2, index)["class_labels"]) == 10 for index in range(1000)]
    assert (np.array(other) != dropped).mean() > 0.2  # another epoch drops others
    plain = ExampleFn(transform=transform, noise=NoiseSpec(shape=(1, 8, 8), objective=OBJECTIVE), labels=LabelDropout())
    np.testing.assert_array_equal(plain(source, 3, 1, 0)["noise"], make(source, 3, 1, 0)["noise"])
    with pytest.raises(DataError, match=r"digits\[0\] has no class; give it one"):
        plain(source.source, 3, 1, 0)
    with pytest.raises(ValueError, match="there is no null class"):
        LabelDropout(0.1, None)
