"""Images from a pipeline folder: independent of batching, equal to plain Diffusers, honest about mistakes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import RUN, TEXT_RUN, stable_diffusion

from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.randomness.streams import sampling_noise
from flax_diffusion.generate import generate, main
from torch_backend.train import train


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return train("unconditional", **RUN, output_dir=str(tmp_path_factory.mktemp("digits") / "run"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return train("text_to_image", **TEXT_RUN, output_dir=str(tmp_path_factory.mktemp("text") / "run"))


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("sd"))


def test_images_do_not_depend_on_the_batch(digits):
    whole = generate(digits, num_images=5, num_inference_steps=3, batch_size=5)
    parts = generate(digits, num_images=5, num_inference_steps=3, batch_size=2)
    assert whole.shape == (5, 8, 8, 1)
    assert whole.dtype == np.uint8
    assert np.abs(whole.astype(int) - parts).max() <= 1
    other = generate(digits, num_images=5, num_inference_steps=3, seed=1)
    assert np.abs(whole.astype(int) - other).max() > 20


def as_uint8(images):
    return (np.clip(images / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)


def test_unconditional_equals_diffusers(digits, monkeypatch):
    from diffusers import DDPMPipeline

    pipe = DDPMPipeline.from_pretrained(digits)
    noises = iter([torch.from_numpy(sampling_noise(3, np.arange(2), step, (1, 8, 8))) for step in range(20)])
    for module in ("diffusers.pipelines.ddpm.pipeline_ddpm", "diffusers.schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: next(noises))
    theirs = pipe(batch_size=2, num_inference_steps=6, output_type="np").images
    ours = generate(digits, num_images=2, num_inference_steps=6, seed=3)
    assert np.abs(ours.astype(int) - (theirs * 255).round()).max() <= 1


@pytest.mark.parametrize("scheduler", [None, "ddim"])
def test_stable_diffusion_equals_diffusers(latent, scheduler):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(latent)
    if scheduler:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(
        "a photo of a dog", latents=torch.from_numpy(sampling_noise(0, np.arange(1), 0, (4, 8, 8))),
        num_inference_steps=6, guidance_scale=3.0, output_type="np",
    ).images  # fmt: skip
    ours = generate(latent, prompt="a photo of a dog", num_inference_steps=6, guidance_scale=3.0, scheduler=scheduler)
    assert ours.shape == (1, 16, 16, 3)
    assert np.abs(ours.astype(int) - (theirs * 255).round()).max() <= 1


def test_pixel_space_text_pipeline_opens_in_diffusers(text):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(text, vae=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    latents = torch.from_numpy(sampling_noise(0, np.arange(1), 0, (1, 8, 8)))
    theirs = pipe(
        "a handwritten two", height=64, width=64, latents=latents, num_inference_steps=5, guidance_scale=2.0,
        output_type="latent",
    ).images  # fmt: skip
    ours = generate(text, prompt="a handwritten two", num_inference_steps=5, guidance_scale=2.0, scheduler="ddim")
    assert np.abs(ours[0, :, :, 0].astype(int) - as_uint8(theirs.numpy())[0, 0]).max() <= 1


def test_several_prompts_in_order(text):
    options = {"num_images": 2, "num_inference_steps": 3, "guidance_scale": 2.0}
    both = generate(text, prompt=["a handwritten two", "a handwritten six"], **options)
    first = generate(text, prompt="a handwritten two", **options)
    assert both.shape == (4, 8, 8, 1)
    assert np.abs(both[:2].astype(int) - first).max() <= 1
    negative = generate(text, prompt="a handwritten two", negative_prompt="a handwritten six", **options)
    assert np.abs(negative.astype(int) - first).max() > 0


@pytest.mark.parametrize("scheduler", ["pndm", "euler", "dpm++"])
def test_other_samplers_run(digits, scheduler):
    images = generate(digits, num_images=2, num_inference_steps=5, scheduler=scheduler)
    assert images.std() > 10


def test_command_line(digits, tmp_path):
    main(["--model", str(digits), "--num_images", "3", "--num_inference_steps", "2", "--output_dir", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "00001.png", "00002.png", "grid.png"]
    with Image.open(tmp_path / "00000.png") as image:
        assert (image.size, image.mode) == ((8, 8), "L")


def test_mistakes(digits, text, tmp_path, request):
    with pytest.raises(ConfigError, match="DDPMPipeline with 1 prompts: drop --prompt"):
        generate(digits, prompt="a dog")
    with pytest.raises(ConfigError, match="give at least one --prompt"):
        generate(text)
    with pytest.raises(ConfigError, match=r"did you mean .num_images."):
        generate(digits, num_image=1)
    with pytest.raises(WeightsError, match=r"model_index\.json"):
        generate(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output_dir .*file/images: cannot be made: Not a directory"):
        main(["--model", str(digits), "--output_dir", str(tmp_path / "file/images")])
    with pytest.raises(ConfigError, match="num_inference_steps"):
        generate(digits, num_inference_steps=2000)
    done = subprocess.run(
        [
            sys.executable, "-m", "flax_diffusion.generate", "--model", str(tmp_path / "nowhere"),
            "--output_dir", str(tmp_path / "images"),
        ],
        capture_output=True, text=True, cwd=request.config.rootpath,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
