"""The look at all examples before the first step."""

import logging
import threading
import time
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flax_diffusion.core.data import check
from flax_diffusion.core.data.check import check_source
from flax_diffusion.core.data.combined import CombinedSource
from flax_diffusion.core.data.images import decoding
from flax_diffusion.core.data.sources.folders import open_folder
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.data.sources.source import ArraySource, Record
from flax_diffusion.core.display.console import Counting
from flax_diffusion.core.errors import DataError


def encoded(kind="PNG"):
    buffer = BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    return buffer.getvalue()


GOOD = encoded()


@pytest.fixture
def folder(tmp_path):
    """Sixty captioned pictures."""
    for number in range(60):
        (tmp_path / f"{number:02}.png").write_bytes(GOOD)
        (tmp_path / f"{number:02}.txt").write_text("a thing")
    return tmp_path


def spoil(folder, number, how):
    picture, caption = folder / f"{number:02}.png", folder / f"{number:02}.txt"
    match how:
        case "caption that is no UTF-8":
            caption.write_bytes(b"\xff\xfe\x00")
        case "caption that is huge":
            caption.write_bytes(b"x" * (2**20 + 1))
        case "link to no caption":
            caption.unlink()
            caption.symlink_to(folder / "nowhere.txt")
        case "link to no picture":
            picture.unlink()
            picture.symlink_to(folder / "nowhere.png")
        case "caption that is a folder":
            caption.unlink()
            (folder / "other").mkdir()
            caption.symlink_to(folder / "other")
        case "empty":
            picture.write_bytes(b"")
        case "web page":
            picture.write_bytes(b"<html>not found</html>")
        case "header cut off":
            picture.write_bytes(GOOD[:20])
        case "floats":
            Image.fromarray(np.zeros((2, 2), np.float32)).save(picture, "TIFF")
        case "pointer of Git LFS":
            picture.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


SPOILT = {
    "caption that is no UTF-8": r"caption file .*37\.txt cannot be read .* it must be UTF-8 text",
    "caption that is huge": r"caption file .*37\.txt cannot be read \(it is larger than",
    "link to no caption": r"caption file .*37\.txt cannot be read \(.*No such file",
    "link to no picture": r"37\.png is a link to a file that does not exist; restore or remove it",
    "empty": r"37\.png is empty \(0 bytes\)",
    "web page": r"37\.png is not an image in a supported format: it is a web page; remove or convert it",
    "header cut off": r"37\.png (cannot be decoded|is not an image)",
    "floats": r"37\.png has floating-point pixels",
    "pointer of Git LFS": r"37\.png is not an image .*: it is a Git LFS pointer; `git lfs pull` downloads",
}


@pytest.mark.parametrize("how", SPOILT)
def test_one_of_sixty(folder, how):
    source = open_folder(folder)
    check_source(source, skip_bad_images=False)
    spoil(folder, 37, how)
    with pytest.raises(DataError, match=rf"{SPOILT[how]}.*, or skip such examples with --skip_bad_images$") as caught:
        check_source(source, skip_bad_images=False)
    assert "\n" not in str(caught.value)
    check_source(source, skip_bad_images=True)  # one is borne


def test_a_caption_that_is_a_link_to_a_folder(folder):
    spoil(folder, 37, "caption that is a folder")
    with pytest.raises(DataError, match=r"1 of 60 images in .* have no caption: 37\.png"):
        open_folder(folder)


def test_several(folder):
    source = open_folder(folder)
    for number, how in ((3, "empty"), (20, "caption that is no UTF-8"), (37, "web page"), (50, "link to no picture")):
        spoil(folder, number, how)
    with pytest.raises(
        DataError, match=r"^4 of 60 examples cannot be used: .*03\.png, .*20\.png, .*37.png, …"
    ) as caught:
        check_source(source, skip_bad_images=False)
    assert "restore or remove them. The first: " in str(caught.value)
    assert "03.png is empty" in str(caught.value)
    with pytest.raises(DataError, match=r"^4 of 60 .*; restore or remove them, which are over 1%\. The first: "):
        check_source(source, skip_bad_images=True)


def test_rows_of_parquet(tmp_path):
    rows = [GOOD] * 300
    rows[7], rows[9] = None, b"<html>"
    captions = [["a"]] * 300
    captions[299] = ["a", None]
    pq.write_table(pa.table({"image": rows, "text": captions}), tmp_path / "data.parquet")
    source = open_source(train_data_dir=tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"^3 of 300 .*row 7, .*row 9, .*row 299; restore .* row 7 holds no"):
        check_source(source, skip_bad_images=False)
    check_source(source, skip_bad_images=True)


def test_pictures_in_memory_are_as_they_are():
    check_source(ArraySource(np.zeros((5, 4, 4), np.uint8), None, "digits"), skip_bad_images=False)


def test_headers_alone_are_read(folder, monkeypatch):
    big = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(big).save(folder / "05.png")
    sizes = []
    read = decoding.read_bytes

    def counted(*arguments, **options):
        sizes.append(len(read(*arguments, **options)))
        return read(*arguments, **options)

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(decoding, "read_bytes", counted)
    monkeypatch.setattr(Image.Image, "load", load)
    check_source(open_folder(folder), skip_bad_images=False)
    assert len(sizes) == 60
    assert max(sizes) == 2**16 < (folder / "05.png").stat().st_size


def test_a_header_beyond_the_first_bytes_is_found(folder):
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    Image.new("RGB", (4, 4)).save(folder / "05.png", "JPEG", exif=exif, icc_profile=bytes(200_000))
    check_source(open_folder(folder), skip_bad_images=False)


def test_a_picture_that_stands_in_an_epoch_many_times_is_read_once(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(check, "check_header", lambda record: seen.append(record.name))
    pictures = open_folder(folder, caption_column=None)
    check_source(CombinedSource([pictures], ["a thing"], [5]), skip_bad_images=False)
    assert len(seen) == len(set(seen)) == 60


@pytest.mark.parametrize(("most", "in_store"), [(10, False), (7, True)])
def test_so_many_of_a_large_dataset(monkeypatch, caplog, most, in_store):
    """At even distances, the first and the last among them."""
    monkeypatch.setattr(check, "MAX_CHECKED", 10)
    monkeypatch.setattr(check, "MAX_CHECKED_IN_STORE", 7)
    monkeypatch.setattr(check, "is_local", lambda path: not in_store)
    seen = []
    monkeypatch.setattr(check, "check_header", lambda record: seen.append(int(record.name)))

    class Large:
        def __len__(self):
            return 1_000_000

        def __getitem__(self, index):
            return Record(__file__, None, str(index))  # type: ignore[arg-type]

    with caplog.at_level(logging.INFO):
        check_source(Large(), skip_bad_images=False)
    assert len(seen) == most
    assert {0, 999_999} <= set(seen)
    assert max(np.diff(sorted(seen))) - min(np.diff(sorted(seen))) <= 1
    assert f"checked {most} of 1000000 examples" in caplog.text


def test_empty_captions_are_named(folder, caplog):
    (folder / "05.txt").write_text(" \n")
    check_source(open_folder(folder), skip_bad_images=False)
    assert "1 captions are empty: " in caplog.text
    assert "05.png" in caplog.text


def test_every_process_ends_alike(folder):
    """Two processes, of which one's copy of the data is damaged; each calls the other."""
    source = open_folder(folder)
    both, answers, errors = threading.Barrier(2), [True, True], ["", ""]

    class Damaged:
        def __len__(self):
            return 60

        def __getitem__(self, index):
            if index == 9:
                raise DataError("09.png is gone")
            return source[index]

    def process(number):
        def all_processes(condition):
            answers[number] = condition
            both.wait(timeout=30)
            return all(answers)

        try:
            own = [source, Damaged()][number]
            check_source(own, skip_bad_images=False, all_processes=all_processes, main=number == 0)
        except DataError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=process, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors[0].startswith("another process of this run cannot use its data")
    assert errors[1].startswith("09.png is gone")


class _Leave(BaseException):
    pass


def test_it_can_be_left(monkeypatch):
    """As SIGTERM does: what is not begun is not waited for."""
    begun = []

    class Slow:
        def __len__(self):
            return 64_000

        def __getitem__(self, index):
            begun.append(index)
            time.sleep(0.001)
            return Record(b"", None, str(index))

    def leave(self, count):
        assert self._delay == 2.0  # it is shown when it takes over two seconds
        raise _Leave

    monkeypatch.setattr(Counting, "add", leave)
    with pytest.raises(_Leave):
        check_source(Slow(), skip_bad_images=True)
    assert len(begun) < 10_000
