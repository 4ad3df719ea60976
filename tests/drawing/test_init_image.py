"""Pictures that are drawn over: the steps that are left out, the same on both backends and in plain Diffusers."""

import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from proofs import proof
from tiny import RUN, stable_diffusion

import flax_diffusion.generate
import torch_backend.generate
from flax_diffusion.core.errors import ConfigError, DataError, UserError
from flax_diffusion.core.objectives.samplers import first_step
from flax_diffusion.core.randomness.streams import sampling_noise
from torch_backend.train import train

BACKENDS = (flax_diffusion.generate.generate, torch_backend.generate.generate)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Twice as wide as it is high, so that its centre is cut out."""
    path = tmp_path_factory.mktemp("picture") / "a.png"
    across = np.broadcast_to(np.linspace(0, 255, 64)[None, :, None], (32, 64, 3))
    Image.fromarray((across * [1, 0.5, 0.2]).astype(np.uint8)).save(path)
    return path


def drawn(backend, model, picture, **options):
    options = {"prompt": "a dog", "num_images": 2, "num_inference_steps": 6, "seed": 4} | options
    return backend(model, init_image=str(picture), **options).astype(int)


@pytest.mark.parametrize("strength", [0.5, proof(1.0)])
def test_they_are_those_of_diffusers(model, picture, monkeypatch, strength):
    """With the same noise, and the means of the posterior, which Diffusers samples."""
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(model, safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    noise = torch.from_numpy(sampling_noise(4, np.arange(2), 0, (4, 8, 8)))
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **options: noise)
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda shape, **options: torch.zeros(shape))
    pipe.set_progress_bar_config(disable=True)
    with Image.open(picture) as image:
        cut = image.crop((16, 0, 48, 32)).resize((16, 16), Image.Resampling.BILINEAR)
    theirs = pipe(
        prompt=["a dog"] * 2, image=[cut, cut], strength=strength, num_inference_steps=6, output_type="np",
    ).images  # fmt: skip
    for backend in BACKENDS:
        ours = drawn(backend, model, picture, strength=strength, scheduler="ddim", height=16, width=16)
        assert np.abs(ours - (theirs * 255).round()).max() <= 1


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["ddpm", "euler", "dpm++"])
def test_backends_agree(model, picture, scheduler):
    ours, theirs = (drawn(backend, model, picture, scheduler=scheduler) for backend in BACKENDS)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours[0] - ours[1]).max() > 1  # each has noise of its own


@pytest.mark.parametrize("objective", ["flow_matching", "edm"])
def test_models_of_other_objectives(tmp_path, picture, objective):
    """In pixel space, in grey: little noise leaves the picture nearly as it is."""
    run = train(
        "unconditional", **RUN, objective=objective, report_to="none", draw_samples=False, output_dir=str(tmp_path)
    )
    options = {"prompt": [], "num_inference_steps": 40}
    ours, theirs = (drawn(backend, run, picture, strength=0.3, **options) for backend in BACKENDS)
    assert np.abs(ours - theirs).max() <= 1
    with Image.open(picture) as image:
        grey = np.asarray(image.crop((16, 0, 48, 32)).resize((8, 8), Image.Resampling.BILINEAR).convert("L"), int)
    little, much = (
        np.abs(drawn(BACKENDS[1], run, picture, strength=share, **options)[..., 0] - grey).mean() for share in (0.03, 1)
    )
    assert little < 20 < much


def test_a_sampler_that_needs_the_steps_before_gives_way(model, picture, caplog):
    own = drawn(BACKENDS[1], model, picture)
    assert "PNDMScheduler cannot begin in the middle; the pictures are drawn with DDIMScheduler" in caplog.text
    assert (own == drawn(BACKENDS[1], model, picture, scheduler="ddim", strength=0.8)).all()


def test_a_picture_for_each_prompt(model, picture, tmp_path):
    other = tmp_path / "b.png"
    Image.new("RGB", (20, 20), (0, 200, 0)).save(other)
    prompts = ["a dog", "a cat"]
    both = [str(picture), str(other)]
    options = {"num_inference_steps": 4, "strength": 0.5, "scheduler": "ddim"}
    together = BACKENDS[1](model, prompt=prompts, init_image=both, num_images=2, batch_size=3, **options)
    alone = BACKENDS[1](model, prompt="a cat", init_image=both[1], num_images=4, **options)
    assert np.abs(together[2:].astype(int) - alone[2:]).max() <= 1


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"init_image": "{picture}", "strength": 0.1}, ConfigError, "--strength 0.1: takes none of 6 steps; raise one"),
        ({"init_image": "{picture}", "strength": 0.0}, ConfigError, "--strength: must be greater than 0"),
        ({"init_image": "{picture}", "strength": 1.5}, ConfigError, "--strength: must be at most 1|less than or equal"),
        ({"strength": 0.5}, ConfigError, "--strength goes with --init_image: add it"),
        ({"init_image": "none.png"}, DataError, "--init_image none.png: does not exist; give a picture"),
        ({"init_image": ["{picture}"] * 3}, ConfigError, "--init_image are 3, for 1 prompts: give one for each, or"),
        ({"init_image": "{picture}", "scheduler": "lms"}, ConfigError, "--scheduler lms: cannot begin with --init_im"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(model, picture, monkeypatch, backend, options, error, says):
    def filled(value):
        return [filled(one) for one in value] if isinstance(value, list) else str(picture) if "{" in value else value

    options = {name: filled(value) if name == "init_image" else value for name, value in options.items()}
    with pytest.raises(UserError, match=says) as caught:
        backend(model, prompt="a dog", num_inference_steps=6, **options)
    assert isinstance(caught.value, error)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_picture_is_found_before_the_weights_are_read(model, tmp_path, backend):
    shutil.copytree(model, tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(DataError, match=r"--init_image none\.png: does not exist"):
        backend(tmp_path / "model", prompt="a dog", init_image="none.png")


def test_the_number_of_steps():
    assert [first_step(50, share) for share in (1.0, 0.8, 0.5, 0.02)] == [0, 10, 25, 49]
