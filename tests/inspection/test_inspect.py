"""`python -m flax_diffusion.data inspect`: what it finds, and what it writes."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from tiny import stable_diffusion

from flax_diffusion import data
from flax_diffusion.core.data.sources.source import ArraySource
from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.inspection import command
from flax_diffusion.core.inspection.examination import examine
from flax_diffusion.core.report import files

LONG = "word " * 90 + "and the rest"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture
def folder(tmp_path):
    """Six pictures: two equal ones, a small one, a wide one and a broken one; captions, one of them too long."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a": (20, 20), "small": (8, 20), "wide": (60, 20), "d": (16, 16)}.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "again.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "broken.png").write_bytes((folder / "wide.png").read_bytes()[:-400])  # its header is good
    captions = {"a": "one", "again": "one", "small": "", "wide": LONG, "d": "<b>", "broken": "three"}
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def options(base, folder, **changes):
    return {
        "pretrained_model_name_or_path": str(base), "train_data_dir": str(folder), "resolution": 16,
        "train_batch_size": 2, "center_crop": True,
    } | changes  # fmt: skip


def remove_broken(folder):
    (folder / "broken.png").unlink()
    table = folder / "metadata.jsonl"
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(row for row in rows if "broken" not in row))


def names(listed):
    return [name.rpartition("/")[2] for name, _ in listed.first]


def test_what_is_found(base, folder):
    report = data.inspect("text_to_image", **options(base, folder))
    assert (report.examples, report.inspected, report.pictures) == (6, 6, 5)
    assert names(report.broken) == ["broken.png"]
    assert "cannot be decoded" in report.broken.first[0][1]
    assert not report.usable
    assert data.inspect("text_to_image", **options(base, folder, skip_bad_images=True)).usable
    assert names(report.duplicates) == ["a.png"]
    assert report.duplicates.first[0][1].endswith("again.png")
    assert names(report.small) == ["small.png"]
    assert report.small.first[0][1] == "8x20"
    assert (report.width.least, report.width.median, report.width.most) == (8, 20, 60)
    assert report.cut.most == pytest.approx(2 / 3)  # a square of a picture that is three times as wide as high
    assert report.data == {"train_data_dir": str(folder)}
    captions = report.captions
    assert (captions.count, names(captions.empty), names(captions.cut_off)) == (5, ["small.png"], ["wide.png"])
    assert captions.cut_off.first[0][1].endswith("and the rest")
    assert captions.repeated.first == [("one", "2 times")]
    assert captions.tokens.least == 2  # of the empty one: its start and its end
    assert captions.tokens.most > captions.limit


def test_files_and_text(base, folder, tmp_path, monkeypatch, capsys):
    words = [f"--{name}={value}" for name, value in options(base, folder).items()]
    out = tmp_path / "report"
    out.mkdir()
    (out / files.PAGE).write_text("of a run")
    with pytest.raises(SystemExit) as left:
        data.main(["inspect", "text_to_image", *words, "--report_dir", str(out), "--sheet", "3"])
    assert left.value.code == 1
    assert (out / files.PAGE).read_text() == "of a run"
    said = capsys.readouterr().out
    assert re.search(r"1 cannot be used\n  \S*broken\.png: ", said)
    assert said.endswith("or add --skip_bad_images.\n")
    found = json.loads((out / command.JSON_FILE).read_text())
    assert (found["pictures"], found["usable"], found["sizes"]) == (5, False, [{"size": "16x16", "pictures": 5}])
    page = (out / command.PAGE_FILE).read_text()
    assert page.count("<figure>") == 3
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # it needs no network
    with Image.open(out / command.SHEET_FILE) as sheet:
        assert sheet.width == 15 * 2 * (16 + 2)
        assert sheet.height > sheet.width  # by the names and captions under the pictures


def test_buckets_and_augmentation(base, folder, tmp_path):
    remove_broken(folder)
    changes = {"bucket_resolutions": ["16x16", "24x8"], "train_batch_size": 1}
    out = tmp_path / "report"
    report = data.inspect("text_to_image", **options(base, folder, **changes), report_dir=str(out))
    assert {one.size: one.pictures for one in report.sizes} == {"16x16": 4, "24x8": 1}
    assert (report.cut.least, report.cut.most, report.left_out) == (0, pytest.approx(0.6), 0)
    whole = data.inspect("text_to_image", **options(base, folder, **changes | {"train_batch_size": 2}))
    assert (sum(one.pictures for one in whole.sizes), whole.left_out) == (5, 1)


def test_classes_and_a_limit(capsys):
    words = ["class_conditional", "--dataset_name", "digits", "--resolution", "8", "--transformer", "SiT-S/2"]
    data.main(["inspect", *words, "--limit", "100"])
    said = capsys.readouterr().out
    assert re.search(r"examples +1797, of which 100 were looked at\n", said)
    assert re.search(r"classes +10, with \d+ to \d+ pictures\n", said)
    assert "captions" not in said


def test_a_picture_that_occurs_several_times_counts_once(base, folder):
    remove_broken(folder)
    report = data.inspect("text_to_image", **options(base, folder, train_data_dir=[f"{folder}:3"]))
    assert (report.examples, report.inspected, report.pictures) == (15, 15, 5)
    assert report.sizes[0].pictures == 15


def test_a_broken_second_picture():
    """Such as the one that a ControlNet follows."""
    images = np.zeros((2, 8, 8, 3), np.uint8)
    found = examine(ArraySource(images, None, "array", extras=images), None, None)
    assert [one.reason for one in found.seen] == [None, None]
    found = examine(ArraySource(images, None, "array", extras=images[:, 0, 0, 0].astype(np.float64)), None, None)
    assert all("cannot be decoded" in one.reason for one in found.broken)
    assert len(found.broken) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the first word must be inspect"),
        (["look"], "the first word must be inspect"),
        (["inspect", "unconditional", "--dataset_name", "digits", "--limit", "0"], "--limit 0: must be at least 1"),
        (["inspect", "unconditional", "--dataset_name", "digits", "--sheet", "-1"], "--sheet -1: must be at least 1"),
        (["inspect", "unconditional", "--dataset_nam", "digits"], "--dataset_nam.*did you mean '--dataset_name'"),
        (["inspect", "unconditional", "--dataset_name=digits", "--report_dir", "/dev/null/x"], "cannot be made"),
    ],
)
def test_what_is_refused(words, says):
    with pytest.raises(ConfigError, match=says):
        data.main(words)


def test_no_picture_that_can_be_used(base, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none of 1 pictures can be used\. The first: .*a\.png is not an image"):
        data.inspect("unconditional", train_data_dir=str(tmp_path), resolution=32)


def test_help_reads_no_data(capsys):
    data.main(["--help"])
    assert "--report_dir" in capsys.readouterr().out
