"""Digits follow a coarse shape and the prompt.

Run: python -m pytest -m acceptance -s tests/benchmarks/test_control_digits.py. The bases are trained from scratch, with
PyTorch, the quicker one here.
"""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
from digits_quality import WORDS, real_digits, svm, to_vectors
from PIL import Image

from flax_diffusion.core.data.sources.opening import coarse_shape
from flax_diffusion.generate import generate

pytestmark = pytest.mark.acceptance
EACH = 20
"""Shapes of each digit."""


def train(request, backend, recipe, *flags):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"{backend}.train", "--config", f"configs/{recipe}.yaml", *map(str, flags)]
    subprocess.run(command, check=True, cwd=request.config.rootpath, env=environment)


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """Trains the base of a seed, once."""

    @functools.cache
    def made(seed):
        folder = tmp_path_factory.mktemp(f"base-{seed}") / "run"
        train(request, "torch_backend", "digits_text_to_image", "--output_dir", folder, "--seed", seed)
        return folder

    return made


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Files of the coarse shapes of real digits, and the digit of each."""
    pixels, labels = real_digits()
    folder = tmp_path_factory.mktemp("shapes")
    chosen = np.concatenate([np.flatnonzero(labels == digit)[:EACH] for digit in range(10)])
    wanted = coarse_shape(np.rint(pixels[chosen].reshape(-1, 8, 8) * 255).astype(np.uint8))
    names = [str(folder / f"{number}.png") for number in range(len(chosen))]
    for name, shape in zip(names, wanted, strict=True):
        Image.fromarray(shape).save(name)
    return names, wanted, labels[chosen]


@pytest.mark.parametrize(
    ("backend", "seed"), [("torch_backend", 0), ("torch_backend", 1), ("torch_backend", 2), ("flax_diffusion", 0)]
)
def test_samples_follow_shape_and_prompt(request, tmp_path, backend, seed, base, shapes):
    """Of the cells that are wrong without it (few, for digits of one kind look alike), at most half stay so."""
    names, wanted, labels = shapes
    flags = ("--pretrained_model_name_or_path", base(seed), "--output_dir", tmp_path / "run", "--seed", seed)
    train(request, backend, "digits_controlnet", *flags)
    prompts = [f"a handwritten {WORDS[label]}" for label in labels]
    options = {"prompt": prompts, "num_inference_steps": 50, "guidance_scale": 2.0, "batch_size": 200, "seed": seed}
    images = generate(tmp_path / "run", conditioning_image=names, **options)
    without = generate(base(seed), **options)
    # Cells of 2 x 2 pixels, of which real pairs agree in all.
    agree, by_chance = (float((coarse_shape(drawn[..., 0]) == wanted).mean()) for drawn in (images, without))
    judge, _ = svm()
    right = float((judge.predict(to_vectors(images) * 2 - 1) == labels).mean())
    print(f"\n{backend}, seed {seed}: {agree:.1%} of the cells are as asked, {by_chance:.1%} without the ControlNet")
    print(f"{right:.1%} of {len(images)} are the prompted digit")
    assert agree >= 0.9
    assert 1 - agree <= 0.5 * (1 - by_chance)
    assert right >= 0.95
