"""Folders of images: every way to write captions, every mistake."""

import json
import logging
import os
import pickle

import pytest
from PIL import Image

from flax_diffusion.core.data.images.decoding import FORMATS
from flax_diffusion.core.data.sources.folders import IMAGE_EXTENSIONS, UNREAD_EXTENSIONS, open_folder
from flax_diffusion.core.errors import DataError


def write(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def contents(source):
    return [(record.image.name, record.caption) for record in (source[n] for n in range(len(source)))]


def test_bare_folder_is_sorted_and_nested(tmp_path):
    write(tmp_path, ["b.png", "a.JPG", "sub/c.webp", "sub/.hidden.png", ".git/x.png"])
    (tmp_path / "notes.md").write_text("not an image")
    source = open_folder(tmp_path, caption_column=None)
    assert source.files == ["a.JPG", "b.png", "sub/c.webp"]
    assert source[2].name == str(tmp_path / "sub" / "c.webp")
    assert open_folder(tmp_path, caption_column=None, max_samples=2).files == ["a.JPG", "b.png"]


def test_text_files(tmp_path):
    write(tmp_path, ["b.png", "sub/a.jpg"])
    (tmp_path / "b.txt").write_text("\ufeffa red\n square \n", encoding="utf-8")
    (tmp_path / "sub" / "a.txt").write_text("größer", encoding="utf-8")
    source = pickle.loads(pickle.dumps(open_folder(tmp_path)))  # noqa: S301
    assert contents(source) == [("b.png", "a red square"), ("a.jpg", "größer")]


def test_text_file_that_is_not_utf8(tmp_path):
    write(tmp_path, ["a.png"])
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"caption file .*a\.txt cannot be read .* it must be UTF-8 text"):
        open_folder(tmp_path)[0]


@pytest.mark.parametrize("column", ["file_name", "image_file_name", "image"])
def test_jsonl(tmp_path, column):
    write(tmp_path, ["a.png", "b.png"])
    lines(tmp_path / "metadata.jsonl", [{column: "b.png", "text": "two"}, {column: "a.png", "text": ["one", "uno"]}])
    assert contents(open_folder(tmp_path)) == [("b.png", "two"), ("a.png", ["one", "uno"])]
    assert len(open_folder(tmp_path, max_samples=1)) == 1


def test_the_column_that_names_the_picture(tmp_path):
    """One that is asked for comes before file_name, and must be there."""
    write(tmp_path, ["a.png", "b.png"])
    rows = [
        {"file_name": "a.png", "other": "b.png", "text": "x"},
        {"file_name": "b.png", "other": "a.png", "text": "y"},
    ]
    lines(tmp_path / "metadata.jsonl", rows)
    assert contents(open_folder(tmp_path, image_column="other")) == [("b.png", "x"), ("a.png", "y")]
    assert contents(open_folder(tmp_path)) == [("a.png", "x"), ("b.png", "y")]
    with pytest.raises(DataError, match=r"is othr, but .*file_name, other, text; give --image_column other$"):
        open_folder(tmp_path, image_column="othr")
    (tmp_path / "metadata.jsonl").unlink()
    for captions in ("text", None):
        with pytest.raises(DataError, match=r"--image_column other: .* holds pictures and no columns; leave it out"):
            open_folder(tmp_path, image_column="other", caption_column=captions)


def test_csv_in_subfolders(tmp_path):
    write(tmp_path, ["x/a.png", "y/images/b.png"])
    (tmp_path / "x" / "metadata.csv").write_text('file_name,caption\na.png,"one, with comma"\n', encoding="utf-8-sig")
    (tmp_path / "y" / "metadata.csv").write_text("file_name,caption\nimages/b.png,two\n")
    source = open_folder(tmp_path, caption_column="caption")
    assert contents(source) == [("a.png", "one, with comma"), ("b.png", "two")]


def test_metadata_is_not_read_without_captions(tmp_path):
    write(tmp_path, ["a.png"])
    (tmp_path / "metadata.jsonl").write_text("not json")
    assert len(open_folder(tmp_path, caption_column=None)) == 1


def test_split_subfolder(tmp_path):
    write(tmp_path, ["train/a.png", "test/b.png", "mine/c.png"])
    (tmp_path / "mine").rename(tmp_path / "validation")
    assert open_folder(tmp_path, caption_column=None).files == ["train/a.png"]
    assert open_folder(tmp_path, caption_column=None, split="test").files == ["test/b.png"]
    write(tmp_path, ["c.png"])
    with pytest.raises(
        DataError, match=r"the split \w+ \(\w+/.\.png\) beside files of no split \(c\.png\); give the folder"
    ):
        open_folder(tmp_path, caption_column=None)


@pytest.mark.parametrize("captions", ["txt", "jsonl", "none"])
@pytest.mark.parametrize(
    ("train", "others"),
    [
        ("train/{}", ["test/{}", "validation/{}"]),
        ("Training/deep/{}", ["dev/{}"]),
        ("train2017/{}", ["val2017/{}"]),
        ("data/train/{}", ["data/eval/{}"]),
        ("train_images/{}", ["test_images/{}"]),
        ("train-{}", ["test-{}", "val_{}"]),
    ],
)
def test_the_other_splits_are_left_out_and_named(tmp_path, caplog, train, others, captions):
    names = [place.format(f"{n}.png") for place in (train, *others) for n in range(2)]
    write(tmp_path, names)
    if captions == "txt":
        for name in names:
            (tmp_path / name).with_suffix(".txt").write_text("x")
    if captions == "jsonl":
        for folder in {(tmp_path / name).parent for name in names}:
            inside = [name for name in names if (tmp_path / name).parent == folder]
            lines(folder / "metadata.jsonl", [{"file_name": name.rpartition("/")[2], "text": "x"} for name in inside])
    with caplog.at_level(logging.INFO):
        source = open_folder(tmp_path, caption_column=None if captions == "none" else "text")
    if captions == "jsonl" and train == "train-{}":  # where rows name the pictures, they decide
        assert len(source) == len(names)
        return
    assert source.files == names[:2]
    assert f"2 of {len(names)} files are of the split train; left out: " in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        ["car/a.png", "boat/b.png", "test tubes/c.png"],  # classes
        ["train/a.png", "train/b.png"],  # one split
        ["validation/a.png"],
        ["train 1.png", "b.png", "test.png"],  # pictures of a train and of a test
        ["train-1.png", "training.png"],
    ],
)
def test_what_is_no_split(tmp_path, names):
    write(tmp_path, names)
    assert open_folder(tmp_path, caption_column=None).files == sorted(names)


def test_splits_without_the_one_asked_for(tmp_path):
    write(tmp_path, ["val/a.png", "test/b.png"])
    with pytest.raises(DataError, match=r"holds the splits test, validation and no train; give the folder to train on"):
        open_folder(tmp_path, caption_column=None)


def test_metadata_beside_the_splits_decides(tmp_path):
    write(tmp_path, ["train/a.png", "test/b.png"])
    lines(tmp_path / "metadata.jsonl", [{"file_name": name, "text": "x"} for name in ("train/a.png", "test/b.png")])
    assert open_folder(tmp_path).files == ["train/a.png", "test/b.png"]


@pytest.mark.parametrize("name", ["a.jfif", "b.JPE", "c.apng", "d.j2k", "e.pbm", "f.dib", "g.pnm", "h.mpo"])
def test_all_names_of_the_formats_that_are_read(tmp_path, name):
    Image.new("1", (4, 4), 1).convert("L").save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / name)
    assert open_folder(tmp_path, caption_column=None).files == [name]


def test_pillows_names_of_the_formats_are_known():
    Image.init()
    names = {name for name, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert names - set(IMAGE_EXTENSIONS) == {".pfm"}  # of floats
    assert not set(IMAGE_EXTENSIONS) & set(UNREAD_EXTENSIONS)


def test_pictures_of_other_kinds_are_named(tmp_path, caplog):
    write(tmp_path, ["a.png"])
    for name in ("b.heic", "c.HEIC", "d.svg", "e.psd"):
        (tmp_path / name).write_bytes(b"x")
    assert open_folder(tmp_path, caption_column=None).files == ["a.png"]
    assert "4 pictures in unsupported formats are left out: b.heic, c.HEIC, d.svg, …; convert" in caplog.text
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"holds no images; .*; it holds \.heic \.svg \.psd"):
        open_folder(tmp_path, caption_column=None)


def test_links_to_folders_are_named(tmp_path, caplog):
    data = tmp_path / "data"
    write(tmp_path, ["other/b.png"])
    data.mkdir()
    (data / "more").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match=r"holds no images; .*; links to folders are not followed: more"):
        open_folder(data, caption_column=None)
    write(data, ["a.png"])
    assert open_folder(data, caption_column=None).files == ["a.png"]
    assert "links to folders are left out: more; give their targets" in caplog.text


def test_a_subfolder_that_cannot_be_read(tmp_path, monkeypatch):
    write(tmp_path, ["a.png", "sub/b.png"])
    scandir = os.scandir

    def denied(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"sub cannot be read \(Permission denied\); make it readable"):
        open_folder(tmp_path, caption_column=None)


def test_no_images(tmp_path):
    (tmp_path / "a.gifv").write_text("")
    with pytest.raises(DataError, match=r"holds no images; looked for \.jpg \.jpeg \.png"):
        open_folder(tmp_path, caption_column=None)


def test_captions_missing(tmp_path):
    write(tmp_path, ["a.png", "b.png", "c.png", "d.png", "e.png"])
    with pytest.raises(DataError, match=r"5 of 5 images in .* have no caption: a\.png, b\.png, c\.png, …; list"):
        open_folder(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match=r"4 of 5 images in .* have no caption: b\.png"):
        open_folder(tmp_path)
    lines(tmp_path / "metadata.jsonl", [{"file_name": f"{name}.png", "text": "x"} for name in "abc"])
    with pytest.raises(DataError, match=r"2 of 5 images in .* have no caption: d\.png, e\.png;"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "a.png", "txt": "x"}, r"caption_column is text, but .*metadata.jsonl has the columns "
         r"file_name, txt; give --caption_column txt$"),
        ({"file_name": "a.png", "caption": "x"}, r"the columns file_name, caption; give --caption_column caption$"),
        ({"file_name": "a.png", "one": "x", "two": "y"}, r"file_name, one, two; give one of them as --caption_column"),
        ({"name": "a.png", "text": "x"}, r"metadata.jsonl has no column file_name; it has name, text"),
        ({"file_name": "../a.png", "text": "x"}, r"row 1: file_name ../a.png: it leaves the folder"),
        ({"file_name": "/etc/a.png", "text": "x"}, r"row 1: file_name /etc/a.png: it leaves the folder"),
        ({"file_name": "x/../../a.png", "text": "x"}, r"leaves the folder"),
        ({"file_name": None, "text": "x"}, r"row 1: file_name is None; it must be a path"),
        ({"file_name": "a.png", "text": 5}, r"row 1: the caption is 5; it must be text or a list"),
        ({"file_name": "a.png", "text": []}, r"row 1: the caption is \[\]; it must be"),
        ({"file_name": "a.png", "text": None}, r"1 of 1 images in .* have no caption: a.png"),
        ({"file_name": "z.png", "text": "x"}, r"names 1 files that do not exist: z.png; names are relative to the"),
    ],
)  # fmt: skip
def test_bad_rows(tmp_path, row, message):
    write(tmp_path, ["a.png"])
    lines(tmp_path / "metadata.jsonl", [row])
    with pytest.raises(DataError, match=message) as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{oops\n', r"line 2 is not JSON"),
        ("metadata.jsonl", b'["a.png"]\n', r"line 1 is \[\"a.png\"\]; write one object per line"),
        ("metadata.jsonl", b"\xff\n", r"it must be UTF-8"),
        ("metadata.csv", b"\xff\n", r"it must be CSV in UTF-8"),
        ("metadata.csv", b"", r"has no column file_name; it has no rows"),
    ],
)
def test_broken_metadata(tmp_path, name, content, message):
    write(tmp_path, ["a.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_folder(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    write(tmp_path, ["a.png"])
    with pytest.raises(DataError, match=r"is a file; give a folder, or a \.parquet or \.tar file"):
        open_folder(tmp_path / "a.png")


def test_images_and_parquet_do_not_mix(tmp_path):
    write(tmp_path, ["a.png"])
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"both images and Parquet files \(t\.parquet\)"):
        open_folder(tmp_path)
