"""What one example holds."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny import OBJECTIVE

from flax_diffusion.core.data.batches import ExampleFn
from flax_diffusion.core.data.captions import Tokenize, TokenizePrompt, train_tokenizer
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.sources.folders import FolderSource
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.objectives.ddpm import ddpm
from flax_diffusion.core.objectives.noising import NoiseSpec
from flax_diffusion.core.objectives.objective import Mixture

TRANSFORM = ImageTransform(resolution=8, channels=1, random_flip=True)
NOISE = NoiseSpec(objective=OBJECTIVE, shape=(1, 8, 8))


@pytest.fixture(scope="module")
def digits():
    return open_source(dataset_name="digits")


@pytest.fixture(scope="module")
def tokenize():
    return TokenizePrompt({"input_ids": Tokenize.from_clip(train_tokenizer(["a handwritten zero"], 520, 16))})


def one_file(tmp_path, captions):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return FolderSource(tmp_path, ["a.png"], captions)


def test_unconditional(digits):
    example = ExampleFn(transform=TRANSFORM, noise=NOISE)(digits, 0, 0, 5)
    assert {key: (value.shape, value.dtype.name) for key, value in example.items()} == {
        "pixel_values": ((1, 8, 8), "float32"),
        "timesteps": ((), "int32"),
        **dict.fromkeys(Mixture._fields[1:], ((), "float32")),
        "noise": ((1, 8, 8), "float32"),
        "example_index": ((), "int64"),
    }
    assert example["example_index"] == 5
    assert example["loss_weights"] == 1


def test_with_captions_and_latents(digits, tokenize):
    noise = NoiseSpec(objective=OBJECTIVE, shape=(4, 2, 2), latent_noise=True, input_perturbation=0.1)
    make = pickle.loads(pickle.dumps(ExampleFn(transform=TRANSFORM, noise=noise, tokenize=tokenize)))  # noqa: S301
    example = make(digits, 0, 0, 0)
    assert example["latent_noise"].shape == example["perturbation"].shape == (4, 2, 2)
    np.testing.assert_array_equal(example["input_ids"], tokenize("a handwritten zero")["input_ids"])


def test_everything_depends_on_seed_epoch_and_index(digits):
    make = ExampleFn(transform=TRANSFORM, noise=NOISE)
    first = make(digits, 3, 1, 7)
    again = make(digits, 3, 1, 7)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    for other in ((4, 1, 7), (3, 2, 7), (3, 1, 8)):
        assert not np.array_equal(make(digits, *other)["noise"], first["noise"])


def test_weight_of_the_timestep(digits):
    table = np.arange(1000, dtype=np.float32) / 7
    make = ExampleFn(transform=TRANSFORM, noise=replace(NOISE, objective=ddpm(np.full(1000, 0.5), "sample", table)))
    for index in range(20):
        example = make(digits, 0, 0, index)
        assert example["loss_weights"] == table[example["timesteps"]]


def test_empty_prompts(digits, tokenize):
    make = ExampleFn(transform=TRANSFORM, noise=NOISE, tokenize=tokenize, proportion_empty_prompts=0.25)
    empty = tokenize("")["input_ids"]
    count = sum(np.array_equal(make(digits, 0, 0, index)["input_ids"], empty) for index in range(1000))
    assert 195 < count < 305  # 4 standard errors
    always = ExampleFn(transform=TRANSFORM, noise=NOISE, tokenize=tokenize, proportion_empty_prompts=1.0)
    np.testing.assert_array_equal(always(digits, 0, 0, 0)["input_ids"], empty)


def test_several_captions_take_turns(tmp_path, tokenize):
    source = one_file(tmp_path, [["one", "two", "three"]])
    make = ExampleFn(transform=TRANSFORM, noise=NOISE, tokenize=tokenize)
    ids = [tuple(make(source, 0, epoch, 0)["input_ids"].tolist()) for epoch in range(300)]
    counts = [ids.count(tuple(tokenize(text)["input_ids"].tolist())) for text in ("one", "two", "three")]
    assert sum(counts) == 300
    assert min(counts) > 67  # 4 standard errors below 100


@pytest.mark.parametrize("caption", [None, []])
def test_no_caption(tmp_path, tokenize, caption):
    make = ExampleFn(transform=TRANSFORM, noise=NOISE, tokenize=tokenize)
    with pytest.raises(DataError, match=r"a\.png has no caption"):
        make(one_file(tmp_path, [caption]), 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"), [({"proportion_empty_prompts": 1.5}, r"proportion_empty_prompts is 1.5")]
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ExampleFn(transform=TRANSFORM, noise=NOISE, **options)
