"""Latents in shards: what `precompute --latents_dir` writes, and runs that read them in place of pictures."""

import importlib
import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hosts import together
from PIL import Image
from recorder import Idle
from tiny import VAE, losses

from flax_diffusion.core.data.shards import latents as files
from flax_diffusion.core.data.shards.latents import Layout, open_latents
from flax_diffusion.core.data.sources.folders import FolderSource
from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.run import lineage
from flax_diffusion.core.run.shards import latents as writing
from flax_diffusion.core.tasks.class_conditional import ClassConditionalConfig
from flax_diffusion.core.tasks.task import task_of
from torch_backend.backend import TorchBackend

BACKENDS = ("flax_diffusion", "torch_backend")
DIT = {"in_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
COUNT = 11


def draw(folder, count=COUNT, size=18):
    """Pictures of three classes, each in a folder."""
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size + number, 3), dtype=np.uint8)
        path = folder / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def autoencoder(folder, seed=0):
    torch.manual_seed(seed)
    AutoencoderKL(**VAE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def options(tmp_path, vae, monkeypatch):
    """Of runs on shards of four pictures."""
    given = {
        "transformer": DIT, "vae": vae, "resolution": 16, "center_crop": True, "random_flip": True,
        "train_batch_size": 3, "max_train_steps": 5, "learning_rate": 1e-3, "lr_warmup_steps": 0,
        "validation_num_inference_steps": 1, "validation_class_labels": ["a"], "eval_batch_size": 1,
    }  # fmt: skip
    monkeypatch.setattr(writing, "SHARD_BYTES", 4 * Layout("float32", (2, 2, 4, 8, 8)).record_bytes)
    return given | {"train_data_dir": str(draw(tmp_path / "data")), "latents_dir": str(tmp_path / "latents")}


def without(options, *names):
    return {name: value for name, value in options.items() if name not in names}


def fill(options, backend="torch_backend", **changes):
    return importlib.import_module(f"{backend}.precompute").precompute("class_conditional", **options | changes)


def train(options, folder, backend="torch_backend", **changes):
    start = importlib.import_module(f"{backend}.train").train
    return start("class_conditional", **without(options | changes, "train_data_dir"), output_dir=str(folder))


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def trained_task(options, **changes):
    return task_of(ClassConditionalConfig(**without(options | changes, "train_data_dir")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_losses_are_those_of_pictures(options, tmp_path, backend):
    """With flips, dropped classes, over epochs, and of a run that goes on with pictures from a checkpoint."""
    start = importlib.import_module(f"{backend}.train").train
    pictures = without(options, "latents_dir") | {"cache_latents": True, "output_dir": str(tmp_path / "pictures")}
    expected = losses(start("class_conditional", **pictures))
    folder = fill(options, backend)
    shutil.rmtree(tmp_path / "data")
    assert losses(train(options, tmp_path / "shards", backend)) == expected
    train(options, tmp_path / "part", backend, max_train_steps=2)
    again = train(options, tmp_path / "part", backend, resume_from_checkpoint="latest")
    assert losses(again) == expected
    assert sorted(content(folder)) == [*(files.shard_name(number, 3) for number in range(3)), "manifest.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["records"], manifest["classes"], manifest["shape"]) == (
        [4, 4, 3],
        ["a", "b", "c"],
        [2, 2, 4, 8, 8],
    )


def test_some_are_held_out_for_validation(options, tmp_path):
    """As of the pictures, of which precompute writes all; latents of another autoencoder are refused all the same."""
    held = {"validation_split": 0.3, "validation_loss_steps": 2}
    pictures = (
        without(options, "latents_dir") | held | {"cache_latents": True, "output_dir": str(tmp_path / "pictures")}
    )
    expected = importlib.import_module("torch_backend.train").train("class_conditional", **pictures)
    assert sum(open_latents(fill(options, **held)).manifest.records) == COUNT
    ours = train(options | held, tmp_path / "shards")
    assert losses(ours) == losses(expected)
    assert (ours / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="autoencoder weights"):
        train(options | held | {"vae": autoencoder(tmp_path / "other", 1)}, tmp_path / "refused")


def test_bfloat16_takes_half_of_the_space(options):
    whole = open_latents(fill(options))
    half = open_latents(fill(options, latents_dir=options["latents_dir"] + "16", latents_dtype="bfloat16"))
    assert 2 * (half.manifest.layout.record_bytes - 128) == whole.manifest.layout.record_bytes - 128
    for index in (0, 10):
        ours, exact = half[index], whole[index]
        assert (ours.name, ours.label) == (exact.name, exact.label)
        np.testing.assert_allclose(ours.posterior, exact.posterior, rtol=2**-8)
        assert (ours.posterior != exact.posterior).any()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(6))
def test_a_command_that_is_killed_goes_on(options, tmp_path, monkeypatch, moment):
    """At the start, before and after a shard or its note, before and after the manifest: the same bytes in the end."""
    expected = content(fill(options, latents_dir=str(tmp_path / "whole")))
    name, call = [("write_shard", 1), ("write_shard", 2), ("write_json", 2), ("write_json", 3), ("write_json", 5),
                  ("_remove_notes", 1)][moment]  # fmt: skip
    real, calls = getattr(writing, name), 0

    def die(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            if name == "write_shard":
                arguments[0].write_bytes(b"half")
            raise Killed
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, name, die)
        with pytest.raises(Killed):
            fill(options)
    folder = tmp_path / "latents"
    if name != "_remove_notes":
        whole = len(list(folder.glob("*.array_record")))
        with pytest.raises(DataError, match=rf"is not finished, {whole} of 3 shards are there: make the others by"):
            trained_task(options).open_source()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    assert content(fill(options)) == expected
    unchanged = sum(path.stat().st_mtime_ns == time for path, time in before.items())
    assert unchanged == (0, 1, 0, 1, 3, 3)[moment]


def test_a_folder_that_is_done_is_left_alone(options, monkeypatch, caplog):
    caplog.set_level("INFO")
    folder = fill(options)
    monkeypatch.setattr(TorchBackend, "posteriors", None)
    before = content(folder)
    fill(options)
    assert content(folder) == before
    assert f"all latents are in {folder}" in caplog.messages
    monkeypatch.undo()
    monkeypatch.setattr(writing, "SHARD_BYTES", 4 * Layout("float32", (2, 2, 4, 8, 8)).record_bytes)
    (folder / files.shard_name(1, 3)).unlink()
    fill(options)  # a shard that was deleted is made again
    assert content(folder) == before
    assert "encoding 11 pictures, 2 of 3 shards are in" in caplog.text


def test_other_latents_are_refused(options, tmp_path):
    """By the command, and by a run before its first step; each names what differs."""
    folder = fill(options)
    other = autoencoder(tmp_path / "other", 1)
    changes = {
        "autoencoder weights": {"vae": other}, "picture resolution 16 → 32": {"resolution": 32},
        "picture interpolation 'bilinear' → 'nearest'": {"image_interpolation_mode": "nearest"},
        "picture resize_mode 'crop' → 'stretch'": {"resize_mode": "stretch"},
        "precision 'no' → 'bf16'": {"mixed_precision": "bf16"},
    }  # fmt: skip
    for says, change in changes.items():
        with pytest.raises(ConfigError, match=rf"{folder} holds latents that differ .*: .*key {says}.*; give the"):
            fill(options, **change)
        with pytest.raises(ConfigError, match=rf"{folder} holds latents that differ .*: .*key {says}.*; give the"):
            train(options, tmp_path / "run", **change)
    draw(tmp_path / "data", COUNT + 1)
    for change in ({}, {"random_flip": False}, {"latents_dtype": "bfloat16"}):
        with pytest.raises(ConfigError, match=r"differ .*: (examples 11 → 12|shape \[2|dtype 'float32' → 'bfl)"):
            fill(options, **change)
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"holds shards and neither manifest\.json nor unfinished\.json"):
        fill(options)


def test_orientations(options, tmp_path):
    one = fill(options, random_flip=False)
    with pytest.raises(ConfigError, match=f"--random_flip: {one} holds the latents of one orientation: drop it, or"):
        train(options, tmp_path / "run")
    both = str(tmp_path / "both")
    fill(options, latents_dir=both)
    plain = train(options, tmp_path / "one", random_flip=False)
    assert losses(train(options, tmp_path / "two", random_flip=False, latents_dir=both)) == losses(plain)


def test_damage(options, tmp_path):
    folder = fill(options)
    shard = folder / files.shard_name(1, 3)
    whole, task = shard.read_bytes(), trained_task(options)
    record = open_latents(folder).manifest.layout.record_bytes
    shard.unlink()
    with pytest.raises(DataError, match=f"--latents_dir: {shard} is missing: copy it again, or compute it again by"):
        task.open_source()
    shard.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=f"{shard} has {len(whole) - 5} bytes, not {len(whole)}: copy it again"):
        task.open_source()
    broken = bytearray(whole)
    place = whole.index(b"/4.png") + 2 * record // 3  # in the latents of the shard's first picture
    broken[place] ^= 1
    shard.write_bytes(broken)
    source = task.open_source()
    with pytest.raises(DataError, match=f"{shard} record 2 cannot be read .*hash mismatch"):
        [source[index] for index in range(4, 8)]
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(DataError, match=f"{shard} record 0 cannot be read .it has 0 records, and its manifest says 4"):
        task.open_source()[4]
    for change, says in (
        (("format", 2), "its format is 2"), (("dtype", "float64"), "dtype 'float64' and shape"),
        (("shape", [3, 2, 4, 8, 8]), "are none of latents"), (("records", [4]), "does not say of each shard"),
        (("records", [4, "4", 3]), "'4' is no number"), (("classes", []), "classes must be names"),
    ):  # fmt: skip
        manifest = json.loads((folder / "manifest.json").read_text())
        other = tmp_path / "changed"
        other.mkdir(exist_ok=True)
        (other / "manifest.json").write_text(json.dumps(manifest | dict([change])))
        with pytest.raises(DataError, match=rf"manifest\.json cannot be read \(.*{says}"):
            open_latents(other)


def test_labels(options, tmp_path):
    """A class beyond the last is refused; those of a model are known by name."""
    folder = fill(options)
    numbers = [record.label for record in map(open_latents(folder, ("c", "b", "x", "a")).__getitem__, (0, 4, 8))]
    assert numbers == [3, 1, 0]
    source = open_latents(folder)
    layout, shard = source.manifest.layout, folder / files.shard_name(0, 3)
    made = [source[index] for index in range(4)]
    files.write_shard(shard, [layout.packed(9, one.name, one.posterior) for one in made])
    with pytest.raises(DataError, match=f"{shard} record 0: its class is 9, and the classes are 0 to 2: compute the"):
        open_latents(folder)[0]
    with pytest.raises(ConfigError, match="num_embeds_ada_norm 2, and data of 3 classes: must be 3"):
        train(options, tmp_path / "run", transformer=DIT | {"num_embeds_ada_norm": 2})


def test_records():
    layout = Layout("float32", (1, 2, 1, 2, 2))
    posterior = np.arange(8, dtype=np.float32).reshape(layout.shape)
    for name, found in (("é.png", "é.png"), ("é" * 70 + "x.png", "…" + "é" * 58 + "x.png")):
        record = layout.packed(7, name, posterior)
        assert len(record) == layout.record_bytes == 128 + 32
        label, kept, array = layout.unpacked(record)
        assert (label, kept) == (7, found)
        np.testing.assert_array_equal(array, posterior)
    with pytest.raises(ValueError, match="a record has 159 bytes, not 160"):
        layout.unpacked(record[:-1])


def test_fewer_examples_and_other_processes(options):
    source = open_latents(fill(options), max_samples=5)
    assert len(source) == 5
    source[0]
    again = pickle.loads(pickle.dumps(source))  # noqa: S301
    np.testing.assert_array_equal(again[4].posterior, source[4].posterior)


def test_bad_pictures_are_left_out(options, tmp_path):
    (tmp_path / "data/b/4.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"4\.png"):
        fill(options)
    source = open_latents(fill(options, skip_bad_images=True))
    assert source.manifest.records == (4, 3, 3) or sum(source.manifest.records) == COUNT - 1
    assert not [index for index in range(len(source)) if source[index].name.endswith("/4.png")]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cache_latents": True}, "--cache_latents computes what is in --latents_dir"),
        ({"bucket_resolutions": ["auto"]}, "--bucket_resolutions computes what is in --latents_dir, or is not in it"),
        ({"center_crop": False}, "--latents_dir holds each picture once, and crops at random would differ"),
        ({"latents_dir": None, "latents_dtype": "bfloat16"}, "--latents_dtype bfloat16 is of latents in shards: add"),
        (
            {"vae": None, "transformer": DIT | {"in_channels": 3}},
            "--latents_dir: the model trains on pixels, there is no autoencoder",
        ),
        ({"latents_dir": "/proc/self/fdinfo"}, r"--latents_dir /proc/self/fdinfo: cannot be written \(.*\); name ano"),
        ({"train_data_dir": None}, "precompute class_conditional: latents are made of pictures: give --train_data_dir"),
    ],
)
def test_what_is_refused(options, changes, says):
    with pytest.raises(ConfigError, match=says):
        fill(options, **changes)


def test_a_run_takes_no_pictures_beside_latents(options, tmp_path):
    task = task_of(ClassConditionalConfig(**options))
    with pytest.raises(ConfigError, match=r"--train_data_dir .*: training reads --latents_dir .*: drop one of them"):
        task.open_source()
    with pytest.raises(DataError, match=r"--latents_dir: .*/latents holds no latents: make them by `python -m flax"):
        trained_task(options).open_source()


class Parts(Idle):
    """One of two processes that encode together; the pictures of the other one do not matter."""

    process_count = device_count = 2

    def __init__(self, index):
        self.process_index, self.rounds = index, 0

    def posteriors(self, pixels):
        self.rounds += 1
        means = pixels.mean(axis=1, keepdims=True)[..., ::2, ::2].repeat(4, axis=1)
        own = np.stack([means, means], axis=1)
        return np.concatenate([own if self.process_index == part else np.zeros_like(own) for part in range(2)])

    def all_processes(self, condition):
        return condition


class Alone(Parts):
    process_count = device_count = 1

    def posteriors(self, pixels):
        return super().posteriors(pixels)[: len(pixels)]


def test_two_processes_write_what_one_does(options, tmp_path, monkeypatch):
    """Each writes shards of its own, in as many rounds as the other."""

    def written(folder, *backends):
        task = task_of(ClassConditionalConfig(**options | {"latents_dir": str(folder)}))
        source = task.open_pictures()
        spec = task.make_spec(source)
        folder.mkdir()
        finish, of = writing._finish, []
        with monkeypatch.context() as patch:
            patch.setattr(writing, "shared_folder", lambda *_: None)
            patch.setattr(writing, "_finish", lambda *arguments: of.append(arguments))
            patch.setattr(writing, "_begin", lambda *_: set())  # as both see it before either writes
            for backend in backends:
                before = set(folder.iterdir())
                writing.write_latents(task, spec, source, backend)
                if len(backends) == 2:
                    shards = {path.name for path in set(folder.iterdir()) - before if path.suffix == ".array_record"}
                    assert shards == {files.shard_name(number, 3) for number in range(3)[backend.process_index :: 2]}
        finish(*of[0])
        return content(folder)

    pair = Parts(0), Parts(1)
    assert written(tmp_path / "two", *pair) == written(tmp_path / "one", Alone(0))
    assert pair[0].rounds == pair[1].rounds


def test_each_picture_is_read_once(options, tmp_path, monkeypatch):
    """Which for those in an object store is what costs."""
    task = task_of(ClassConditionalConfig(**options))
    source = task.open_pictures()
    spec, real, reads = task.make_spec(source), FolderSource.__getitem__, Counter()

    def read(folder, index):
        reads[index] += 1
        return real(folder, index)

    monkeypatch.setattr(FolderSource, "__getitem__", read)
    monkeypatch.setattr(lineage, "data_digest", lambda _: "")
    (tmp_path / "latents").mkdir()
    writing.write_latents(task, spec, source, Alone(0))
    assert reads == Counter(range(COUNT))


@pytest.mark.acceptance
def test_two_hosts(request, options, tmp_path):
    """Of four devices each, train on shards as one process does."""
    fill(options)
    values = without(options, "train_data_dir") | {"task": "class_conditional", "global_batch_size": 16}
    values |= {"train_batch_size": 1, "output_dir": str(tmp_path / "two")}
    codes, logs = together(request, tmp_path, 2, values)
    assert codes == [0, 0], logs
    one = train(options, tmp_path / "one", "flax_diffusion", global_batch_size=16, train_batch_size=1)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one), rtol=1e-5)
