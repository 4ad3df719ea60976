"""Buckets with what is computed before training, and with pairs of pictures."""

import importlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hosts import together
from tiny import losses, pictures, shaped_pictures, stable_diffusion, stable_diffusion_xl

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data import batches, store
from flax_diffusion.core.data.buckets import make_order
from flax_diffusion.core.run import assembly, precompute
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.run.shards import encoding
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.validation.held_out import with_held_out

BACKENDS = ("flax_diffusion", "torch_backend")
QUICK_ON_PYTORCH = (pytest.param("flax_diffusion", marks=pytest.mark.acceptance), "torch_backend")
"""JAX compiles a program for each size and run: the parity of three steps holds it to PyTorch."""
SHAPES = [(24, 24)] * 5 + [(40, 22)] * 4 + [(21, 41)] * 4
CACHED = {"cache_latents": True, "center_crop": True}
LATENTS = {(16, 16): (8, 8), (20, 10): (10, 5), (12, 20): (6, 10)}
"""Height and width of the latents of a picture, by its own."""


@pytest.fixture
def options(tmp_path):
    return {
        "pretrained_model_name_or_path": str(stable_diffusion(tmp_path / "base")),
        "train_data_dir": str(shaped_pictures(tmp_path / "data", SHAPES)), "resolution": 16, "train_batch_size": 2,
        "bucket_resolutions": ["auto"], "max_train_steps": 7, "lr_warmup_steps": 0, "learning_rate": 1e-3,
        "random_flip": True, "center_crop": True, "draw_samples": False, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


@pytest.fixture
def things(options, tmp_path):
    """Options of DreamBooth, with four pictures of the new thing, two of them wide, and nine of its class."""
    shapes = [(24, 24), (25, 24), (40, 22), (41, 22)]
    named = {
        "instance_data_dir": str(shaped_pictures(tmp_path / "thing", shapes)), "instance_prompt": "a photo of sks dog",
        "class_data_dir": str(pictures(tmp_path / "class", 9, size=30)), "class_prompt": "a photo of dog",
        "num_class_images": 9, "bucket_resolutions": ["16x16", "20x12"], "with_prior_preservation": True,
        "prior_loss_weight": 0.5,
    }  # fmt: skip
    return {name: value for name, value in options.items() if name != "train_data_dir"} | named


@pytest.fixture
def encoded(monkeypatch):
    """Names of the pictures that were encoded."""
    names, decode = [], encoding.decode

    def read(record):
        names.append(Path(record.name).name)
        return decode(record)

    monkeypatch.setattr(encoding, "decode", read)
    return names


def start(options, name, backend="torch_backend", task="text_to_image", command="train", **changes):
    module = importlib.import_module(f"{backend}.{command}")
    output_dir = str(Path(options["output_dir"]).with_name(name))
    return getattr(module, command)(task, **options | changes | {"output_dir": output_dir})


def weights(run):
    return (run / "unet/diffusion_pytorch_model.safetensors").read_bytes()


def folders(kept):
    return sorted(Path(kept["precomputed_dir"]).glob("posteriors-*"))


@pytest.mark.parametrize("backend", QUICK_ON_PYTORCH)
def test_cached_latents(options, tmp_path, backend):
    """The losses are those of a run that encodes at each step, and a resumed run ends as one that was not ended."""
    each = start(options, "each", backend)
    once = start(options, "once", backend, **CACHED, dataloader_num_workers=1)
    np.testing.assert_allclose(losses(once), losses(each), rtol=1e-5)
    part = start(options, "part", backend, **CACHED, max_train_steps=3)
    start(options, "part", backend, **CACHED, resume_from_checkpoint="latest")
    assert weights(part) == weights(once)


@pytest.mark.acceptance
@pytest.mark.parametrize("first", BACKENDS)
def test_latents_that_stay(options, tmp_path, encoded, first):
    """A second run encodes nothing, of the other backend neither; each shard has rows of one shape."""
    kept = options | CACHED | {"precomputed_dir": str(tmp_path / "kept")}
    start(kept, "filled", first, command="precompute")
    assert sorted(encoded) == [f"{number:04d}.png" for number in range(13)]
    encoded.clear()
    runs = [start(kept, f"of-{backend}", backend) for backend in BACKENDS]
    once = start(kept, "once", first, precomputed_dir=None)
    assert losses(runs[BACKENDS.index(first)]) == losses(once)
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=1e-5)
    (folder,) = folders(kept)
    shards = [store.open_shard(shard) for shard in folder.glob("shard-*")]
    shapes = sorted(shard.tensors["posteriors"][1] for shard in shards)
    assert shapes == [(4, 2, 2, 4, 6, 10), (4, 2, 2, 4, 10, 5), (5, 2, 2, 4, 8, 8)]
    assert {row.key[32:] for shard in shards for row in shard.rows} == {" 16x16", " 20x12", " 10x20"}


def test_another_list_of_buckets(options, tmp_path, encoded, caplog):
    """It says what changed; with another batch only the pictures are encoded that have another bucket then."""
    caplog.set_level("INFO")
    kept = options | CACHED | {"precomputed_dir": str(tmp_path / "kept")}
    squares = kept | {"bucket_resolutions": []}
    given = kept | {"bucket_resolutions": ["16x16", "20x12"]}
    for one in (squares, given, kept):
        start(one, "filled", command="precompute")
    said = [text.partition("posteriors-")[2].partition(": ")[2] for text in caplog.messages if "made anew" in text]
    assert said[0] == "picture bucket_resolutions None → ['20x12', '16x16']"
    assert re.fullmatch(r"picture bucket_resolutions \['20x12', '16x16'\] → \[.*'16x16'.*\]", said[1])
    assert len(folders(kept)) == 3
    encoded.clear()
    caplog.clear()
    start(
        kept, "filled", command="precompute", train_batch_size=3
    )  # of which each bucket but the squares gets a multiple
    assert 0 < len(encoded) < 5
    assert "changed since" not in caplog.text
    data = Path(options["train_data_dir"])
    shutil.copy(data / "0006.png", data / "0005.png")
    encoded.clear()
    start(kept, "filled", command="precompute")
    assert encoded == []  # its bytes are there, at that size


def loaded(options, task="text_to_image", epochs=1, **changes):
    """The examples of a run by index, in the order of its steps: a list of dictionaries of arrays."""
    from torch_backend.backend import TorchBackend

    task = task_of(command_line.merge(task, {}, options | changes, ""))
    source = task.open_source()
    spec = task.make_spec(source)
    backend = TorchBackend(task.config, spec)
    backend.init_state()
    schedule = make_schedule(task.config, task.count_examples(source), 1)
    order = assembly.make_buckets(task, spec, source, schedule)
    source = task.complete_source(source, backend)
    pictures, sizes = with_held_out(source, order, task.rows_per_example, None)
    made = precompute.precompute(task, spec, pictures, backend, Path(options["output_dir"]), sizes)
    steps = order.steps * epochs
    with assembly.make_loader(task, spec, source, schedule, num_steps=steps, made=made, buckets=order) as loader:
        return [{name: array[0] for name, array in batch.items()} for batch in loader]


def test_sizes_that_are_told(options, tmp_path, monkeypatch):
    """Original size, corner and target are those of the crop that is taken, with latents as without."""
    options |= {"pretrained_model_name_or_path": str(stable_diffusion_xl(tmp_path / "xl"))}
    each = loaded(options)
    monkeypatch.setattr(batches, "size_of", None)  # no picture is read
    once = loaded(options, **CACHED)
    for one, other in zip(once, each, strict=True):
        assert set(one) - set(other) == {"posterior"}
        for name in set(one) & set(other):
            np.testing.assert_array_equal(one[name], other[name])
        size = other["pixel_values"].shape[2:]
        assert one["posterior"].shape[-2:] == LATENTS[size]
        for index, told in zip(one["example_index"].tolist(), one["time_ids"].tolist(), strict=True):
            width, height = SHAPES[index]
            scale = max(size[0] / height, size[1] / width)
            spare = int(height * scale) - size[0], int(width * scale) - size[1]
            assert told[:2] == [height, width]
            assert told[4:] == list(size)
            assert abs(told[2] - spare[0] / 2) <= 0.5
            assert abs(told[3] - spare[1] / 2) <= 0.5


@pytest.mark.parametrize("changes", [{}, CACHED])
def test_pairs_of_pictures(things, changes, caplog):
    """Both of a pair have the size of the new thing's bucket, and an epoch has every pair, but for a part of a step."""
    caplog.set_level("INFO")
    steps = loaded(things, "dreambooth", epochs=2, **changes)
    assert len(steps) == 2 * (9 // 2)
    assert "their pairs of pictures: 20x12 4, 16x16 5" in caplog.text
    for epoch in (steps[:4], steps[4:]):
        pairs = [index for step in epoch for index in step["example_index"].tolist()]
        assert pairs[::2] == [index - 1 for index in pairs[1::2]]
        assert len(set(pairs)) == len(pairs) == 16
        assert {pair // 2 % 4 for pair in pairs} == set(range(4))  # each picture of the new thing
    for step in steps:
        shape = step["posterior" if changes else "pixel_values"].shape
        size = (12, 20) if step["example_index"][0] // 2 % 4 >= 2 else (16, 16)
        assert shape[0] == 4
        assert shape[-2:] == (LATENTS[size] if changes else size)
        assert step["loss_weights"][::2].tolist() == (2 * step["loss_weights"][1::2]).tolist()
        assert len({index // 2 % 4 >= 2 for index in step["example_index"].tolist()}) == 1


@pytest.mark.parametrize("backend", QUICK_ON_PYTORCH)
def test_runs_on_pairs(things, tmp_path, backend, encoded):
    """With latents as without, and resumed as not ended; class pictures are encoded at each size that they have."""
    things |= {"max_train_steps": 5, "num_class_images": 3}  # the first is paired with a square and with a wide one
    each = start(things, "each", backend, "dreambooth")
    once = start(things, "once", backend, "dreambooth", **CACHED)
    np.testing.assert_allclose(losses(once), losses(each), rtol=1e-5)
    assert sorted(encoded) == sorted(
        [*(f"{number:04d}.png" for number in range(4)), "0.png", "0.png", "1.png", "2.png"]
    )
    part = start(things, "part", backend, "dreambooth", **CACHED, max_train_steps=2)
    start(things, "part", backend, "dreambooth", **CACHED, resume_from_checkpoint="latest")
    assert weights(part) == weights(once)


def test_small_pictures_of_pairs_are_named_once(things, tmp_path, caplog):
    """Also those of the class, each of which is in several pairs."""
    things |= {"class_data_dir": str(pictures(tmp_path / "small", 3, size=10)), "num_class_images": 3}
    start(things, "run", task="dreambooth", max_train_steps=1)
    said = [record.getMessage() for record in caplog.records if "smaller than their bucket" in record.getMessage()]
    assert len(said) == 1
    assert re.match(r"3 of 7 pictures are smaller than their bucket, and are enlarged: \S*0\.png, \S*1", said[0])


def test_only_the_first_process_tells(options, caplog):
    caplog.set_level("INFO")
    task = task_of(command_line.merge("text_to_image", {}, options, ""))
    source = task.open_source()
    orders = [
        make_order(source, [(12, 20), (64, 64)], 2, 0, skip_bad_images=False, main=main) for main in (False, True)
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert [orders[0].at(position) for position in range(30)] == [orders[1].at(position) for position in range(30)]


@pytest.mark.acceptance
def test_two_processes(request, options, things, tmp_path):
    """They take the same steps as one, of pictures and of pairs, with latents that they encode together; one tells."""
    shapes = SHAPES * 6
    shaped_pictures(tmp_path / "data", shapes)
    shaped_pictures(tmp_path / "thing", shapes)
    shared = CACHED | {"global_batch_size": 8, "max_train_steps": 9, "precomputed_dir": str(tmp_path / "kept")}
    for task, given in (("text_to_image", options), ("dreambooth", things)):
        one = start(given, f"one-{task}", "flax_diffusion", task, **shared | {"precomputed_dir": None})
        values = given | shared | {"task": task, "output_dir": str(tmp_path / f"two-{task}")}
        codes, logs = together(request, tmp_path, 2, values)
        assert codes == [0, 0], logs
        np.testing.assert_allclose(losses(tmp_path / f"two-{task}"), losses(one), rtol=1e-5)
        assert ["each compiled when it is first met" in log for log in logs] == [True, False]
