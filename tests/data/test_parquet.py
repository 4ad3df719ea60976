"""Parquet: the forms a picture may have, the unpacked copy, the mistakes."""

import pickle
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.data.sources.parquet import open_parquet
from flax_diffusion.core.errors import DataError


def png(value):
    buffer = BytesIO()
    Image.new("RGB", (2, 2), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def table(first, count, form="struct"):
    images = {
        "struct": [{"bytes": png(n), "path": f"{n}.png"} for n in range(first, first + count)],
        "bytes": [png(n) for n in range(first, first + count)],
        "path": [f"images/{n}.png" for n in range(first, first + count)],
    }[form]
    return pa.table(
        {"image": images, "text": [f"number {n}" for n in range(first, first + count)], "other": [0] * count}
    )


def red(record):
    return decode(record).getpixel((0, 0))[0]


@pytest.mark.parametrize("form", ["struct", "bytes", "path"])
def test_forms(tmp_path, form):
    file = tmp_path / "data.parquet"
    pq.write_table(table(0, 4, form), file)
    (tmp_path / "images").mkdir()
    for n in range(4):
        (tmp_path / "images" / f"{n}.png").write_bytes(png(n))
    source = open_parquet([file], cache_dir=tmp_path / "cache")
    assert [(red(source[n]), source[n].caption) for n in range(4)] == [(n, f"number {n}") for n in range(4)]
    assert source[3].name == f"{file} row 3"


def test_folder_of_files(tmp_path):
    # Row groups of 100 and record batches of 256 cut at different rows.
    data = tmp_path / "data"
    data.mkdir()
    numbers = pa.table({"image": [str(n).encode() for n in range(900)], "text": [str(n) for n in range(900)]})
    pq.write_table(numbers.slice(0, 700), data / "part-0.parquet", row_group_size=100)
    pq.write_table(numbers.slice(700), data / "part-1.parquet")
    source = open_source(train_data_dir=data, cache_dir=tmp_path / "cache")
    assert [source[n].caption for n in range(900)] == [str(n) for n in range(900)]
    assert [int(source[n].image) for n in (0, 255, 256, 699, 700, 899)] == [0, 255, 256, 699, 700, 899]
    assert source[699].name == f"{data / 'part-0.parquet'} row 699"
    assert source[700].name == f"{data / 'part-1.parquet'} row 0"
    assert pickle.loads(pickle.dumps(source))[800].caption == "800"  # noqa: S301


@pytest.mark.parametrize("count", [1, 256, 300, 701])
def test_max_samples(tmp_path, count):
    numbers = pa.table({"image": [b"x"] * 900, "text": [str(n) for n in range(900)]})
    for part, (first, length) in enumerate(((0, 700), (700, 200))):
        pq.write_table(numbers.slice(first, length), tmp_path / f"{part}.parquet")
    files = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    source = open_parquet(files, max_samples=count, cache_dir=tmp_path)
    assert len(source) == count
    assert source[count - 1].caption == str(count - 1)


def test_unpacked_once_and_again_when_the_file_changes(tmp_path):
    file, cache = tmp_path / "data.parquet", tmp_path / "cache"
    pq.write_table(table(0, 4), file)
    first = open_parquet([file], cache_dir=cache)
    assert open_parquet([file], cache_dir=cache).arrow_file == first.arrow_file
    pq.write_table(table(5, 2), file)
    second = open_parquet([file], cache_dir=cache)
    assert [red(second[n]) for n in range(2)] == [5, 6]
    assert [path.suffix for path in cache.iterdir()] == [".arrow", ".arrow"]


def test_default_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    pq.write_table(table(0, 1), tmp_path / "data.parquet")
    source = open_parquet([tmp_path / "data.parquet"], caption_column=None)
    assert source.arrow_file.parent == tmp_path / "home" / "flax_diffusion"
    assert source[0].caption is None


def test_several_captions(tmp_path):
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table({"image": [png(0)], "text": [["one", "uno"]]}), file)
    assert open_parquet([file], cache_dir=tmp_path)[0].caption == ["one", "uno"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": [b""], "text": ["x"]}, r"image_column is image, but .* columns img, text; give --image_column img$"),
        (
            {"image": [b""], "zzz": ["x"]},
            r"caption_column is text, but .* has the columns image, zzz; give --caption_column zzz$",
        ),
        ({"image": [1], "text": ["x"]}, r"image_column image in .* is of type int64; it must hold image files"),
        ({"image": [b""], "text": [1]}, r"caption_column text in .* is of type int64; it must be text"),
        ({"image": [b"", b""], "text": ["x", None]}, r"row 1 has no text; give it one"),
        ({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}, r"holds no rows"),
    ],
)
def test_mistakes(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=message):
        open_parquet([tmp_path / "data.parquet"], cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_null_and_escaping_images(tmp_path):
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table({"image": [None, "../secret.png", "sub/a.png"], "text": ["x", "y", "z"]}), file)
    (tmp_path / "sub").symlink_to(tmp_path.parent)
    source = open_parquet([file], cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"row 0 holds no image"):
        source[0]
    with pytest.raises(DataError, match=r"row 1: image path \.\./secret\.png: it leaves the folder"):
        source[1]
    with pytest.raises(DataError, match=r"row 2: image path sub/a\.png: a link to a folder leads to it"):
        source[2]


def test_not_parquet(tmp_path):
    Path(tmp_path / "data.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"is not a readable Parquet file"):
        open_source(train_data_dir=tmp_path / "data.parquet")


def test_types_that_differ_between_files(tmp_path):
    pq.write_table(table(0, 1), tmp_path / "0.parquet")
    pq.write_table(table(0, 1, "bytes"), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"1\.parquet has other column types than"):
        open_parquet([tmp_path / "0.parquet", tmp_path / "1.parquet"], cache_dir=tmp_path / "cache")


def test_cache_that_cannot_be_written(tmp_path):
    pq.write_table(table(0, 1), tmp_path / "data.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"cannot unpack Parquet into .*; free some space there or give another cache_dir"
    ):
        open_parquet([tmp_path / "data.parquet"], cache_dir=tmp_path / "file" / "cache")


HUB = ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation-00000-of-00001"]


@pytest.mark.parametrize("layout", ["{}", "data/{}", "default/{}"])
def test_a_local_copy_of_a_hub_dataset_gives_its_training_split(tmp_path, layout):
    for number, name in enumerate(HUB):
        file = tmp_path / "data" / f"{layout.format(name)}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(10 * number, 2), file)
    source = open_source(train_data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    assert [red(source[n]) for n in range(len(source))] == [0, 1, 10, 11]
    source = open_source(train_data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", split="test")
    assert [red(source[n]) for n in range(len(source))] == [20, 21]


def test_folders_of_splits(tmp_path):
    """As the Hub's own conversion to Parquet has them."""
    for number, name in enumerate(("train", "test")):
        (tmp_path / "default" / name).mkdir(parents=True)
        pq.write_table(table(10 * number, 2), tmp_path / "default" / name / "0000.parquet")
    source = open_source(train_data_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert [red(source[n]) for n in range(len(source))] == [0, 1]


def test_a_split_beside_a_file_of_none(tmp_path):
    for name in ("test", "more"):
        pq.write_table(table(0, 1), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"the split test \(test\.parquet\) beside files of no split \(more\.parquet\)"):
        open_source(train_data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_a_configuration_is_not_passed_over(tmp_path):
    pq.write_table(table(0, 1), tmp_path / "train.parquet")
    for place, says in (
        ({"train_data_dir": tmp_path}, r"name cats: .* has no README\.md that lists configurations; give .*/cats if"),
        ({"train_data_dir": tmp_path / "train.parquet"}, r"name cats: .*train\.parquet is one file; leave it out$"),
        ({"dataset_name": "digits"}, r"name cats: the digits have one only; leave it out$"),
    ):
        with pytest.raises(DataError, match=says):
            open_source(**place, dataset_config_name="cats")


def test_captions_that_are_no_text(tmp_path):
    file = tmp_path / "data.parquet"
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"image": [png(0)], "text": broken}), file)
    with pytest.raises(DataError, match=r"row 0 holds text that is not UTF-8"):
        open_parquet([file], cache_dir=tmp_path)[0]
    pq.write_table(pa.table({"image": [png(0)] * 3, "text": [["a"], ["b", None], []]}), file)
    source = open_parquet([file], cache_dir=tmp_path)
    assert source[0].caption == ["a"]
    with pytest.raises(DataError, match=r"row 1 has a null among its captions; remove it"):
        source[1]
    with pytest.raises(DataError, match=r"row 2 has no caption; give it one"):
        source[2]


def test_damaged_in_the_middle(tmp_path):
    file = tmp_path / "data.parquet"
    pq.write_table(table(0, 200), file)
    data = bytearray(file.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"data\.parquet is not a readable Parquet file .*; download it again"):
        open_parquet([file], cache_dir=tmp_path / "cache")


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "train.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"train\.parquet does not exist, or is a link to nothing; download it again"):
        open_source(train_data_dir=tmp_path)


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(DataError, match=r"train\.parquet is a Git LFS pointer; `git lfs pull` downloads"):
        open_source(train_data_dir=tmp_path)
