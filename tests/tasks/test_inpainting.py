"""Inpainting: masks, the widened UNet, a run that is resumed, and the export."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
from PIL import Image
from proofs import proof
from tiny import pictures, stable_diffusion

import flax_diffusion.generate
import torch_backend.generate
import torch_backend.train
from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.extra import draw_mask, images_to_fill
from flax_diffusion.core.errors import ConfigError, UserError
from flax_diffusion.core.randomness.streams import sampling_noise
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.text_to_image import TextToImageConfig
from flax_diffusion.jax_backend.backend import JaxBackend
from torch_backend.backend import TorchBackend

BACKENDS = {"jax": JaxBackend, "torch": TorchBackend}
GENERATE = (flax_diffusion.generate, torch_backend.generate)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"), length=40)


@pytest.fixture
def options(model, tmp_path):
    return {
        "pretrained_model_name_or_path": str(model), "train_data_dir": str(pictures(tmp_path / "data", 5)),
        "resolution": 16, "train_batch_size": 2, "learning_rate": 1e-2, "lr_warmup_steps": 0, "report_to": "none",
        "draw_samples": False,
        "max_train_steps": 4, "random_flip": True, "inpainting": True, "validation_epochs": None,
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def run(options, backend, folder, until=None, **more):
    def make(config, spec):
        made = BACKENDS[backend](config, spec)
        if until is not None:
            made.should_stop = lambda requested, step: step == until
        return made

    values = options | {"output_dir": str(folder), "checkpointing_steps": 4, "use_ema": True} | more
    fit(task_of(TextToImageConfig(**values)), make)
    return portable.read(folder / f"checkpoint-{until or 4}")


def test_masks_are_of_all_kinds():
    masks = np.stack([draw_mask((16, 16), np.random.default_rng(seed)) for seed in range(4000)])
    whole = masks.all(axis=(1, 2)).mean()
    assert 0.23 < whole < 0.28
    boxes = [mask[np.ix_(mask.any(axis=1), mask.any(axis=0))] for mask in masks if mask.any() and not mask.all()]
    assert 0.3 < np.mean([box.all() for box in boxes]) < 0.9  # rectangles, and small ellipses
    assert any(mask[0, 0] for mask in masks)
    assert any(mask[-1, -1] for mask in masks)


def test_masks_of_files_are_cut_like_the_pictures(options, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in (tmp_path / "data").glob("*.png"):
        with Image.open(path) as picture:
            light = np.zeros((picture.height, picture.width), np.uint8)
        light[:, : light.shape[1] // 2] = 255
        Image.fromarray(light).save(folder / path.name)
    task = task_of(TextToImageConfig(**options | {"mask_data_dir": str(folder)}))
    source = task.open_source()
    make = task.make_example_fn(task.make_spec(source))
    seen = set()
    for epoch in range(8):
        mask = make(source, 0, epoch, 0)["mask"]
        assert mask.shape == (1, 16, 16)
        np.testing.assert_array_equal(mask, np.broadcast_to(mask[:, :1], mask.shape))
        seen.add((mask[0, 0, 0], mask[0, 0, -1]))
    assert seen == {(1, 0), (0, 1)}


@pytest.mark.parametrize("backend", [proof("jax"), "torch"])
def test_the_unet_is_widened_by_zeros_resumes_bitwise_and_opens_in_diffusers(options, model, tmp_path, backend):
    config = TextToImageConfig(**options)
    task = task_of(config)
    made = BACKENDS[backend](config, task.make_spec(task.open_source()))
    made.init_state()
    first = made.trained_arrays()["unet/conv_in.weight"]
    assert first.shape[1] == 9
    assert not first[:, 4:].any()
    preview = {"validation_prompts": ["a dog", "a cat"], "validation_num_inference_steps": 1, "eval_batch_size": 2}
    preview |= {"draw_samples": True}
    whole = run(options, backend, tmp_path / "whole", **preview)
    assert (tmp_path / "whole/samples/00000004.png").is_file()
    run(options, backend, tmp_path / "part", 2)
    rest = run(options, backend, tmp_path / "part", resume_from_checkpoint="latest")
    for name, array in whole[0].items():
        np.testing.assert_array_equal(rest[0][name], array, err_msg=name)
    assert np.any(whole[0]["params/unet/conv_in.weight"][:, 4:] != 0)
    index = json.loads((tmp_path / "whole/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    theirs = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "whole")
    own = whole[0]["ema/unet/conv_in.weight"]
    np.testing.assert_array_equal(theirs.unet.conv_in.weight.detach().numpy(), own)
    theirs.set_progress_bar_config(disable=True)
    picture, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    drawn = theirs("a dog", image=picture, mask_image=mask, num_inference_steps=2, height=16, width=16).images[0]
    assert drawn.size == (16, 16)


def filled(folder, size=(20, 26)):
    """A picture and a mask of its right half, as files."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / "picture.png")
    mask = np.zeros(size[::-1], np.uint8)
    mask[:, size[0] // 2 :] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return {"image": str(folder / "picture.png"), "mask_image": str(folder / "mask.png")}


def test_pictures_are_filled_in_as_diffusers_does(options, tmp_path):
    """On both backends, two at a time, at a size that cuts the picture."""
    model, given = torch_backend.train.train("text_to_image", **options | {"max_train_steps": 1}), filled(tmp_path)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 24, "width": 16}
    prompts = ["a dog", "a cat"]
    drawn = [
        backend.generate(model, prompt=prompts, seed=3, scheduler="ddim", **settings, **given) for backend in GENERATE
    ]
    read = images_to_fill({name: [file] * 2 for name, file in given.items()}, (24, 16), (4, 12, 8), 3)
    pixels, mask, noise = (torch.from_numpy(read[name]) for name in ("pixel_values", "mask", "masked_latent_noise"))
    assert mask[0, 0, 0].tolist() == [0] * 8 + [1] * 8
    pipe = StableDiffusionInpaintPipeline.from_pretrained(model)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        rest = pipe.vae.encode(pixels * (mask < 0.5)).latent_dist
    rest = (rest.mean + rest.std * noise) * pipe.vae.config.scaling_factor
    latents = torch.from_numpy(sampling_noise(3, np.arange(2), 0, (4, 12, 8)))
    expected = pipe(
        prompts,
        image=(pixels + 1) / 2,
        mask_image=mask,
        masked_image_latents=rest,
        latents=latents,
        output_type="np",
        **settings,
    ).images
    for one in drawn:
        assert np.abs(one - np.round(expected * 255)).max() <= 1
    assert np.abs(drawn[0][:, :, :8].astype(int) - drawn[0][:, :, 8:]).max() > 1


def test_pictures_to_fill_in_are_checked(options, model, tmp_path):
    out, given = torch_backend.train.train("text_to_image", **options | {"max_train_steps": 1}), filled(tmp_path)
    Image.new("L", (20, 20)).save(tmp_path / "small.png")
    for changes, message in (
        ({"image": []}, "the model fills in pictures: give the picture to fill in by --image"),
        ({"mask_image": []}, "the model fills in pictures: give what to fill in by --mask_image"),
        ({"image": [given["image"]] * 3}, "--image are 3, for 2 prompts: give one for each, or one for all"),
        ({"mask_image": "no.png"}, "--mask_image no.png: does not exist; give a picture"),
        ({"mask_image": str(tmp_path / "small.png")}, r"small.png: is 20x20, and .*picture.png 20x26; give both in"),
    ):
        with pytest.raises(UserError, match=message):
            flax_diffusion.generate.generate(out, prompt=["a", "b"], **given | changes)
    with pytest.raises(ConfigError, match="--image: the model takes no such picture; drop it"):
        flax_diffusion.generate.generate(model, prompt="a", **given)
    earlier = tmp_path / "out/00000.png"
    earlier.parent.mkdir()
    Image.new("L", (8, 8)).save(earlier)
    words = ["--model", str(out), "--prompt", "a dog", "--image", given["image"], "--mask_image", "no.png"]
    for backend in GENERATE:
        with pytest.raises(UserError, match=r"no\.png: does not exist"):
            backend.main([*words, "--output_dir", str(earlier.parent), "--overwrite_output_dir"])
    assert earlier.exists()  # what cannot be read deletes nothing


def test_what_the_unet_is_told_is_what_diffusers_tells_it(options):
    """Mask, then the latents of the rest, in the order and at the sizes of its pipeline."""
    config = TextToImageConfig(**options)
    task = task_of(config)
    source = task.open_source()
    spec = task.make_spec(source)
    example = task.make_example_fn(spec)(source, 0, 0, 1)
    batch = {name: torch.from_numpy(np.asarray(value))[None] for name, value in example.items()}
    backend = TorchBackend(config, spec)
    backend.init_state()
    with torch.no_grad():
        told = backend.modules.condition(batch)["masked"]
        small = torch.nn.functional.interpolate(batch["mask"], size=(8, 8))
        rest = backend.modules.posterior(batch["pixel_values"] * (batch["mask"] < 0.5))
        latents = (rest.mean + rest.std * batch["masked_latent_noise"]) * spec.vae["scaling_factor"]
    torch.testing.assert_close(told, torch.cat([small, latents], dim=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_latents": True, "center_crop": True}, "--inpainting encodes each picture anew, .*: drop --cache"),
        ({"inpainting": False, "mask_column": "mask"}, "--mask_column goes with --inpainting: add it"),
        ({"mask_column": "a", "mask_data_dir": "b"}, "--mask_column and --mask_data_dir exclude each other"),
        ({"lora_rank": 2}, "--inpainting with --lora_rank: LoRA does not train the UNet's first layer"),
    ],
)
def test_mistakes_are_named(options, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(options | changes)


def make(options):
    task = task_of(command_line.merge("text_to_image", {}, options, "test"))
    return task.make_spec(task.open_source())


def test_an_inpainting_model_trains_with_the_flag_only(options, tmp_path):
    folder = stable_diffusion(tmp_path / "nine", length=40, unet={"in_channels": 9})
    nine = options | {"pretrained_model_name_or_path": str(folder)}
    assert make(nine).denoiser.overlay is None
    assert make(nine | {"lora_rank": 2}).trains_adapters
    with pytest.raises(ConfigError, match=r"in_channels 9 and out_channels 4: it fills in pictures; add --inpainting"):
        make(nine | {"inpainting": False})
    other = stable_diffusion(tmp_path / "five", length=40, unet={"in_channels": 5})
    with pytest.raises(ConfigError, match=r"--inpainting: the UNet has in_channels 5 .* must take 9, or 4 to be wid"):
        make(options | {"pretrained_model_name_or_path": str(other)})
