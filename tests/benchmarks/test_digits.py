"""The digits recipes reach their figures. Run: python -m pytest -m acceptance -s tests/benchmarks/test_digits.py

Each bound holds for three seeds with PyTorch, the quicker one here, and for the first of them with JAX, which computes
the same.
"""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from digits_quality import WORDS, frechet, real_digits, svm, to_vectors

from flax_diffusion.generate import generate

pytestmark = pytest.mark.acceptance
RUNS = pytest.mark.parametrize(
    ("backend", "seed"), [("torch_backend", 0), ("torch_backend", 1), ("torch_backend", 2), ("flax_diffusion", 0)]
)


def train(request, backend, recipe, seed, out, *more):
    """Runs the README's command in a process of its own, as a user would; returns its wall time in seconds."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"{backend}.train", "--config", f"configs/{recipe}.yaml"]
    start = time.perf_counter()
    command += ["--seed", str(seed), "--output_dir", str(out), *more]
    subprocess.run(command, check=True, cwd=request.config.rootpath, env=environment)
    return time.perf_counter() - start


def judged(images):
    """Whether each of 100 pictures of every digit is that digit, (10, 100), and how often the judge is right at all."""
    judge, accuracy = svm()
    return judge.predict(to_vectors(images) * 2 - 1).reshape(10, 100) == np.arange(10)[:, None], accuracy


def test_the_measure_itself():
    pixels, _ = real_digits()
    half = np.random.default_rng(0).permutation(len(pixels))
    distance = frechet(pixels[half[::2]], pixels[half[1::2]])
    print(f"\nFréchet distance of two random halves of the real digits: {distance:.3f}")
    assert 0.06 < distance < 0.1
    assert svm()[1] >= 0.96


def test_the_distance_sees_what_the_share_does_not():
    """Bolder ink, as too much guidance makes it; and only a few kinds of each digit, as too few pictures do."""
    pixels, labels = real_digits()
    judge, _ = svm(fit_on_all=True)
    few = np.concatenate([np.tile(np.flatnonzero(labels == digit)[:20], 9) for digit in range(10)])
    bold = np.where(pixels > 0.1, np.minimum(pixels + 0.2, 1), pixels)
    for changed, of_what in ((bold, labels), (pixels[few], labels[few])):
        assert (judge.predict(changed * 2 - 1) == of_what).mean() >= 0.99
        assert frechet(changed, pixels) > 0.4


@pytest.mark.parametrize("recipe", ["digits_unconditional", "digits_flow", "digits_edm"])
@RUNS
def test_unconditional(request, tmp_path, recipe, backend, seed):
    seconds = train(request, backend, recipe, seed, tmp_path / "run")
    images = generate(tmp_path / "run", num_images=1790, num_inference_steps=50, batch_size=256)
    distance = frechet(to_vectors(images), real_digits()[0])
    print(f"\n{backend}, seed {seed}, {recipe}: Fréchet distance {distance:.3f} of 1,790 samples (bound 0.10)")
    print(f"training with compilation, samples and export: {seconds:.0f} s (bound 360 on two idle cores)")
    assert distance <= 0.10
    assert seconds <= 360


@RUNS
def test_text_to_image(request, tmp_path, backend, seed):
    seconds = train(request, backend, "digits_text_to_image", seed, tmp_path / "run")
    prompts = [f"a handwritten {word}" for word in WORDS]
    images = generate(
        tmp_path / "run", prompt=prompts, num_images=100, num_inference_steps=50, guidance_scale=2.0, batch_size=200
    )
    right, accuracy = judged(images)
    distance = frechet(to_vectors(images), real_digits()[0])
    print(f"\n{backend}, seed {seed}, text to image: {right.mean():.1%} of 1,000 are the prompted digit (bound 98%)")
    print(f"Fréchet distance {distance:.3f}, with guidance 2 (bound 0.4)")
    print("by digit: " + " ".join(f"{word} {share:.0%}" for word, share in zip(WORDS, right.mean(1), strict=True)))
    print(f"the judge is right on {accuracy:.1%} of the real digits it has not seen")
    print(f"training with compilation, samples and export: {seconds:.0f} s (bound 360 on two idle cores)")
    assert accuracy >= 0.96
    assert right.mean() >= 0.98
    assert distance <= 0.4
    assert seconds <= 360


OBJECTIVES = {"flow_matching": [], "epsilon": ["--objective", "ddpm", "--ddpm_beta_schedule", "squaredcos_cap_v2"]}


@pytest.mark.parametrize("objective", OBJECTIVES)
@RUNS
def test_transformer_of_classes(request, tmp_path, objective, backend, seed):
    seconds = train(request, backend, "digits_dit", seed, tmp_path / "run", *OBJECTIVES[objective])

    def drawn(count, guidance_scale):
        options = {"num_images": count, "guidance_scale": guidance_scale, "num_inference_steps": 50, "batch_size": 500}
        return generate(tmp_path / "run", class_label="all", **options)

    right, accuracy = judged(drawn(100, 2.0))
    distance = frechet(to_vectors(drawn(179, 1.0)), real_digits()[0])
    print(f"\n{backend}, seed {seed}, transformer, {objective}:")
    print(f"{right.mean():.1%} of 1,000 are of the class asked for (bound 98%)")
    print(f"Fréchet distance {distance:.3f} of 1,790 samples without guidance (bound 0.10)")
    print(f"training with compilation, samples and export: {seconds:.0f} s (bound 360 on two idle cores)")
    assert accuracy >= 0.96
    assert right.mean() >= 0.98
    assert distance <= 0.10
    assert seconds <= 360


@pytest.mark.parametrize("seed", range(3))
def test_consistency(request, tmp_path, seed):
    """In one step, by an objective with a loss of its own, which JAX alone has."""
    seconds = train(request, "flax_diffusion", "digits_consistency", seed, tmp_path / "run")
    options = {"objective": "flax_diffusion.recipes.consistency:Consistency", "class_label": "all", "batch_size": 500}
    images = generate(tmp_path / "run", **options, num_images=179, num_inference_steps=1, guidance_scale=1.0)
    distance = frechet(to_vectors(images), real_digits()[0])
    judge, _ = svm()
    right = judge.predict(to_vectors(images) * 2 - 1).reshape(10, 179) == np.arange(10)[:, None]
    print(f"\nconsistency, seed {seed}: Fréchet distance {distance:.3f} of 1,790 samples in one step (bound 0.5)")
    print(f"{right.mean():.1%} are of the class asked for (bound 85%); training took {seconds:.0f} s")
    assert distance <= 0.5
    assert right.mean() >= 0.85
