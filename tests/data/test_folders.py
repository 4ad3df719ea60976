"""Folders of images: every way to write captions, every mistake."""

import json
import pickle

import pytest
from PIL import Image

from flax_diffusion.core.data.folders import open_folder
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
    write(tmp_path, ["train/a.png", "test/b.png"])
    assert open_folder(tmp_path, caption_column=None).files == ["a.png"]
    assert open_folder(tmp_path, caption_column=None, split="test").files == ["b.png"]
    write(tmp_path, ["c.png"])
    assert len(open_folder(tmp_path, caption_column=None)) == 3


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
         r"file_name, txt; did you mean 'txt'\?"),
        ({"name": "a.png", "text": "x"}, r"metadata.jsonl has no column file_name; it has name, text"),
        ({"file_name": "../a.png", "text": "x"}, r"row 1: file_name ../a.png: it leaves the folder"),
        ({"file_name": "/etc/a.png", "text": "x"}, r"row 1: file_name /etc/a.png: it leaves the folder"),
        ({"file_name": "x/../../a.png", "text": "x"}, r"leaves the folder"),
        ({"file_name": None, "text": "x"}, r"row 1: file_name is None; it must be a path"),
        ({"file_name": "a.png", "text": 5}, r"row 1: the caption is 5; it must be text or a list"),
        ({"file_name": "a.png", "text": []}, r"row 1: the caption is \[\]; it must be"),
        ({"file_name": "a.png", "text": None}, r"1 of 1 images in .* have no caption: a.png"),
        ({"file_name": "z.png", "text": "x"}, r"names 1 files that are not there: z.png; restore"),
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
        ("metadata.jsonl", b'["a.png"]\n', r"line 1 is \[\"a.png\"\]; write one object a line"),
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
    with pytest.raises(DataError, match=r"is a file; only a \.parquet file"):
        open_folder(tmp_path / "a.png")


def test_images_and_parquet_do_not_mix(tmp_path):
    write(tmp_path, ["a.png"])
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"both images and Parquet files \(t\.parquet\)"):
        open_folder(tmp_path)
