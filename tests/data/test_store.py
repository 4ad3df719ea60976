"""Rows of arrays in files: written once, read by every process, and not trusted when they are damaged."""

import copy
import json
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import OBJECTIVE

from flax_diffusion.core.data import batches, store
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.sources.folders import open_folder
from flax_diffusion.core.data.store import Row, Store, Writer
from flax_diffusion.core.objectives.noising import NoiseSpec

ROWS = np.arange(24, dtype=np.float32).reshape(4, 3, 2)


def write(folder, names="abcd", rows=ROWS, **options):
    """Two arrays of as many rows as there are names."""
    writer = Writer(folder, **options)
    writer.add([Row(name) for name in names], {"rows": rows[: len(names)], "more": -rows[: len(names)]})
    writer.flush()
    (name,) = store.shard_names(folder)
    return folder / name


def tables(folder, names="abcd"):
    return Store(folder).tables({name: name for name in names})


def first(table):
    return table["a"].tolist()


def test_tables(tmp_path, monkeypatch):
    """Of several shards; also in a process that opens them anew."""
    monkeypatch.setattr(store, "SHARD_ROWS", 3)
    writer = Writer(tmp_path / "deep")
    writer.add([Row("a"), Row("b"), Row("c")], {"rows": ROWS[:3], "more": -ROWS[:3]})
    assert len(store.shard_names(tmp_path / "deep")) == 1
    writer.add([], {"rows": ROWS[:0], "more": ROWS[:0]})
    writer.add([Row("d")], {"rows": ROWS[3:], "more": -ROWS[3:]})
    writer.flush()
    writer.flush()
    assert len(store.shard_names(tmp_path / "deep")) == 2
    made = Store(tmp_path / "deep").tables({"A": "a", "b": "b", "c": "c", "d": "d", "none": "e"})
    table = made["rows"]
    np.testing.assert_array_equal(made["more"]["d"], -ROWS[3])
    assert list(table) == ["A", "b", "c", "d"]
    assert len(table) == 4
    assert len(pickle.dumps(table)) < 1000
    for place, name in enumerate(table):
        np.testing.assert_array_equal(table[name], ROWS[place])
        np.testing.assert_array_equal(copy.copy(table)[name], ROWS[place])
    assert "none" not in table
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(first, tables(tmp_path / "deep")["rows"]).result() == ROWS[0].tolist()


def test_a_folder_that_is_not_there(tmp_path):
    assert Store(tmp_path / "none").tables({"a": "a"}) == {}
    assert not (tmp_path / "none").exists()


def test_a_shard_is_a_safetensors_file(tmp_path):
    file = write(tmp_path)
    stored = load_file(file)
    np.testing.assert_array_equal(stored["more"], -ROWS)
    with safe_open(file, framework="numpy") as shard:
        assert json.loads(shard.metadata()["rows"])[0] == ["a", "", None]


def test_the_identity_of_rows(tmp_path):
    rows = [Row("1f", "deep/ä.png", (3, 2**60)), Row("2f", "b\n.png")]
    writer = Writer(tmp_path)
    writer.add(rows, {"rows": ROWS[:2]})
    writer.flush()
    assert list(Store(tmp_path).rows()) == rows


def test_rows_of_other_shapes_have_shards_of_their_own(tmp_path):
    writer = Writer(tmp_path)
    shapes = [(2, 3), (2, 3), (3, 2), (2, 3)]
    made = [np.full(shape, number, np.float32) for number, shape in enumerate(shapes)]
    for name, row in zip("abcd", made, strict=True):
        writer.add([Row(name)], {"rows": row[None], "sizes": np.array([row.shape], np.int32)})
    writer.flush()
    assert sorted(len(shard.rows) for shard in Store(tmp_path).shards) == [1, 1, 2]
    table = tables(tmp_path)["rows"]
    for name, row in zip("abcd", made, strict=True):
        np.testing.assert_array_equal(table[name], row)


@pytest.mark.parametrize("dtype", ["float64", "int32"])
def test_other_dtypes(tmp_path, dtype):
    rows = (ROWS / 3).astype(dtype)
    write(tmp_path, rows=rows)
    row = tables(tmp_path)["rows"]["c"]
    np.testing.assert_array_equal(row, rows[2])
    assert row.dtype == dtype


def test_bfloat16(tmp_path):
    """As PyTorch rounds."""
    import torch

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((64, 50)).astype(np.float32) * np.float32(10.0) ** rng.integers(-30, 30, (64, 50))
    rows[0, :6] = [np.inf, -np.inf, np.nan, 0, -0.0, 3.4e38]
    rows[1, :2] = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)  # halfway between two
    names = [str(number) for number in range(64)]
    writer = Writer(tmp_path, bfloat16=True)
    writer.add([Row(name) for name in names], {"rows": rows, "counts": np.arange(64, dtype=np.int32)})
    writer.flush()
    made = tables(tmp_path, names)
    expected = torch.from_numpy(rows).bfloat16().float().numpy()
    np.testing.assert_array_equal(np.stack([made["rows"][name] for name in names]), expected)
    assert [int(made["counts"][name]) for name in names] == list(range(64))
    (file,) = tmp_path.iterdir()
    with safe_open(file, framework="pt") as shard:
        assert shard.get_tensor("rows").dtype == torch.bfloat16


def test_what_is_there_twice_is_read_once(tmp_path):
    write(tmp_path, "ab")
    assert len(store.shard_names(tmp_path)) == 1
    writer = Writer(tmp_path)
    writer.add([Row("a"), Row("b")], {"rows": ROWS[:2], "more": -ROWS[:2]})
    writer.flush()  # the same bytes, and so the same file
    assert len(store.shard_names(tmp_path)) == 1
    writer.add([Row("b"), Row("c")], {"rows": ROWS[1:3], "more": -ROWS[1:3]})
    writer.flush()
    table = tables(tmp_path)["rows"]
    assert sorted(table) == ["a", "b", "c"]
    for place, name in enumerate("abc"):
        np.testing.assert_array_equal(table[name], ROWS[place])


def cut(content):
    return content[:-5]


def flipped(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize(
    "damage", [cut, flipped, lambda content: b"", lambda content: b"\xff" * 100, lambda content: content + b"more"]
)
def test_damaged_shards(tmp_path, caplog, damage):
    file = write(tmp_path)
    other = Writer(tmp_path)
    other.add([Row("e")], {"rows": ROWS[:1], "more": -ROWS[:1]})
    other.flush()
    store.remove_damaged(tmp_path)
    assert not caplog.messages
    file.write_bytes(damage(file.read_bytes()))
    for part in range(2):
        store.remove_damaged(tmp_path, part, 2)
    (said,) = caplog.messages
    assert said.startswith(f"{file} is damaged (its checksum is ")
    assert said.endswith("): what it held is computed again")
    assert list(tables(tmp_path, "abcde")["rows"]) == ["e"]


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"rows": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}, "there are 1 rows"),
        ({"rows": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 8]}}, r"shape \(1, 1\)"),
        ({"rows": {"dtype": "I64", "shape": [1, 1], "data_offsets": [0, 8]}}, "'I64'"),
        ({"rows": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}, "bytes long, not"),
        ({"__metadata__": {}}, "'rows'"),
        ([], "its header cannot be read"),
    ],
)
def test_files_that_are_no_shards(tmp_path, caplog, header, says):
    """Whatever their checksum says."""
    if isinstance(header, dict):
        header = {"__metadata__": {"rows": '[["a", "", null]]'}} | header
    head = json.dumps(header).encode()
    content = len(head).to_bytes(8, "little") + head + bytes(4)
    file = tmp_path / f"shard-{store._checksum(content)}.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        store.open_shard(file)
    store.remove_damaged(tmp_path)
    assert not file.exists()
    assert f"{file} is damaged" in caplog.text


def test_a_key_that_changed(tmp_path, caplog):
    caplog.set_level("INFO")
    key = {"picture": {"resolution": 16, "mode": "crop"}, "weights": "1a", "words": ["a"]}
    for changed in (key, key, key | {"weights": "2b"}, key | {"weights": "2b", "picture": {"resolution": 24}}):
        store.write_manifest(tmp_path, "rows", changed)
    store.write_manifest(tmp_path, "others", key)
    assert len(list(tmp_path.iterdir())) == 4
    folders = [store.folder_of(tmp_path, "rows", key), store.folder_of(tmp_path, "rows", key | {"weights": "2b"})]
    assert all(folder.is_dir() for folder in folders)
    first, second = caplog.messages
    assert first == (
        f"rows are made anew in {folders[1]}, because they differ from those in {folders[0].name}: weights '1a' → '2b'"
    )
    assert second.endswith(f"those in {folders[1].name}: picture mode 'crop' → None; picture resolution 16 → 24")
    assert store.read_keys(tmp_path, "rows")[folders[0]] == key


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"), ("[]", "cannot be read"), ("{}", r"cannot be read \('key'\)"),
        ('{"key": {"a": 2}}', "is not the one that was written there"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_broken(tmp_path, content, says):
    store.write_manifest(tmp_path, "rows", {"a": 1})
    file = store.folder_of(tmp_path, "rows", {"a": 1}) / store.MANIFEST
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} {says}"):
        store.read_keys(tmp_path, "rows")
    file.unlink()
    assert store.read_keys(tmp_path, "rows") == {}


@pytest.mark.acceptance
def test_how_fast_cached_examples_are(tmp_path, capsys):
    """Against those of JPEGs of 1,024 pixels, with latents of the size of SDXL's."""
    data = tmp_path / "data"
    data.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    smooth = Image.fromarray(pixels).resize((1024, 1024), Image.Resampling.BICUBIC)
    for number in range(16):
        smooth.save(data / f"{number:02}.jpg", quality=90)
    source = open_folder(data, caption_column=None)
    names = [source[index].name for index in range(16)]
    writer = Writer(tmp_path / "kept")
    latents = np.random.default_rng(0).standard_normal((16, 1, 2, 4, 128, 128), np.float32)
    sizes = np.full((16, 2), 1024, np.int32)
    writer.add([Row(name) for name in names], {"posteriors": latents, "sizes": sizes})
    writer.flush()
    made = batches.Precomputed(**Store(tmp_path / "kept").tables({name: name for name in names}))
    transform = ImageTransform(resolution=1024, center_crop=True)

    def speed(once, shape):
        noise = NoiseSpec(shape=shape, objective=OBJECTIVE)
        make = batches.ExampleFn(transform=transform, noise=noise, made=once, told_sizes=True)
        rounds = []
        for number in range(4):
            start = time.perf_counter()
            for index in range(16):
                make(source, 0, number, index)
            rounds.append(16 / (time.perf_counter() - start))
        return max(rounds)

    speeds = [speed(once, shape) for shape in ((1, 1, 1), latents.shape[-3:]) for once in (batches.Precomputed(), made)]
    with capsys.disabled():
        print(
            "\nexamples per second of one thread: {:.0f} decoded, {:.0f} cached; with the draw of their noise, "
            "which both need, {:.0f} decoded, {:.0f} cached".format(*speeds)
        )
    assert speeds[1] > 20 * speeds[0]
