"""Buckets: pictures of several shapes at several sizes, a size a step."""

import math
import pickle
import re

import numpy as np
import pytest
from PIL import Image
from proofs import proof
from tiny import shaped_pictures, stable_diffusion

import flax_diffusion.train
import torch_backend.train
from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.data import buckets
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.order import Bucketed
from flax_diffusion.core.data.sources.source import ArraySource
from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.randomness.streams import example_rng

BACKENDS = {"jax": flax_diffusion.train, "torch": torch_backend.train}


def random_sizes(count, low, high, seed=0):
    return np.random.default_rng(seed).integers(low, high, (count, 2))


@pytest.mark.parametrize(("resolution", "multiple"), [(1024, 32), (1024, 64), (512, 64), (64, 8), (16, 2), (8, 1)])
def test_sizes_of_our_choice(resolution, multiple):
    sizes = buckets.auto_sizes(resolution, multiple)
    shapes = [height / width for height, width in sizes]
    assert len(sizes) <= 17
    assert (resolution, resolution) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    assert shapes == sorted(set(shapes))
    assert max(shapes) <= 2.1
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert 0.7 * resolution**2 <= height * width <= resolution**2
    assert buckets.parse_sizes(["auto"], resolution, multiple) == sizes


def test_sizes_that_are_given():
    assert buckets.parse_sizes(["64x96", "128X64", "64x64"], 64, 32) == [(64, 128), (64, 64), (96, 64)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["64"], "--bucket_resolutions 64: must be auto alone, or width x height such as 1152x896"),
        (["auto", "64x64"], "--bucket_resolutions auto: must be auto alone"),
        (["64x-64"], "--bucket_resolutions 64x-64: must be auto alone"),
        (["64x0"], "--bucket_resolutions 64x0: must be auto alone"),
        (["64x72"], "--bucket_resolutions 64x72: 72 must be a multiple of 32, by which this .*: 64 or 96"),
        (["64x64", "128x128"], "--bucket_resolutions .* are of one shape: drop one of them"),
    ],
)
def test_sizes_that_are_wrong(given, message):
    with pytest.raises(ConfigError, match=message):
        buckets.parse_sizes(given, 64, 32)


def test_pictures_are_divided_without_rest():
    """Whatever their shapes and the batch: fewer than a batch are left out, and those go to the nearest otherwise."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        batch = int(rng.integers(1, 20))
        pictures = random_sizes(int(rng.integers(batch, 200)), 100, 2000, int(rng.integers(2**31)))
        shapes = np.sort(rng.uniform(0.4, 2.5, int(rng.integers(1, 14))))
        sizes = [(int(1000 * shape), 1000) for shape in shapes]
        members = buckets.divide(pictures, sizes, batch)
        assert sorted(np.concatenate(members).tolist()) == list(range(len(pictures)))
        assert sum(len(own) // batch for own in members) == len(pictures) // batch
    pictures = np.array([(100, 100)] * 8 + [(200, 100)] * 8)
    members = buckets.divide(pictures, [(64, 128), (64, 64)], 4)
    assert [own.tolist() for own in members] == [list(range(8, 16)), list(range(8))]
    with pytest.raises(DataError, match="3 pictures are fewer than the 4 of one optimizer step: lower the batch size"):
        buckets.divide(pictures[:3], [(64, 64)], 4)


def test_little_is_cut_off_and_few_are_left_out(figure):
    """A thousand pictures of random sizes: none is padded or distorted, and the median loses less than 3%."""
    pictures, batch = random_sizes(1000, 512, 2048), 16
    sizes = buckets.auto_sizes(1024, 32)
    members = buckets.divide(pictures, sizes, batch)
    lost = []
    for size, own in zip(sizes, members, strict=True):
        transform = ImageTransform(resolution=1024, size=size, center_crop=True)
        for width, height in pictures[own].tolist():
            place = transform.place((width, height), lambda stream: None)
            assert place.target == size
            assert place.size[0] >= size[1]
            assert place.size[1] >= size[0]
            assert (place.size[0] == size[1]) or (place.size[1] == size[0])
            assert abs(place.size[0] / width * height - place.size[1]) <= max(width, height) / min(width, height)
            lost.append(1 - size[0] * size[1] / math.prod(place.size))
    left_out = sum(len(own) % batch for own in members)
    line = f"the median loses {np.median(lost):.1%}, {left_out} are left out of an epoch"
    figure("21", f"1,000 pictures over {len(sizes)} buckets: {line}")
    assert np.median(lost) <= 0.03
    assert left_out < 0.02 * len(pictures)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(20, 48), (48, 20), (31, 32)])
def test_pixels_are_those_of_pillow(size, interpolation):
    for width, height in ((40, 30), (17, 80), (3000, 4)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        transform = ImageTransform(resolution=32, size=size, interpolation=interpolation, random_flip=True)
        done = transform(image, lambda stream: example_rng(0, stream, 0, 3))
        top, left = done.place.corner
        whole = image.resize(done.place.size, getattr(Image.Resampling, interpolation.upper()))
        expected = np.asarray(whole.crop((left, top, left + size[1], top + size[0])))
        expected = expected[:, ::-1] if done.place.flipped else expected
        np.testing.assert_array_equal(np.rint((done.pixel_values + 1) * 127.5), expected.transpose(2, 0, 1))


def ordered(count=50, batch=6, seed=1):
    pictures = random_sizes(count, 100, 200)
    sizes = buckets.auto_sizes(64, 8)
    return Bucketed(sizes=sizes, members=buckets.divide(pictures, sizes, batch), step_examples=batch, seed=seed)


def test_the_order_of_steps():
    order = ordered()
    assert order.steps == 8
    epochs = []
    for epoch in range(3):
        seen = []
        for step in range(order.steps):
            places = [order.at((epoch * order.steps + step) * 6 + number) for number in range(6)]
            assert len({place.bucket for place in places}) == 1
            assert {place.epoch for place in places} == {epoch}
            for place in places:
                assert place.size == order.sizes[place.bucket]
                assert place.index in order.members[place.bucket]
                assert order.following(place, 0) == place.index
                assert order.following(place, 1) in order.members[place.bucket]
            seen += [place.index for place in places]
        assert len(seen) == len(set(seen)) == 48
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    again = pickle.loads(pickle.dumps(ordered()))  # noqa: S301
    assert [again.at(position).index for position in range(100, 140)] == [
        order.at(position).index for position in range(100, 140)
    ]
    assert [ordered(seed=2).at(position).index for position in range(48)] != epochs[0]


def test_processes_and_resumed_runs_take_the_same_steps():
    order = ordered(batch=8)
    source = ArraySource(np.zeros((50, 4, 4, 3), np.uint8), None, "grey")

    def make(source, seed, epoch, index, size=None):
        return {"index": np.asarray(index), "size": np.asarray(size), "epoch": np.asarray(epoch)}

    def steps(**options):
        with Loader(source, make, seed=1, order=order, accumulation=2, **options) as loader:
            return [{name: array.tolist() for name, array in step.items()} for step in loader]

    whole = steps(batch_size=4, num_steps=15)
    assert all(np.array(step["size"]).reshape(-1, 2).std(axis=0).max() == 0 for step in whole)
    assert len({tuple(step["size"][0][0]) for step in whole}) > 2
    assert steps(batch_size=4, num_steps=8, start_example=7 * 8) == whole[7:]
    halves = [steps(batch_size=2, num_steps=15, process_index=part, process_count=2) for part in range(2)]
    for one, two, both in zip(*halves, whole, strict=True):
        joined = [[*a, *b] for a, b in zip(one["index"], two["index"], strict=True)]
        assert joined == both["index"]


SHAPES = [(24, 24)] * 5 + [(40, 22)] * 4 + [(21, 41)] * 4


@pytest.fixture
def options(tmp_path):
    return {
        "pretrained_model_name_or_path": str(stable_diffusion(tmp_path / "base")),
        "train_data_dir": str(shaped_pictures(tmp_path / "data", SHAPES)), "resolution": 16, "train_batch_size": 2,
        "bucket_resolutions": ["auto"], "max_train_steps": 6, "checkpointing_steps": 3, "lr_warmup_steps": 0,
        "draw_samples": False,
        "learning_rate": 1e-3, "random_flip": True, "report_to": "none",
    }  # fmt: skip


@pytest.mark.parametrize("backend", [proof("jax"), "torch"])
def test_a_run_resumes_bitwise(options, tmp_path, backend, caplog):
    caplog.set_level("INFO")
    train = BACKENDS[backend].train
    whole = train("text_to_image", **options, output_dir=str(tmp_path / "whole"))
    assert "3 buckets, each compiled when it is first met, and their pictures: 20x12 4, 16x16 5, 10x20 4" in caplog.text
    part = tmp_path / "part"
    train("text_to_image", **options | {"max_train_steps": 3}, output_dir=str(part))
    train("text_to_image", **options, output_dir=str(part), resume_from_checkpoint="latest")
    for name in ("unet/diffusion_pytorch_model.safetensors",):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.acceptance
def test_one_program_a_bucket(options, tmp_path, monkeypatch):
    from flax_diffusion.jax_backend.backend import JaxBackend

    programs = []
    real = JaxBackend.train_step

    def train_step(self, *arguments):
        programs.append(self.program.step)
        return real(self, *arguments)

    monkeypatch.setattr(JaxBackend, "train_step", train_step)
    flax_diffusion.train.train("text_to_image", **options, output_dir=str(tmp_path / "run"))
    assert programs[-1]._cache_size() == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bucket_resolutions": ["15x17"]}, "--bucket_resolutions 15x17: 15 must be a multiple of 2"),
        ({"resize_mode": "stretch"}, "--resize_mode stretch does not: drop one"),
        ({"cache_latents": True}, "crops at random would differ from epoch to epoch: add --center_crop"),
        ({"train_batch_size": 14}, "13 pictures are fewer than the 14 of one optimizer step: lower the batch size"),
    ],
)
def test_what_does_not_go_together(options, tmp_path, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        flax_diffusion.train.train("text_to_image", **options | changes, output_dir=str(tmp_path / "run"))


def test_small_pictures_are_not_enlarged_unsaid(options, tmp_path, caplog):
    options |= {"train_data_dir": str(shaped_pictures(tmp_path / "small", [*SHAPES, (8, 8), (9, 9)]))}
    torch_backend.train.train("text_to_image", **options | {"max_train_steps": 1}, output_dir=str(tmp_path / "run"))
    said = r"2 of 15 pictures are smaller than their bucket, and are enlarged: \S+0013\.png, \S+0014\.png"
    assert re.search(said, caplog.text)


def test_a_bad_picture_is_replaced_by_one_of_its_bucket(options, tmp_path, caplog):
    data = tmp_path / "many"
    shaped_pictures(data, [*SHAPES * 8, (24, 24)])
    (data / "0104.png").write_bytes(b"not a picture")
    options |= {"train_data_dir": str(data), "max_train_steps": 3, "train_batch_size": 8}
    with pytest.raises(DataError, match="0104"):
        torch_backend.train.train("text_to_image", **options, output_dir=str(tmp_path / "refused"))
    out = torch_backend.train.train("text_to_image", **options, skip_bad_images=True, output_dir=str(tmp_path / "run"))
    assert portable.read(out / "checkpoint-3")[1]["step"] == 3
    assert "smaller than their bucket" not in caplog.text
