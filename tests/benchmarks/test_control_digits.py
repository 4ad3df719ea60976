"""Digits follow a coarse shape and the prompt.

Run: python -m pytest -m acceptance -s tests/benchmarks/test_control_digits.py. The base is trained once, with PyTorch,
the quicker one here.
"""

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
    folder = tmp_path_factory.mktemp("base") / "run"
    train(request, "torch_backend", "digits_text_to_image", "--output_dir", folder)
    return folder


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


@pytest.mark.parametrize("backend", ["torch_backend", "flax_diffusion"])
def test_samples_follow_shape_and_prompt(request, tmp_path, backend, base, shapes):
    names, wanted, labels = shapes
    train(
        request, backend, "digits_controlnet", "--pretrained_model_name_or_path", base, "--output_dir", tmp_path / "run"
    )
    prompts = [f"a handwritten {WORDS[label]}" for label in labels]
    images = generate(
        tmp_path / "run", prompt=prompts, conditioning_image=names, num_inference_steps=50, guidance_scale=2.0,
        batch_size=200,
    )  # fmt: skip
    # Cells of 2 x 2 pixels, of which real pairs agree in all.
    agree = float((coarse_shape(images[..., 0]) == wanted).mean())
    without = generate(base, prompt=prompts, num_inference_steps=50, guidance_scale=2.0, batch_size=200)
    by_chance = float((coarse_shape(without[..., 0]) == wanted).mean())
    judge, _ = svm()
    right = float((judge.predict(to_vectors(images) * 2 - 1) == labels).mean())
    print(f"\n{backend}: {agree:.1%} of the cells are as asked (bound 90%), {by_chance:.1%} without the ControlNet")
    print(f"{right:.1%} of {len(images)} are the prompted digit (bound 95%)")
    assert by_chance < 0.88
    assert agree >= 0.9
    assert right >= 0.95
