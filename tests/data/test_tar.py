"""Tar shards of images: what is read of them, and what is refused."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.sources import tar
from flax_diffusion.core.data.sources.labels import with_labels
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.errors import DataError


def picture(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write(file, members, form=tarfile.PAX_FORMAT):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as opened:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return file


def shards(folder, form=tarfile.PAX_FORMAT):
    """Two, of three and two examples, with classes and captions."""
    for shard, numbers in enumerate(((0, 1, 2), (3, 4))):
        members = []
        for number in numbers:
            key = f"{'very_' * 40 if number == 1 else ''}long/n{number}"
            members += [(f"{key}.png", picture(number)), (f"{key}.cls", b"%d\n" % (number % 3))]
            members += [(f"{key}.txt", f"picture {number}\n".encode())]
            fields = {"label": "abc"[number % 3], "text": f"field {number}", "size": number}
            members += [(f"{key}.json", json.dumps(fields).encode())]
        write(folder / f"train-{shard:04}.tar", members, form)
    return folder


@pytest.fixture
def opened(tmp_path):
    def opened(name=tmp_path / "data", **options):
        return open_source(train_data_dir=str(name), cache_dir=tmp_path / "cache", **options)

    return opened


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_examples(opened, tmp_path, form):
    """Of every form of tar, by a folder, a file or a pattern; in another process, and from the kept index."""
    if form == tarfile.USTAR_FORMAT:
        names = [("a/n0.png", picture(0)), ("a/" * 60 + "n1.png", picture(1))]
        members = [[*names, ("b/n2.png", picture(2))], [("n3.png", picture(3)), ("n4.png", picture(4))]]
        for shard, own in enumerate(members):
            write(tmp_path / f"data/train-{shard:04}.tar", own, form)
        sources = [opened(caption_column=None)]
    else:
        shards(tmp_path / "data", form)
        sources = [opened(), opened(tmp_path / "data/train-{0000..0001}.tar"), opened()]
        sources.append(pickle.loads(pickle.dumps(sources[0])))  # noqa: S301
    for source in sources:
        assert len(source) == 5
        for number in (4, 0, 1, 2, 3):
            record = source[number]
            assert np.asarray(decode(record))[0, 0, 0] == number
            assert record.name.endswith(f"/n{number}.png")
            assert record.caption == (None if form == tarfile.USTAR_FORMAT else f"picture {number}")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_is_taken(opened, tmp_path):
    shards(tmp_path / "data")
    assert [opened(max_train_samples=4, caption_column="text")[3].caption, len(opened(max_train_samples=4))] == [
        "picture 3", 4,
    ]  # fmt: skip
    assert opened(caption_column="label")[1].caption == "b"
    assert opened(tmp_path / "data/train-0001.tar")[0].caption == "picture 3"
    write(tmp_path / "two/a.tar", [("a.jpg", picture(1)), ("a.mask.png", picture(2)), ("b.jpg", picture(3))])
    source = opened(tmp_path / "two", image_column="mask.png", caption_column=None)
    assert [len(source), np.asarray(decode(source[0]))[0, 0, 0]] == [1, 2]
    write(tmp_path / "splits/test-0.tar", [("a.png", picture(9))])
    write(tmp_path / "splits/train-0.tar", [("a.png", picture(8))])
    source = opened(tmp_path / "splits", caption_column=None)
    assert [len(source), np.asarray(decode(source[0]))[0, 0, 0]] == [1, 8]


def test_classes(opened, tmp_path):
    data = shards(tmp_path / "data")
    source = with_labels(opened(caption_column=None), None)
    assert source.labels.tolist() == [0, 1, 2, 0, 1]
    assert source.classes == ("0", "1", "2")
    assert with_labels(opened(caption_column=None), "label").classes == ("a", "b", "c")
    assert opened(max_train_samples=4).labels("cls").values == [0, 1, 2, 0]
    (data / "classnames.txt").write_text("tench\ngoldfish\nshark\nray\n")
    assert with_labels(opened(caption_column=None), None).classes == ("tench", "goldfish", "shark", "ray")
    (data / "classnames.txt").write_text("tench\ngoldfish\n")
    with pytest.raises(DataError, match=r"classnames\.txt names 2 classes, and an example is of class 2: add its name"):
        opened().labels(None)
    (data / "classnames.txt").write_text("tench\ntench\n")
    with pytest.raises(DataError, match="gives the name 'tench' to two classes"):
        opened().labels(None)
    (data / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"n0\.png: its \.json has no field kind; add it or remove the example"):
        opened().labels("kind")
    write(tmp_path / "bare/a.tar", [("a.png", picture(1)), ("a.cls", b"0"), ("b.png", picture(2))])
    bare = opened(tmp_path / "bare", caption_column=None)
    with pytest.raises(DataError, match=r"b\.png: has no \.cls; give --label_column"):
        bare.labels("cls")
    with pytest.raises(DataError, match=r"a\.png: has neither \.cls nor \.json: its class is not known"):
        bare.labels(None)


def header(name=b"a.png", size=b"00000000003\0", kind=b"0"):
    block = name.ljust(100, b"\0") + b"0000644\0" * 3 + size + b"0" * 11 + b"\0"
    block = block.ljust(148, b"\0") + b" " * 8 + kind + bytes(355)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"x" * 600, "byte 0 starts no member of a tar; it is cut off, compressed, or no tar"),
        (header() + b"abc", None),
        (header() + b"ab", "is cut off, its member at byte 0 ends after it; copy it again"),
        (header(size=b"\x80" + b"\xff" * 11), "is cut off, its member at byte 0 ends after it"),
        (header(size=b"77777777777\0", kind=b"L"), "byte 0 has a name of 8589934591 bytes; it may have 65536"),
        (header(size=b"zzzzzzzzzzz\0"), "is no size of a member"),
        (header(size=b"00000000005\0", kind=b"x") + b"9 a=b".ljust(512, b"\0"), "holds a pax header that cannot"),
        (header()[:300], "byte 0 starts no member of a tar; it is cut off"),
        (header(kind=b"2"), "1 tar files hold no pictures"),
        (header(b"a.cls") + b"abc".ljust(512, b"\0"), r"a\.cls holds b'abc'; it must hold the number of a class"),
        (header(b"a.cls", b"00000000100\0") + b"1".ljust(512), r"a\.cls has 64 bytes|a\.cls holds|hold no pictures"),
        (header(b"a.cls", b"00000000200\0") + b"1".ljust(512), r"a\.cls has 128 bytes, and may have 64; remove it"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(opened, tmp_path, content, says):
    """None of them takes memory, and no link or device is followed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.tar").write_bytes(content)
    if says is None:
        assert opened(caption_column=None)[0].image == b"abc"
        return
    with pytest.raises(DataError, match=says):
        opened(caption_column=None)


def test_names_are_no_paths(opened, tmp_path):
    """A member's name leads nowhere, whatever it is; links and what is hidden are no examples."""
    data = tmp_path / "data/a.tar"
    write(data, [("../../etc/a.png", picture(1)), ("/b.png", picture(2)), (".hidden.png", picture(3))])
    with tarfile.open(data, "a") as opened_tar:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened_tar.addfile(link)
    source = opened(caption_column=None)
    assert [record.name.rpartition("a.tar/")[2] for record in map(source.__getitem__, range(2))] == [
        "../../etc/a.png", "/b.png",
    ]  # fmt: skip
    assert len(source) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("data", "cache")] == []


def test_what_is_refused(opened, tmp_path, monkeypatch, caplog):
    write(tmp_path / "two/a.tar", [("a.jpg", picture(1)), ("a.png", picture(2))])
    with pytest.raises(DataError, match=r"a\.jpg and a\.png are two pictures of one example: name one kind by"):
        opened(tmp_path / "two", caption_column=None)
    shards(tmp_path / "data")
    with pytest.raises(DataError, match=r"train-0002\.tar does not exist, nor do 3 others; change the numbers"):
        opened(tmp_path / "data/train-{0000..0005}.tar")
    with pytest.raises(DataError, match=r"must count up, such as \{0000\.\.0127\}"):
        opened(tmp_path / "data/train-{0005..0001}.tar")
    write(tmp_path / "plain/a.tar", [("a.png", picture(1)), ("a.txt", b"one"), ("b.png", picture(2))])
    with pytest.raises(DataError, match=r"b\.png has no \.txt; add its caption, or remove it"):
        opened(tmp_path / "plain")
    (tmp_path / "data/a.png").write_bytes(picture(1))
    with pytest.raises(DataError, match="holds both images and tar shards"):
        opened()
    monkeypatch.setattr(tar, "replacing", lambda _: (_ for _ in ()).throw(OSError("read-only")))
    assert len(opened(tmp_path / "data/train-0001.tar")) == 2
    assert "the index of" in caplog.text


def test_a_file_that_was_cut_off_later(opened, tmp_path):
    data = write(tmp_path / "data/a.tar", [("a.png", picture(1))])
    source = opened(caption_column=None)
    data.write_bytes(data.read_bytes()[:520])
    with pytest.raises(DataError, match=r"a\.png: the file was cut off after it was opened; copy it again"):
        source[0]
